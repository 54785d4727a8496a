//! A policy: a network with its adapter, what it is conditioned on, and its guidance.

use burn::tensor::Tensor;

use crate::device::Compute;
use crate::lora::Lora;
use crate::model::{Conditioning, Denoiser, Inputs};
use crate::ops::Guidance;

/// Conditional and unconditional embeddings of a batch.
#[derive(Clone)]
pub struct PromptPair {
    pub cond: Conditioning,
    pub uncond: Conditioning,
}

/// The policy for one batch.
#[derive(Clone, Copy)]
pub struct Policy<'a> {
    pub compute: &'a Compute,
    pub net: &'a dyn Denoiser,
    pub lora: Option<&'a Lora>,
    pub guidance: GuidanceMode,
    pub prompts: &'a PromptPair,
}

/// How a run's guidance scale reaches a network.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GuidanceMode {
    /// Two passes that are combined, or one.
    pub combine: Guidance,
    /// The scale as an input, for distilled networks.
    pub input: f32,
}

impl GuidanceMode {
    /// A distilled network takes the scale as an input; others are run with and without text.
    pub fn new(net: &dyn Denoiser, scale: f64) -> Self {
        let combine = if net.distilled() { Guidance::Off } else { Guidance::new(scale) };
        Self { combine, input: scale as f32 }
    }
}

/// Which rows of the network's input a pass has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Branch {
    /// All that guidance needs: with it the unconditional rows first.
    All,
    Conditional,
    Unconditional,
}

impl Policy<'_> {
    /// The network's output for latents `[B, ..]` at one timestep: `[B, ..]`, or `[2B, ..]` with
    /// guidance, the unconditional rows first.
    pub fn output(&self, x: &Tensor<4>, t: f64) -> Tensor<4> {
        self.pass(Branch::All, x, t, |x, inputs| self.net.forward(x, inputs, self.lora))
    }

    /// Hands `run` the network's inputs for a branch.
    pub fn pass<R>(
        &self,
        branch: Branch,
        x: &Tensor<4>,
        t: f64,
        run: impl FnOnce(Tensor<4>, Inputs) -> R,
    ) -> R {
        let PromptPair { cond, uncond } = self.prompts;
        let both;
        let (x, cond) = match (branch, self.guidance.combine) {
            (Branch::Unconditional, _) => (x.clone(), uncond),
            (Branch::All, Guidance::Scale(_)) => {
                both = Conditioning::cat(vec![uncond.clone(), cond.clone()]);
                (Tensor::cat(vec![x.clone(), x.clone()], 0), &both)
            }
            (Branch::All, Guidance::Off) | (Branch::Conditional, _) => (x.clone(), cond),
        };
        let rows = x.dims()[0];
        let (timesteps, guidance) = (vec![t as f32; rows], vec![self.guidance.input; rows]);
        run(x, Inputs { timesteps: &timesteps, cond, guidance: &guidance })
    }
}
