//! diffusers' `SD3Transformer2DModel`: Stable Diffusion 3, 3.5 medium (dual attention) and 3.5
//! large.

use std::any::Any;
use std::sync::Arc;

use anyhow::{Result, ensure};
use burn::tensor::{Device, Tensor, TensorData};

use super::joint::{
    Gated, JointAttention, JointSpec, Modulation, Output, TimeTextEmbedding, block_shape, hold,
    tokens,
};
use crate::io::tensors::HostTensor;
use crate::lora::{LayerShape, Lora};
use crate::model::block_store::{BlockStore, StoredBlock};
use crate::model::blocks::FeedForward;
use crate::model::component::Component;
use crate::model::config::{BlockShape, Config, NetworkConfig};
use crate::model::denoiser::{Denoiser, Fixed, Hidden, Inputs, forward_of_latents};
use crate::model::loader::{Loader, Storage, Stream};
use crate::model::nn::{Conv2d, Linear, channels_last};
use crate::model::reference::ReferenceTensors;

/// A transformer's settings.
#[derive(Clone, Debug)]
pub struct Sd3Config {
    pub width: usize,
    pub heads: usize,
    pub layers: usize,
    /// Blocks with a second attention of the image to itself.
    pub dual: Vec<usize>,
    pub qk_norm: bool,
    /// Channels of a latent, its side, and the side of a patch.
    pub channels: usize,
    pub sample_size: usize,
    pub patch: usize,
    /// Patches along the side of the largest image.
    pub side: usize,
    /// Widths of the sequence and of the pooled text.
    pub context: [usize; 2],
}

impl Sd3Config {
    /// Reads a `transformer` folder's `config.json`.
    ///
    /// # Errors
    /// Names the field that is not supported.
    pub fn read(c: &Config) -> Result<Self> {
        /// Position embeddings beyond would not fit any device.
        const MOST_SIDE: usize = 512;
        let heads = c.count("num_attention_heads", 18)?;
        let width = heads * c.width("attention_head_dim", 64)?;
        let qk_norm = match c.json["qk_norm"].as_str() {
            None if c.json["qk_norm"].is_null() => false,
            Some("rms_norm") => true,
            _ => return Err(c.bad("qk_norm", "is not supported; rms_norm and null are")),
        };
        let projection = c.size("caption_projection_dim", 1152)?;
        ensure!(
            projection == width,
            c.bad("caption_projection_dim", &format!("must be the width, {width}"))
        );
        let channels = c.width("in_channels", 16)?;
        let named = c.json.get("out_channels").is_some();
        let out = c.size("out_channels", if named { channels } else { 16 })?;
        ensure!(
            out == channels,
            c.bad("out_channels", &format!("must be in_channels = {channels}"))
        );
        let side = c.width("pos_embed_max_size", 96)?;
        ensure!(
            side <= MOST_SIDE,
            c.bad("pos_embed_max_size", &format!("is more than {MOST_SIDE}"))
        );
        Ok(Self {
            width,
            heads,
            layers: c.count("num_layers", 18)?,
            dual: c.list("dual_attention_layers")?,
            qk_norm,
            channels,
            sample_size: c.sides("sample_size", 128)?[0],
            patch: c.width("patch_size", 2)?,
            side,
            context: [
                c.width("joint_attention_dim", 4096)?,
                c.width("pooled_projection_dim", 2048)?,
            ],
        })
    }
}

impl NetworkConfig for Sd3Config {
    fn latent_shape(&self) -> [usize; 3] {
        [self.channels, self.sample_size, self.sample_size]
    }

    fn context(&self) -> [usize; 2] {
        self.context
    }

    fn distilled(&self) -> bool {
        false
    }

    fn tokens(&self, [h, w]: [usize; 2]) -> usize {
        (h / self.patch) * (w / self.patch)
    }

    fn convolves(&self) -> bool {
        false
    }

    fn block_shapes(&self, [h, w]: [usize; 2], text: usize) -> Vec<BlockShape> {
        let image = (h / self.patch) * (w / self.patch);
        let block = block_shape(image + text, self.width, self.heads);
        let second = 0.5 * image as f64 * self.width as f64;
        let shape = |i: usize| {
            let extra = if self.dual.contains(&i) { second } else { 0.0 };
            BlockShape { stream: block.stream + extra, ..block }
        };
        (0..self.layers).map(shape).collect()
    }
}

/// diffusers' `JointTransformerBlock`.
struct JointBlock {
    norm1: Modulation,
    norm1_context: Modulation,
    attn: JointAttention,
    /// A second attention of the image to itself (3.5 medium).
    attn2: Option<JointAttention>,
    ff: FeedForward,
    /// The last block has none: its text goes nowhere.
    ff_context: Option<FeedForward>,
}

impl JointBlock {
    fn load(l: &Loader, spec: JointSpec, dual: bool, last: bool) -> Result<Self> {
        let width = spec.width;
        let text = if last { Output::Plain } else { Output::Projected };
        let attn2 = dual
            .then(|| JointAttention::load(&l.at("attn2"), spec, Output::Projected, None))
            .transpose()?;
        let ff = |part: &str| FeedForward::load(&l.at(part), width, false);
        Ok(Self {
            norm1: Modulation::load(l, "norm1", width, if dual { 9 } else { 6 })?,
            norm1_context: Modulation::load(l, "norm1_context", width, if last { 2 } else { 6 })?,
            attn: JointAttention::load(&l.at("attn"), spec, Output::Projected, Some(text))?,
            attn2,
            ff: ff("ff")?,
            ff_context: if last { None } else { Some(ff("ff_context")?) },
        })
    }

    fn forward(
        &self,
        x: Tensor<3>,
        text: Tensor<3>,
        fixed: &Fixed,
        lora: Option<&Lora>,
    ) -> (Tensor<3>, Tensor<3>) {
        // Of attention, feed-forward, and the second attention where there is one.
        let image = self.norm1.gated(fixed, lora);
        let image_in = image[0].shift.norm(x.clone());
        let Some(ff_context) = &self.ff_context else {
            let text_in = self.norm1_context.continuous(fixed, lora).norm(text.clone());
            let (out, _) = self.attn.forward(image_in, Some(text_in), None, lora);
            return (self.rest(x, out, &image, lora), text);
        };
        let context = self.norm1_context.gated(fixed, lora);
        let text_in = context[0].shift.norm(text.clone());
        let (image_out, text_out) = self.attn.forward(image_in, Some(text_in), None, lora);
        let x = self.rest(x, image_out, &image, lora);
        let text = text + text_out.expect("text has projections") * context[0].gate.clone();
        let h = context[1].shift.norm(text.clone());
        (x, text + ff_context.forward(h, lora) * context[1].gate.clone())
    }

    /// What follows the image's attention, whose result is `out`.
    fn rest(&self, x: Tensor<3>, out: Tensor<3>, m: &[Gated], lora: Option<&Lora>) -> Tensor<3> {
        // The second attention reads what the first did.
        let before = x.clone();
        let mut x = x + out * m[0].gate.clone();
        if let Some(attn2) = &self.attn2 {
            let (own, _) = attn2.forward(m[2].shift.norm(before), None, None, lora);
            x = x + own * m[2].gate.clone();
        }
        let h = m[1].shift.norm(x.clone());
        x + self.ff.forward(h, lora) * m[1].gate.clone()
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        let ff = [&self.ff].into_iter().chain(&self.ff_context);
        [self.norm1.linear(), self.norm1_context.linear()]
            .into_iter()
            .chain(self.attn.linears())
            .chain(self.attn2.iter().flat_map(JointAttention::linears))
            .chain(ff.flat_map(|ff| [&ff.input, &ff.output]))
    }
}

impl StoredBlock for JointBlock {
    type Layer = LayerShape;

    fn layers(&self) -> Vec<LayerShape> {
        self.linears().map(|l| l.shape.clone()).collect()
    }
}

/// The velocity network.
pub struct Sd3 {
    config: Sd3Config,
    patches: Conv2d,
    /// Position embedding of the largest image, `[1, side, side, width]`.
    positions: Tensor<4>,
    time_text: TimeTextEmbedding,
    context_embedder: Linear,
    blocks: BlockStore<JointBlock>,
    norm_out: Modulation,
    proj_out: Linear,
}

impl Sd3 {
    /// Loads a `transformer`.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, of the wrong shape or not supported.
    pub fn load(
        part: &Component,
        device: &Device,
        storage: Storage,
        stream: Option<Stream>,
    ) -> Result<Self> {
        let c = Sd3Config::read(&part.config)?;
        let weights = part.weights()?;
        let l = Loader::new(&weights, device, storage).streaming(stream);
        let (width, patch, side) = (c.width, c.patch, c.side);
        let [joint, pooled] = c.context;
        let patches = Conv2d::patches(&l.in_f32(), "pos_embed.proj", c.channels, width, patch)?;
        let table = if l.has("pos_embed.pos_embed") {
            l.tensor("pos_embed.pos_embed", [1, side * side, width])?
        } else {
            positions(side, (c.sample_size / patch).max(1), width, device)
        };
        let spec = JointSpec { width, heads: c.heads, qk_norm: c.qk_norm };
        let (dual, layers) = (c.dual.clone(), c.layers);
        let block = move |l: &Loader, i: usize| {
            let l = l.at(format!("transformer_blocks.{i}"));
            JointBlock::load(&l, spec, dual.contains(&i), i + 1 == layers)
        };
        Ok(Self {
            patches,
            positions: table.reshape([1, side, side, width]),
            time_text: TimeTextEmbedding::load(&l.at("time_text_embed"), width, pooled, false)?,
            context_embedder: Linear::load(&l, "context_embedder", joint, width)?,
            blocks: BlockStore::new(&l, c.layers, block)?,
            norm_out: Modulation::load(&l, "norm_out", width, 2)?,
            proj_out: Linear::load(&l.in_f32(), "proj_out", width, patch * patch * c.channels)?,
            config: c,
        })
    }
}

/// diffusers' sinusoidal position embedding `[1, side * side, width]`, in steps of `base / side` of
/// a patch: first the column's sines and cosines, then the row's.
fn positions(side: usize, base: usize, width: usize, device: &Device) -> Tensor<3> {
    let quarter = width / 4;
    let axis = |p: usize| {
        let at = p as f64 / (side as f64 / base as f64);
        let angle = move |i: usize| at / 10000f64.powf(i as f64 / quarter as f64);
        (0..quarter)
            .map(move |i| angle(i).sin() as f32)
            .chain((0..quarter).map(move |i| angle(i).cos() as f32))
    };
    let cell = |i: usize| axis(i % side).chain(axis(i / side));
    let values: Vec<f32> = (0..side * side).flat_map(cell).collect();
    Tensor::from_data(TensorData::new(values, [1, side * side, width]), device)
}

impl Denoiser for Sd3 {
    fn config(&self) -> &dyn NetworkConfig {
        &self.config
    }

    fn accepts(&self, [h, w]: [usize; 2]) -> Result<()> {
        let (p, side) = (self.config.patch, self.config.side);
        ensure!(
            h % p == 0 && w % p == 0 && h > 0 && w > 0 && h / p <= side && w / p <= side,
            "latents of {h}x{w}: the transformer takes multiples of {p} up to {}",
            side * p
        );
        Ok(())
    }

    fn linears(&self) -> Vec<LayerShape> {
        self.blocks.layers().to_vec()
    }

    fn start(&self, x: Tensor<4>, inputs: Inputs) -> Hidden {
        let [b, _, h, w] = x.dims();
        let Sd3Config { patch, side, width, .. } = self.config;
        let (rows, columns) = (h / patch, w / patch);
        let centre = self.positions.clone().narrow(1, (side - rows) / 2, rows);
        let centre = centre.narrow(2, (side - columns) / 2, columns);
        let image = self.patches.forward(channels_last(x)).reshape([b, rows * columns, width])
            + centre.reshape([1, rows * columns, width]);
        let text = self.context_embedder.forward(inputs.cond.sequence.clone(), None);
        let text = inputs.cond.rows.spread(text);
        let time = self.time_text.forward(&inputs);
        let fixed = Fixed::new(time, inputs.cond.clone(), [h, w]);
        Hidden { flow: vec![hold(image), hold(text)], fixed: Arc::new(fixed) }
    }

    fn blocks(&self) -> usize {
        self.blocks.len()
    }

    fn block(&self, i: usize, hidden: Hidden, lora: Option<&Lora>) -> Hidden {
        let [image, text]: [Tensor<4>; 2] = hidden.flow.try_into().expect("image and text");
        let (image, text) =
            self.blocks.get(i).forward(tokens(image), tokens(text), &hidden.fixed, lora);
        Hidden { flow: vec![hold(image), hold(text)], fixed: hidden.fixed }
    }

    fn keep(&self, i: usize) -> Option<Arc<dyn Any + Send + Sync>> {
        self.blocks.keep(i)
    }

    fn finish(&self, mut hidden: Hidden) -> Tensor<4> {
        let image = tokens(hidden.flow.swap_remove(0));
        let shift = self.norm_out.continuous(&hidden.fixed, None);
        let y = self.proj_out.forward(shift.norm(image), None);
        let ([h, w], p, b) = (hidden.fixed.size, self.config.patch, y.dims()[0]);
        let c = self.config.channels;
        let patches = y.reshape([b, h / p, w / p, p, p, c]);
        patches.permute([0, 5, 1, 3, 2, 4]).reshape([b, c, h, w])
    }

    fn forward_reference(
        &self,
        inputs: &ReferenceTensors,
        lora: Option<&Lora>,
    ) -> Result<HostTensor> {
        forward_of_latents(self, inputs, "in.hidden_states", lora)
    }
}
