//! What the sampling of an epoch leaves, and its progress.

use anyhow::Result;

use super::observer::Event;
use super::run::Run;
use super::update::TrajectoryBatch;

/// What sampling leaves.
pub(super) struct Sampled {
    /// One for each part of the plan.
    pub batches: Vec<TrajectoryBatch>,
    /// Where the images end, several at a time in their order.
    pub latents: Vec<Vec<f32>>,
    /// Rows that the network has computed.
    pub calls: usize,
}

/// What is called after each step of each batch.
pub(super) type Tick<'a> = &'a (dyn Fn() -> Result<()> + Sync);

/// Runs a rollout of so many units, step by step of batch by batch.
pub(super) fn in_rollout<R>(
    run: &Run,
    units: usize,
    work: &dyn Fn(Tick) -> Result<R>,
) -> Result<R> {
    run.observer.on(Event::PhaseBegins { phase: "rollout", units, done: 0 });
    let done = work(&|| {
        run.observer.on(Event::PhaseAdvances);
        run.hear_stop()
    });
    run.observer.on(Event::PhaseEnds);
    done
}
