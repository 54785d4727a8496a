//! diffusers' `FluxTransformer2DModel`: FLUX.1 dev (with an embedding of the guidance scale) and
//! schnell (without).

use std::sync::Arc;

use anyhow::{Result, ensure};
use burn::tensor::{Device, Tensor, TensorData};
use serde_json::json;

use super::joint::{
    Gated, JointAttention, JointSpec, Modulation, Output, TimeTextEmbedding, block_shape, hold,
    tokens,
};
use crate::device::tensor::read;
use crate::io::tensors::HostTensor;
use crate::lora::{LayerShape, Lora};
use crate::model::blocks::FeedForward;
use crate::model::component::Component;
use crate::model::config::{BlockShape, Config, NetworkConfig};
use crate::model::denoiser::{Denoiser, Fixed, Hidden, Inputs};
use crate::model::loader::{Loader, Storage};
use crate::model::nn::{Activation, Linear};
use crate::model::reference::ReferenceTensors;

/// FLUX packs 2x2 latent pixels into a token.
const PACK: usize = 2;
/// Latent height and width of the pipeline's default, 1024 pixels.
const SAMPLE_SIZE: usize = 128;

/// A transformer's settings.
#[derive(Clone, Debug)]
pub struct FluxConfig {
    pub width: usize,
    pub heads: usize,
    /// Channels of a packed token.
    pub token: usize,
    /// Blocks with weights of their own for text and image, and blocks with one stream.
    pub double: usize,
    pub single: usize,
    /// Widths of the rotary embedding's three axes.
    pub axes: Vec<usize>,
    /// Widths of the sequence and of the pooled text.
    pub context: [usize; 2],
    /// Whether it takes the guidance scale as an input.
    pub guided: bool,
}

impl FluxConfig {
    /// Reads a `transformer` folder's `config.json`.
    ///
    /// # Errors
    /// Names the field that is not supported.
    pub fn read(c: &Config) -> Result<Self> {
        c.only(&[("patch_size", json!(1))])?;
        let heads = c.count("num_attention_heads", 24)?;
        let head = c.width("attention_head_dim", 128)?;
        let token = c.width("in_channels", 64)?;
        ensure!(token.is_multiple_of(PACK * PACK), c.bad("in_channels", "is not a multiple of 4"));
        ensure!(
            c.size("out_channels", token)? == token,
            c.bad("out_channels", "must be null or in_channels")
        );
        let axes = match c.list("axes_dims_rope")? {
            axes if c.json["axes_dims_rope"].is_null() && axes.is_empty() => vec![16, 56, 56],
            axes => axes,
        };
        let fits = axes.len() == 3 && axes.iter().sum::<usize>() == head;
        let what = format!("must be three even numbers that add up to attention_head_dim = {head}");
        ensure!(fits && axes.iter().all(|a| a % 2 == 0), c.bad("axes_dims_rope", &what));
        let (double, single) =
            (c.count_or_none("num_layers", 19)?, c.count_or_none("num_single_layers", 38)?);
        ensure!(double + single > 0, c.bad("num_layers", "leaves the network without a block"));
        Ok(Self {
            width: heads * head,
            heads,
            token,
            double,
            single,
            axes,
            context: [
                c.width("joint_attention_dim", 4096)?,
                c.width("pooled_projection_dim", 768)?,
            ],
            guided: c.flag("guidance_embeds", false)?,
        })
    }
}

impl NetworkConfig for FluxConfig {
    fn latent_shape(&self) -> [usize; 3] {
        [self.token / (PACK * PACK), SAMPLE_SIZE, SAMPLE_SIZE]
    }

    fn context(&self) -> [usize; 2] {
        self.context
    }

    /// dev takes the scale as an input, schnell needs no guidance at all.
    fn distilled(&self) -> bool {
        true
    }

    fn convolves(&self) -> bool {
        false
    }

    fn block_shapes(&self, [h, w]: [usize; 2], text: usize) -> Vec<BlockShape> {
        let block = block_shape((h / PACK) * (w / PACK) + text, self.width, self.heads);
        let single = BlockShape { wide: 1.25 * block.wide, ..block };
        let mut blocks = vec![block; self.double];
        blocks.extend(vec![single; self.single]);
        blocks
    }
}

/// diffusers' `FluxTransformerBlock`: text and image with weights of their own.
struct Double {
    norm1: [Modulation; 2],
    attn: JointAttention,
    ff: [FeedForward; 2],
}

impl Double {
    fn load(l: &Loader, spec: JointSpec) -> Result<Self> {
        let width = spec.width;
        let norm = |part: &str| Modulation::load(l, part, width, 6);
        let ff = |part: &str| FeedForward::load(&l.at(part), width, false);
        let out = Output::Projected;
        Ok(Self {
            norm1: [norm("norm1")?, norm("norm1_context")?],
            attn: JointAttention::load(&l.at("attn"), spec, out, Some(out))?,
            ff: [ff("ff")?, ff("ff_context")?],
        })
    }

    fn forward(
        &self,
        x: Tensor<3>,
        text: Tensor<3>,
        fixed: &Fixed,
        lora: Option<&Lora>,
    ) -> (Tensor<3>, Tensor<3>) {
        let [image, context] = [0, 1].map(|i| self.norm1[i].gated(fixed, lora));
        let image_in = image[0].shift.norm(x.clone());
        let text_in = context[0].shift.norm(text.clone());
        let rotary = fixed.rotary.as_ref();
        let (image_out, text_out) = self.attn.forward(image_in, Some(text_in), rotary, lora);
        let rest = |x: Tensor<3>, out: Tensor<3>, m: &[Gated], ff: &FeedForward| {
            let x = x + out * m[0].gate.clone();
            let h = m[1].shift.norm(x.clone());
            x + ff.forward(h, lora) * m[1].gate.clone()
        };
        let text_out = text_out.expect("attention over text gives text");
        (rest(x, image_out, &image, &self.ff[0]), rest(text, text_out, &context, &self.ff[1]))
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        let norms = self.norm1.iter().map(Modulation::linear);
        norms
            .chain(self.attn.linears())
            .chain(self.ff.iter().flat_map(|ff| [&ff.input, &ff.output]))
    }
}

/// diffusers' `FluxSingleTransformerBlock`: text and image in one stream, attention and
/// feed-forward side by side.
struct Single {
    norm: Modulation,
    attn: JointAttention,
    proj_mlp: Linear,
    proj_out: Linear,
}

impl Single {
    fn load(l: &Loader, spec: JointSpec) -> Result<Self> {
        let (width, inner) = (spec.width, 4 * spec.width);
        Ok(Self {
            norm: Modulation::load(l, "norm", width, 3)?,
            attn: JointAttention::load(&l.at("attn"), spec, Output::Plain, None)?,
            proj_mlp: Linear::load(l, "proj_mlp", width, inner)?,
            proj_out: Linear::load(l, "proj_out", width + inner, width)?,
        })
    }

    fn forward(&self, x: Tensor<3>, fixed: &Fixed, lora: Option<&Lora>) -> Tensor<3> {
        let m = &self.norm.gated(fixed, lora)[0];
        let h = m.shift.norm(x.clone());
        let mlp = Activation::GeluTanh.forward(self.proj_mlp.forward(h.clone(), lora));
        let (attended, _) = self.attn.forward(h, None, fixed.rotary.as_ref(), lora);
        let y = self.proj_out.forward(Tensor::cat(vec![attended, mlp], 2), lora);
        x + y * m.gate.clone()
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        [self.norm.linear()]
            .into_iter()
            .chain(self.attn.linears())
            .chain([&self.proj_mlp, &self.proj_out])
    }
}

/// The velocity network.
pub struct Flux {
    config: FluxConfig,
    device: Device,
    time_text: TimeTextEmbedding,
    context_embedder: Linear,
    x_embedder: Linear,
    double: Vec<Double>,
    single: Vec<Single>,
    norm_out: Modulation,
    proj_out: Linear,
}

impl Flux {
    /// Loads a `transformer`.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, of the wrong shape or not supported.
    pub fn load(part: &Component, device: &Device, storage: Storage) -> Result<Self> {
        let c = FluxConfig::read(&part.config)?;
        let weights = part.weights()?;
        let l = Loader::new(&weights, device, storage);
        let (width, [joint, pooled]) = (c.width, c.context);
        let spec = JointSpec { width, heads: c.heads, qk_norm: true };
        let double = |i: usize| Double::load(&l.at(format!("transformer_blocks.{i}")), spec);
        let single = |i: usize| Single::load(&l.at(format!("single_transformer_blocks.{i}")), spec);
        let time_text = l.at("time_text_embed");
        Ok(Self {
            device: device.clone(),
            time_text: TimeTextEmbedding::load(&time_text, width, pooled, c.guided)?,
            context_embedder: Linear::load(&l, "context_embedder", joint, width)?,
            x_embedder: Linear::load(&l, "x_embedder", c.token, width)?,
            double: (0..c.double).map(double).collect::<Result<_>>()?,
            single: (0..c.single).map(single).collect::<Result<_>>()?,
            norm_out: Modulation::load(&l, "norm_out", width, 2)?,
            proj_out: Linear::load(&l, "proj_out", width, c.token)?,
            config: c,
        })
    }

    /// cos and sin of the rotary embedding of positions (three numbers a token), `[1, T, 1, head]`.
    fn rotary(&self, ids: &[[f32; 3]]) -> [Tensor<4>; 2] {
        let mut values = [Vec::new(), Vec::new()];
        for id in ids {
            for (axis, &width) in self.config.axes.iter().enumerate() {
                for pair in 0..width / 2 {
                    let frequency = 10000f64.powf(-2.0 * pair as f64 / width as f64);
                    let (sin, cos) = (f64::from(id[axis]) * frequency).sin_cos();
                    values[0].extend([cos as f32; 2]);
                    values[1].extend([sin as f32; 2]);
                }
            }
        }
        let head: usize = self.config.axes.iter().sum();
        values.map(|v| Tensor::from_data(TensorData::new(v, [1, ids.len(), 1, head]), &self.device))
    }

    /// The hidden before the first block, from packed tokens `[B, S, 4 C]` at positions
    /// `image_ids`; text tokens are at `text_ids`.
    fn start_tokens(
        &self,
        packed: Tensor<3>,
        image_ids: &[[f32; 3]],
        text_ids: &[[f32; 3]],
        size: [usize; 2],
        inputs: Inputs,
    ) -> Hidden {
        let image = self.x_embedder.forward(packed, None);
        let text = self.context_embedder.forward(inputs.cond.sequence.clone(), None);
        let text = inputs.cond.rows.spread(text);
        let rotary = Some(self.rotary(&[text_ids, image_ids].concat()));
        let (time, cond) = (self.time_text.forward(&inputs), inputs.cond.clone());
        let fixed = Fixed { time, cond, rotary, size };
        Hidden { flow: vec![hold(image), hold(text)], fixed: Arc::new(fixed) }
    }

    /// The prediction of the last hidden's `n` image tokens, packed, `[B, n, 4 C]`.
    fn finish_tokens(&self, mut hidden: Hidden, n: usize) -> Tensor<3> {
        let first = tokens(hidden.flow.swap_remove(0));
        let total = first.dims()[1];
        let image = first.narrow(1, total - n, n);
        let shift = self.norm_out.continuous(&hidden.fixed, None);
        self.proj_out.forward(shift.norm(image), None)
    }
}

impl Denoiser for Flux {
    fn config(&self) -> &dyn NetworkConfig {
        &self.config
    }

    fn accepts(&self, [h, w]: [usize; 2]) -> Result<()> {
        ensure!(
            h % PACK == 0 && w % PACK == 0 && h > 0 && w > 0,
            "latents of {h}x{w}: the transformer takes multiples of {PACK}"
        );
        Ok(())
    }

    fn tokens(&self, [h, w]: [usize; 2]) -> usize {
        (h / PACK) * (w / PACK)
    }

    fn linears(&self) -> Vec<LayerShape> {
        let single = self.single.iter().flat_map(Single::linears);
        let all = self.double.iter().flat_map(Double::linears).chain(single);
        all.map(|l| l.shape.clone()).collect()
    }

    fn start(&self, x: Tensor<4>, inputs: Inputs) -> Hidden {
        let [b, c, h, w] = x.dims();
        let (rows, columns) = (h / PACK, w / PACK);
        let packed = x.reshape([b, c, rows, PACK, columns, PACK]).permute([0, 2, 4, 1, 3, 5]);
        let packed = packed.reshape([b, rows * columns, c * PACK * PACK]);
        let position = |i: usize| [0.0, (i / columns) as f32, (i % columns) as f32];
        let image_ids: Vec<[f32; 3]> = (0..rows * columns).map(position).collect();
        let text_ids = vec![[0.0; 3]; inputs.cond.sequence.dims()[1]];
        self.start_tokens(packed, &image_ids, &text_ids, [h, w], inputs)
    }

    fn blocks(&self) -> usize {
        self.double.len() + self.single.len()
    }

    fn block(&self, i: usize, hidden: Hidden, lora: Option<&Lora>) -> Hidden {
        let Hidden { mut flow, fixed } = hidden;
        let flow = match i.checked_sub(self.double.len()) {
            None => {
                let [image, text]: [Tensor<4>; 2] = flow.try_into().expect("image and text");
                let (image, text) =
                    self.double[i].forward(tokens(image), tokens(text), &fixed, lora);
                vec![hold(image), hold(text)]
            }
            Some(i) => {
                // From the first single block on, text and image are one stream, text first.
                let joined = if flow.len() == 2 {
                    Tensor::cat(vec![flow.remove(1), flow.remove(0)], 2)
                } else {
                    flow.remove(0)
                };
                vec![hold(self.single[i].forward(tokens(joined), &fixed, lora))]
            }
        };
        Hidden { flow, fixed }
    }

    fn finish(&self, hidden: Hidden) -> Tensor<4> {
        let [h, w] = hidden.fixed.size;
        let (rows, columns) = (h / PACK, w / PACK);
        let y = self.finish_tokens(hidden, rows * columns);
        let (b, c) = (y.dims()[0], self.latent_shape()[0]);
        let pixels = y.reshape([b, rows, columns, c, PACK, PACK]);
        pixels.permute([0, 3, 1, 4, 2, 5]).reshape([b, c, h, w])
    }

    /// The class's forward takes packed tokens, their positions, and times from 0 to 1.
    fn forward_reference(
        &self,
        inputs: &ReferenceTensors,
        lora: Option<&Lora>,
    ) -> Result<HostTensor> {
        let packed = inputs.tensor::<3>("in.hidden_states")?;
        let [rows, n, channels] = packed.dims();
        let token = self.config.token;
        ensure!(
            channels == token,
            "{}: in.hidden_states has tokens of {channels} channels, the network takes {token}",
            inputs.path().display()
        );
        let cond = inputs.conditioning(rows, &self.config)?;
        let ids = |name: &str, count: usize| -> Result<Vec<[f32; 3]>> {
            let values = inputs.values(name, 3 * count)?;
            Ok(values.chunks_exact(3).map(|c| [c[0], c[1], c[2]]).collect())
        };
        let image_ids = ids("in.img_ids", n)?;
        let text_ids = ids("in.txt_ids", cond.sequence.dims()[1])?;
        let times = inputs.values("in.timestep", rows)?;
        let timesteps: Vec<f32> = times.iter().map(|t| 1000.0 * t).collect();
        let guidance = if inputs.has("in.guidance") {
            inputs.values("in.guidance", rows)?
        } else {
            vec![1.0; rows]
        };
        let own = Inputs { timesteps: &timesteps, cond: &cond, guidance: &guidance };
        let start = self.start_tokens(packed, &image_ids, &text_ids, [0, 0], own);
        let hidden = (0..self.blocks()).fold(start, |hidden, i| self.block(i, hidden, lora));
        let y = self.finish_tokens(hidden, n);
        Ok(HostTensor::new("out.prediction", y.dims(), read(&y)?))
    }
}
