//! A job in several processes has the bits of one. Threads stand for the processes here; with the
//! feature `mpi` the last test starts real ones.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};

use anyhow::{Result, bail};
use pcpo_wgpu::sampling::world::{Link, World};
use pcpo_wgpu::{Event, Job, Observer, Options, Prompt, Reward, RgbImage, Silent, train};

use super::{metrics, of};
use crate::support::emoji;

/// Threads of this process that exchange like processes.
struct Threads {
    rank: usize,
    size: usize,
    shared: Arc<(Mutex<Vec<Vec<u8>>>, Barrier)>,
}

impl Link for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn gather(&self, own: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        let (slots, barrier) = &*self.shared;
        slots.lock().unwrap()[self.rank] = own;
        barrier.wait();
        let all = if self.rank == 0 { slots.lock().unwrap().clone() } else { Vec::new() };
        barrier.wait();
        Ok(all)
    }

    fn cast(&self, of_first: Vec<u8>) -> Result<Vec<u8>> {
        Ok(self.gather_all(of_first))
    }
}

impl Threads {
    fn gather_all(&self, of_first: Vec<u8>) -> Vec<u8> {
        let (slots, barrier) = &*self.shared;
        if self.rank == 0 {
            slots.lock().unwrap()[0] = of_first;
        }
        barrier.wait();
        let first = slots.lock().unwrap()[0].clone();
        barrier.wait();
        first
    }
}

/// Runs a job in so many ranks; what each says.
fn in_ranks<R: Send>(size: usize, work: impl Fn(World) -> R + Sync) -> Vec<R> {
    let shared = Arc::new((Mutex::new(vec![Vec::new(); size]), Barrier::new(size)));
    std::thread::scope(|scope| {
        let start = |rank: usize| {
            let link = Threads { rank, size, shared: shared.clone() };
            let work = &work;
            scope.spawn(move || work(World::linked(link, format!("host{}", rank % 2)).unwrap()))
        };
        let all: Vec<_> = (0..size).map(start).collect();
        all.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn options() -> Options {
    Options {
        model: Some(emoji()),
        device: Some("cpu".into()),
        reward: Some(vec!["color:blue".into(), "symmetry".into()]),
        prompt: Some(["red apple", "cat face", "green tree"].map(String::from).to_vec()),
        epochs: Some(2),
        images_per_epoch: Some(18),
        group_size: Some(6),
        updates_per_epoch: Some(3),
        batch: Some(1),
        steps: Some(4),
        train_steps: Some(2),
        eval_images: Some(1),
        rank: Some(2),
        ..Default::default()
    }
}

/// What a run leaves of numbers: without times and memory, and without what each device did.
fn numbers(out: &Path) -> Vec<serde_json::Value> {
    let mut lines = metrics(out);
    for line in lines.iter_mut().filter_map(serde_json::Value::as_object_mut) {
        let of_time = |key: &String| {
            key.contains("second") || key.contains("peak") || key == "device_batches"
        };
        line.retain(|key, _| !of_time(key));
    }
    lines
}

/// Adapter, optimizer and state of the newest checkpoint.
fn checkpoint(out: &Path, epoch: usize) -> Vec<Vec<u8>> {
    let dir = out.join(format!("checkpoints/epoch-{epoch:05}"));
    let files = ["adapter.safetensors", "optimizer.safetensors", "state.json"];
    files.map(|name| std::fs::read(dir.join(name)).unwrap()).to_vec()
}

#[test]
fn ranks_have_the_bits_of_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let with = |name: &str, options: Options| {
        let settings = options.resolve().unwrap();
        let out = |size: usize| dir.path().join(format!("{name}-{size}"));
        for size in [1, 2, 4] {
            let job = || Job::new(settings.clone(), out(size));
            let done = in_ranks(size, |world| train(job().with_world(world), &Silent).unwrap());
            assert!(done.iter().all(|d| *d == done[0]), "all ranks say the same");
        }
        for size in [2, 4] {
            assert_eq!(numbers(&out(1)), numbers(&out(size)), "{name} in {size} ranks");
            assert!(checkpoint(&out(1), 2) == checkpoint(&out(size), 2), "{name} in {size} ranks");
            let lines = metrics(&out(size));
            let counts = of(&lines, "epoch").map(|e| e["device_batches"].clone());
            let counts: Vec<usize> =
                counts.flat_map(|c| serde_json::from_value::<Vec<usize>>(c).unwrap()).collect();
            assert_eq!(counts.len(), 2 * size);
            assert!(
                counts.iter().all(|n| *n > 0),
                "{name}: each of {size} ranks works: {counts:?}"
            );
        }
        assert!(
            std::fs::read(out(1).join("before_after.png")).unwrap()
                == std::fs::read(out(4).join("before_after.png")).unwrap()
        );
    };
    with("plain", options());
    let branch = Options {
        images_per_epoch: None,
        group_size: None,
        train_steps: None,
        updates_per_epoch: Some(1),
        branch: Some(vec![3, 2]),
        kl_beta: Some(0.1),
        anchor_steps: Some(1),
        ..options()
    };
    with("branch", branch);
    let nft = Options {
        preset: Some(pcpo_wgpu::config::Preset::Nft),
        train_steps: Some(2),
        epochs: Some(2),
        ..options()
    };
    with("nft", nft);
}

/// Fails in one process when it is asked for the n-th time.
struct Failing {
    at: usize,
    asked: usize,
}

impl Reward for Failing {
    fn score(&mut self, images: &[RgbImage], _: &[&Prompt]) -> Result<Vec<f64>> {
        self.asked += 1;
        if self.asked == self.at {
            bail!("the program died");
        }
        let mean = |i: &RgbImage| i.iter().map(|&v| f64::from(v)).sum::<f64>() / i.len() as f64;
        Ok(images.iter().map(mean).collect())
    }
}

/// What one process fails in ends all of them with its words, once the epoch is saved; any number
/// of processes goes on from there.
#[test]
fn an_error_of_one_rank_is_every_one_s() {
    let dir = tempfile::tempdir().unwrap();
    let settings = Options { reward: Some(vec!["color:blue".into()]), ..options() };
    let settings = settings.resolve().unwrap();
    let never = || Failing { at: usize::MAX, asked: 0 };
    let whole = dir.path().join("whole");
    train(Job::new(settings.clone(), &whole).with_reward("own", never()), &Silent).unwrap();
    for on in [1, 3] {
        let broken = dir.path().join(format!("broken-{on}"));
        // Asked for the evaluation before, the two rollouts, and the evaluation of the first epoch,
        // which is where it dies: with three updates done.
        let errors = in_ranks(2, |world| {
            let reward = if world.rank() == 1 { Failing { at: 3, asked: 0 } } else { never() };
            let job = Job::new(settings.clone(), &broken).with_reward("own", reward);
            format!("{:#}", train(job.with_world(world), &Silent).unwrap_err())
        });
        assert!(errors.iter().all(|e| *e == errors[0]), "{errors:?}");
        for words in ["rank 1 on host1: ", "the program died", "--resume", "3 updates of epoch 1"] {
            assert!(errors[0].contains(words), "{}", errors[0]);
        }
        in_ranks(on, |world| {
            let job = Job::resume(&Options::default(), &broken).unwrap();
            train(job.with_reward("own", never()).with_world(world), &Silent).unwrap();
        });
        assert!(checkpoint(&whole, 2) == checkpoint(&broken, 2), "resumed in {on}");
    }
}

/// Panics in the middle of an update: in the n-th unit of them.
struct Bomb {
    at: usize,
    updating: AtomicBool,
    advanced: AtomicUsize,
}

impl Bomb {
    fn new(at: usize) -> Self {
        Self { at, updating: AtomicBool::new(false), advanced: AtomicUsize::new(0) }
    }
}

impl Observer for Bomb {
    fn on(&self, event: Event) {
        match event {
            Event::PhaseBegins { phase, .. } => {
                self.updating.store(phase == "update", Ordering::SeqCst);
            }
            Event::PhaseAdvances if self.updating.load(Ordering::SeqCst) => {
                assert!(self.advanced.fetch_add(1, Ordering::SeqCst) != self.at, "lost");
            }
            _ => {}
        }
    }
}

/// What ends one rank between two updates leaves an epoch that any number of ranks takes up: what
/// each of them had sampled is in it.
#[test]
fn a_rank_that_fails_in_an_update_leaves_the_epoch_to_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let branch = Options {
        images_per_epoch: None,
        group_size: None,
        train_steps: None,
        branch: Some(vec![3, 2]),
        ..options()
    };
    let nft = Options { preset: Some(pcpo_wgpu::config::Preset::Nft), ..options() };
    // Units that the second rank has in the first of three updates, or some more.
    let cases =
        [("plain", options(), 8, &[1, 3][..]), ("branch", branch, 1, &[3]), ("nft", nft, 13, &[1])];
    for (name, options, units, resumed_in) in cases {
        let settings = options.resolve().unwrap();
        let whole = dir.path().join(name);
        train(Job::new(settings.clone(), &whole), &Silent).unwrap();
        for &on in resumed_in {
            let broken = dir.path().join(format!("{name}-{on}"));
            let errors = in_ranks(2, |world| {
                let job = Job::new(settings.clone(), &broken);
                let bomb = Bomb::new(if world.rank() == 1 { units } else { usize::MAX });
                format!("{:#}", train(job.with_world(world), &bomb).unwrap_err())
            });
            assert!(errors[0].contains("1 updates of epoch 1 are kept"), "{name}: {}", errors[0]);
            in_ranks(on, |world| {
                let job = Job::resume(&Options::default(), &broken).unwrap();
                train(job.with_world(world), &Silent).unwrap();
            });
            assert!(checkpoint(&whole, 2) == checkpoint(&broken, 2), "{name}, resumed in {on}");
        }
    }
}

/// Each process checks what the others were told.
#[test]
fn ranks_that_differ_do_not_start() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let errors = in_ranks(3, |world| {
        let seed = if world.rank() == 2 { 8 } else { 7 };
        let settings = Options { seed: Some(seed), ..options() }.resolve().unwrap();
        format!("{:#}", train(Job::new(settings, &out).with_world(world), &Silent).unwrap_err())
    });
    for error in errors {
        assert!(
            error.contains("a setting of rank 2 on host0 is seed = 8, of rank 0 seed = 7"),
            "{error}"
        );
    }
    assert!(!out.exists(), "nothing is left");
}
