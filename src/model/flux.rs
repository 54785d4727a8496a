//! diffusers' `FluxTransformer2DModel`: FLUX.1 dev (with an embedding of the guidance scale) and schnell (without).

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use burn::tensor::{Device, Tensor, TensorData};
use serde_json::json;

use super::blocks::FeedForward;
use super::config::Config;
use super::denoiser::{Denoiser, Fixed, Inputs, State};
use super::dit::{JointAttention, JointSpec, Modulation, TimeTextEmbedding, hold, modulate, tokens};
use super::nn::{LayerNorm, Linear, gelu_tanh};
use super::weights::{Loader, Storage, Weights};
use crate::lora::Lora;

/// FLUX packs 2x2 latent pixels into a token.
const PACK: usize = 2;
/// Latent height and width of the pipeline's default, 1024 pixels.
const SAMPLE_SIZE: usize = 128;

/// diffusers' `FluxTransformerBlock`: text and image with weights of their own.
struct Double {
    norm1: [Modulation; 2],
    attn: JointAttention,
    norm2: LayerNorm,
    ff: [FeedForward; 2],
}

impl Double {
    fn load(l: &Loader, spec: JointSpec) -> Result<Self> {
        let width = spec.width;
        Ok(Self {
            norm1: [Modulation::load(l, "norm1", width, 6)?, Modulation::load(l, "norm1_context", width, 6)?],
            attn: JointAttention::load(&l.at("attn"), spec, true, [true, true])?,
            norm2: LayerNorm::plain(l, width, 1e-6),
            ff: [FeedForward::load(&l.at("ff"), width, false)?, FeedForward::load(&l.at("ff_context"), width, false)?],
        })
    }

    fn forward(&self, x: Tensor<3>, text: Tensor<3>, fixed: &Fixed, lora: Option<&Lora>) -> (Tensor<3>, Tensor<3>) {
        let [m, c] = [0, 1].map(|i| self.norm1[i].parts(&fixed.time, lora));
        let image_in = modulate(self.norm1[0].norm(x.clone()), &m[1], &m[0]);
        let text_in = modulate(self.norm1[1].norm(text.clone()), &c[1], &c[0]);
        let (image_out, text_out) = self.attn.forward(image_in, Some(text_in), fixed.rotary.as_ref(), lora);
        let rest = |x: Tensor<3>, out: Tensor<3>, m: &[Tensor<3>], ff: &FeedForward| {
            let x = x + out * m[2].clone();
            let h = modulate(self.norm2.forward(x.clone()), &m[4], &m[3]);
            x + ff.forward(h, lora) * m[5].clone()
        };
        let text_out = text_out.expect("attention over text gives text");
        (rest(x, image_out, &m, &self.ff[0]), rest(text, text_out, &c, &self.ff[1]))
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        let norms = self.norm1.iter().map(Modulation::linear);
        norms.chain(self.attn.linears()).chain(self.ff.iter().flat_map(|ff| [&ff.input, &ff.output]))
    }
}

/// diffusers' `FluxSingleTransformerBlock`: text and image in one stream, attention and feed-forward side by side.
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
            attn: JointAttention::load(&l.at("attn"), spec, false, [false, false])?,
            proj_mlp: Linear::load(l, "proj_mlp", width, inner)?,
            proj_out: Linear::load(l, "proj_out", width + inner, width)?,
        })
    }

    fn forward(&self, x: Tensor<3>, fixed: &Fixed, lora: Option<&Lora>) -> Tensor<3> {
        let m = self.norm.parts(&fixed.time, lora);
        let h = modulate(self.norm.norm(x.clone()), &m[1], &m[0]);
        let mlp = gelu_tanh(self.proj_mlp.forward(h.clone(), lora));
        let (attended, _) = self.attn.forward(h, None, fixed.rotary.as_ref(), lora);
        x + self.proj_out.forward(Tensor::cat(vec![attended, mlp], 2), lora) * m[2].clone()
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        [self.norm.linear()].into_iter().chain(self.attn.linears()).chain([&self.proj_mlp, &self.proj_out])
    }
}

/// The velocity network.
pub struct Flux {
    /// Channels of a latent: a quarter of the token's.
    channels: usize,
    context: [usize; 2],
    axes: Vec<usize>,
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
    /// Loads a `transformer` folder.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, of the wrong shape or not supported.
    pub fn load(dir: &Path, device: &Device, storage: Storage) -> Result<Self> {
        let c = Config::open(dir)?;
        c.only(&[("patch_size", json!(1))])?;
        let (heads, head) = (c.size("num_attention_heads", 24)?, c.size("attention_head_dim", 128)?);
        let width = heads * head;
        let channels = c.size("in_channels", 64)?;
        ensure!(channels > 0 && channels % (PACK * PACK) == 0, c.bad("in_channels", "is not a multiple of 4"));
        ensure!(c.size("out_channels", channels)? == channels, c.bad("out_channels", "must be null or in_channels"));
        let axes = match c.json["axes_dims_rope"].is_null() {
            true => vec![16, 56, 56],
            false => c.list("axes_dims_rope")?,
        };
        ensure!(
            axes.len() == 3 && axes.iter().sum::<usize>() == head && axes.iter().all(|a| a % 2 == 0),
            c.bad("axes_dims_rope", &format!("must be three even numbers that add up to attention_head_dim = {head}"))
        );
        let (joint, pooled) = (c.size("joint_attention_dim", 4096)?, c.size("pooled_projection_dim", 768)?);
        let guided = c.flag("guidance_embeds", false)?;
        let weights = Weights::open_dir(dir)?;
        let l = Loader::new(&weights, device, storage);
        let spec = JointSpec { width, heads, qk_norm: true };
        let double = |i: usize| Double::load(&l.at(format!("transformer_blocks.{i}")), spec);
        let single = |i: usize| Single::load(&l.at(format!("single_transformer_blocks.{i}")), spec);
        Ok(Self {
            channels: channels / (PACK * PACK),
            context: [joint, pooled],
            axes,
            device: device.clone(),
            time_text: TimeTextEmbedding::load(&l.at("time_text_embed"), width, pooled, guided)?,
            context_embedder: Linear::load(&l, "context_embedder", joint, width)?,
            x_embedder: Linear::load(&l, "x_embedder", channels, width)?,
            double: (0..c.size("num_layers", 19)?).map(double).collect::<Result<_>>()?,
            single: (0..c.size("num_single_layers", 38)?).map(single).collect::<Result<_>>()?,
            norm_out: Modulation::load(&l, "norm_out", width, 2)?,
            proj_out: Linear::load(&l, "proj_out", width, channels)?,
        })
    }

    /// cos and sin of the rotary embedding of positions (three numbers a token), `[1, 1, T, head]`.
    fn rotary(&self, ids: &[[f32; 3]]) -> [Tensor<4>; 2] {
        let mut values = [Vec::new(), Vec::new()];
        for id in ids {
            for (axis, &width) in self.axes.iter().enumerate() {
                for pair in 0..width / 2 {
                    let frequency = 10000f64.powf(-2.0 * pair as f64 / width as f64);
                    let (sin, cos) = (f64::from(id[axis]) * frequency).sin_cos();
                    values[0].extend([cos as f32; 2]);
                    values[1].extend([sin as f32; 2]);
                }
            }
        }
        let head: usize = self.axes.iter().sum();
        values.map(|v| Tensor::from_data(TensorData::new(v, [1, 1, ids.len(), head]), &self.device))
    }

    /// The state before the first block, from packed tokens `[B, S, 4 C]` at positions `image_ids`; text tokens are at
    /// `text_ids`. diffusers' own interface, which checks use.
    pub fn start_tokens(
        &self,
        packed: Tensor<3>,
        image_ids: &[[f32; 3]],
        text_ids: &[[f32; 3]],
        size: [usize; 2],
        inputs: Inputs,
    ) -> State {
        let image = self.x_embedder.forward(packed, None);
        let text = self.context_embedder.forward(inputs.cond.sequence.clone(), None);
        let rotary = Some(self.rotary(&[text_ids, image_ids].concat()));
        let fixed = Fixed { time: self.time_text.forward(&inputs), context: None, rotary, size };
        State { flow: vec![hold(image), hold(text)], fixed: Arc::new(fixed) }
    }

    /// The prediction of the last state's `n` image tokens, packed, `[B, n, 4 C]`.
    pub fn finish_tokens(&self, mut state: State, n: usize) -> Tensor<3> {
        let first = tokens(state.flow.swap_remove(0));
        let total = first.dims()[1];
        let image = first.narrow(1, total - n, n);
        let m = self.norm_out.parts(&state.fixed.time, None);
        self.proj_out.forward(modulate(self.norm_out.norm(image), &m[0], &m[1]), None)
    }
}

impl Denoiser for Flux {
    fn latent_shape(&self) -> [usize; 3] {
        [self.channels, SAMPLE_SIZE, SAMPLE_SIZE]
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

    fn context(&self) -> [usize; 2] {
        self.context
    }

    /// dev takes the scale as an input, schnell needs no guidance at all.
    fn distilled(&self) -> bool {
        true
    }

    fn linears(&self) -> Vec<&Linear> {
        self.double.iter().flat_map(Double::linears).chain(self.single.iter().flat_map(Single::linears)).collect()
    }

    fn start(&self, x: Tensor<4>, inputs: Inputs) -> State {
        let [b, c, h, w] = x.dims();
        let (rows, columns) = (h / PACK, w / PACK);
        let packed = x.reshape([b, c, rows, PACK, columns, PACK]).permute([0, 2, 4, 1, 3, 5]).reshape([
            b,
            rows * columns,
            c * PACK * PACK,
        ]);
        let image_ids: Vec<[f32; 3]> =
            (0..rows * columns).map(|i| [0.0, (i / columns) as f32, (i % columns) as f32]).collect();
        let text_ids = vec![[0.0; 3]; inputs.cond.sequence.dims()[1]];
        self.start_tokens(packed, &image_ids, &text_ids, [h, w], inputs)
    }

    fn blocks(&self) -> usize {
        self.double.len() + self.single.len()
    }

    fn block(&self, i: usize, state: State, lora: Option<&Lora>) -> State {
        let State { mut flow, fixed } = state;
        let flow = match i.checked_sub(self.double.len()) {
            None => {
                let [image, text]: [Tensor<4>; 2] = flow.try_into().expect("image and text");
                let (image, text) = self.double[i].forward(tokens(image), tokens(text), &fixed, lora);
                vec![hold(image), hold(text)]
            }
            Some(i) => {
                // From the first single block on, text and image are one stream, text first.
                let joined =
                    if flow.len() == 2 { Tensor::cat(vec![flow.remove(1), flow.remove(0)], 2) } else { flow.remove(0) };
                vec![hold(self.single[i].forward(tokens(joined), &fixed, lora))]
            }
        };
        State { flow, fixed }
    }

    fn finish(&self, state: State) -> Tensor<4> {
        let [h, w] = state.fixed.size;
        let (rows, columns) = (h / PACK, w / PACK);
        let y = self.finish_tokens(state, rows * columns);
        let (b, c) = (y.dims()[0], self.channels);
        y.reshape([b, rows, columns, c, PACK, PACK]).permute([0, 3, 1, 4, 2, 5]).reshape([b, c, h, w])
    }
}
