//! `policy_objective`: from log rho, advantage and credit weight to the loss and its gradient with
//! respect to the network's output. The gradient enters Burn's autodiff as `(output *
//! gradient).sum().backward()`.
//!
//! ```text
//! PPO-clip    max(-A rho, -A clip(rho, 1 - xi, 1 + xi))             DDPO, DanceGRPO, Flow-GRPO
//! log-ratio   max(-A (1 + log rho), -A clip(1 + log rho, 1 - xi, 1 + xi))      PCPO's ablation
//! log-hinge   max(0, xi |A| - A log rho)                            PCPO
//! d log rho / d p = -(w z + q w^2 D) / dim;    + beta w_native^2 (p - p_base) / dim of the KL
//! ```
//! The objective is multiplied by the step's loss weight, everything by `scale`, one over the
//! number of (sample, step) pairs of the update. Accuracy: 1e-5.

use burn::tensor::Tensor;
use bytemuck::{Pod, Zeroable};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::context::{Guidance, Params, StepContext};
use super::log_ratio::{self, HostPredictions, LogRatio, Predictions};
use super::philox_noise;
use crate::device::gpu::{Kernel, Launch, buffer, kernel, output, width};
use crate::device::tensor::{host, upload};

/// What each sample leaves in the statistics; kept in sync with the struct of the same name in
/// `shaders/policy_objective.wgsl` and `shaders/credit_reduce.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable, Serialize, Deserialize)]
pub struct SampleStats {
    pub log_rho: f32,
    pub loss: f32,
    /// 1 where the entry is clipped.
    pub clipped: f32,
    /// log rho^2 / 2
    pub approx_kl: f32,
    /// To the base policy.
    pub kl: f32,
    /// |d loss / d log rho|
    pub push: f32,
}

/// Numbers in a [`SampleStats`].
pub const STATS: usize = size_of::<SampleStats>() / size_of::<f32>();

/// The surrogate that is minimised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Objective {
    PpoClip,
    LogRatio,
    LogHinge,
}

/// What an objective says of one (sample, step) pair; as in `shaders/shared/entry.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Entry {
    pub loss: f32,
    /// d loss / d log rho
    pub slope: f32,
    pub clipped: bool,
}

impl Objective {
    /// The kernel with the objective's own file in it.
    pub(super) fn kernel(self) -> Kernel {
        match self {
            Self::PpoClip => kernel!("policy_objective", "common", "entry"; "objectives/ppo_clip"),
            Self::LogRatio => {
                kernel!("policy_objective", "common", "entry"; "objectives/log_ratio")
            }
            Self::LogHinge => {
                kernel!("policy_objective", "common", "entry"; "objectives/log_hinge")
            }
        }
    }

    /// Bounds of log rho beyond which an entry counts as clipped: PPO's in log space, since rho - 1
    /// is off in its fourth digit at xi = 1e-4 in f32.
    fn bounds(self, clip_range: f32) -> Bounds {
        let xi = f64::from(clip_range);
        match self {
            Self::PpoClip => Bounds { hi: xi.ln_1p() as f32, lo: (-xi).ln_1p() as f32 },
            Self::LogRatio | Self::LogHinge => Bounds { hi: clip_range, lo: -clip_range },
        }
    }
}

struct Bounds {
    hi: f32,
    lo: f32,
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

impl GuidanceGradient {
    /// Factor of the unconditional branch's gradient.
    pub fn through_uncond(self) -> f32 {
        match self {
            Self::Both => 1.0,
            Self::Conditional => 0.0,
        }
    }
}

/// The settings of the objective.
#[derive(Clone, Copy, Debug)]
pub struct Surrogate {
    pub objective: Objective,
    /// xi
    pub clip_range: f32,
    /// Weight of the KL to the base policy.
    pub beta: f32,
    pub guidance_gradient: GuidanceGradient,
    /// One over the (sample, step) pairs of the update.
    pub scale: f32,
}

impl Surrogate {
    /// The objective of one (sample, step) pair, without loss weight, KL and scale.
    pub fn entry(&self, log_rho: f32, advantage: f32) -> Entry {
        let xi = self.clip_range;
        let free = match self.objective {
            Objective::LogHinge => {
                let h = xi * advantage.abs() - advantage * log_rho;
                let slope = if h > 0.0 { -advantage } else { 0.0 };
                return Entry { loss: h.max(0.0), slope, clipped: h < 0.0 };
            }
            Objective::PpoClip => {
                let rho = log_rho.exp();
                Entry { loss: -advantage * rho, slope: -advantage * rho, clipped: false }
            }
            Objective::LogRatio => {
                let loss = -advantage * (1.0 + log_rho);
                Entry { loss, slope: -advantage, clipped: false }
            }
        };
        let Bounds { hi, lo } = self.objective.bounds(xi);
        let clipped = log_rho > hi || log_rho < lo;
        if advantage > 0.0 && log_rho > hi {
            return Entry { loss: -advantage * (1.0 + xi), slope: 0.0, clipped };
        }
        if advantage < 0.0 && log_rho < lo {
            return Entry { loss: -advantage * (1.0 - xi), slope: 0.0, clipped };
        }
        Entry { clipped, ..free }
    }
}

/// What the operation gives.
pub struct ObjectiveOutput {
    /// The gradient with respect to the network's output, shaped as it is.
    pub gradient: Tensor<4>,
    /// A [`SampleStats`] of each sample, `[B, STATS]`.
    pub stats: Tensor<2>,
}

/// The same on the host.
pub struct HostObjective {
    pub gradient: Vec<f32>,
    pub stats: Vec<SampleStats>,
}

/// Loss, statistics and gradient of a batch at a step.
pub fn policy_objective(
    s: &StepContext,
    surrogate: &Surrogate,
    p: &Predictions,
    advantage: &[f32],
) -> ObjectiveOutput {
    let (batch, dim) = (advantage.len(), p.old.dims()[1..].iter().product::<usize>());
    let (shape, device) = (p.model_out.dims(), &s.compute.burn);
    let Some(gpu) = &s.compute.gpu else {
        let (out, old, base) = (host(p.model_out), host(p.old), p.base.map(host));
        let p = HostPredictions { model_out: &out, old: &old, base: base.as_deref() };
        let noise = philox_noise::reference(batch, dim, s.key);
        let rows = log_ratio::reference(s, &p, &noise, batch);
        let done = reference(s, surrogate, &p, &noise, &rows, advantage);
        return ObjectiveOutput {
            gradient: upload(&done.gradient, shape, device),
            stats: upload(bytemuck::cast_slice(&done.stats), [batch, STATS], device),
        };
    };
    let Bounds { hi, lo } = surrogate.objective.bounds(surrogate.clip_range);
    let params = Params {
        clip_range: surrogate.clip_range,
        scale: surrogate.scale,
        beta: surrogate.beta,
        grad_uncond: surrogate.guidance_gradient.through_uncond(),
        log_hi: hi,
        log_lo: lo,
        with_base: p.base.is_some().into(),
        with_direction: 1,
        ..Params::new(batch, dim, s)
    };
    let gradient = output(shape, device);
    let stats = output([batch, STATS], device);
    let advantage = buffer(&upload(advantage, [batch], device));
    let (policy, old) = (buffer(p.model_out), buffer(p.old));
    let (sums, log_rho) = (params.partials(&policy), params.pairs(&policy));
    let base = p.base.map(buffer);
    let base = base.as_ref().unwrap_or(&policy);
    let (slope, rows) = (buffer(&gradient), buffer(&stats));
    let inputs =
        log_ratio::Inputs { policy: &policy, old: &old, base, partials: &sums, direction: &slope };
    let [partial, finish] = log_ratio::launches(&params, &inputs, &log_rho);
    let objective = Launch {
        kernel: surrogate.objective.kernel(),
        bindings: vec![&policy, base, &log_rho, &advantage, &slope, &rows],
        grid: [params.blocks, params.batch],
    };
    gpu.run(bytemuck::bytes_of(&params), width(dim), &[partial, finish, objective]);
    ObjectiveOutput { gradient, stats }
}

/// CPU reference, with the step's noise `[B, D]` and each sample's log rho and KL.
pub fn reference(
    s: &StepContext,
    surrogate: &Surrogate,
    p: &HostPredictions,
    noise: &[f32],
    rows: &[LogRatio],
    advantage: &[f32],
) -> HostObjective {
    let (n, dim, c) = (p.old.len(), p.old.len() / advantage.len(), &s.coefficients);
    let second = (s.guidance.rows() - 1) * n;
    let mut gradient = vec![0.0; p.model_out.len()];
    let mut stats = Vec::with_capacity(advantage.len());
    let through_uncond = surrogate.guidance_gradient.through_uncond();
    let penalty = surrogate.beta * surrogate.scale * c.w_native * c.w_native / dim as f32;
    for (sample, (row, &adv)) in rows.iter().zip(advantage).enumerate() {
        let entry = surrogate.entry(row.log_rho, adv);
        let policy = -entry.slope * c.loss_weight * surrogate.scale / dim as f32;
        for i in sample * dim..(sample + 1) * dim {
            let now = s.guidance.combine(p.model_out[i], p.model_out[i + second]);
            let mut g = policy * c.w * (noise[i] + c.quadratic * c.w * (now - p.old[i]));
            if let Some(base) = p.base {
                g += penalty * (now - s.guidance.combine(base[i], base[i + second]));
            }
            match s.guidance {
                Guidance::Off => gradient[i] = g,
                Guidance::Scale(scale) => {
                    gradient[i] = through_uncond * (1.0 - scale) * g;
                    gradient[i + n] = scale * g;
                }
            }
        }
        stats.push(SampleStats {
            log_rho: row.log_rho,
            loss: c.loss_weight * entry.loss + surrogate.beta * row.kl,
            clipped: f32::from(u8::from(entry.clipped)),
            approx_kl: 0.5 * row.log_rho * row.log_rho,
            kl: row.kl,
            push: c.loss_weight * entry.slope.abs(),
        });
    }
    HostObjective { gradient, stats }
}
