//! What every operation of the hot path is told: guidance, a step's numbers, its noise.

use burn::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

use crate::device::compute::Compute;
use crate::device::gpu::{Buffer, width};
use crate::schedule::{Step, StepKind};

/// Threads of a workgroup: each leaves a partial sum. `THREADS` in the shaders.
pub const THREADS: usize = 64;

/// Elements that one workgroup takes of one sample at most: 64 threads, 16 quads each.
pub const BLOCK: usize = 4096;

/// How guidance combines the two halves of the network's output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Guidance {
    /// The output is the prediction, `[B, ..]`.
    Off,
    /// The output is `[2B, ..]`, first the unconditional rows: p = u + scale (c - u).
    Scale(f32),
}

impl Guidance {
    /// Classifier-free guidance is off for scales up to 1, as in diffusers.
    pub fn new(scale: f64) -> Self {
        if scale > 1.0 { Self::Scale(scale as f32) } else { Self::Off }
    }

    /// Rows of network output for each sample.
    pub fn rows(self) -> usize {
        match self {
            Self::Off => 1,
            Self::Scale(_) => 2,
        }
    }

    /// The prediction from the unconditional and the conditional output (which are the same where
    /// guidance is off).
    pub(super) fn combine(self, uncond: f32, cond: f32) -> f32 {
        match self {
            Self::Off => cond,
            Self::Scale(g) => uncond + g * (cond - uncond),
        }
    }

    /// The prediction `[B, ..]` from the network's output `[B or 2B, ..]`.
    pub fn prediction(self, out: &Tensor<4>) -> Tensor<4> {
        match self {
            Self::Off => out.clone(),
            Self::Scale(g) => {
                let n = out.dims()[0] / 2;
                let (u, c) = (out.clone().narrow(0, 0, n), out.clone().narrow(0, n, n));
                u.clone() + (c - u) * g
            }
        }
    }

    /// The gradient of the network's output from that of the prediction; `through_uncond` is the
    /// factor of the unconditional rows.
    pub fn gradient(self, prediction: Tensor<4>, through_uncond: f32) -> Tensor<4> {
        match self {
            Self::Off => prediction,
            Self::Scale(g) => {
                let uncond = prediction.clone() * ((1.0 - g) * through_uncond);
                Tensor::cat(vec![uncond, prediction * g], 0)
            }
        }
    }

    fn scale(self) -> f32 {
        match self {
            Self::Off => 1.0,
            Self::Scale(g) => g,
        }
    }
}

/// A [`Step`] in f32 and in prediction units.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Coefficients {
    pub a: f32,
    pub b: f32,
    pub sigma: f32,
    /// log sigma + log sqrt(2 pi), taken in f64.
    pub log_norm: f32,
    /// x0 = x0_x x - x0_p p and its part in the mean; used where `clip` is finite.
    pub x0_x: f32,
    pub x0_p: f32,
    pub root_prev: f32,
    pub clip: f32,
    /// Credit weight and native weight.
    pub w: f32,
    pub w_native: f32,
    /// Factor of log rho's quadratic term: 1, or 0 for GRPO-Guard.
    pub quadratic: f32,
    /// Factor of the step's loss.
    pub loss_weight: f32,
    /// Whether the step is a flow's.
    pub flow: bool,
}

impl From<&Step> for Coefficients {
    fn from(s: &Step) -> Self {
        // Far beyond any latent and still finite: shaders may assume that infinities do not occur.
        const UNCLIPPED: f32 = 1e30;
        let (x0_x, x0_p, root_prev, clip, flow) = match s.kind {
            StepKind::Diffusion { alpha_bar_prev, x0_x, x0_p, clip, .. } => {
                let clip = (clip as f32).min(UNCLIPPED);
                (x0_x as f32, x0_p as f32, alpha_bar_prev.sqrt() as f32, clip, false)
            }
            StepKind::Flow { .. } => (0.0, 0.0, 0.0, UNCLIPPED, true),
        };
        let half_log_tau = 0.5 * std::f64::consts::TAU.ln();
        let log_norm = if s.sigma > 0.0 { s.sigma.ln() + half_log_tau } else { 0.0 };
        // At zero terminal SNR eps has no weight, the prediction still has.
        let w = if s.weight.is_finite() { s.weight * s.unit } else { s.b / s.sigma };
        Self {
            a: s.a as f32,
            b: s.b as f32,
            sigma: s.sigma as f32,
            log_norm: log_norm as f32,
            x0_x,
            x0_p,
            root_prev,
            clip,
            w: w as f32,
            w_native: if s.sigma > 0.0 { (s.b / s.sigma) as f32 } else { 0.0 },
            quadratic: s.quadratic as f32,
            loss_weight: s.loss_weight as f32,
            flow,
        }
    }
}

/// Where a batch stands in the run's noise: row i belongs to image `first_image + i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoiseKey {
    pub seed: u64,
    pub first_image: u32,
    pub step: u32,
}

/// What every operation of one step on one batch is told.
#[derive(Clone, Copy)]
pub struct StepContext<'a> {
    pub compute: &'a Compute,
    pub guidance: Guidance,
    pub coefficients: Coefficients,
    pub key: NoiseKey,
}

/// Uniforms of all kernels; kept in sync with `struct Params` in `shaders/shared/common.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(crate) struct Params {
    pub batch: u32,
    pub dim: u32,
    pub blocks: u32,
    pub guided: u32,
    pub key: [u32; 2],
    pub first_image: u32,
    pub step: u32,
    pub guidance: f32,
    pub a: f32,
    pub b: f32,
    pub sigma: f32,
    pub log_norm: f32,
    pub x0_x: f32,
    pub x0_p: f32,
    pub root_prev: f32,
    pub clip: f32,
    pub w: f32,
    pub w_native: f32,
    pub rounds: u32,
    pub clip_range: f32,
    pub scale: f32,
    pub beta: f32,
    pub grad_uncond: f32,
    pub log_hi: f32,
    pub log_lo: f32,
    pub with_base: u32,
    pub stream: u32,
    pub with_direction: u32,
    pub quadratic: f32,
    pub loss_weight: f32,
    pub pad: u32,
}

const _: () =
    assert!(size_of::<Params>() == 32 * 4, "kept in sync with shaders/shared/common.wgsl");

impl Params {
    pub fn new(batch: usize, dim: usize, s: &StepContext) -> Self {
        let (c, key) = (&s.coefficients, s.key);
        let blocks = dim.div_ceil(BLOCK);
        let units = dim / width(dim) as usize;
        Self {
            batch: batch as u32,
            dim: dim as u32,
            blocks: blocks as u32,
            rounds: units.div_ceil(blocks * THREADS) as u32,
            guided: (s.guidance.rows() - 1) as u32,
            key: crate::philox::key(key.seed),
            first_image: key.first_image,
            step: key.step,
            guidance: s.guidance.scale(),
            a: c.a,
            b: c.b,
            sigma: c.sigma,
            log_norm: c.log_norm,
            x0_x: c.x0_x,
            x0_p: c.x0_p,
            root_prev: c.root_prev,
            clip: c.clip,
            w: c.w,
            w_native: c.w_native,
            quadratic: c.quadratic,
            loss_weight: c.loss_weight,
            stream: crate::philox::Stream::StepNoise as u32,
            ..Self::zeroed()
        }
    }

    /// Partial sums of a batch, for a kernel to fill: `[batch, blocks, THREADS]` pairs.
    pub(super) fn partials(&self, pool: &Buffer) -> Buffer {
        pool.scratch((self.batch * self.blocks) as usize * THREADS * 2)
    }

    /// A pair of numbers for each sample, for a kernel to fill.
    pub(super) fn pairs(&self, pool: &Buffer) -> Buffer {
        pool.scratch(self.batch as usize * 2)
    }
}
