//! diffusers' `UNet2DConditionModel`, driven by its config.json.

pub mod config;
pub mod original;

use std::any::Any;
use std::sync::Arc;

use anyhow::Result;
use burn::tensor::{Device, Tensor};

pub use self::config::UNetConfig;
use self::config::{Addition, MidKind};
use self::original::renamings;
use super::block_store::{BlockStore, StoredBlock};
use super::blocks::{
    Downsample, Resnet, ResnetSpec, Time, TimeEmbedding, Transformer2d, Upsample, Waves,
};
use super::component::Component;
use super::conditioning::{Conditioning, TIME_IDS};
use super::config::NetworkConfig;
use super::denoiser::{Denoiser, Fixed, Hidden, Inputs, forward_of_latents};
use super::loader::{Loader, Storage, Stream};
use super::nn::{Activation, Conv2d, GroupNorm, channels_first, channels_last};
use super::reference::ReferenceTensors;
use crate::io::tensors::HostTensor;
use crate::lora::{LayerShape, Lora};

/// A resnet with its attention.
struct Layer {
    resnet: Resnet,
    attention: Option<Transformer2d>,
}

impl Layer {
    fn forward(
        &self,
        h: Tensor<4>,
        time: Option<Time>,
        context: &Conditioning,
        lora: Option<&Lora>,
    ) -> Tensor<4> {
        let h = self.resnet.forward(h, time, lora);
        match &self.attention {
            Some(attention) => attention.forward(h, context, lora),
            None => h,
        }
    }
}

/// A part of the network that is differentiated alone: a resnet with its attention, or a change of
/// size.
#[allow(clippy::large_enum_variant)] // There is one middle.
enum Unit {
    Down(Layer),
    Downsample(Downsample),
    /// The second resnet stands behind attention.
    Mid(Layer, Option<Resnet>),
    Up(Layer),
    Upsample(Upsample),
}

/// Which part it is: of which level or block, and which layer of it.
#[derive(Clone, Copy)]
enum Place {
    Down(usize, usize),
    Downsample(usize),
    Mid,
    Up(usize, usize),
    Upsample(usize),
}

/// The order in which the parts run.
fn places(c: &UNetConfig) -> Vec<Place> {
    let (mut places, n) = (Vec::new(), c.levels.len());
    for (i, level) in c.levels.iter().enumerate() {
        places.extend((0..level.layers).map(|j| Place::Down(i, j)));
        places.extend((i + 1 < n).then_some(Place::Downsample(i)));
    }
    places.extend((c.mid != MidKind::None).then_some(Place::Mid));
    for i in 0..n {
        places.extend((0..=c.levels[n - 1 - i].layers).map(|j| Place::Up(i, j)));
        places.extend((i + 1 < n).then_some(Place::Upsample(i)));
    }
    places
}

impl Unit {
    fn load(root: &Loader, c: &UNetConfig, place: Place) -> Result<Self> {
        let n = c.levels.len();
        let down = |i: usize| root.at(format!("down_blocks.{i}"));
        let up = |i: usize| root.at(format!("up_blocks.{i}"));
        Ok(match place {
            Place::Down(i, j) => {
                let own = &c.levels[i];
                let (before, cout) = (c.levels[i.saturating_sub(1)].channels, own.channels);
                let cin = if j == 0 { before } else { cout };
                Self::Down(layer(&down(i), c, [i, j], [cin, cout], own.down_attends)?)
            }
            Place::Downsample(i) => {
                let (l, padding) = (down(i).at("downsamplers.0"), c.downsample_padding);
                Self::Downsample(Downsample::load(&l, c.levels[i].channels, padding)?)
            }
            Place::Mid => load_mid(&root.at("mid_block"), c)?,
            // Block 0 on the way up is the deepest level.
            Place::Up(i, j) => {
                let at = n - 1 - i;
                let own = &c.levels[at];
                let cout = own.channels;
                let previous = c.levels[(at + 1).min(n - 1)].channels;
                let skip_last = c.levels[at.saturating_sub(1)].channels;
                let skip = if j == own.layers { skip_last } else { cout };
                let cin = if j == 0 { previous } else { cout } + skip;
                Self::Up(layer(&up(i), c, [at, j], [cin, cout], own.up_attends)?)
            }
            Place::Upsample(i) => {
                let channels = c.levels[n - 1 - i].channels;
                Self::Upsample(Upsample::load(&up(i).at("upsamplers.0"), channels)?)
            }
        })
    }
}

/// Layer `j` of level `at`.
fn layer(
    l: &Loader,
    c: &UNetConfig,
    [at, j]: [usize; 2],
    [cin, cout]: [usize; 2],
    attends: bool,
) -> Result<Layer> {
    let resnet = Resnet::load(&l.at(format!("resnets.{j}")), cin, cout, c.resnet)?;
    let spec = c.transformer(at, c.levels[at].only_cross);
    let attention =
        attends.then(|| Transformer2d::load(&l.at(format!("attentions.{j}")), cout, spec));
    Ok(Layer { resnet, attention: attention.transpose()? })
}

fn load_mid(l: &Loader, c: &UNetConfig) -> Result<Unit> {
    let last = c.levels.len() - 1;
    let ch = c.levels[last].channels;
    let spec = ResnetSpec { output_scale: c.mid_scale, ..c.resnet };
    let resnet = |j: usize| Resnet::load(&l.at(format!("resnets.{j}")), ch, ch, spec);
    Ok(match c.mid {
        MidKind::None | MidKind::Resnet => {
            Unit::Mid(Layer { resnet: resnet(0)?, attention: None }, None)
        }
        MidKind::CrossAttention => {
            let spec = c.transformer(last, false);
            let attention = Some(Transformer2d::load(&l.at("attentions.0"), ch, spec)?);
            Unit::Mid(Layer { resnet: resnet(0)?, attention }, Some(resnet(1)?))
        }
    })
}

/// The kinds of layers, in the order in which an adapter has them: attention's linear layers first,
/// as the noise of a fresh adapter goes by this order.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Linear,
    AttentionConv,
    Resnet,
    Size,
}

impl Unit {
    fn of_kind(&self, kind: Kind) -> Vec<LayerShape> {
        let (resnets, attention, size) = match self {
            Self::Down(layer) | Self::Up(layer) => {
                (vec![&layer.resnet], layer.attention.as_ref(), None)
            }
            Self::Mid(layer, second) => {
                let resnets = [&layer.resnet].into_iter().chain(second).collect();
                (resnets, layer.attention.as_ref(), None)
            }
            Self::Downsample(down) => (vec![], None, Some(&down.conv.shape)),
            Self::Upsample(up) => (vec![], None, Some(&up.conv.shape)),
        };
        let attention = attention.into_iter();
        match kind {
            Kind::Linear => {
                attention.flat_map(Transformer2d::linears).map(|l| l.shape.clone()).collect()
            }
            Kind::AttentionConv => {
                attention.flat_map(Transformer2d::convolutions).cloned().collect()
            }
            Kind::Resnet => resnets.into_iter().flat_map(Resnet::targets).cloned().collect(),
            Kind::Size => size.into_iter().cloned().collect(),
        }
    }
}

/// A unit's layers, each with its kind.
impl StoredBlock for Unit {
    type Layer = (Kind, LayerShape);

    fn layers(&self) -> Vec<(Kind, LayerShape)> {
        let kinds = [Kind::Linear, Kind::AttentionConv, Kind::Resnet, Kind::Size];
        let of = |kind| self.of_kind(kind).into_iter().map(move |shape| (kind, shape));
        kinds.into_iter().flat_map(of).collect()
    }
}

/// The noise-prediction network.
pub struct UNet {
    config: UNetConfig,
    device: Device,
    time: TimeEmbedding,
    /// Of the pooled text and the sizes in pixels, where it takes them.
    addition: Option<TimeEmbedding>,
    conv_in: Conv2d,
    units: BlockStore<Unit>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl UNet {
    /// Loads a `unet`.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, of the wrong shape or not supported.
    pub fn load(
        part: &Component,
        device: &Device,
        storage: Storage,
        stream: Option<Stream>,
    ) -> Result<Self> {
        let c = UNetConfig::read(&part.config)?;
        let weights = part.weights()?;
        let l = Loader::new(&weights, device, storage).streaming(stream);
        let first = c.levels[0].channels;
        let (groups, eps) = (c.resnet.groups, c.resnet.eps);
        let waves = |width| Waves { width, flip: c.flip_sin_to_cos, shift: c.freq_shift };
        let addition = |a: Addition| {
            TimeEmbedding::load(&l.at("add_embedding"), waves(a.time), a.width(), 4 * first)
        };
        let (own, places) = (c.clone(), places(&c));
        Ok(Self {
            device: device.clone(),
            time: TimeEmbedding::load(&l.at("time_embedding"), waves(first), first, 4 * first)?,
            addition: c.addition.map(addition).transpose()?,
            conv_in: Conv2d::same(&l.in_f32(), "conv_in", c.channels, first)?,
            units: BlockStore::new(&l, places.len(), move |l, i| Unit::load(l, &own, places[i]))?,
            norm_out: GroupNorm::load(&l, "conv_norm_out", groups, first, eps)?,
            conv_out: Conv2d::same(&l.in_f32(), "conv_out", first, c.channels)?,
            config: c,
        })
    }
}

impl UNet {
    /// The embedding of the pooled text and the sizes, `[P, D]`: the text stands first.
    fn add(&self, addition: &TimeEmbedding, cond: &Conditioning) -> Tensor<2> {
        let pooled = cond.pooled.clone().expect("checked with the model's text encoders");
        let numbers = cond.time_ids.as_flattened();
        let waves = addition.waves.of(numbers, &self.device);
        let waves = waves.reshape([cond.rows.few(), TIME_IDS * addition.waves.width]);
        addition.embed(Tensor::cat(vec![pooled, waves], 1))
    }
}

impl Denoiser for UNet {
    fn config(&self) -> &dyn NetworkConfig {
        &self.config
    }

    fn linears(&self) -> Vec<LayerShape> {
        let names = renamings(&self.config.levels, self.config.mid);
        let named = |(_, shape): &(Kind, LayerShape)| LayerShape {
            original: names.iter().find_map(|n| n.to_theirs(&shape.name)),
            ..shape.clone()
        };
        let kinds = [Kind::Linear, Kind::AttentionConv, Kind::Resnet, Kind::Size];
        let of = |kind| self.units.layers().iter().filter(move |(own, _)| *own == kind);
        kinds.into_iter().flat_map(of).map(named).collect()
    }

    fn start(&self, x: Tensor<4>, inputs: Inputs) -> Hidden {
        let [_, _, h, w] = x.dims();
        // Every resnet activates the embedding first: once here instead of in each.
        let mut time = self.time.forward(inputs.timesteps, &self.device);
        if let Some(addition) = &self.addition {
            time = time + self.add(addition, inputs.cond);
        }
        let time = Activation::Silu.forward(time);
        let x = if self.config.center_input { x * 2.0 - 1.0 } else { x };
        let x = self.conv_in.forward(channels_last(x));
        // The image last; below it the skip connections that wait for their up block.
        let fixed = Fixed::new(time, inputs.cond.clone(), [h, w]);
        Hidden { flow: vec![x.clone(), x], fixed: Arc::new(fixed) }
    }

    fn blocks(&self) -> usize {
        self.units.len()
    }

    fn block(&self, i: usize, hidden: Hidden, lora: Option<&Lora>) -> Hidden {
        let Hidden { mut flow, fixed } = hidden;
        let context = &fixed.cond;
        let time = Some(Time { embedding: &fixed.time, rows: &context.rows });
        let mut h = flow.pop().expect("the image");
        match &*self.units.get(i) {
            Unit::Down(layer) => {
                h = layer.forward(h, time, context, lora);
                flow.push(h.clone());
            }
            Unit::Downsample(down) => {
                h = down.forward(h, lora);
                flow.push(h.clone());
            }
            Unit::Mid(layer, second) => {
                h = layer.forward(h, time, context, lora);
                if let Some(resnet) = second {
                    h = resnet.forward(h, time, lora);
                }
            }
            Unit::Up(layer) => {
                let skip = flow.pop().expect("a skip for every up resnet");
                h = layer.forward(Tensor::cat(vec![h, skip], 3), time, context, lora);
            }
            Unit::Upsample(up) => {
                let size = flow.last().map(|s| [s.dims()[1], s.dims()[2]]);
                h = up.forward(h, size, lora);
            }
        }
        flow.push(h);
        Hidden { flow, fixed }
    }

    fn keep(&self, i: usize) -> Option<Arc<dyn Any + Send + Sync>> {
        self.units.keep(i)
    }

    fn finish(&self, mut hidden: Hidden) -> Tensor<4> {
        let h = hidden.flow.pop().expect("the image");
        channels_first(self.conv_out.forward(self.norm_out.activated(h, Activation::Silu)))
    }

    fn forward_reference(
        &self,
        inputs: &ReferenceTensors,
        lora: Option<&Lora>,
    ) -> Result<HostTensor> {
        forward_of_latents(self, inputs, "in.latents", lora)
    }
}
