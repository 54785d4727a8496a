//! `log_ratio`: the exact log-probability ratio of a step under the policy now and when it sampled.
//!
//! ```text
//! log rho = -mean(w D z + q w^2 D^2 / 2),   D = p_theta - p_old    Lee & Ye 2026, prop. 1; q = 1
//! KL      = mean(w_native^2 (p_theta - p_base)^2) / 2               to the base policy, if given
//! ```
//! The base policy is the network without its adapter. q = 0 and w = b is GRPO-Guard's normalised
//! ratio (Wang et al. 2025): no drift of the mean, one spread at all steps. The form keeps its
//! relative accuracy as D goes to 0, where exp(log p - log p_old) - 1 has lost all of it. Accuracy:
//! 1e-5 of the mean magnitude of the terms. Its gradient is part of [`super::policy_objective`].

use burn::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

use super::context::{Params, StepContext};
use super::philox_noise;
use crate::device::gpu::{Buffer, Kernel, Launch, buffer, kernel, output, width};
use crate::device::tensor::{host, upload};

pub(super) const PARTIALS: Kernel = kernel!("log_ratio", "common", "philox");
pub(super) const FINISH: Kernel = kernel!("log_ratio_finish", "common", "partials_sum");

/// What the policies say of a batch at a step.
#[derive(Clone, Copy)]
pub struct Predictions<'a> {
    /// The network's output now, `[B or 2B, C, H, W]`, the unconditional rows first.
    pub model_out: &'a Tensor<4>,
    /// The prediction after guidance when the step was sampled, `[B, C, H, W]`.
    pub old: &'a Tensor<4>,
    /// The output of the network without its adapter, shaped as `model_out`, for the KL.
    pub base: Option<&'a Tensor<4>>,
}

/// The same on the host.
#[derive(Clone, Copy)]
pub struct HostPredictions<'a> {
    pub model_out: &'a [f32],
    pub old: &'a [f32],
    pub base: Option<&'a [f32]>,
}

/// One sample's row; kept in sync with the `vec2` of the shaders.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct LogRatio {
    pub log_rho: f32,
    pub kl: f32,
}

/// `[B, 2]`: log rho and KL of each sample. Without a base policy the KL is 0.
pub fn log_ratio(s: &StepContext, p: &Predictions) -> Tensor<2> {
    let shape = p.old.dims();
    let (batch, dim) = (shape[0], shape[1..].iter().product::<usize>());
    let Some(gpu) = &s.compute.gpu else {
        let (out, old, base) = (host(p.model_out), host(p.old), p.base.map(host));
        let p = HostPredictions { model_out: &out, old: &old, base: base.as_deref() };
        let rows = reference(s, &p, &philox_noise::reference(batch, dim, s.key), batch);
        return upload(bytemuck::cast_slice(&rows), [batch, 2], &s.compute.burn);
    };
    let params = Params { with_base: p.base.is_some().into(), ..Params::new(batch, dim, s) };
    let log_rho = output([batch, 2], &s.compute.burn);
    let (policy, old, rows) = (buffer(p.model_out), buffer(p.old), buffer(&log_rho));
    let sums = params.partials(&policy);
    let base = p.base.map(buffer);
    let base = base.as_ref().unwrap_or(&policy);
    // Without a direction to keep any buffer serves in its place.
    let inputs = Inputs { policy: &policy, old: &old, base, partials: &sums, direction: &old };
    gpu.run(bytemuck::bytes_of(&params), width(dim), &launches(&params, &inputs, &rows));
    log_rho
}

/// What the operation's first launch is bound to.
pub(super) struct Inputs<'a> {
    pub policy: &'a Buffer,
    pub old: &'a Buffer,
    pub base: &'a Buffer,
    pub partials: &'a Buffer,
    /// Where the gradient's direction goes, with `with_direction`.
    pub direction: &'a Buffer,
}

/// The two launches of the operation.
pub(super) fn launches<'a>(
    params: &Params,
    i: &Inputs<'a>,
    log_rho: &'a Buffer,
) -> [Launch<'a>; 2] {
    let bindings = vec![i.policy, i.old, i.base, i.partials, i.direction];
    [
        Launch { kernel: PARTIALS, bindings, grid: [params.blocks, params.batch] },
        Launch { kernel: FINISH, bindings: vec![i.partials, log_rho], grid: [params.batch, 1] },
    ]
}

/// CPU reference, summed in f64, with the step's noise `[B, D]`.
pub fn reference(
    s: &StepContext,
    p: &HostPredictions,
    noise: &[f32],
    batch: usize,
) -> Vec<LogRatio> {
    let (n, dim, c) = (p.old.len(), p.old.len() / batch, &s.coefficients);
    let second = (s.guidance.rows() - 1) * n;
    let row = |sample: usize| {
        let (mut ratio, mut kl) = (0f64, 0f64);
        for i in sample * dim..(sample + 1) * dim {
            let now = s.guidance.combine(p.model_out[i], p.model_out[i + second]);
            let wd = c.w * (now - p.old[i]);
            ratio += f64::from(wd * (noise[i] + 0.5 * c.quadratic * wd));
            if let Some(base) = p.base {
                let wb = c.w_native * (now - s.guidance.combine(base[i], base[i + second]));
                kl += f64::from(0.5 * wb * wb);
            }
        }
        LogRatio { log_rho: (-ratio / dim as f64) as f32, kl: (kl / dim as f64) as f32 }
    };
    (0..batch).map(row).collect()
}
