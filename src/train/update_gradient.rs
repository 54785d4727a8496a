//! What batches leave, added up to an update: the adapter's gradient, and of each trained step how
//! its log-ratios spread and how large its own gradient is.

use anyhow::Result;
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::backward::{GradientAccumulator, StepSums, joined};
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

/// Gradients and statistics on the host, by one visit to the device; `of_each` says which steps
/// have ended and how many rows each has.
pub(super) fn read_gradient(
    sums: GradientAccumulator,
    adapter: &Adapter,
    stats: Vec<Tensor<2>>,
    of_each: &[(usize, usize)],
    calls: usize,
) -> Result<BatchGradient> {
    let StepSums { gradient, squares } = sums.finish();
    let joined = joined(adapter);
    let n: usize = of_each.iter().map(|(_, rows)| rows * STATS).sum();
    let stats = (n > 0).then(|| Tensor::cat(stats, 0).reshape([n]));
    let mut values =
        read_all(gradient.into_iter().chain(squares).chain(stats).collect())?.into_iter();
    let mut lengths = adapter.parameters().map(Vec::len);
    let mut gradients = Vec::new();
    for part in joined {
        let mut sum = values.next().unwrap_or_default().into_iter();
        for n in lengths.by_ref().take(part.len()) {
            let mut own: Vec<f32> = sum.by_ref().take(n).collect();
            // Of a batch without a step nothing has arrived.
            own.resize(n, 0.0);
            gradients.push(own);
        }
    }
    let norm = |squares: Vec<f32>| squares.iter().map(|s| f64::from(*s)).sum::<f64>().sqrt();
    let norms: Vec<f64> = values.by_ref().take(of_each.len()).map(norm).collect();
    let stats = values.next().unwrap_or_default();
    let mut stats = bytemuck::cast_slice::<f32, SampleStats>(&stats).iter().copied();
    let step = |(&(at, rows), grad_norm): (&(usize, usize), f64)| BatchStep {
        at,
        rows: stats.by_ref().take(rows).collect(),
        grad_norm,
    };
    let steps = of_each.iter().zip(norms).map(step).collect();
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
