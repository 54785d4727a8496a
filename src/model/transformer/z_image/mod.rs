//! diffusers' `ZImageTransformer2DModel`: Z-Image and Z-Image-Turbo. Captions and pictures are
//! refined apart and then run as one sequence, the picture first. Both are filled up to multiples
//! of 32 tokens with a learned one, which is attended to like the others.

mod block;
pub mod config;

use std::any::Any;
use std::sync::Arc;

use anyhow::{Result, ensure};
use burn::tensor::{Device, Tensor};

use self::block::ZImageBlock;
use self::config::{PATCH, ZImageConfig, filled};
use super::joint::{WAVES, hold, tokens};
use super::rotary::Turns;
use crate::device::tensor::{read, upload};
use crate::io::tensors::HostTensor;
use crate::kernels::layer_norm::layer_norm;
use crate::lora::{LayerShape, Lora};
use crate::model::block_store::BlockStore;
use crate::model::blocks::TimeEmbedding;
use crate::model::component::Component;
use crate::model::conditioning::Conditioning;
use crate::model::config::NetworkConfig;
use crate::model::denoiser::{Denoiser, Fixed, Hidden, Inputs};
use crate::model::loader::{Loader, Storage, Stream};
use crate::model::nn::{Activation, Linear, RmsNorm};
use crate::model::reference::ReferenceTensors;
use crate::model::row_map::RowMap;

/// Width between the two layers of the time embedding.
const TIME_INNER: usize = 1024;
/// eps of the last norm.
const FINAL_EPS: f64 = 1e-6;

/// A caption's way in.
struct CaptionEmbedder {
    norm: RmsNorm,
    linear: Linear,
    /// What fills captions up, `[1, 1, width]`.
    pad: Tensor<3>,
}

impl CaptionEmbedder {
    fn load(l: &Loader, c: &ZImageConfig) -> Result<Self> {
        Ok(Self {
            norm: RmsNorm::load(l, "cap_embedder.0", c.context, c.eps)?,
            linear: Linear::load(l, "cap_embedder.1", c.context, c.width)?,
            pad: l.tensor::<2>("cap_pad_token", [1, c.width])?.unsqueeze(),
        })
    }

    /// Captions `[P, L, context]` of so many tokens each -> `[P, T, width]`, filled up.
    fn forward(&self, captions: Tensor<3>, lengths: &[usize], t: usize) -> Tensor<3> {
        let [p, l, width] = captions.dims();
        let device = captions.device();
        let captions = match l < t {
            true => Tensor::cat(vec![captions, Tensor::zeros([p, t - l, width], &device)], 1),
            false => captions.narrow(1, 0, t),
        };
        let own = lengths.iter().flat_map(|n| (0..t).map(move |i| f32::from(u8::from(i < *n))));
        let own = upload(&own.collect::<Vec<f32>>(), [p, t, 1], &device);
        let embedded = self.linear.forward(self.norm.forward(captions), None);
        embedded * own.clone() + self.pad.clone() * (1.0 - own)
    }
}

/// The velocity network.
pub struct ZImage {
    config: ZImageConfig,
    device: Device,
    time: TimeEmbedding,
    captions: CaptionEmbedder,
    x_embedder: Linear,
    /// What fills pictures up, `[1, 1, width]`.
    x_pad: Tensor<3>,
    /// The picture's refiners, the caption's, and the layers over both.
    blocks: BlockStore<ZImageBlock>,
    final_scale: Linear,
    final_linear: Linear,
    /// `[1, width]`: the last norm shifts nothing.
    zero: Tensor<2>,
}

impl ZImage {
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
        let c = ZImageConfig::read(&part.config)?;
        let weights = part.weights()?;
        let l = Loader::new(&weights, device, storage).streaming(stream);
        let (width, token) = (c.width, PATCH * PATCH * c.channels);
        let own = c.clone();
        let block = move |l: &Loader, i: usize| {
            let refiners = own.refiners;
            let (part, modulated) = match i {
                i if i < refiners => (format!("noise_refiner.{i}"), true),
                i if i < 2 * refiners => (format!("context_refiner.{}", i - refiners), false),
                i => (format!("layers.{}", i - 2 * refiners), true),
            };
            ZImageBlock::load(&l.at(part), &own, modulated)
        };
        let last = l.at("all_final_layer.2-1");
        Ok(Self {
            device: device.clone(),
            time: TimeEmbedding::load_as(
                &l.at("t_embedder"),
                ["mlp.0", "mlp.2"],
                WAVES,
                [WAVES.width, TIME_INNER, c.modulation()],
            )?,
            captions: CaptionEmbedder::load(&l, &c)?,
            x_embedder: Linear::load(&l.in_f32(), "all_x_embedder.2-1", token, width)?,
            x_pad: l.tensor::<2>("x_pad_token", [1, width])?.unsqueeze(),
            blocks: BlockStore::new(&l, 2 * c.refiners + c.layers, block)?,
            final_scale: Linear::load(&last, "adaLN_modulation.1", c.modulation(), width)?,
            final_linear: Linear::load(&last.in_f32(), "linear", width, token)?,
            zero: Tensor::zeros([1, width], device),
            config: c,
        })
    }

    /// The hidden before the first block, at times from 0 to 1, one a condition.
    fn start_at(&self, x: Tensor<4>, times: &[f32], cond: &Conditioning) -> Hidden {
        let [b, c, h, w] = x.dims();
        let (rows, columns, width) = (h / PATCH, w / PATCH, self.config.width);
        let own = rows * columns;
        let patches = x.reshape([b, c, rows, PATCH, columns, PATCH]).permute([0, 2, 4, 3, 5, 1]);
        let patches = patches.reshape([b, own, PATCH * PATCH * c]);
        let image = self.x_embedder.forward(patches, None);
        let image = match filled(own) - own {
            0 => image,
            pads => Tensor::cat(vec![image, self.x_pad.clone().expand([b, pads, width])], 1),
        };
        let counts = lengths(cond);
        let t = counts.iter().copied().map(filled).max().expect("a condition at least");
        let captions = self.captions.forward(cond.sequence.clone(), &counts, t);
        let scale = self.config.time_scale as f32;
        let scaled: Vec<f32> = times.iter().map(|t| t * scale).collect();
        let time = self.time.forward(&scaled, &self.device);
        let fixed = Fixed::new(time, cond.clone(), [h, w]);
        let rotary = Some(self.turns(&counts, t, [rows, columns]));
        let flow = vec![hold(image), hold(cond.rows.spread(captions))];
        Hidden { flow, fixed: Arc::new(Fixed { rotary, ..fixed }) }
    }

    /// Of the picture's tokens, behind the caption of each condition, and of the caption's.
    fn turns(&self, counts: &[usize], t: usize, [rows, columns]: [usize; 2]) -> Turns {
        let own = rows * columns;
        let of = |count: &usize| {
            let after = (filled(*count) + 1) as f32;
            let pixel = move |i: usize| [after, (i / columns) as f32, (i % columns) as f32];
            let pads = vec![[0.0; 3]; filled(own) - own];
            let caption = (0..t).map(|i| [(i + 1) as f32, 0.0, 0.0]);
            (0..own).map(pixel).chain(pads).chain(caption).collect()
        };
        let sequences: Vec<Vec<[f32; 3]>> = counts.iter().map(of).collect();
        self.config.rotary.of(&sequences, &self.device)
    }

    /// The output of the class's forward, `[B, C, H, W]`: what is left of the velocity's opposite.
    fn output(&self, mut hidden: Hidden) -> Tensor<4> {
        let ([h, w], c) = (hidden.fixed.size, self.config.channels);
        let (rows, columns) = (h / PATCH, w / PATCH);
        let all = tokens(hidden.flow.swap_remove(0));
        let image = all.narrow(1, 0, rows * columns);
        let fixed = &hidden.fixed;
        let few = self.final_scale.forward(Activation::Silu.forward(fixed.time.clone()), None);
        let factor = fixed.cond.rows.spread(few) + 1.0;
        let zero = self.zero.clone().expand(factor.dims());
        let y = self.final_linear.forward(layer_norm(image, factor, zero, FINAL_EPS), None);
        let b = y.dims()[0];
        let pixels = y.reshape([b, rows, columns, PATCH, PATCH, c]);
        pixels.permute([0, 5, 1, 3, 2, 4]).reshape([b, c, h, w])
    }
}

/// How many tokens each condition's caption has.
fn lengths(cond: &Conditioning) -> Vec<usize> {
    match cond.lengths.is_empty() {
        true => vec![cond.sequence.dims()[1]; cond.sequence.dims()[0]],
        false => cond.lengths.clone(),
    }
}

impl Denoiser for ZImage {
    fn config(&self) -> &dyn NetworkConfig {
        &self.config
    }

    fn accepts(&self, [h, w]: [usize; 2]) -> Result<()> {
        let [_, rows, columns] = self.config.positions[..] else {
            unreachable!("three axes were read")
        };
        ensure!(
            h % PATCH == 0 && w % PATCH == 0 && h > 0 && w > 0,
            "latents of {h}x{w}: the transformer takes multiples of {PATCH}"
        );
        ensure!(
            h / PATCH <= rows && w / PATCH <= columns,
            "latents of {h}x{w}: the transformer takes up to {}x{}",
            PATCH * rows,
            PATCH * columns
        );
        Ok(())
    }

    fn linears(&self) -> Vec<LayerShape> {
        self.blocks.layers().to_vec()
    }

    fn start(&self, x: Tensor<4>, inputs: Inputs) -> Hidden {
        // Its own time is 1 - sigma.
        let times: Vec<f32> = inputs.timesteps.iter().map(|t| (1000.0 - t) / 1000.0).collect();
        self.start_at(x, &times, inputs.cond)
    }

    fn blocks(&self) -> usize {
        self.blocks.len()
    }

    fn block(&self, i: usize, hidden: Hidden, lora: Option<&Lora>) -> Hidden {
        let Hidden { mut flow, fixed } = hidden;
        let refiners = self.config.refiners;
        let [h, w] = fixed.size;
        let image = filled((h / PATCH) * (w / PATCH));
        let counts = lengths(&fixed.cond);
        let captions: Vec<usize> =
            fixed.cond.rows.of().iter().map(|&row| filled(counts[row])).collect();
        let turns = |first: usize, n: usize| {
            let turns = fixed.rotary.as_ref().expect("made with the hidden");
            turns.each_ref().map(|t| spread(&fixed.cond.rows, t.clone().narrow(1, first, n)))
        };
        let block = self.blocks.get(i);
        let run = |x: Tensor<4>, first: usize, keys: &[usize]| {
            let x = tokens(x);
            let turns = turns(first, x.dims()[1]);
            hold(block.forward(x, keys, &turns, &fixed, lora))
        };
        if i < refiners {
            let keys = vec![image; captions.len()];
            flow[0] = run(flow[0].clone(), 0, &keys);
        } else if i < 2 * refiners {
            flow[1] = run(flow[1].clone(), image, &captions);
        } else {
            let joined = if flow.len() == 2 { Tensor::cat(flow, 2) } else { flow.remove(0) };
            let keys: Vec<usize> = captions.iter().map(|caption| image + caption).collect();
            flow = vec![run(joined, 0, &keys)];
        }
        Hidden { flow, fixed }
    }

    fn keep(&self, i: usize) -> Option<Arc<dyn Any + Send + Sync>> {
        self.blocks.keep(i)
    }

    fn finish(&self, hidden: Hidden) -> Tensor<4> {
        -self.output(hidden)
    }

    /// The class's forward takes a list of pictures with one frame each, captions of their own
    /// lengths, and times from 0, noise, to 1.
    fn forward_reference(
        &self,
        inputs: &ReferenceTensors,
        lora: Option<&Lora>,
    ) -> Result<HostTensor> {
        let path = inputs.path().display();
        let x = inputs.tensor::<5>("in.x")?;
        let [rows, channels, frames, h, w] = x.dims();
        let own = self.config.channels;
        ensure!(
            channels == own && frames == 1,
            "{path}: in.x has {channels} channels and {frames} frames, the network takes {own} and \
             one"
        );
        self.accepts([h, w]).map_err(|e| e.context(format!("{path}: in.x")))?;
        let times = inputs.values("in.t", rows)?;
        let cond = inputs.captions(rows, self.config.context)?;
        let start = self.start_at(x.reshape([rows, channels, h, w]), &times, &cond);
        let hidden = (0..self.blocks()).fold(start, |hidden, i| self.block(i, hidden, lora));
        let y = self.output(hidden);
        Ok(HostTensor::new("out.prediction", [rows, channels, 1, h, w], read(&y)?))
    }
}

/// What each row has of what each condition has.
fn spread(rows: &RowMap, few: Tensor<4>) -> Tensor<4> {
    if few.dims()[0] == 1 { few } else { rows.spread(few) }
}
