//! diffusers' `Flux2Transformer2DModel`: FLUX.2 klein. Latents are packed and normalised by the
//! VAE: a latent pixel is a token.

mod block;
pub mod config;

use std::any::Any;
use std::sync::Arc;

use anyhow::Result;
use burn::tensor::{Device, Tensor};

use self::block::{Block, Double, Single};
use self::config::Flux2Config;
use super::joint::{
    Gated, Modulation, PackedReference, WAVES, hold, one_stream, predicted, tokens,
};
use crate::device::tensor::read;
use crate::io::tensors::HostTensor;
use crate::lora::{LayerShape, Lora};
use crate::model::block_store::BlockStore;
use crate::model::blocks::{TimeEmbedding, Waves};
use crate::model::component::Component;
use crate::model::config::NetworkConfig;
use crate::model::denoiser::{Denoiser, Fixed, Hidden, Inputs};
use crate::model::loader::{Loader, Storage, Stream};
use crate::model::nn::{Activation, Linear};
use crate::model::reference::ReferenceTensors;

/// The velocity network.
pub struct Flux2 {
    config: Flux2Config,
    device: Device,
    time: TimeEmbedding,
    guidance: Option<TimeEmbedding>,
    /// Of image and text in double blocks, and of single ones; all blocks of a kind share theirs.
    modulations: [Linear; 3],
    context_embedder: Linear,
    x_embedder: Linear,
    blocks: BlockStore<Block>,
    norm_out: Modulation,
    proj_out: Linear,
}

impl Flux2 {
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
        let c = Flux2Config::read(&part.config)?;
        let weights = part.weights()?;
        let l = Loader::new(&weights, device, storage).streaming(stream);
        let width = c.width;
        let own = c.clone();
        let block = move |l: &Loader, i: usize| {
            Ok(match i.checked_sub(own.double) {
                None => {
                    let l = l.at(format!("transformer_blocks.{i}"));
                    Block::Double(Box::new(Double::load(&l, &own)?))
                }
                Some(i) => {
                    let l = l.at(format!("single_transformer_blocks.{i}"));
                    Block::Single(Box::new(Single::load(&l, &own)?))
                }
            })
        };
        let embedding = |part: &str| {
            let waves = Waves { width: c.waves, ..WAVES };
            TimeEmbedding::load(&l.at("time_guidance_embed").at(part), waves, c.waves, width)
        };
        let modulation =
            |part: &str, parts: usize| Linear::load(&l.at(part), "linear", width, parts * width);
        Ok(Self {
            device: device.clone(),
            time: embedding("timestep_embedder")?,
            guidance: if c.guided { Some(embedding("guidance_embedder")?) } else { None },
            modulations: [
                modulation("double_stream_modulation_img", 6)?,
                modulation("double_stream_modulation_txt", 6)?,
                modulation("single_stream_modulation", 3)?,
            ],
            context_embedder: Linear::load(&l, "context_embedder", c.context, width)?,
            x_embedder: Linear::load(&l.in_f32(), "x_embedder", c.token, width)?,
            blocks: BlockStore::new(&l, c.double + c.single, block)?,
            norm_out: Modulation::load(&l, "norm_out", width, 2)?,
            proj_out: Linear::load(&l.in_f32(), "proj_out", width, c.token)?,
            config: c,
        })
    }

    /// The hidden before the first block, from tokens `[B, S, C]` at positions `image_ids`; text
    /// tokens are at `text_ids`.
    fn start_tokens(
        &self,
        packed: Tensor<3>,
        image_ids: &[[f32; 4]],
        text_ids: &[[f32; 4]],
        size: [usize; 2],
        inputs: Inputs,
    ) -> Hidden {
        let image = self.x_embedder.forward(packed, None);
        let text = self.context_embedder.forward(inputs.cond.sequence.clone(), None);
        let text = inputs.cond.rows.spread(text);
        let mut time = self.time.forward(inputs.timesteps, &self.device);
        if let Some(embedding) = self.guidance.as_ref().filter(|_| !inputs.guidance.is_empty()) {
            let scaled: Vec<f32> = inputs.guidance.iter().map(|g| 1000.0 * g).collect();
            time = time + embedding.forward(&scaled, &self.device);
        }
        let time = Activation::Silu.forward(time);
        let modulations = self.modulations.iter().map(|l| l.forward(time.clone(), None)).collect();
        let rotary = self.config.rotary.of(&[[text_ids, image_ids].concat()], &self.device);
        let fixed = Fixed::new(time, inputs.cond.clone(), size);
        let fixed = Fixed { rotary: Some(rotary), modulations, ..fixed };
        Hidden { flow: vec![hold(image), hold(text)], fixed: Arc::new(fixed) }
    }
}

impl Denoiser for Flux2 {
    fn config(&self) -> &dyn NetworkConfig {
        &self.config
    }

    fn linears(&self) -> Vec<LayerShape> {
        self.blocks.layers().to_vec()
    }

    fn start(&self, x: Tensor<4>, inputs: Inputs) -> Hidden {
        let [b, c, h, w] = x.dims();
        let packed = x.reshape([b, c, h * w]).permute([0, 2, 1]);
        let position = |i: usize| [0.0, (i / w) as f32, (i % w) as f32, 0.0];
        let image_ids: Vec<[f32; 4]> = (0..h * w).map(position).collect();
        let text = 0..inputs.cond.sequence.dims()[1];
        let text_ids: Vec<[f32; 4]> = text.map(|i| [0.0, 0.0, 0.0, i as f32]).collect();
        self.start_tokens(packed, &image_ids, &text_ids, [h, w], inputs)
    }

    fn blocks(&self) -> usize {
        self.blocks.len()
    }

    fn block(&self, i: usize, hidden: Hidden, lora: Option<&Lora>) -> Hidden {
        let Hidden { flow, fixed } = hidden;
        let (width, rows) = (self.config.width, &fixed.cond.rows);
        let gated = |i: usize| Gated::shared(&fixed.modulations[i], width, rows);
        let rotary = fixed.rotary.as_ref();
        let flow = match &*self.blocks.get(i) {
            Block::Double(block) => {
                let both: [Tensor<4>; 2] = flow.try_into().expect("image and text");
                let modulations = [gated(0), gated(1)];
                let both = block.forward(both.map(tokens), modulations, rotary, lora);
                both.map(hold).into()
            }
            Block::Single(block) => {
                vec![hold(block.forward(one_stream(flow), &gated(2)[0], rotary, lora))]
            }
        };
        Hidden { flow, fixed }
    }

    fn keep(&self, i: usize) -> Option<Arc<dyn Any + Send + Sync>> {
        self.blocks.keep(i)
    }

    fn finish(&self, hidden: Hidden) -> Tensor<4> {
        let [h, w] = hidden.fixed.size;
        let y = predicted(hidden, h * w, &self.norm_out, &self.proj_out);
        let b = y.dims()[0];
        y.permute([0, 2, 1]).reshape([b, self.config.token, h, w])
    }

    /// The class's forward takes packed tokens, their positions, and times from 0 to 1.
    fn forward_reference(
        &self,
        inputs: &ReferenceTensors,
        lora: Option<&Lora>,
    ) -> Result<HostTensor> {
        let r = PackedReference::<4>::read(inputs, &self.config, self.config.token)?;
        let n = r.packed.dims()[1];
        let guidance = r.guidance.unwrap_or_default();
        let own = Inputs { timesteps: &r.timesteps, cond: &r.cond, guidance: &guidance };
        let start = self.start_tokens(r.packed, &r.image_ids, &r.text_ids, [0, 0], own);
        let hidden = (0..self.blocks()).fold(start, |hidden, i| self.block(i, hidden, lora));
        let y = predicted(hidden, n, &self.norm_out, &self.proj_out);
        Ok(HostTensor::new("out.prediction", y.dims(), read(&y)?))
    }
}
