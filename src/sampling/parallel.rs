//! Batches over all devices: side by side where that is faster, with results in the order of the
//! batches.

use std::ops::Range;

use anyhow::Result;

use super::Replica;
use crate::device::in_order::{in_order, pool};
use crate::device::{Compute, guard, rows_at_a_time};

/// `total` rows in batches of at most `most`, on the CPU of a share for each core.
pub fn batches(compute: &Compute, total: usize, most: usize) -> Vec<Range<usize>> {
    let rows = rows_at_a_time(compute.threads(), total, most);
    (0..total).step_by(rows).map(|first| first..total.min(first + rows)).collect()
}

/// Runs `work` over all items, on a replica each; results in the order of the items.
///
/// # Errors
/// The first item's error.
pub fn map_batches<T: Sync, R: Send>(
    replicas: &[Replica],
    items: &[T],
    work: impl Fn(&Replica, &T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let mut results = Vec::with_capacity(items.len());
    fold_batches(replicas, items, work, |result| {
        results.push(result);
        Ok(())
    })?;
    Ok(results)
}

/// Runs `work` over all items, on a replica each, and hands each result to `fold` in the order of
/// the items, as soon as it is its turn: one after the other on a GPU, on a thread for each core on
/// the CPU, whose operations are too small for all cores.
///
/// # Errors
/// The first item's error; work that has not begun by then is left undone.
pub fn fold_batches<T: Sync, R: Send>(
    replicas: &[Replica],
    items: &[T],
    work: impl Fn(&Replica, &T) -> Result<R> + Sync,
    mut fold: impl FnMut(R) -> Result<()> + Send,
) -> Result<()> {
    let all = replicas.iter().flat_map(|r| std::iter::repeat_n(r, r.compute.threads()));
    let chosen: Vec<&Replica> = all.take(items.len().max(1)).collect();
    if let [replica] = chosen[..] {
        return items.iter().try_for_each(|item| fold(guard(|| work(replica, item))?));
    }
    let workers: Vec<Worker> =
        chosen.iter().map(|r| Worker::new(r, &chosen)).collect::<Result<_>>()?;
    let on = |worker: &Worker, item: &T| worker.pool.install(|| work(worker.replica, item));
    in_order(&workers, items, on, fold)
}

/// A thread's part of a device. The pool is its own, with a share of the cores: Burn's operations
/// stay in it instead of queueing for the pool that all threads share, and it is never handed a
/// second batch in the middle of a first.
struct Worker<'a> {
    replica: &'a Replica,
    pool: rayon::ThreadPool,
}

impl<'a> Worker<'a> {
    /// One of those that share a replica's cores.
    fn new(replica: &'a Replica, all: &[&Replica]) -> Result<Self> {
        let beside = all.iter().filter(|r| std::ptr::eq(**r, replica)).count();
        let cores = (replica.compute.threads() / beside).max(1);
        Ok(Self { replica, pool: pool(cores)? })
    }
}
