//! What the sampler, the trainer and the checks see of a network: a chain of blocks. The sampler runs it from end to
//! end; the update can differentiate it block by block, so that only one block's activations are held at a time.

use std::sync::Arc;

use anyhow::{Result, ensure};
use burn::tensor::Tensor;

use super::nn::Linear;
use crate::lora::Lora;

/// What a denoiser is conditioned on, for B images.
#[derive(Clone)]
pub struct Conditioning {
    /// Text tokens, `[B, T, D]`.
    pub sequence: Tensor<3>,
    /// Pooled text embedding, `[B, P]`, of the families that have one.
    pub pooled: Option<Tensor<2>>,
}

impl Conditioning {
    /// `n` rows from `start` on.
    pub fn rows(&self, start: usize, n: usize) -> Self {
        Self {
            sequence: self.sequence.clone().narrow(0, start, n),
            pooled: self.pooled.clone().map(|p| p.narrow(0, start, n)),
        }
    }

    /// All rows of all parts, in order.
    ///
    /// # Panics
    /// When there is no part, or some have a pooled embedding and others do not.
    pub fn cat(parts: Vec<Self>) -> Self {
        let pooled: Vec<Tensor<2>> = parts.iter().filter_map(|p| p.pooled.clone()).collect();
        assert!(pooled.is_empty() || pooled.len() == parts.len(), "all parts are of one family");
        Self {
            sequence: Tensor::cat(parts.into_iter().map(|p| p.sequence).collect(), 0),
            pooled: (!pooled.is_empty()).then(|| Tensor::cat(pooled, 0)),
        }
    }

    /// Row `0` repeated.
    pub fn repeat(&self, n: usize) -> Self {
        Self {
            sequence: self.sequence.clone().repeat_dim(0, n),
            pooled: self.pooled.clone().map(|p| p.repeat_dim(0, n)),
        }
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.sequence.dims()[0]
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The inputs of a network that are not its latents.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// One a row, 0..1000.
    pub timesteps: &'a [f32],
    pub cond: &'a Conditioning,
    /// The guidance scale, one a row, that a distilled network (FLUX.1-dev) takes as an input; others ignore it.
    pub guidance: &'a [f32],
}

/// What flows from block to block.
#[derive(Clone)]
pub struct State {
    /// The tensors that blocks change: image and text tokens as `[B, 1, T, D]`, or an image and its skip connections.
    pub flow: Vec<Tensor<4>>,
    /// What all blocks read and none changes; it depends on nothing that is trained.
    pub fixed: Arc<Fixed>,
}

/// What all blocks of a forward pass read.
pub struct Fixed {
    /// The embedding of time and of the pooled text, activated, `[B, D]`.
    pub time: Tensor<2>,
    /// The text that a UNet attends to.
    pub context: Option<Tensor<3>>,
    /// cos and sin of the rotary position embedding, `[1, 1, T, head]`.
    pub rotary: Option<[Tensor<4>; 2]>,
    /// Latent height and width.
    pub size: [usize; 2],
}

impl State {
    /// The state with other tensors.
    pub fn with(&self, flow: Vec<Tensor<4>>) -> Self {
        Self { flow, fixed: self.fixed.clone() }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.flow[0].dims()[0]
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `n` rows from `start` on. Rows do not see each other, in any block.
    pub fn rows(&self, start: usize, n: usize) -> Self {
        if (start, n) == (0, self.len()) {
            return self.clone();
        }
        let fixed = Fixed {
            time: self.fixed.time.clone().narrow(0, start, n),
            context: self.fixed.context.clone().map(|c| c.narrow(0, start, n)),
            rotary: self.fixed.rotary.clone(),
            size: self.fixed.size,
        };
        Self { flow: self.flow.iter().map(|t| t.clone().narrow(0, start, n)).collect(), fixed: Arc::new(fixed) }
    }
}

/// A network that predicts noise or velocity.
pub trait Denoiser: Send + Sync {
    /// Shape of the latents that it was made for, `[C, H, W]`.
    fn latent_shape(&self) -> [usize; 3];

    /// Checks that it takes latents of a height and width.
    ///
    /// # Errors
    /// Says which sizes it takes.
    fn accepts(&self, [h, w]: [usize; 2]) -> Result<()> {
        ensure!(h > 0 && w > 0, "latents of {h}x{w}: must not be empty");
        Ok(())
    }

    /// Tokens that it makes of a latent of a size: what dynamic shifting depends on.
    fn tokens(&self, size: [usize; 2]) -> usize;

    /// Widths of the sequence and of the pooled embedding (0 without one) that it is conditioned on.
    fn context(&self) -> [usize; 2];

    /// Whether guidance was distilled into it: one pass, with the scale as an input where it takes one, replaces the two
    /// of classifier-free guidance.
    fn distilled(&self) -> bool {
        false
    }

    /// The linear layers that a LoRA can target, in the order of the network.
    fn linears(&self) -> Vec<&Linear>;

    /// Everything before the first block, for latents `[B, C, H, W]`.
    fn start(&self, x: Tensor<4>, inputs: Inputs) -> State;

    fn blocks(&self) -> usize;

    /// Block `i`.
    fn block(&self, i: usize, state: State, lora: Option<&Lora>) -> State;

    /// Everything after the last block: the prediction, `[B, C, H, W]`.
    fn finish(&self, state: State) -> Tensor<4>;

    /// From latents `[B, C, H, W]` to the prediction of the same shape.
    fn forward(&self, x: Tensor<4>, inputs: Inputs, lora: Option<&Lora>) -> Tensor<4> {
        let state = (0..self.blocks()).fold(self.start(x, inputs), |state, i| self.block(i, state, lora));
        self.finish(state)
    }
}

/// Checks that text embeddings are of the widths that a network takes.
///
/// # Errors
/// Names `source`, the file or folder that they come from.
pub fn fits(net: &dyn Denoiser, widths: [usize; 2], source: &str) -> Result<()> {
    let [sequence, pooled] = net.context();
    ensure!(
        widths == [sequence, pooled],
        "{source}: text embeddings are {} wide and pooled {}, the network takes {sequence} and {pooled}; \
         the parts belong to different models",
        widths[0],
        widths[1]
    );
    Ok(())
}
