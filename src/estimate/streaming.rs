//! What streaming a network's blocks costs: how much is read in an epoch, and how fast this machine
//! reads it.

use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::shapes::{Shapes, block_of};
use crate::config::{Rollout, Settings};
use crate::device::Compute;
use crate::device::system::{available, memory_text};
use crate::model::ModelFiles;
use crate::model::loader::Loader;
use crate::ops::Guidance;
use crate::ops::policy_objective::GuidanceGradient;

/// What is read in an epoch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Streaming {
    /// Bytes of all blocks.
    pub bytes: f64,
    /// How often they are read, at most: batches that run at once share what they read together.
    pub reads: usize,
}

impl Streaming {
    /// Of a run with so many batches an epoch: each reads all blocks once at each of its steps, and
    /// twice at each that is trained, forward and backward; a pass more for the base that a KL is
    /// taken to, one for guidance without gradients, and two for the old policies of an objective
    /// of the forward process.
    pub fn of(shapes: &Shapes, s: &Settings, batches: usize) -> Self {
        let guided = !shapes.distilled && Guidance::new(shapes.guidance) != Guidance::Off;
        let apart = guided && s.guidance_gradient == GuidanceGradient::Conditional;
        let passes = 2
            + usize::from(s.kl_beta > 0.0)
            + usize::from(apart)
            + if s.objective.forward() { 2 } else { 0 };
        let trained = match &s.rollout {
            Rollout::Plain(_) => s.trained_steps(),
            // A batch of branches is of one step.
            Rollout::Branching(_) => 1,
        };
        let reads = batches * (s.steps + trained * passes * s.inner_epochs);
        Self { bytes: shapes.block_weights, reads }
    }

    /// In words, with the seconds that it takes at so many bytes a second.
    pub fn text(&self, rate: Option<f64>) -> String {
        let reads = format!(
            "on: {} of blocks are read {} times an epoch",
            memory_text(self.bytes as u64),
            self.reads
        );
        match rate {
            None => reads,
            Some(rate) => {
                let seconds = self.bytes * self.reads as f64 / rate;
                let second = memory_text(rate as u64);
                format!("{reads}, {seconds:.0} s of it at the {second}/s measured here")
            }
        }
    }
}

/// Bytes of blocks that this machine reads in a second, by reading the largest matrix of a block as
/// a run does: the second time, where what is read is kept, by the program or by the system.
///
/// # Errors
/// When it cannot be read.
pub fn read_rate(files: &ModelFiles, s: &Settings, compute: &Compute) -> Result<f64> {
    let weights = files.network()?.weights()?;
    let size = |name: &&str| weights.shape(name).map_or(0, |shape| shape.iter().product::<usize>());
    let matrix = |name: &&str| {
        block_of(name).is_some() && weights.shape(name).is_some_and(|shape| shape.len() == 2)
    };
    let name = weights.names().filter(matrix).max_by_key(size).context("the network has blocks")?;
    let &[outputs, inputs] = weights.shape(name).context("a listed tensor has a shape")? else {
        bail!("{}: tensor {name} is no matrix", weights.source().display())
    };
    let stream = files.stream(compute, s.storage)?;
    let mut loader = Loader::new(&weights, &compute.burn, s.storage);
    loader.prepared = stream.prepared();
    // A file that the system can keep in memory is read from the disk once.
    let file = weights.elements(|_| true) as u64 * size_of::<half::f16>() as u64;
    let again = if loader.prepared.is_some() || file < available() { 2 } else { 1 };
    let (mut seconds, mut bytes) = (0.0, 0);
    for _ in 0..again {
        let start = Instant::now();
        let read = loader.frozen(name, [outputs, inputs], s.storage, |row| row)?;
        compute.sync()?;
        seconds = start.elapsed().as_secs_f64();
        bytes = read.bytes();
    }
    Ok(bytes as f64 / seconds.max(1e-9))
}
