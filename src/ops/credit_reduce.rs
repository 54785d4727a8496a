//! `credit_reduce`: the statistics of an update for each trained step: how log rho spreads, how
//! much is clipped, and how much each step contributes to the gradient (|d loss / d log rho| times
//! the step's weight).
//!
//! `[S, N]` of [`SampleStats`] and weights `[S]` -> one [`StepStats`] a step. Sums in a fixed
//! order; accuracy 1e-5.

use anyhow::Result;
use burn::tensor::Tensor;
use bytemuck::{Pod, Zeroable};
use serde::{Deserialize, Serialize};

use super::policy_objective::SampleStats;
use crate::device::compute::Compute;
use crate::device::gpu::{Kernel, Launch, buffer, kernel, output};
use crate::device::tensor::{host, read, upload};

pub(super) const REDUCE: Kernel = kernel!("credit_reduce");

/// One step's statistics over the samples of an update; kept in sync with the struct of the same
/// name in the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable, Serialize, Deserialize)]
pub struct StepStats {
    pub log_rho_mean: f32,
    /// Population standard deviation.
    pub log_rho_std: f32,
    pub loss: f32,
    pub clip_frac: f32,
    pub approx_kl: f32,
    /// To the base policy.
    pub kl: f32,
    /// Mean |d loss / d log rho| times the credit weight.
    pub contribution: f32,
}

/// Numbers in a [`StepStats`].
const COLUMNS: usize = size_of::<StepStats>() / size_of::<f32>();

/// Reduces statistics `[S, N, STATS]` to one row a step.
///
/// # Errors
/// When the device fails while the table is read.
pub fn credit_reduce(
    compute: &Compute,
    stats: &Tensor<3>,
    weights: &[f32],
) -> Result<Vec<StepStats>> {
    let [steps, samples, _] = stats.dims();
    let Some(gpu) = &compute.gpu else {
        return Ok(reference(bytemuck::cast_slice(&host(stats)), steps, weights));
    };
    let table = output([steps, COLUMNS], &compute.burn);
    let weights = buffer(&upload(weights, [steps], &compute.burn));
    let (stats, rows) = (buffer(stats), buffer(&table));
    let bindings = vec![&stats, &weights, &rows];
    let launch = Launch { kernel: REDUCE, bindings, grid: [steps as u32, 1] };
    let sizes = [steps as u32, samples as u32, 0, 0];
    gpu.run(bytemuck::bytes_of(&sizes), 1, &[launch]);
    Ok(bytemuck::cast_slice(&read(&table)?).to_vec())
}

/// CPU reference: `stats` `[S, N]`.
pub fn reference(stats: &[SampleStats], steps: usize, weights: &[f32]) -> Vec<StepStats> {
    let samples = stats.len() / steps;
    let row = |(step, weight): (&[SampleStats], &f32)| {
        let mean =
            |of: &dyn Fn(&SampleStats) -> f64| step.iter().map(of).sum::<f64>() / samples as f64;
        let log_rho = mean(&|s| f64::from(s.log_rho));
        let variance = mean(&|s| (f64::from(s.log_rho) - log_rho).powi(2));
        StepStats {
            log_rho_mean: log_rho as f32,
            log_rho_std: variance.sqrt() as f32,
            loss: mean(&|s| f64::from(s.loss)) as f32,
            clip_frac: mean(&|s| f64::from(s.clipped)) as f32,
            approx_kl: mean(&|s| f64::from(s.approx_kl)) as f32,
            kl: mean(&|s| f64::from(s.kl)) as f32,
            contribution: (mean(&|s| f64::from(s.push)) * f64::from(*weight)) as f32,
        }
    };
    stats.chunks_exact(samples).zip(weights).map(row).collect()
}
