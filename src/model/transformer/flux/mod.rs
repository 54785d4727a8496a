//! diffusers' `FluxTransformer2DModel`: FLUX.1 dev (with an embedding of the guidance scale) and
//! schnell (without).

pub mod config;

use std::any::Any;
use std::sync::Arc;

use anyhow::{Result, ensure};
use burn::tensor::{Device, Tensor};

use self::config::{FluxConfig, PACK};
use super::joint::{
    Gated, JointAttention, JointSpec, Modulation, Output, PackedReference, TimeTextEmbedding, hold,
    one_stream, predicted, tokens,
};
use crate::device::tensor::read;
use crate::io::tensors::HostTensor;
use crate::lora::{LayerShape, Lora};
use crate::model::block_store::{BlockStore, StoredBlock};
use crate::model::blocks::FeedForward;
use crate::model::component::Component;
use crate::model::config::NetworkConfig;
use crate::model::denoiser::{Denoiser, Fixed, Hidden, Inputs};
use crate::model::loader::{Loader, Storage, Stream};
use crate::model::nn::{Activation, Linear};
use crate::model::reference::ReferenceTensors;

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

enum Block {
    Double(Box<Double>),
    Single(Box<Single>),
}

impl StoredBlock for Block {
    type Layer = LayerShape;

    fn layers(&self) -> Vec<LayerShape> {
        match self {
            Self::Double(block) => block.linears().map(|l| l.shape.clone()).collect(),
            Self::Single(block) => block.linears().map(|l| l.shape.clone()).collect(),
        }
    }
}

/// The velocity network.
pub struct Flux {
    config: FluxConfig,
    device: Device,
    time_text: TimeTextEmbedding,
    context_embedder: Linear,
    x_embedder: Linear,
    blocks: BlockStore<Block>,
    norm_out: Modulation,
    proj_out: Linear,
}

impl Flux {
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
        let c = FluxConfig::read(&part.config)?;
        let weights = part.weights()?;
        let l = Loader::new(&weights, device, storage).streaming(stream);
        let (width, [joint, pooled]) = (c.width, c.context);
        let spec = JointSpec { width, heads: c.heads, qk_norm: true };
        let double = c.double;
        let block = move |l: &Loader, i: usize| {
            Ok(match i.checked_sub(double) {
                None => {
                    let l = l.at(format!("transformer_blocks.{i}"));
                    Block::Double(Box::new(Double::load(&l, spec)?))
                }
                Some(i) => {
                    let l = l.at(format!("single_transformer_blocks.{i}"));
                    Block::Single(Box::new(Single::load(&l, spec)?))
                }
            })
        };
        let time_text = l.at("time_text_embed");
        Ok(Self {
            device: device.clone(),
            time_text: TimeTextEmbedding::load(&time_text, width, pooled, c.guided)?,
            context_embedder: Linear::load(&l, "context_embedder", joint, width)?,
            x_embedder: Linear::load(&l.in_f32(), "x_embedder", c.token, width)?,
            blocks: BlockStore::new(&l, c.double + c.single, block)?,
            norm_out: Modulation::load(&l, "norm_out", width, 2)?,
            proj_out: Linear::load(&l.in_f32(), "proj_out", width, c.token)?,
            config: c,
        })
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
        let rotary = self.config.rotary.of(&[[text_ids, image_ids].concat()], &self.device);
        let fixed = Fixed::new(self.time_text.forward(&inputs), inputs.cond.clone(), size);
        let fixed = Fixed { rotary: Some(rotary), ..fixed };
        Hidden { flow: vec![hold(image), hold(text)], fixed: Arc::new(fixed) }
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

    fn linears(&self) -> Vec<LayerShape> {
        self.blocks.layers().to_vec()
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
        self.blocks.len()
    }

    fn block(&self, i: usize, hidden: Hidden, lora: Option<&Lora>) -> Hidden {
        let Hidden { flow, fixed } = hidden;
        let flow = match &*self.blocks.get(i) {
            Block::Double(block) => {
                let [image, text]: [Tensor<4>; 2] = flow.try_into().expect("image and text");
                let (image, text) = block.forward(tokens(image), tokens(text), &fixed, lora);
                vec![hold(image), hold(text)]
            }
            Block::Single(block) => {
                vec![hold(block.forward(one_stream(flow), &fixed, lora))]
            }
        };
        Hidden { flow, fixed }
    }

    fn keep(&self, i: usize) -> Option<Arc<dyn Any + Send + Sync>> {
        self.blocks.keep(i)
    }

    fn finish(&self, hidden: Hidden) -> Tensor<4> {
        let [h, w] = hidden.fixed.size;
        let (rows, columns) = (h / PACK, w / PACK);
        let y = predicted(hidden, rows * columns, &self.norm_out, &self.proj_out);
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
        let r = PackedReference::<3>::read(inputs, &self.config, self.config.token)?;
        let [rows, n, _] = r.packed.dims();
        let guidance = r.guidance.unwrap_or_else(|| vec![1.0; rows]);
        let own = Inputs { timesteps: &r.timesteps, cond: &r.cond, guidance: &guidance };
        let start = self.start_tokens(r.packed, &r.image_ids, &r.text_ids, [0, 0], own);
        let hidden = (0..self.blocks()).fold(start, |hidden, i| self.block(i, hidden, lora));
        let y = predicted(hidden, n, &self.norm_out, &self.proj_out);
        Ok(HostTensor::new("out.prediction", y.dims(), read(&y)?))
    }
}
