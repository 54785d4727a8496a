//! What the sampling of an epoch leaves, and its progress.

use anyhow::Result;

use super::observer::Event;
use super::run::Run;
use super::update::TrajectoryBatch;
use crate::sampling::fleet::Batch;

/// What sampling leaves.
pub(super) struct Sampled {
    /// One for each part of the plan, in the process whose device it is with its transitions.
    pub batches: Vec<TrajectoryBatch>,
    /// Where the images of this process's devices end, in their order.
    pub latents: Vec<Ends>,
    /// Rows that the network of this process's devices has computed.
    pub calls: usize,
}

/// Where a few images end.
pub(super) struct Ends {
    pub images: Batch,
    /// `[B, C, H, W]`
    pub latents: Vec<f32>,
}

/// What is called after each step of each batch.
pub(super) type Tick<'a> = &'a (dyn Fn() -> Result<()> + Sync);

/// Runs a rollout of so many units, step by step of batch by batch.
pub(super) fn in_rollout<R>(
    run: &Run,
    units: usize,
    work: &dyn Fn(Tick) -> Result<R>,
) -> Result<R> {
    // Of several processes each sees its own share go on.
    let units = units.div_ceil(run.fleet.world.size());
    run.observer.on(Event::PhaseBegins { phase: "rollout", units, done: 0 });
    let done = work(&|| {
        run.observer.on(Event::PhaseAdvances);
        run.hear_stop()
    });
    run.observer.on(Event::PhaseEnds);
    run.fleet.world.agree(done)
}
