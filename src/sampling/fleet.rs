//! All devices of a job, in all its processes, and the batches that are dealt out to them: evenly
//! and always in the same way, so that an update reads a batch where it was sampled. Results come
//! in the order of the batches, whatever computed them.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};
use image::RgbImage;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Replica;
use super::world::World;
use crate::device::in_order::{in_order, pool};
use crate::device::{Compute, guard, rows_at_a_time, system};
use crate::stop;

/// Rows that go through a network together, and the device that they go to.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    pub rows: Range<usize>,
    /// Among all devices of the job.
    pub device: usize,
}

/// How a job's work is laid out: the same for any number of devices and processes, but for the
/// device that each batch goes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layout {
    /// Batches that the first device runs side by side. Of CPUs it is what the largest machine of
    /// the job has, however many processes share it.
    pub threads: usize,
    /// Of all processes.
    pub devices: usize,
    /// Whether all of them are of one kind, which have the same bits.
    pub alike: bool,
}

impl Layout {
    /// `total` rows in batches of at most `most`, on the CPU of a share for each core.
    pub fn batches(&self, total: usize, most: usize) -> Vec<Batch> {
        let rows = rows_at_a_time(self.threads, total, most);
        let ranges = (0..total).step_by(rows).map(|first| first..total.min(first + rows));
        ranges.enumerate().map(|(i, rows)| Batch { rows, device: i % self.devices }).collect()
    }
}

/// What a process tells of its devices.
#[derive(Serialize, Deserialize)]
struct Own {
    names: Vec<String>,
    /// Batches that its first device runs side by side.
    threads: usize,
    /// Whether these are a CPU's.
    cpu: bool,
    /// The cores that it may use, where the system tells.
    cores: Vec<usize>,
}

/// All devices of a job as they are before a model is on them.
pub struct Roll {
    pub world: World,
    pub layout: Layout,
    /// What all devices are called.
    pub names: Vec<String>,
    /// The number of this process's first device among all.
    first: usize,
}

impl Roll {
    /// This process's devices and those of the others.
    ///
    /// # Errors
    /// When another process cannot be reached.
    ///
    /// # Panics
    /// Without a device.
    pub fn call(world: World, computes: &[Compute]) -> Result<Self> {
        let own = Own {
            names: computes.iter().map(|c| c.name.clone()).collect(),
            threads: computes[0].threads(),
            cpu: computes[0].gpu.is_none(),
            cores: system::allowed_cores(),
        };
        let all = world.all(Ok(own))?;
        let kind = |name: &String| name.split(" (").next().unwrap_or_default().to_string();
        let several = world.size() > 1;
        let named = |(rank, own): (usize, &Own)| {
            let of = if several { format!(" [{}]", world.name(rank)) } else { String::new() };
            own.names.iter().map(|name| format!("{name}{of}")).collect::<Vec<_>>()
        };
        let kinds: Vec<String> = all.iter().flat_map(|own| own.names.iter().map(kind)).collect();
        Ok(Self {
            layout: Layout {
                threads: threads(&world, &all),
                devices: kinds.len(),
                alike: kinds.iter().all(|kind| *kind == kinds[0]),
            },
            names: all.iter().enumerate().flat_map(named).collect(),
            first: all[..world.rank()].iter().map(|own| own.names.len()).sum(),
            world,
        })
    }
}

/// All devices of a job.
pub struct Fleet {
    /// This process's, with a model on each.
    pub replicas: Vec<Replica>,
    pub world: World,
    pub layout: Layout,
    /// What all devices are called, in their order.
    pub names: Vec<String>,
    /// The number of this process's first device among all.
    first: usize,
    /// Batches that each of this process's devices has done.
    done: Vec<AtomicUsize>,
}

impl Fleet {
    /// The devices of a roll, this process's with a model on each.
    pub fn new(roll: Roll, replicas: Vec<Replica>) -> Self {
        let Roll { world, layout, names, first } = roll;
        let done = replicas.iter().map(|_| AtomicUsize::new(0)).collect();
        Self { replicas, world, layout, names, first, done }
    }

    /// One device.
    ///
    /// # Errors
    /// None with a process alone.
    pub fn of_one(replica: Replica) -> Result<Self> {
        let roll = Roll::call(World::default(), std::slice::from_ref(&replica.compute))?;
        Ok(Self::new(roll, vec![replica]))
    }

    /// The replica that does what is done once.
    pub fn first(&self) -> &Replica {
        &self.replicas[0]
    }

    /// The place of a device among this process's, where it is one of them.
    pub fn local(&self, device: usize) -> Option<usize> {
        device.checked_sub(self.first).filter(|i| *i < self.replicas.len())
    }

    /// Runs `work` over the items of this process's devices, on the replica of each; results with
    /// the items' numbers, in their order.
    ///
    /// # Errors
    /// The first item's error.
    pub fn map<T: Sync, R: Send>(
        &self,
        items: &[T],
        device: impl Fn(&T) -> usize,
        work: impl Fn(&Replica, &T) -> Result<R> + Sync,
    ) -> Result<Vec<(usize, R)>> {
        let mut results = Vec::with_capacity(items.len());
        self.fold(items, device, work, |i, result| {
            results.push((i, result));
            Ok(())
        })?;
        Ok(results)
    }

    /// Runs `work` over the items of this process's devices, on the replica of each, and hands each
    /// result to `fold` with the item's number, in the order of the items, as soon as it is its
    /// turn: a thread for each GPU, and one for each core of a CPU, whose operations are too small
    /// for all cores.
    ///
    /// # Errors
    /// The first item's error; work that has not begun by then is left undone.
    pub fn fold<T: Sync, R: Send>(
        &self,
        items: &[T],
        device: impl Fn(&T) -> usize,
        work: impl Fn(&Replica, &T) -> Result<R> + Sync,
        mut fold: impl FnMut(usize, R) -> Result<()> + Send,
    ) -> Result<()> {
        let local = |(i, item)| Some(Dealt { i, item, replica: self.local(device(item))? });
        let own: Vec<Dealt<T>> = items.iter().enumerate().filter_map(local).collect();
        let several = self.names.len() > 1;
        let done = |dealt: &Dealt<T>| {
            let done = guard(|| work(&self.replicas[dealt.replica], dealt.item));
            self.done[dealt.replica].fetch_add(1, Ordering::Relaxed);
            let name = &self.names[self.first + dealt.replica];
            // A wish to stop is no fault of a device's.
            let fault = several && !stop::requested();
            let done = if fault { done.with_context(|| format!("device {name}")) } else { done };
            Ok((dealt.i, done?))
        };
        let threads = self.threads(&own);
        if threads.len() <= 1 {
            // A device alone computes here, on all cores.
            return own.iter().try_for_each(|dealt| {
                let (i, result) = done(dealt)?;
                fold(i, result)
            });
        }
        let worker =
            |of: &Thread| anyhow::Ok(Worker { replica: of.replica, pool: pool(of.cores)? });
        let workers: Vec<Worker> = threads.iter().map(worker).collect::<Result<_>>()?;
        let may = |worker: &Worker, dealt: &Dealt<T>| worker.replica == dealt.replica;
        let on = |worker: &Worker, dealt: &Dealt<T>| worker.pool.install(|| done(dealt));
        in_order(&workers, &own, may, on, |(i, result)| fold(i, result))
    }

    /// Threads for the items that are dealt out here: one for each GPU, and one for each core of a
    /// CPU, which several CPUs of a test share.
    fn threads<T>(&self, own: &[Dealt<T>]) -> Vec<Thread> {
        let cpus = self.replicas.iter().filter(|r| r.compute.gpu.is_none()).count().max(1);
        let of_device = |(replica, of): (usize, &Replica)| {
            let items = own.iter().filter(|dealt| dealt.replica == replica).count();
            let all = of.compute.threads().div_ceil(cpus);
            let threads = all.min(items);
            let thread = Thread { replica, cores: (all / threads.max(1)).max(1) };
            std::iter::repeat_n(thread, threads)
        };
        self.replicas.iter().enumerate().flat_map(of_device).collect()
    }

    /// All results of items in their order, from those that each process has.
    ///
    /// # Errors
    /// The first error of any process.
    pub fn share<R: Serialize + DeserializeOwned>(
        &self,
        own: Result<Vec<(usize, R)>>,
    ) -> Result<Vec<R>> {
        if self.world.size() == 1 {
            return Ok(own?.into_iter().map(|(_, result)| result).collect());
        }
        Ok(in_their_order(self.world.all(own)?))
    }

    /// Bytes that the pool of a GPU holds, the largest of this process's; `None` without one. What
    /// nothing holds goes back to the driver, for a phase's tensors have other sizes than the
    /// next's: a pool keeps pages of both.
    pub fn empty_pools(&self) -> Option<u64> {
        self.replicas.iter().filter_map(|replica| replica.compute.empty_pool()).max()
    }

    /// The share of this process of things that need no device: of its rank's.
    pub fn part_of(&self, total: usize) -> Range<usize> {
        let (rank, size) = (self.world.rank(), self.world.size());
        total * rank / size..total * (rank + 1) / size
    }

    /// Batches that each device of the job has done since this was asked last.
    ///
    /// # Errors
    /// When another process cannot be reached.
    pub fn take_counts(&self) -> Result<Vec<usize>> {
        let own: Vec<usize> = self.done.iter().map(|n| n.swap(0, Ordering::Relaxed)).collect();
        Ok(self.world.all(Ok(own))?.concat())
    }
}

/// A picture as processes exchange it.
#[derive(Serialize, Deserialize)]
pub struct Picture {
    width: u32,
    height: u32,
    rgb: Vec<u8>,
}

impl Picture {
    pub fn list(images: Vec<RgbImage>) -> Vec<Self> {
        images.into_iter().map(Self::from).collect()
    }
}

impl From<RgbImage> for Picture {
    fn from(image: RgbImage) -> Self {
        Self { width: image.width(), height: image.height(), rgb: image.into_raw() }
    }
}

impl From<Picture> for RgbImage {
    fn from(picture: Picture) -> Self {
        Self::from_raw(picture.width, picture.height, picture.rgb)
            .expect("a picture has a colour for each of its pixels")
    }
}

/// What processes have of numbered things, in the order of the numbers.
pub fn in_their_order<R>(of_all: Vec<Vec<(usize, R)>>) -> Vec<R> {
    let mut all: Vec<(usize, R)> = of_all.into_iter().flatten().collect();
    all.sort_by_key(|(i, _)| *i);
    all.into_iter().map(|(_, result)| result).collect()
}

/// Batches that run side by side on the job's first device.
fn threads(world: &World, all: &[Own]) -> usize {
    if !all[0].cpu {
        return all[0].threads;
    }
    let of_host = |host: &str| {
        let here: Vec<&Own> =
            (0..all.len()).filter(|r| world.host(*r) == host).map(|r| &all[r]).collect();
        let mut cores: Vec<usize> = here.iter().flat_map(|own| own.cores.clone()).collect();
        cores.sort_unstable();
        cores.dedup();
        let most = here.iter().map(|own| own.threads).max().unwrap_or(1);
        // Processes that are bound to cores have them together; a quota is everybody's.
        let bound = here.iter().all(|own| own.cores.len() == own.threads);
        if bound { cores.len().max(most) } else { most }
    };
    (0..all.len()).map(|rank| of_host(world.host(rank))).max().unwrap_or(1)
}

/// An item that is one of this process's devices'.
struct Dealt<'a, T> {
    i: usize,
    item: &'a T,
    replica: usize,
}

/// A thread to be made for a device, and its share of the cores.
#[derive(Clone, Copy)]
struct Thread {
    replica: usize,
    cores: usize,
}

/// A thread's part of a device. The pool is its own, with a share of the cores: Burn's operations
/// stay in it instead of queueing for the pool that all threads share, and it is never handed a
/// second batch in the middle of a first.
struct Worker {
    replica: usize,
    pool: rayon::ThreadPool,
}
