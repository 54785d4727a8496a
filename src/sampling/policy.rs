//! A policy: a network with its adapter, what it is conditioned on, and its guidance.

use burn::tensor::Tensor;

use crate::device::Compute;
use crate::lora::Lora;
use crate::model::row_map::RowMap;
use crate::model::{Conditioning, Denoiser, Inputs};
use crate::ops::Guidance;

/// Conditional and unconditional embeddings of a batch.
#[derive(Clone)]
pub struct PromptPair {
    pub cond: Conditioning,
    pub uncond: Conditioning,
}

/// Something with its share of a sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weighted<T> {
    pub weight: f64,
    pub value: T,
}

impl<T> Weighted<T> {
    /// All of it.
    pub fn whole(value: T) -> Self {
        Self { weight: 1.0, value }
    }
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
        let combine = match net.distilled() {
            true => Guidance::Off,
            false => Guidance::new(net.config().guidance(scale)),
        };
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

impl<'a> Policy<'a> {
    /// What a branch of the network is told of a batch whose equal rows, by `equal`, it computes
    /// once.
    pub fn pass(self, branch: Branch, equal: &RowMap) -> Pass<'a> {
        let PromptPair { cond, uncond } = self.prompts;
        let few = equal.firsts();
        let both = branch == Branch::All && self.guidance.combine != Guidance::Off;
        let cond = match branch {
            Branch::All if both => uncond.at(&few).then(cond.at(&few)),
            Branch::All | Branch::Conditional => cond.at(&few),
            Branch::Unconditional => uncond.at(&few),
        };
        let output = if both { equal.then(equal) } else { equal.clone() };
        Pass { policy: self, cond, both, equal: equal.clone(), output }
    }

    /// Which rows of latents `[B, ..]` are equal in value and in prompt.
    pub fn equal_rows(&self, latents: &[f32]) -> RowMap {
        let prompts = self.prompts.cond.rows.of();
        let rows = latents.chunks_exact((latents.len() / prompts.len()).max(1));
        RowMap::of_equal(&rows.zip(prompts).collect::<Vec<_>>())
    }
}

/// Passes of a policy's network over one batch.
pub struct Pass<'a> {
    policy: Policy<'a>,
    cond: Conditioning,
    /// Whether the unconditional rows go first.
    both: bool,
    /// The network's rows of the batch's, and of its output's.
    equal: RowMap,
    output: RowMap,
}

impl Pass<'_> {
    /// The same, for several passes without gradients: what the network makes of the prompts is
    /// kept.
    pub fn keeping(self) -> Self {
        Self { cond: self.cond.keeping(), ..self }
    }

    /// Rows of the batch that the network computes, guidance's not counted twice.
    pub fn calls(&self) -> usize {
        self.equal.few()
    }

    /// Hands `run` the network's inputs for latents `[B, ..]` at one timestep.
    pub fn run<R>(&self, x: &Tensor<4>, t: f64, run: impl FnOnce(Tensor<4>, Inputs) -> R) -> R {
        let x = self.equal.take(x.clone());
        let x = if self.both { Tensor::cat(vec![x.clone(), x], 0) } else { x };
        let conditions = self.cond.rows.few();
        let timesteps = vec![t as f32; conditions];
        let guidance = vec![self.policy.guidance.input; conditions];
        run(x, Inputs { timesteps: &timesteps, cond: &self.cond, guidance: &guidance })
    }

    /// The network's output for latents `[B, ..]` at one timestep: `[B, ..]`, or `[2B, ..]` with
    /// guidance, the unconditional rows first.
    pub fn output(&self, x: &Tensor<4>, t: f64) -> Tensor<4> {
        let Policy { net, lora, .. } = self.policy;
        self.spread(self.run(x, t, |x, inputs| net.forward(x, inputs, lora)))
    }

    /// The output of all rows from that of the network's.
    pub fn spread(&self, output: Tensor<4>) -> Tensor<4> {
        self.output.spread(output)
    }

    /// The gradient of the network's output from that of all rows.
    pub fn sum(&self, gradient: Tensor<4>) -> Tensor<4> {
        self.output.sum(gradient)
    }
}
