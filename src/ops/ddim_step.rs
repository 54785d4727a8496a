//! `ddim_step`: a DDIM step in one pass over the latent; see [`super::sampler_step`] for what every
//! step does.
//!
//! ```text
//! mean = a x - b p   (+ sqrt(abar_prev) (clip(x0) - x0) where the scheduler clips samples)
//! ```
//! Source: Song et al. 2021, eq. 12; Lee & Ye 2026, section 3. [`crate::schedule::ddim`] makes a
//! and b.

use burn::tensor::Tensor;

use super::context::StepContext;
use super::sampler_step::{Stepped, SteppedHost, run};
use crate::device::gpu::{Kernel, kernel};

pub(super) const STEP: Kernel = kernel!("ddim_step", "common", "philox", "sampler_step");

/// One step for a batch. `model_out` holds the unconditional rows first where guidance is on.
///
/// # Panics
/// When the shapes disagree: `[B, C, H, W]` against `[B or 2B, C, H, W]`.
pub fn ddim_step(s: &StepContext, x: &Tensor<4>, model_out: &Tensor<4>) -> Stepped {
    run(STEP, reference, s, x, model_out)
}

/// CPU reference, for `batch` rows of latents and of network output.
pub fn reference(s: &StepContext, x: &[f32], model_out: &[f32], batch: usize) -> SteppedHost {
    let c = s.coefficients;
    super::sampler_step::reference(s, x, model_out, batch, |x, p| {
        let mean = c.a * x - c.b * p;
        if c.clip >= 1e30 {
            return mean;
        }
        let x0 = c.x0_x * x - c.x0_p * p;
        mean + c.root_prev * (x0.clamp(-c.clip, c.clip) - x0)
    })
}
