//! `flow_step`: a step of a flow model, SDE or ODE, in one pass over the latent; see [`super::sampler_step`] for what
//! every step does.
//!
//! ```text
//! mean = a x - b v,   e.g. a = 1 - s^2 dt / 2t,  b = (1 + s^2 (1 - t) / 2t) dt,  sigma = s sqrt(dt)
//! ```
//! Source: Liu et al. 2025 (Flow-GRPO), eq. 12; Xue et al. 2025 (DanceGRPO). [`crate::schedule::flow`] makes a, b and
//! sigma of each sampler. Latents and arithmetic are f32, whatever the network's weights are stored in.

use anyhow::Result;
use burn::tensor::Tensor;

use super::gpu::{Kernel, kernel};
use super::sampler_step::{Stepped, run};
use super::{Coefficients, Guidance, NoiseKey};
use crate::device::Compute;

pub(super) const STEP: Kernel = kernel!("flow_step", "common", "philox", "sampler_step");

/// One step for a batch. `model_out` holds the unconditional rows first where guidance is on.
///
/// # Errors
/// When the device failed.
///
/// # Panics
/// When the shapes disagree: `[B, C, H, W]` against `[B or 2B, C, H, W]`.
pub fn flow_step(
    compute: &Compute,
    x: &Tensor<4>,
    model_out: &Tensor<4>,
    guidance: Guidance,
    c: &Coefficients,
    key: NoiseKey,
) -> Result<Stepped> {
    run((STEP, reference), compute, x, model_out, guidance, c, key)
}

/// CPU reference: (x_prev `[B, D]`, prediction `[B, D]`, log p `[B]`).
pub fn reference(
    x: &[f32],
    model_out: &[f32],
    batch: usize,
    guidance: Guidance,
    c: &Coefficients,
    key: NoiseKey,
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    super::sampler_step::reference(x, model_out, batch, guidance, c, key, |x, v| c.a * x - c.b * v)
}
