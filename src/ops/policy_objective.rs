//! `policy_objective`: from log rho, advantage and credit weight to the loss and its gradient with respect to the
//! network's output. The gradient enters Burn's autodiff as `(output * gradient).sum().backward()`.
//!
//! ```text
//! PPO-clip    max(-A rho, -A clip(rho, 1 - xi, 1 + xi))                 DDPO, DanceGRPO, Flow-GRPO
//! log-ratio   max(-A (1 + log rho), -A clip(1 + log rho, 1 - xi, 1 + xi))   PCPO's ablation
//! log-hinge   max(0, xi |A| - A log rho)                                PCPO
//! d log rho / d p = -(w z + q w^2 D) / dim;    + beta w_native^2 (p - p_ref) / dim of the KL
//! ```
//! The objective is multiplied by the step's loss weight, everything by `scale`, one over the number of (sample, step) pairs of the update. Accuracy: 1e-5.

use anyhow::Result;
use burn::tensor::{Tensor, TensorData};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::gpu::{Kernel, Launch, buffer, kernel, output, width};
use super::{Coefficients, Guidance, NoiseKey, Params, log_ratio};
use crate::device::Compute;

pub(super) const OBJECTIVE: Kernel = kernel!("policy_objective", "common");

/// Numbers that each sample leaves in the statistics: log rho, loss, clipped, 1/2 log rho^2, KL, |d loss / d log rho|.
pub const STATS: usize = 6;

/// The surrogate that is minimised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    PpoClip,
    LogRatio,
    LogHinge,
}

/// Through which branches of the guidance the gradient flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuidanceGradient {
    /// Conditional and unconditional (DDPO, PCPO, DanceGRPO).
    Both,
    /// The conditional branch only (Flow-GRPO).
    Conditional,
}

/// The settings of the objective.
#[derive(Clone, Copy, Debug)]
pub struct Surrogate {
    pub objective: Objective,
    /// Clip range xi.
    pub xi: f32,
    /// Weight of the KL to the reference.
    pub beta: f32,
    pub guidance_gradient: GuidanceGradient,
    /// One over the (sample, step) pairs of the update.
    pub scale: f32,
}

impl Surrogate {
    /// Bounds of log rho beyond which the entry counts as clipped: PPO's in log space, since rho - 1 is off in its
    /// fourth digit at xi = 1e-4 in f32.
    fn bounds(&self) -> (f32, f32) {
        let xi = f64::from(self.xi);
        match self.objective {
            Objective::PpoClip => (xi.ln_1p() as f32, (-xi).ln_1p() as f32),
            _ => (self.xi, -self.xi),
        }
    }

    /// (loss, d loss / d log rho, clipped) of one entry.
    pub fn entry(&self, log_rho: f32, advantage: f32) -> (f32, f32, bool) {
        let (hi, lo) = self.bounds();
        if self.objective == Objective::LogHinge {
            let h = self.xi * advantage.abs() - advantage * log_rho;
            return (h.max(0.0), if h > 0.0 { -advantage } else { 0.0 }, h < 0.0);
        }
        let clipped = log_rho > hi || log_rho < lo;
        if advantage > 0.0 && log_rho > hi {
            return (-advantage * (1.0 + self.xi), 0.0, clipped);
        }
        if advantage < 0.0 && log_rho < lo {
            return (-advantage * (1.0 - self.xi), 0.0, clipped);
        }
        match self.objective {
            Objective::PpoClip => (-advantage * log_rho.exp(), -advantage * log_rho.exp(), clipped),
            _ => (-advantage * (1.0 + log_rho), -advantage, clipped),
        }
    }
}

/// The gradient `[B or 2B, C, H, W]` with respect to `model_out`, and the statistics `[B, STATS]`.
///
/// # Errors
/// When the device failed.
#[allow(clippy::too_many_arguments)]
pub fn policy_objective(
    compute: &Compute,
    surrogate: &Surrogate,
    model_out: &Tensor<4>,
    old: &Tensor<4>,
    reference_out: Option<&Tensor<4>>,
    advantage: &[f32],
    guidance: Guidance,
    c: &Coefficients,
    key: NoiseKey,
) -> Result<(Tensor<4>, Tensor<2>)> {
    let (batch, dim) = (advantage.len(), old.dims()[1..].iter().product::<usize>());
    let shape = model_out.dims();
    let Some(gpu) = &compute.gpu else {
        let reference_out = reference_out.map(super::host);
        let (out, old) = (super::host(model_out), super::host(old));
        let rows = log_ratio::reference(&out, &old, reference_out.as_deref(), batch, guidance, c, key).concat();
        let (gradient, stats) =
            reference(surrogate, &out, &old, reference_out.as_deref(), &rows, advantage, guidance, c, key);
        return Ok((
            Tensor::from_data(TensorData::new(gradient, shape), &compute.burn),
            Tensor::from_data(TensorData::new(stats, [batch, STATS]), &compute.burn),
        ));
    };
    let (log_hi, log_lo) = surrogate.bounds();
    let params = Params {
        objective: surrogate.objective as u32,
        xi: surrogate.xi,
        scale: surrogate.scale,
        beta: surrogate.beta,
        grad_uncond: if surrogate.guidance_gradient == GuidanceGradient::Both { 1.0 } else { 0.0 },
        log_hi,
        log_lo,
        with_reference: reference_out.is_some().into(),
        with_direction: 1,
        ..Params::new(batch, dim, guidance, c, key)
    };
    let gradient = output(shape, &compute.burn);
    let stats = output([batch, STATS], &compute.burn);
    let advantage = Tensor::<1>::from_data(TensorData::new(advantage.to_vec(), [batch]), &compute.burn);
    let (policy, old, advantage) = (buffer(model_out), buffer(old), buffer(&advantage));
    let (partials, log_rho) = (policy.partials(&params), policy.pairs(&params));
    let frozen = reference_out.map(buffer);
    let frozen = frozen.as_ref().unwrap_or(&policy);
    let (slope, rows) = (buffer(&gradient), buffer(&stats));
    let [partial, finish] = log_ratio::launches(&params, [&policy, &old, frozen, &partials, &slope], &log_rho);
    let objective = Launch {
        kernel: OBJECTIVE,
        bindings: vec![&policy, frozen, &log_rho, &advantage, &slope, &rows],
        grid: [params.blocks, params.batch],
    };
    gpu.run(bytemuck::bytes_of(&params), width(dim), &[partial, finish, objective])?;
    Ok((gradient, stats))
}

/// CPU reference: (gradient with respect to `model_out`, statistics `[B, STATS]`); `log_rho` is `[B, 2]`.
#[allow(clippy::too_many_arguments)]
pub fn reference(
    s: &Surrogate,
    model_out: &[f32],
    old: &[f32],
    reference_out: Option<&[f32]>,
    log_rho: &[f32],
    advantage: &[f32],
    guidance: Guidance,
    c: &Coefficients,
    key: NoiseKey,
) -> (Vec<f32>, Vec<f32>) {
    let (n, dim) = (old.len(), old.len() / advantage.len());
    let noise = super::philox::reference(advantage.len(), dim, key);
    let second = (guidance.rows() - 1) * n;
    let mut gradient = vec![0.0; model_out.len()];
    let mut stats = Vec::with_capacity(advantage.len() * STATS);
    let through_uncond = if s.guidance_gradient == GuidanceGradient::Both { 1.0 } else { 0.0 };
    let penalty = s.beta * s.scale * c.w_native * c.w_native / dim as f32;
    for (sample, (row, &adv)) in log_rho.chunks(2).zip(advantage).enumerate() {
        let (loss, push, clipped) = s.entry(row[0], adv);
        let policy = -push * c.loss_weight * s.scale / dim as f32;
        for i in sample * dim..(sample + 1) * dim {
            let p = guidance.combine(model_out[i], model_out[i + second]);
            let mut g = policy * c.w * (noise[i] + c.quadratic * c.w * (p - old[i]));
            if let Some(r) = reference_out {
                g += penalty * (p - guidance.combine(r[i], r[i + second]));
            }
            match guidance {
                Guidance::Off => gradient[i] = g,
                Guidance::Scale(scale) => {
                    gradient[i] = through_uncond * (1.0 - scale) * g;
                    gradient[i + n] = scale * g;
                }
            }
        }
        let clipped = f32::from(u8::from(clipped));
        let (loss, push) = (c.loss_weight * loss, c.loss_weight * push.abs());
        stats.extend([row[0], loss + s.beta * row[1], clipped, 0.5 * row[0] * row[0], row[1], push]);
    }
    (gradient, stats)
}
