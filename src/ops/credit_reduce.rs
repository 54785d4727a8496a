//! `credit_reduce`: the statistics of an update for each trained step: how log rho spreads, how much is clipped, and
//! how much each step contributes to the gradient (|d loss / d log rho| times the step's weight).
//!
//! `[S, N, STATS]` and weights `[S]` -> one [`StepStats`] a step. Sums in a fixed order; accuracy 1e-5.

use anyhow::Result;
use burn::tensor::{Tensor, TensorData};
use serde::Serialize;

use super::gpu::{Kernel, Launch, buffer, kernel, output};
use super::policy_objective::STATS;
use crate::device::Compute;

pub(super) const REDUCE: Kernel = kernel!("credit_reduce");

/// One step's statistics over the samples of an update.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StepStats {
    pub log_rho_mean: f32,
    /// Population standard deviation.
    pub log_rho_std: f32,
    pub loss: f32,
    pub clip_frac: f32,
    pub approx_kl: f32,
    pub kl: f32,
    /// Mean |d loss / d log rho| times the credit weight.
    pub contribution: f32,
}

const COLUMNS: usize = 7;

/// Reduces statistics `[S, N, STATS]` to one row a step.
///
/// # Errors
/// When the device fails while the table is read.
pub fn credit_reduce(compute: &Compute, stats: &Tensor<3>, weights: &[f32]) -> Result<Vec<StepStats>> {
    let [steps, samples, _] = stats.dims();
    let Some(gpu) = &compute.gpu else {
        return Ok(reference(&super::host(stats), steps, weights));
    };
    let table = output([steps, COLUMNS], &compute.burn);
    let weights = Tensor::<1>::from_data(TensorData::new(weights.to_vec(), [steps]), &compute.burn);
    let sizes = [steps as u32, samples as u32, 0, 0];
    gpu.run(
        bytemuck::bytes_of(&sizes),
        1,
        &[Launch {
            kernel: REDUCE,
            bindings: vec![&buffer(stats), &buffer(&weights), &buffer(&table)],
            grid: [steps as u32, 1],
        }],
    )?;
    let rows = super::read(&table)?;
    Ok(rows.chunks_exact(COLUMNS).map(row).collect())
}

fn row(r: &[f32]) -> StepStats {
    StepStats {
        log_rho_mean: r[0],
        log_rho_std: r[1],
        loss: r[2],
        clip_frac: r[3],
        approx_kl: r[4],
        kl: r[5],
        contribution: r[6],
    }
}

/// CPU reference.
pub fn reference(stats: &[f32], steps: usize, weights: &[f32]) -> Vec<StepStats> {
    let per_step = stats.len() / steps;
    stats
        .chunks_exact(per_step)
        .zip(weights)
        .map(|(step, weight)| {
            let n = (per_step / STATS) as f64;
            let mean = |column: usize| step.iter().skip(column).step_by(STATS).map(|&v| f64::from(v)).sum::<f64>() / n;
            let log_rho = mean(0);
            let variance = step.iter().step_by(STATS).map(|&v| (f64::from(v) - log_rho).powi(2)).sum::<f64>() / n;
            let columns = [log_rho, variance.sqrt(), mean(1), mean(2), mean(3), mean(4), mean(5) * f64::from(*weight)];
            row(&columns.map(|v| v as f32))
        })
        .collect()
}
