//! The hot path: every operation is a WGSL shader, its launch, and a CPU reference of the same name. The reference is
//! what the CPU device runs and what the shader is tested against. Only this folder knows shaders and buffers.
//!
//! Predictions are eps or v alike: a [`Coefficients`] holds a step's numbers in prediction units, so that v needs no
//! conversion and stays finite at zero terminal SNR.

pub mod credit_reduce;
pub mod ddim_step;
pub mod flow_step;
pub mod gpu;
pub mod group_advantage;
pub mod log_ratio;
pub mod philox;
pub mod policy_objective;
pub mod sampler_step;
pub mod tensor_ops;

use bytemuck::{Pod, Zeroable};

use crate::schedule::{Family, Step};

/// Elements that one workgroup takes of one sample at most: 64 threads, 16 quads each.
pub const BLOCK: usize = 4096;
/// Threads of a workgroup: each leaves a partial sum. `THREADS` in the shaders.
pub const THREADS: usize = 64;

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

    /// The prediction from the unconditional and the conditional output (which are the same where guidance is off).
    fn combine(self, uncond: f32, cond: f32) -> f32 {
        match self {
            Self::Off => cond,
            Self::Scale(g) => uncond + g * (cond - uncond),
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
        let (x0_x, x0_p, root_prev, clip) = match s.family {
            Family::Diffusion { alpha_bar_prev, x0_x, x0_p, clip, .. } => {
                (x0_x as f32, x0_p as f32, alpha_bar_prev.sqrt() as f32, (clip as f32).min(UNCLIPPED))
            }
            Family::Flow { .. } => (0.0, 0.0, 0.0, UNCLIPPED),
        };
        let log_norm = if s.sigma > 0.0 { s.sigma.ln() + 0.5 * std::f64::consts::TAU.ln() } else { 0.0 };
        Self {
            a: s.a as f32,
            b: s.b as f32,
            sigma: s.sigma as f32,
            log_norm: log_norm as f32,
            x0_x,
            x0_p,
            root_prev,
            clip,
            // At zero terminal SNR eps has no weight, the prediction still has.
            w: (if s.weight.is_finite() { s.weight * s.unit } else { s.b / s.sigma }) as f32,
            w_native: if s.sigma > 0.0 { (s.b / s.sigma) as f32 } else { 0.0 },
            quadratic: s.quadratic as f32,
            loss_weight: s.loss_weight as f32,
            flow: matches!(s.family, Family::Flow { .. }),
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

/// Uniforms of all kernels; kept in sync with `struct Params` in `shaders/common.wgsl`.
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
    pub objective: u32,
    pub xi: f32,
    pub scale: f32,
    pub beta: f32,
    pub grad_uncond: f32,
    pub log_hi: f32,
    pub log_lo: f32,
    pub with_reference: u32,
    pub stream: u32,
    pub with_direction: u32,
    pub quadratic: f32,
    pub loss_weight: f32,
    pub rounds: u32,
}

const _: () = assert!(size_of::<Params>() == 32 * 4, "kept in sync with shaders/common.wgsl");

impl Params {
    pub fn new(batch: usize, dim: usize, guidance: Guidance, c: &Coefficients, key: NoiseKey) -> Self {
        let blocks = dim.div_ceil(BLOCK);
        Self {
            batch: batch as u32,
            dim: dim as u32,
            blocks: blocks as u32,
            rounds: (dim / gpu::width(dim) as usize).div_ceil(blocks * THREADS) as u32,
            guided: (guidance.rows() - 1) as u32,
            key: crate::philox::key(key.seed),
            first_image: key.first_image,
            step: key.step,
            guidance: guidance.scale(),
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
}

/// The values of a tensor on the CPU device, where reading cannot fail.
fn host<const D: usize>(tensor: &burn::tensor::Tensor<D>) -> Vec<f32> {
    read(tensor).expect("the CPU device holds its tensors in memory")
}

/// The values of a tensor, whatever its device.
///
/// # Errors
/// When the device failed or was lost.
pub fn read<const D: usize>(tensor: &burn::tensor::Tensor<D>) -> anyhow::Result<Vec<f32>> {
    let data = tensor
        .clone()
        .try_into_data()
        .map_err(|e| anyhow::anyhow!("the device failed while a result was read: {e}"))?;
    data.try_into_vec::<f32>().map_err(|e| anyhow::anyhow!("a tensor is not f32: {e:?}"))
}
