//! diffusers' `SD3Transformer2DModel`: Stable Diffusion 3, 3.5 medium (dual attention) and 3.5 large.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use burn::tensor::{Device, Tensor, TensorData};

use super::blocks::FeedForward;
use super::config::Config;
use super::denoiser::{Denoiser, Fixed, Inputs, State};
use super::dit::{JointAttention, JointSpec, Modulation, TimeTextEmbedding, hold, modulate, tokens};
use super::nn::{Conv2d, LayerNorm, Linear};
use super::weights::{Loader, Storage, Weights};
use crate::lora::Lora;

/// diffusers' `JointTransformerBlock`.
struct Block {
    norm1: Modulation,
    norm1_context: Modulation,
    attn: JointAttention,
    /// A second attention of the image to itself (3.5 medium).
    attn2: Option<JointAttention>,
    norm2: LayerNorm,
    ff: FeedForward,
    /// The last block has none: its text goes nowhere.
    ff_context: Option<FeedForward>,
}

impl Block {
    fn load(l: &Loader, spec: JointSpec, dual: bool, last: bool) -> Result<Self> {
        let width = spec.width;
        Ok(Self {
            norm1: Modulation::load(l, "norm1", width, if dual { 9 } else { 6 })?,
            norm1_context: Modulation::load(l, "norm1_context", width, if last { 2 } else { 6 })?,
            attn: JointAttention::load(&l.at("attn"), spec, true, [true, !last])?,
            attn2: if dual { Some(JointAttention::load(&l.at("attn2"), spec, false, [true, false])?) } else { None },
            norm2: LayerNorm::plain(l, width, 1e-6),
            ff: FeedForward::load(&l.at("ff"), width, false)?,
            ff_context: if last { None } else { Some(FeedForward::load(&l.at("ff_context"), width, false)?) },
        })
    }

    fn forward(&self, x: Tensor<3>, text: Tensor<3>, time: &Tensor<2>, lora: Option<&Lora>) -> (Tensor<3>, Tensor<3>) {
        let m = self.norm1.parts(time, lora);
        let c = self.norm1_context.parts(time, lora);
        let normed = self.norm1.norm(x.clone());
        let image_in = modulate(normed.clone(), &m[1], &m[0]);
        let text_normed = self.norm1_context.norm(text.clone());
        // The last block's modulation is diffusers' AdaLayerNormContinuous, which has the scale first.
        let text_in = match self.ff_context {
            Some(_) => modulate(text_normed, &c[1], &c[0]),
            None => modulate(text_normed, &c[0], &c[1]),
        };
        let (image_out, text_out) = self.attn.forward(image_in, Some(text_in), None, lora);
        let mut x = x + image_out * m[2].clone();
        if let Some(attn2) = &self.attn2 {
            x = x + attn2.forward(modulate(normed, &m[7], &m[6]), None, None, lora).0 * m[8].clone();
        }
        let h = modulate(self.norm2.forward(x.clone()), &m[4], &m[3]);
        let x = x + self.ff.forward(h, lora) * m[5].clone();
        let text = match (&self.ff_context, text_out) {
            (Some(ff), Some(out)) => {
                let text = text + out * c[2].clone();
                let h = modulate(self.norm2.forward(text.clone()), &c[4], &c[3]);
                text + ff.forward(h, lora) * c[5].clone()
            }
            _ => text,
        };
        (x, text)
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        [self.norm1.linear(), self.norm1_context.linear()]
            .into_iter()
            .chain(self.attn.linears())
            .chain(self.attn2.iter().flat_map(JointAttention::linears))
            .chain([&self.ff].into_iter().chain(&self.ff_context).flat_map(|ff| [&ff.input, &ff.output]))
    }
}

/// The velocity network.
pub struct Sd3 {
    channels: usize,
    sample_size: usize,
    patch: usize,
    width: usize,
    context: [usize; 2],
    patches: Conv2d,
    /// Position embedding of the largest image, `[1, side, side, width]`.
    positions: Tensor<4>,
    time_text: TimeTextEmbedding,
    context_embedder: Linear,
    blocks: Vec<Block>,
    norm_out: Modulation,
    proj_out: Linear,
}

impl Sd3 {
    /// Loads a `transformer` folder.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, of the wrong shape or not supported.
    pub fn load(dir: &Path, device: &Device, storage: Storage) -> Result<Self> {
        let c = Config::open(dir)?;
        let (heads, head) = (c.size("num_attention_heads", 18)?, c.size("attention_head_dim", 64)?);
        let width = heads * head;
        ensure!(width > 0, c.bad("num_attention_heads", "must be positive"));
        let qk_norm = match c.json["qk_norm"].as_str() {
            None if c.json["qk_norm"].is_null() => false,
            Some("rms_norm") => true,
            _ => return Err(c.bad("qk_norm", "is not supported; rms_norm and null are")),
        };
        let projection = c.size("caption_projection_dim", 1152)?;
        ensure!(projection == width, c.bad("caption_projection_dim", &format!("must be the width, {width}")));
        let (patch, channels) = (c.size("patch_size", 2)?, c.size("in_channels", 16)?);
        let out = c.size("out_channels", if c.json.get("out_channels").is_some() { channels } else { 16 })?;
        ensure!(out == channels, c.bad("out_channels", &format!("must be in_channels = {channels}")));
        ensure!(patch > 0, c.bad("patch_size", "must be positive"));
        let (sample_size, side) = (c.size("sample_size", 128)?, c.size("pos_embed_max_size", 96)?);
        let layers = c.size("num_layers", 18)?;
        let dual = c.list("dual_attention_layers")?;
        let (joint, pooled) = (c.size("joint_attention_dim", 4096)?, c.size("pooled_projection_dim", 2048)?);
        let weights = Weights::open_dir(dir)?;
        let l = Loader::new(&weights, device, storage);
        let positions = if l.has("pos_embed.pos_embed") {
            l.tensor("pos_embed.pos_embed", [1, side * side, width])?
        } else {
            positions(side, (sample_size / patch).max(1), width, device)
        };
        let spec = JointSpec { width, heads, qk_norm };
        let block = |i: usize| {
            let l = l.at(format!("transformer_blocks.{i}"));
            Block::load(&l, spec, dual.contains(&i), i + 1 == layers)
        };
        Ok(Self {
            channels,
            sample_size,
            patch,
            width,
            context: [joint, pooled],
            patches: Conv2d::load(&l, "pos_embed.proj", channels, width, patch, patch, 0)?,
            positions: positions.reshape([1, side, side, width]),
            time_text: TimeTextEmbedding::load(&l.at("time_text_embed"), width, pooled, false)?,
            context_embedder: Linear::load(&l, "context_embedder", joint, width)?,
            blocks: (0..layers).map(block).collect::<Result<_>>()?,
            norm_out: Modulation::load(&l, "norm_out", width, 2)?,
            proj_out: Linear::load(&l, "proj_out", width, patch * patch * channels)?,
        })
    }
}

/// diffusers' sinusoidal position embedding `[1, side * side, width]`, in steps of `base / side` of a patch: first the
/// column's sines and cosines, then the row's.
fn positions(side: usize, base: usize, width: usize, device: &Device) -> Tensor<3> {
    let quarter = width / 4;
    let axis = |p: usize| {
        let at = p as f64 / (side as f64 / base as f64);
        let angle = move |i: usize| at / 10000f64.powf(i as f64 / quarter as f64);
        (0..quarter).map(move |i| angle(i).sin() as f32).chain((0..quarter).map(move |i| angle(i).cos() as f32))
    };
    let cell = |i: usize| axis(i % side).chain(axis(i / side));
    let values: Vec<f32> = (0..side * side).flat_map(cell).collect();
    Tensor::from_data(TensorData::new(values, [1, side * side, width]), device)
}

impl Denoiser for Sd3 {
    fn latent_shape(&self) -> [usize; 3] {
        [self.channels, self.sample_size, self.sample_size]
    }

    fn accepts(&self, [h, w]: [usize; 2]) -> Result<()> {
        let (p, side) = (self.patch, self.positions.dims()[1]);
        ensure!(
            h % p == 0 && w % p == 0 && h > 0 && w > 0 && h / p <= side && w / p <= side,
            "latents of {h}x{w}: the transformer takes multiples of {p} up to {}",
            side * p
        );
        Ok(())
    }

    fn tokens(&self, [h, w]: [usize; 2]) -> usize {
        (h / self.patch) * (w / self.patch)
    }

    fn context(&self) -> [usize; 2] {
        self.context
    }

    fn linears(&self) -> Vec<&Linear> {
        self.blocks.iter().flat_map(Block::linears).collect()
    }

    fn start(&self, x: Tensor<4>, inputs: Inputs) -> State {
        let [b, _, h, w] = x.dims();
        let (rows, columns, side) = (h / self.patch, w / self.patch, self.positions.dims()[1]);
        let centre = self.positions.clone().narrow(1, (side - rows) / 2, rows).narrow(2, (side - columns) / 2, columns);
        let image = self.patches.forward(x).reshape([b, self.width, rows * columns]).swap_dims(1, 2)
            + centre.reshape([1, rows * columns, self.width]);
        let text = self.context_embedder.forward(inputs.cond.sequence.clone(), None);
        let time = self.time_text.forward(&inputs);
        let fixed = Fixed { time, context: None, rotary: None, size: [h, w] };
        State { flow: vec![hold(image), hold(text)], fixed: Arc::new(fixed) }
    }

    fn blocks(&self) -> usize {
        self.blocks.len()
    }

    fn block(&self, i: usize, state: State, lora: Option<&Lora>) -> State {
        let [image, text]: [Tensor<4>; 2] = state.flow.try_into().expect("image and text");
        let (image, text) = self.blocks[i].forward(tokens(image), tokens(text), &state.fixed.time, lora);
        State { flow: vec![hold(image), hold(text)], fixed: state.fixed }
    }

    fn finish(&self, mut state: State) -> Tensor<4> {
        let image = tokens(state.flow.swap_remove(0));
        let m = self.norm_out.parts(&state.fixed.time, None);
        let y = self.proj_out.forward(modulate(self.norm_out.norm(image), &m[0], &m[1]), None);
        let ([h, w], p, b) = (state.fixed.size, self.patch, y.dims()[0]);
        y.reshape([b, h / p, w / p, p, p, self.channels]).permute([0, 5, 1, 3, 2, 4]).reshape([b, self.channels, h, w])
    }
}
