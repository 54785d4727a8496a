//! The chain of steps from noise to latents, and what the update needs of it.

use anyhow::{Result, ensure};
use burn::tensor::Tensor;
use image::RgbImage;
use serde::{Deserialize, Serialize};

use super::policy::{Branch, Pass, Policy, Weighted};
use crate::device::tensor::{read, read_all};
use crate::model::row_map::RowMap;
use crate::model::vae::Vae;
use crate::ops::{self, Coefficients, NoiseKey, StepContext};
use crate::schedule::Step;

/// What the update reads of one step of one batch. On the host: a GPU holds one batch of them at a
/// time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// Rows that the network has computed, over all steps; guidance's are not counted twice.
    pub calls: usize,
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

/// Samples a batch by the sum of several policies' outputs, from initial latents some of whose rows
/// may be `equal` in value and prompt: they are computed once until noise makes them different.
/// Image i of it draws the noise of number `first_image + i`. Keeps the transitions of the steps
/// whose index is in `keep`; `tick` is called after each step.
///
/// # Errors
/// When the device fails, or `tick` asks to stop.
///
/// # Panics
/// Without a policy.
pub fn sample(
    policies: &[Weighted<Policy>],
    latents: Tensor<4>,
    equal: &RowMap,
    steps: &[Step],
    keep: &[usize],
    noise: Noise,
    tick: &dyn Fn() -> Result<()>,
) -> Result<Trajectory> {
    let mut x = latents;
    let policy = policies[0].value;
    let mut now = passes(policies, equal);
    let (mut kept, mut calls) = (Vec::with_capacity(2 * keep.len()), 0);
    for step in steps {
        let parts = now.iter().map(|pass| {
            calls += pass.value.calls();
            let out = pass.value.output(&x, step.t);
            // By 1 not even the sign of a zero changes.
            if pass.weight == 1.0 { out } else { out * pass.weight }
        });
        let out = parts.reduce(|sum, part| sum + part).expect("at least one policy");
        let context = StepContext {
            compute: policy.compute,
            guidance: policy.guidance.combine,
            coefficients: Coefficients::from(step),
            key: noise.at(step),
        };
        let next = ops::step(&context, &x, &out);
        if keep.contains(&step.index) {
            kept.extend([x, next.prediction]);
        }
        x = next.x_prev;
        if step.sigma > 0.0 && now[0].value.calls() < x.dims()[0] {
            now = passes(policies, &RowMap::identity(x.dims()[0]));
        }
        tick()?;
    }
    policy.compute.sync()?;
    let mut values = read_all(kept)?.into_iter();
    let transition = |_| {
        let (x, old_prediction) = values.next().zip(values.next()).expect("two for each step");
        Transition { x, old_prediction }
    };
    Ok(Trajectory { latents: x, transitions: keep.iter().map(transition).collect(), calls })
}

fn passes<'a>(policies: &[Weighted<Policy<'a>>], equal: &RowMap) -> Vec<Weighted<Pass<'a>>> {
    let pass = |p: &Weighted<Policy<'a>>| {
        let value = p.value.pass(Branch::All, equal).keeping();
        Weighted { weight: p.weight, value }
    };
    policies.iter().map(pass).collect()
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
