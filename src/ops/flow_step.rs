//! `flow_step`: a step of a flow model, SDE or ODE, in one pass over the latent; see
//! [`super::sampler_step`] for what every step does.
//!
//! ```text
//! mean = a x - b v,   e.g. a = 1 - s^2 dt / 2t,  b = (1 + s^2 (1 - t) / 2t) dt
//! sigma = s sqrt(dt)
//! ```
//! Source: Liu et al. 2025 (Flow-GRPO), eq. 12; Xue et al. 2025 (DanceGRPO).
//! [`crate::schedule::flow`] makes a, b and sigma of each sampler. Latents and arithmetic are f32,
//! whatever the network's weights are stored in.

use burn::tensor::Tensor;

use super::context::StepContext;
use super::sampler_step::{Stepped, SteppedHost, run};
use crate::device::gpu::{Kernel, kernel};

pub(super) const STEP: Kernel = kernel!("flow_step", "common", "philox", "sampler_step");

/// One step for a batch. `model_out` holds the unconditional rows first where guidance is on.
///
/// # Panics
/// When the shapes disagree: `[B, C, H, W]` against `[B or 2B, C, H, W]`.
pub fn flow_step(s: &StepContext, x: &Tensor<4>, model_out: &Tensor<4>) -> Stepped {
    run(STEP, reference, s, x, model_out)
}

/// CPU reference, for `batch` rows of latents and of network output.
pub fn reference(s: &StepContext, x: &[f32], model_out: &[f32], batch: usize) -> SteppedHost {
    let c = s.coefficients;
    super::sampler_step::reference(s, x, model_out, batch, |x, v| c.a * x - c.b * v)
}
