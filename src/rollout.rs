//! Sampling: the chain of DDIM steps, and the rollout that keeps what the update needs of it.

use anyhow::Result;
use burn::tensor::Tensor;

use crate::device::Compute;
use crate::lora::Lora;
use crate::model::Conditioning;
use crate::model::unet::UNet;
use crate::ops::ddim_step::ddim_step;
use crate::ops::{Coefficients, Guidance, NoiseKey};
use crate::schedule::Step;

/// The policy for one batch: a network, its adapter, its conditioning and its guidance.
pub struct Denoise<'a> {
    pub compute: &'a Compute,
    pub unet: &'a UNet,
    pub lora: Option<&'a Lora>,
    pub guidance: Guidance,
    pub cond: &'a Conditioning,
    pub uncond: &'a Conditioning,
}

impl Denoise<'_> {
    /// The network's output for latents `[B, ..]` at one timestep: `[B, ..]`, or `[2B, ..]` with guidance, the
    /// unconditional rows first.
    pub fn output(&self, x: &Tensor<4>, t: usize) -> Tensor<4> {
        let rows = x.dims()[0] * self.guidance.rows();
        let timesteps = vec![t as f32; rows];
        match self.guidance {
            Guidance::Off => self.unet.forward(x.clone(), &timesteps, self.cond, self.lora),
            Guidance::Scale(_) => {
                let both = Tensor::cat(vec![x.clone(), x.clone()], 0);
                self.unet.forward(both, &timesteps, &self.uncond.then(self.cond), self.lora)
            }
        }
    }

    /// The conditional output alone, `[B, ..]`.
    pub fn conditional(&self, x: &Tensor<4>, t: usize) -> Tensor<4> {
        self.unet.forward(x.clone(), &vec![t as f32; x.dims()[0]], self.cond, self.lora)
    }

    /// The unconditional output alone, `[B, ..]`.
    pub fn unconditional(&self, x: &Tensor<4>, t: usize) -> Tensor<4> {
        self.unet.forward(x.clone(), &vec![t as f32; x.dims()[0]], self.uncond, self.lora)
    }
}

/// What the update reads of one step of one batch.
#[derive(Clone)]
pub struct Visit {
    /// Latents before the step, `[B, C, H, W]`.
    pub x: Tensor<4>,
    /// The sampling policy's prediction after guidance.
    pub old: Tensor<4>,
}

/// A sampled batch.
pub struct Sampled {
    /// Final latents.
    pub latents: Tensor<4>,
    /// Every step's visit, in sampling order.
    pub visits: Vec<Visit>,
}

/// Samples a batch from initial latents; `tick` is called after each step.
///
/// # Errors
/// When the device fails.
pub fn sample(
    policy: &Denoise,
    latents: Tensor<4>,
    steps: &[Step],
    seed: u64,
    first_image: u32,
    tick: impl Fn(usize),
) -> Result<Sampled> {
    let mut x = latents;
    let mut visits = Vec::with_capacity(steps.len());
    for (i, step) in steps.iter().enumerate() {
        let out = policy.output(&x, step.t);
        let key = NoiseKey { seed, first_image, step: i as u32 };
        let next = ddim_step(policy.compute, &x, &out, policy.guidance, &Coefficients::from(step), key);
        visits.push(Visit { x, old: next.prediction });
        x = next.x_prev;
        tick(i);
    }
    policy.compute.sync()?;
    Ok(Sampled { latents: x, visits })
}
