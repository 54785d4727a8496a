//! diffusers' `UNet2DConditionModel`, driven by its config.json.

pub mod config;
pub mod original;

use std::sync::Arc;

use anyhow::Result;
use burn::tensor::{Device, Tensor};

pub use self::config::UNetConfig;
use self::config::{Addition, MidKind};
use self::original::renamings;
use super::blocks::{
    Downsample, Resnet, ResnetSpec, Time, TimeEmbedding, Transformer2d, Upsample, Waves,
};
use super::component::Component;
use super::conditioning::{Conditioning, TIME_IDS};
use super::config::NetworkConfig;
use super::denoiser::{Denoiser, Fixed, Hidden, Inputs, forward_of_latents};
use super::loader::{Loader, Storage};
use super::nn::{Activation, Conv2d, GroupNorm, Linear, channels_first, channels_last};
use super::reference::ReferenceTensors;
use crate::io::tensors::HostTensor;
use crate::lora::{LayerShape, Lora};

/// A level on the way down or up: resnets with or without attention, then a change of size.
struct Level {
    resnets: Vec<Resnet>,
    attentions: Vec<Transformer2d>,
    down: Option<Downsample>,
    up: Option<Upsample>,
}

struct Mid {
    resnets: Vec<Resnet>,
    attention: Option<Transformer2d>,
}

/// A part of the network that is differentiated alone: a resnet with its attention, or a change of
/// size.
#[derive(Clone, Copy)]
enum Unit {
    Down(usize, usize),
    Downsample(usize),
    Mid,
    Up(usize, usize),
    Upsample(usize),
}

/// The noise-prediction network.
pub struct UNet {
    config: UNetConfig,
    device: Device,
    time: TimeEmbedding,
    /// Of the pooled text and the sizes in pixels, where it takes them.
    addition: Option<TimeEmbedding>,
    conv_in: Conv2d,
    down: Vec<Level>,
    mid: Option<Mid>,
    up: Vec<Level>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
    /// The order in which the parts run.
    units: Vec<Unit>,
}

fn load_down(l: &Loader, c: &UNetConfig, i: usize) -> Result<Level> {
    let l = l.at(format!("down_blocks.{i}"));
    let own = &c.levels[i];
    let (cin, cout) = (c.levels[i.saturating_sub(1)].channels, own.channels);
    let mut level = Level { resnets: vec![], attentions: vec![], down: None, up: None };
    for j in 0..own.layers {
        let first = if j == 0 { cin } else { cout };
        level.resnets.push(Resnet::load(&l.at(format!("resnets.{j}")), first, cout, c.resnet)?);
        if own.down_attends {
            let spec = c.transformer(i, own.only_cross);
            let l = l.at(format!("attentions.{j}"));
            level.attentions.push(Transformer2d::load(&l, cout, spec)?);
        }
    }
    if i + 1 < c.levels.len() {
        let l = l.at("downsamplers.0");
        level.down = Some(Downsample::load(&l, cout, c.downsample_padding)?);
    }
    Ok(level)
}

/// Block `i` on the way up, which begins at the deepest level.
fn load_up(l: &Loader, c: &UNetConfig, i: usize) -> Result<Level> {
    let l = l.at(format!("up_blocks.{i}"));
    let n = c.levels.len();
    let at = n - 1 - i;
    let own = &c.levels[at];
    let cout = own.channels;
    let previous = c.levels[(at + 1).min(n - 1)].channels;
    let skip_last = c.levels[at.saturating_sub(1)].channels;
    let layers = own.layers + 1;
    let mut level = Level { resnets: vec![], attentions: vec![], down: None, up: None };
    for j in 0..layers {
        let skip = if j + 1 == layers { skip_last } else { cout };
        let cin = if j == 0 { previous } else { cout } + skip;
        level.resnets.push(Resnet::load(&l.at(format!("resnets.{j}")), cin, cout, c.resnet)?);
        if own.up_attends {
            let spec = c.transformer(at, own.only_cross);
            let l = l.at(format!("attentions.{j}"));
            level.attentions.push(Transformer2d::load(&l, cout, spec)?);
        }
    }
    if at > 0 {
        level.up = Some(Upsample::load(&l.at("upsamplers.0"), cout)?);
    }
    Ok(level)
}

fn load_mid(l: &Loader, c: &UNetConfig) -> Result<Option<Mid>> {
    let l = l.at("mid_block");
    let last = c.levels.len() - 1;
    let ch = c.levels[last].channels;
    let spec = ResnetSpec { output_scale: c.mid_scale, ..c.resnet };
    let resnet = |j: usize| Resnet::load(&l.at(format!("resnets.{j}")), ch, ch, spec);
    Ok(match c.mid {
        MidKind::None => None,
        MidKind::Resnet => Some(Mid { resnets: vec![resnet(0)?], attention: None }),
        MidKind::CrossAttention => {
            let spec = c.transformer(last, false);
            let attention = Transformer2d::load(&l.at("attentions.0"), ch, spec)?;
            Some(Mid { resnets: vec![resnet(0)?, resnet(1)?], attention: Some(attention) })
        }
    })
}

impl UNet {
    /// Loads a `unet`.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, of the wrong shape or not supported.
    pub fn load(part: &Component, device: &Device, storage: Storage) -> Result<Self> {
        let c = UNetConfig::read(&part.config)?;
        let weights = part.weights()?;
        let l = Loader::new(&weights, device, storage);
        let (first, n) = (c.levels[0].channels, c.levels.len());
        let down = (0..n).map(|i| load_down(&l, &c, i)).collect::<Result<Vec<_>>>()?;
        let mid = load_mid(&l, &c)?;
        let up = (0..n).map(|i| load_up(&l, &c, i)).collect::<Result<Vec<_>>>()?;
        let (groups, eps) = (c.resnet.groups, c.resnet.eps);
        let waves = |width| Waves { width, flip: c.flip_sin_to_cos, shift: c.freq_shift };
        let addition = |a: Addition| {
            TimeEmbedding::load(&l.at("add_embedding"), waves(a.time), a.width(), 4 * first)
        };
        Ok(Self {
            units: units(&down, mid.is_some(), &up),
            device: device.clone(),
            time: TimeEmbedding::load(&l.at("time_embedding"), waves(first), first, 4 * first)?,
            addition: c.addition.map(addition).transpose()?,
            conv_in: Conv2d::same(&l, "conv_in", c.channels, first)?,
            down,
            mid,
            up,
            norm_out: GroupNorm::load(&l, "conv_norm_out", groups, first, eps)?,
            conv_out: Conv2d::same(&l, "conv_out", first, c.channels)?,
            config: c,
        })
    }
}

fn units(down: &[Level], mid: bool, up: &[Level]) -> Vec<Unit> {
    let mut units = Vec::new();
    for (i, block) in down.iter().enumerate() {
        units.extend((0..block.resnets.len()).map(|j| Unit::Down(i, j)));
        units.extend(block.down.is_some().then_some(Unit::Downsample(i)));
    }
    units.extend(mid.then_some(Unit::Mid));
    for (i, block) in up.iter().enumerate() {
        units.extend((0..block.resnets.len()).map(|j| Unit::Up(i, j)));
        units.extend(block.up.is_some().then_some(Unit::Upsample(i)));
    }
    units
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

    fn tokens(&self, [h, w]: [usize; 2]) -> usize {
        h * w
    }

    fn linears(&self) -> Vec<LayerShape> {
        let attentions = || {
            let down = self.down.iter().flat_map(|b| &b.attentions);
            let mid = self.mid.iter().flat_map(|m| &m.attention);
            down.chain(mid).chain(self.up.iter().flat_map(|b| &b.attentions))
        };
        let resnets = self.down.iter().flat_map(|b| &b.resnets);
        let resnets = resnets.chain(self.mid.iter().flat_map(|m| &m.resnets));
        let resnets = resnets.chain(self.up.iter().flat_map(|b| &b.resnets));
        let levels = self.down.iter().chain(&self.up);
        let sizes = levels.flat_map(|b| {
            let (down, up) = (b.down.iter().map(|d| &d.conv), b.up.iter().map(|u| &u.conv));
            down.chain(up)
        });
        // Attention's linear layers first: the noise of a fresh adapter goes by this order.
        let all = attentions().flat_map(Transformer2d::linears).map(|l: &Linear| &l.shape);
        let all = all.chain(attentions().flat_map(Transformer2d::convolutions));
        let all = all.chain(resnets.flat_map(Resnet::targets));
        let all = all.chain(sizes.map(|conv| &conv.shape));
        let names = renamings(&self.config.levels, self.config.mid);
        let named = |shape: &LayerShape| LayerShape {
            original: names.iter().find_map(|n| n.to_theirs(&shape.name)),
            ..shape.clone()
        };
        all.map(named).collect()
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
        let fixed = Fixed { time, cond: inputs.cond.clone(), rotary: None, size: [h, w] };
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
        let attend = |h: Tensor<4>, attention: Option<&Transformer2d>| match attention {
            Some(attention) => attention.forward(h, context, lora),
            None => h,
        };
        match self.units[i] {
            Unit::Down(i, j) => {
                let block = &self.down[i];
                h = attend(block.resnets[j].forward(h, time, lora), block.attentions.get(j));
                flow.push(h.clone());
            }
            Unit::Downsample(i) => {
                h = self.down[i].down.as_ref().expect("listed as a unit").forward(h, lora);
                flow.push(h.clone());
            }
            Unit::Mid => {
                let mid = self.mid.as_ref().expect("listed as a unit");
                h = attend(mid.resnets[0].forward(h, time, lora), mid.attention.as_ref());
                h = mid.resnets[1..].iter().fold(h, |h, resnet| resnet.forward(h, time, lora));
            }
            Unit::Up(i, j) => {
                let block = &self.up[i];
                let skip = flow.pop().expect("a skip for every up resnet");
                h = block.resnets[j].forward(Tensor::cat(vec![h, skip], 3), time, lora);
                h = attend(h, block.attentions.get(j));
            }
            Unit::Upsample(i) => {
                let size = flow.last().map(|s| [s.dims()[1], s.dims()[2]]);
                h = self.up[i].up.as_ref().expect("listed as a unit").forward(h, size, lora);
            }
        }
        flow.push(h);
        Hidden { flow, fixed }
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
