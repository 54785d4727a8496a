//! What the sampler, the trainer and the checks see of a network: a chain of blocks. The sampler
//! runs it from end to end; the update can differentiate it block by block, so that only one
//! block's activations are held at a time.

use std::any::Any;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use burn::tensor::Tensor;

use super::conditioning::Conditioning;
use super::config::NetworkConfig;
use super::reference::ReferenceTensors;
use crate::device::tensor::read;
use crate::io::tensors::HostTensor;
use crate::lora::{LayerShape, Lora};

/// The inputs of a network that are not its latents.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// One a condition, 0..1000.
    pub timesteps: &'a [f32],
    pub cond: &'a Conditioning,
    /// The guidance scale, one a condition, that a distilled network (FLUX.1-dev) takes as an
    /// input; others ignore it.
    pub guidance: &'a [f32],
}

/// What flows from block to block.
#[derive(Clone)]
pub struct Hidden {
    /// The tensors that blocks change: image and text tokens as `[B, 1, T, D]`, or an image and its
    /// skip connections.
    pub flow: Vec<Tensor<4>>,
    /// What all blocks read and none changes; it depends on nothing that is trained.
    pub fixed: Arc<Fixed>,
}

/// What all blocks of a forward pass read.
pub struct Fixed {
    /// The embedding of time and of the pooled text, activated, `[P, D]`: one a condition.
    pub time: Tensor<2>,
    /// The text, and which condition each row has.
    pub cond: Conditioning,
    /// cos and sin of the rotary position embedding, `[1, T, 1, head]`, or `[P, ..]` where
    /// positions depend on the condition.
    pub rotary: Option<[Tensor<4>; 2]>,
    /// What blocks that share it are modulated with, `[P, ..]` each.
    pub modulations: Vec<Tensor<2>>,
    /// Latent height and width.
    pub size: [usize; 2],
}

impl Fixed {
    /// Of a network without rotary embedding and shared modulations.
    pub fn new(time: Tensor<2>, cond: Conditioning, size: [usize; 2]) -> Self {
        Self { time, cond, rotary: None, modulations: Vec::new(), size }
    }

    /// The same for `n` rows from `start` on.
    fn rows(&self, start: usize, n: usize) -> Self {
        let (_, few) = self.cond.rows.narrow(start, n);
        let (from, few) = (few.start, few.len());
        let narrow = |t: &Tensor<4>| match t.dims()[0] {
            1 => t.clone(),
            _ => t.clone().narrow(0, from, few),
        };
        Self {
            time: self.time.clone().narrow(0, from, few),
            cond: self.cond.narrow(start, n),
            rotary: self.rotary.as_ref().map(|turns| turns.each_ref().map(narrow)),
            modulations: self.modulations.iter().map(|m| m.clone().narrow(0, from, few)).collect(),
            size: self.size,
        }
    }
}

impl Hidden {
    /// The same with other tensors.
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
        Self {
            flow: self.flow.iter().map(|t| t.clone().narrow(0, start, n)).collect(),
            fixed: Arc::new(self.fixed.rows(start, n)),
        }
    }
}

/// A network that predicts noise or velocity.
pub trait Denoiser: Send + Sync {
    /// What it is from outside.
    fn config(&self) -> &dyn NetworkConfig;

    /// Shape of the latents that it was made for, `[C, H, W]`.
    fn latent_shape(&self) -> [usize; 3] {
        self.config().latent_shape()
    }

    /// Widths of the sequence and of the pooled embedding (0 without one) that it is conditioned
    /// on.
    fn context(&self) -> [usize; 2] {
        self.config().context()
    }

    /// Whether guidance was distilled into it: one pass, with the scale as an input where it takes
    /// one, replaces the two of classifier-free guidance.
    fn distilled(&self) -> bool {
        self.config().distilled()
    }

    /// Checks that it takes latents of a height and width.
    ///
    /// # Errors
    /// Says which sizes it takes.
    fn accepts(&self, [h, w]: [usize; 2]) -> Result<()> {
        ensure!(h > 0 && w > 0, "latents of {h}x{w}: must not be empty");
        Ok(())
    }

    /// The layers that a LoRA can target: linear ones in the order of the network, then
    /// convolutions.
    fn linears(&self) -> Vec<LayerShape>;

    /// Everything before the first block, for latents `[B, C, H, W]`.
    fn start(&self, x: Tensor<4>, inputs: Inputs) -> Hidden;

    /// Number of blocks.
    fn blocks(&self) -> usize;

    /// Block `i`.
    fn block(&self, i: usize, hidden: Hidden, lora: Option<&Lora>) -> Hidden;

    /// Keeps what a block is read from for as long as the result lives: for several runs of it,
    /// where blocks are read when their turn comes.
    fn keep(&self, _i: usize) -> Option<Arc<dyn Any + Send + Sync>> {
        None
    }

    /// Everything after the last block: the prediction, `[B, C, H, W]`.
    fn finish(&self, hidden: Hidden) -> Tensor<4>;

    /// From latents `[B, C, H, W]` to the prediction of the same shape.
    fn forward(&self, x: Tensor<4>, inputs: Inputs, lora: Option<&Lora>) -> Tensor<4> {
        let start = self.start(x, inputs);
        self.finish((0..self.blocks()).fold(start, |hidden, i| self.block(i, hidden, lora)))
    }

    /// The prediction for the inputs of a reference file, which are those of the class's own
    /// `forward`; with its shape.
    ///
    /// # Errors
    /// When an input is missing or does not fit.
    fn forward_reference(
        &self,
        inputs: &ReferenceTensors,
        lora: Option<&Lora>,
    ) -> Result<HostTensor>;
}

/// The forward of a class that takes latents under `name` and timesteps from 0 to 1000.
///
/// # Errors
/// When an input is missing or does not fit the network.
pub fn forward_of_latents(
    net: &dyn Denoiser,
    inputs: &ReferenceTensors,
    name: &str,
    lora: Option<&Lora>,
) -> Result<HostTensor> {
    let path = inputs.path().display();
    let x = inputs.tensor::<4>(name)?;
    let [rows, channels, h, w] = x.dims();
    let own = net.latent_shape()[0];
    ensure!(
        channels == own,
        "{path}: {name} has {channels} channels, the network takes latents of {own} channels"
    );
    net.accepts([h, w]).with_context(|| format!("{path}: {name}"))?;
    let timesteps = inputs.values("in.timestep", rows)?;
    let cond = inputs.conditioning(rows, net.config())?;
    let y = net.forward(x, Inputs { timesteps: &timesteps, cond: &cond, guidance: &[] }, lora);
    Ok(HostTensor::new(name, y.dims(), read(&y)?))
}
