//! The chain of steps from noise to latents, and what the update needs of it.

use anyhow::{Result, ensure};
use burn::tensor::Tensor;
use image::RgbImage;

use super::policy::Policy;
use crate::device::tensor::read;
use crate::model::vae::Vae;
use crate::ops::{self, Coefficients, NoiseKey, StepContext};
use crate::schedule::Step;

/// What the update reads of one step of one batch. On the host: a GPU holds one batch of them at a
/// time.
#[derive(Clone, Debug, PartialEq)]
pub struct Transition {
    /// Latents before the step, `[B, C, H, W]`.
    pub x: Vec<f32>,
    /// The sampling policy's prediction after guidance.
    pub old_prediction: Vec<f32>,
}

/// A sampled batch.
pub struct Trajectory {
    /// Final latents.
    pub latents: Tensor<4>,
    /// The transitions that were asked for, in sampling order.
    pub transitions: Vec<Transition>,
}

/// Values or pictures that are not finite: of a policy that has diverged, or of a model that
/// overflows.
#[derive(Debug)]
pub struct NotFinite(pub String);

impl NotFinite {
    fn picture() -> Self {
        let what = "a decoded picture holds values that are not finite: the adapter has diverged, \
            or the model overflows (--storage f32, or check it with `pcpo-wgpu check`)";
        Self(what.into())
    }
}

impl std::fmt::Display for NotFinite {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NotFinite {}

/// Samples a batch from initial latents; image i of it draws the noise of number
/// `first_image + i`. Keeps the transitions of the steps whose index is in `keep`; `tick` is called
/// after each step.
///
/// # Errors
/// When the device fails, or `tick` asks to stop.
pub fn sample(
    policy: &Policy,
    latents: Tensor<4>,
    steps: &[Step],
    keep: &[usize],
    noise: Noise,
    tick: &dyn Fn() -> Result<()>,
) -> Result<Trajectory> {
    let mut x = latents;
    let mut kept = Vec::with_capacity(keep.len());
    for step in steps {
        let out = policy.output(&x, step.t);
        let context = StepContext {
            compute: policy.compute,
            guidance: policy.guidance.combine,
            coefficients: Coefficients::from(step),
            key: noise.at(step),
        };
        let next = ops::step(&context, &x, &out)?;
        if keep.contains(&step.index) {
            kept.push((x, next.prediction));
        }
        x = next.x_prev;
        tick()?;
    }
    policy.compute.sync()?;
    let transition = |(x, old): &(Tensor<4>, Tensor<4>)| {
        anyhow::Ok(Transition { x: read(x)?, old_prediction: read(old)? })
    };
    Ok(Trajectory { latents: x, transitions: kept.iter().map(transition).collect::<Result<_>>()? })
}

/// Which noise a batch draws.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noise {
    pub seed: u64,
    /// Number of its first image.
    pub first_image: u32,
}

impl Noise {
    /// The key of a step's noise.
    pub fn at(self, step: &Step) -> NoiseKey {
        NoiseKey { seed: self.seed, first_image: self.first_image, step: step.index as u32 }
    }
}

/// Decodes latents to 8-bit pictures, one at a time: a VAE's activations are its largest.
///
/// # Errors
/// When the device fails, or a pixel is not finite ([`NotFinite`]).
pub fn decode(vae: &Vae, latents: &Tensor<4>) -> Result<Vec<RgbImage>> {
    let picture = |i: usize| {
        let image = vae.decode(latents.clone().narrow(0, i, 1));
        let [_, _, height, width] = image.dims();
        let values = read(&image)?;
        ensure!(values.iter().all(|v| v.is_finite()), NotFinite::picture());
        let byte = |v: f32| ((v.clamp(-1.0, 1.0) + 1.0) * 127.5).round() as u8;
        let plane = height * width;
        Ok(RgbImage::from_fn(width as u32, height as u32, |x, y| {
            let at = y as usize * width + x as usize;
            image::Rgb([byte(values[at]), byte(values[plane + at]), byte(values[2 * plane + at])])
        }))
    };
    (0..latents.dims()[0]).map(picture).collect()
}
