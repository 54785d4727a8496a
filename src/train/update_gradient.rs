//! What batches leave, added up to an update: the adapter's gradient, and of each trained step how
//! its log-ratios spread and how large its own gradient is.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::backward::{EndedStep, GradientAccumulator, StepSums, joined};
use super::update_record::TrainedStep;
use crate::device::Compute;
use crate::device::tensor::{read_all, upload};
use crate::lora::Adapter;
use crate::ops::Coefficients;
use crate::ops::credit_reduce::credit_reduce;
use crate::ops::policy_objective::{STATS, SampleStats};
use crate::schedule::Step;

/// What a batch adds to an update.
#[derive(Serialize, Deserialize)]
pub struct BatchGradient {
    /// Gradients of A and B of each layer, in the order of [`Adapter::parameters`].
    pub gradients: Vec<Vec<f32>>,
    /// Of each of the batch's steps.
    pub steps: Vec<BatchStep>,
    /// Rows that the policy's network has computed; guidance's are not counted twice.
    pub calls: usize,
}

/// What a batch leaves of a step beside its gradient.
#[derive(Serialize, Deserialize)]
pub struct BatchStep {
    /// Its place in the epoch's trained ones.
    pub at: usize,
    /// Of each of the batch's rows.
    pub rows: Vec<SampleStats>,
    /// Norm of what it adds to the adapter's gradient.
    pub grad_norm: f64,
}

/// Gradients and statistics on the host, by one visit to the device.
pub(super) fn read_gradient(
    sums: GradientAccumulator,
    adapter: &Adapter,
    calls: usize,
) -> Result<BatchGradient> {
    let StepSums { gradient, steps } = sums.finish();
    let places: Vec<usize> = steps.iter().map(|step| step.at).collect();
    let of_step = |s: EndedStep| [s.squares, s.stats.flatten(0, 1)];
    let tensors = gradient.into_iter().chain(steps.into_iter().flat_map(of_step)).collect();
    let mut values = read_all(tensors)?.into_iter();
    let mut lengths = adapter.parameters().map(Vec::len);
    let mut gradients = Vec::new();
    for part in joined(adapter) {
        let mut sum = values.next().unwrap_or_default().into_iter();
        for n in lengths.by_ref().take(part.len()) {
            let mut own: Vec<f32> = sum.by_ref().take(n).collect();
            // Of a batch without a step nothing has arrived.
            own.resize(n, 0.0);
            gradients.push(own);
        }
    }
    let values: Vec<Vec<f32>> = values.collect();
    let step = |(at, read): (usize, &[Vec<f32>])| {
        let [squares, stats] = read else { unreachable!("two tensors were read of each step") };
        let grad_norm = squares.iter().map(|s| f64::from(*s)).sum::<f64>().sqrt();
        BatchStep { at, rows: bytemuck::cast_slice(stats).to_vec(), grad_norm }
    };
    let steps = places.into_iter().zip(values.chunks_exact(2)).map(step).collect();
    Ok(BatchGradient { gradients, steps, calls })
}

/// An update's gradient and statistics, batch by batch in their order.
#[derive(Default)]
pub struct UpdateGradient {
    /// Sums over batches, as [`BatchGradient::gradients`].
    pub gradients: Vec<Vec<f32>>,
    /// Of each batch and step in their order.
    pub steps: Vec<BatchStep>,
    /// Rows that the policy's network has computed.
    pub calls: usize,
}

impl UpdateGradient {
    /// Adds a batch: its gradient is not held any longer.
    pub fn add(&mut self, batch: BatchGradient) {
        if self.gradients.is_empty() {
            self.gradients = batch.gradients;
        } else {
            for (sum, own) in self.gradients.iter_mut().zip(&batch.gradients) {
                sum.iter_mut().zip(own).for_each(|(s, g)| *s += g);
            }
        }
        self.steps.extend(batch.steps);
        self.calls += batch.calls;
    }

    /// The statistics of all rows of one of the trained steps.
    pub fn stats_of(&self, at: usize) -> Vec<SampleStats> {
        all_stats(self.steps.iter().filter(|step| step.at == at))
    }

    /// Of one of the trained steps, the sum over batches of what it adds by its norm: the norm of
    /// the step's gradient where the update is one batch, and a bound of it where there are more.
    fn grad_norm_of(&self, at: usize) -> f64 {
        self.steps.iter().filter(|step| step.at == at).map(|step| step.grad_norm).sum()
    }
}

/// Statistics of several steps as one list.
pub fn all_stats<'a>(steps: impl IntoIterator<Item = &'a BatchStep>) -> Vec<SampleStats> {
    steps.into_iter().flat_map(|step| step.rows.iter().copied()).collect()
}

/// Each of the trained steps over the rows of an update; a time that no image of it was noised to
/// is not among them.
///
/// # Errors
/// When the device fails.
pub fn credit_table(
    compute: &Compute,
    trained: &[Step],
    sum: &UpdateGradient,
) -> Result<Vec<TrainedStep>> {
    let steps = (0..trained.len()).map(|at| (at, sum.stats_of(at)));
    let steps: Vec<(usize, Vec<SampleStats>)> = steps.filter(|(_, s)| !s.is_empty()).collect();
    let mut table = Vec::with_capacity(steps.len());
    // Steps with as many rows as each other are one visit to the device.
    for alike in steps.chunk_by(|(_, a), (_, b)| a.len() == b.len()) {
        let weight = |(at, _): &(usize, _)| Coefficients::from(&trained[*at]).w;
        let weights: Vec<f32> = alike.iter().map(weight).collect();
        let stats: Vec<SampleStats> = alike.iter().flat_map(|(_, s)| s.iter().copied()).collect();
        let shape = [alike.len(), alike[0].1.len(), STATS];
        let stats = upload(bytemuck::cast_slice(&stats), shape, &compute.burn);
        let reduced = credit_reduce(compute, &stats, &weights)?;
        table.extend(alike.iter().zip(reduced).map(|(&(at, _), stats)| TrainedStep {
            step: trained[at],
            stats,
            grad_norm: sum.grad_norm_of(at),
        }));
    }
    Ok(table)
}
