//! Work dealt out to threads, with results in the order of the items.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex};

use anyhow::{Result, anyhow};

use super::compute::Compute;
use super::guard::guard;

/// A pool of threads for one worker's operations.
///
/// # Errors
/// When the system gives no more threads.
pub fn pool(cores: usize) -> Result<rayon::ThreadPool> {
    rayon::ThreadPoolBuilder::new().num_threads(cores).build().map_err(|e| {
        anyhow!("the system gives no thread for a batch: {e}; use a smaller --batch or fewer cores")
    })
}

/// Runs `work` over all items: one after the other on a GPU, on a thread for each core on the CPU.
///
/// # Errors
/// The first item's error.
pub fn map<T: Sync, R: Send>(
    compute: &Compute,
    items: &[T],
    work: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let threads = compute.threads().min(items.len());
    if threads <= 1 {
        return items.iter().map(|item| guard(|| work(item))).collect();
    }
    let cores = (compute.threads() / threads).max(1);
    let workers: Vec<rayon::ThreadPool> =
        (0..threads).map(|_| pool(cores)).collect::<Result<_>>()?;
    let mut results = Vec::with_capacity(items.len());
    let on = |pool: &rayon::ThreadPool, item: &T| pool.install(|| work(item));
    in_order(
        &workers,
        items,
        |_, _| true,
        on,
        |result| {
            results.push(result);
            Ok(())
        },
    )?;
    Ok(results)
}

/// What the workers share.
struct Queue<R, F> {
    /// Which items have begun, and the next to fold.
    begun: Vec<bool>,
    folded: usize,
    /// Results that wait for an earlier one.
    waiting: BTreeMap<usize, R>,
    fold: F,
    error: Option<(usize, anyhow::Error)>,
}

/// What a worker does next.
enum Next {
    Item(usize),
    /// There is no room for its next item's result.
    Wait,
    End,
}

impl<R, F: FnMut(R) -> Result<()>> Queue<R, F> {
    /// The first item that has not begun of those that a worker may take.
    fn next(&mut self, most: usize, may: impl Fn(usize) -> bool) -> Next {
        let mut left = (self.folded..self.begun.len()).filter(|i| !self.begun[*i] && may(*i));
        match left.next().filter(|_| self.error.is_none()) {
            None => Next::End,
            Some(i) if i < self.folded + most => {
                self.begun[i] = true;
                Next::Item(i)
            }
            Some(_) => Next::Wait,
        }
    }

    fn fail(&mut self, item: usize, error: anyhow::Error) {
        if self.error.as_ref().is_none_or(|(first, _)| item < *first) {
            self.error = Some((item, error));
        }
    }

    /// Takes a result, and folds all whose turn it is.
    fn finish(&mut self, item: usize, result: Result<R>) {
        match result {
            Ok(result) => drop(self.waiting.insert(item, result)),
            Err(error) => return self.fail(item, error),
        }
        while let Some(result) = self.waiting.remove(&self.folded) {
            if let Err(error) = (self.fold)(result) {
                return self.fail(self.folded, error);
            }
            self.folded += 1;
        }
    }
}

/// Runs all items, each on one of the workers that may take it, a thread for each worker; folds the
/// results in the items' order. A worker that is far ahead waits: no more than two results a worker
/// are held. What no worker may take is left undone, and all behind it.
///
/// # Errors
/// The first item's error; work that has not begun by then is left undone.
pub fn in_order<W: Sync, T: Sync, R: Send>(
    workers: &[W],
    items: &[T],
    may: impl Fn(&W, &T) -> bool + Sync,
    work: impl Fn(&W, &T) -> Result<R> + Sync,
    fold: impl FnMut(R) -> Result<()> + Send,
) -> Result<()> {
    let most = 2 * workers.len();
    let begun = vec![false; items.len()];
    let queue = Queue { begun, folded: 0, waiting: BTreeMap::new(), fold, error: None };
    let (queue, turn) = (Mutex::new(queue), Condvar::new());
    // The next item, once there is room for its result.
    let next = |worker: &W| {
        let mut q = queue.lock().expect("no holder panics");
        loop {
            match q.next(most, |i| may(worker, &items[i])) {
                Next::Item(i) => return Some(i),
                Next::End => return None,
                Next::Wait => q = turn.wait(q).expect("no holder panics"),
            }
        }
    };
    std::thread::scope(|scope| {
        for worker in workers {
            let (work, next, queue, turn) = (&work, &next, &queue, &turn);
            scope.spawn(move || {
                while let Some(i) = next(worker) {
                    let result = guard(|| work(worker, &items[i]));
                    queue.lock().expect("no holder panics").finish(i, result);
                    turn.notify_all();
                }
            });
        }
    });
    let queue = queue.into_inner().expect("all threads have ended");
    queue.error.map_or(Ok(()), |(_, error)| Err(error))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use anyhow::bail;

    use super::*;

    /// A result that counts how many of it there are.
    struct Counted<'a>(&'a AtomicUsize, usize);

    impl Drop for Counted<'_> {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn results_are_folded_in_order_and_few_are_held() {
        let (alive, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let work = |_: &(), i: &usize| {
            // The first of each ten is slow: the others run ahead of it.
            std::thread::sleep(Duration::from_millis(if i.is_multiple_of(10) { 20 } else { 1 }));
            most.fetch_max(1 + alive.fetch_add(1, Ordering::SeqCst), Ordering::SeqCst);
            Ok(Counted(&alive, *i))
        };
        let items: Vec<usize> = (0..60).collect();
        let mut folded = Vec::new();
        in_order(
            &[(); 3],
            &items,
            |_, _| true,
            work,
            |result| {
                folded.push(result.1);
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(folded, items);
        let most = most.load(Ordering::SeqCst);
        assert!(most <= 6, "{most} results were held, three threads may hold six");
    }

    /// Each worker has its own items: a slow one holds nobody up but by the order of the results.
    #[test]
    fn a_worker_takes_what_it_may() {
        let items: Vec<usize> = (0..40).collect();
        let may = |worker: &usize, i: &usize| i % 2 == *worker;
        let work = |worker: &usize, i: &usize| {
            std::thread::sleep(Duration::from_millis(3 * *worker as u64));
            Ok((*worker, *i))
        };
        let mut folded = Vec::new();
        in_order(&[0, 1], &items, may, work, |result| {
            folded.push(result);
            Ok(())
        })
        .unwrap();
        assert_eq!(folded, items.iter().map(|i| (i % 2, *i)).collect::<Vec<_>>());
    }

    #[test]
    fn the_first_error_ends_the_work() {
        let begun = AtomicUsize::new(0);
        let work = |_: &(), i: &usize| {
            begun.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(1));
            if *i == 4 {
                bail!("item {i}");
            }
            if *i == 5 {
                panic!("a panic of item {i}");
            }
            Ok(*i)
        };
        let items: Vec<usize> = (0..1000).collect();
        let mut folded = Vec::new();
        let error = in_order(
            &[(); 2],
            &items,
            |_, _| true,
            work,
            |i| {
                folded.push(i);
                Ok(())
            },
        );
        let error = error.unwrap_err().to_string();
        assert!(error.contains("item 4") || error.contains("item 5"), "{error}");
        assert!(begun.load(Ordering::SeqCst) < 20 && folded == items[..folded.len()]);
        let folded = in_order(&[(); 2], &items[..4], |_, _| true, work, |_| bail!("the fold"));
        assert_eq!(folded.unwrap_err().to_string(), "the fold");
    }
}
