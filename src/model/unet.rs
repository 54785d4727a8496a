//! diffusers' `UNet2DConditionModel`, driven by its config.json.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use burn::tensor::{Device, Tensor};
use serde_json::json;

use super::blocks::{Downsample, Resnet, ResnetSpec, TimeEmbedding, Transformer2d, TransformerSpec, Upsample};
use super::config::Config;
use super::denoiser::{Denoiser, Fixed, Inputs, State};
use super::nn::{Conv2d, GroupNorm, Linear, silu};
use super::weights::{Loader, Storage, Weights};
use crate::lora::Lora;

/// One down or up block: resnets with or without attention, then a change of size.
struct Block {
    resnets: Vec<Resnet>,
    attentions: Vec<Transformer2d>,
    down: Option<Downsample>,
    up: Option<Upsample>,
}

struct Mid {
    resnets: Vec<Resnet>,
    attention: Option<Transformer2d>,
}

/// A part of the network that is differentiated alone: a resnet with its attention, or a change of size.
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
    pub in_channels: usize,
    pub out_channels: usize,
    pub context: usize,
    /// Latent height and width that the network was made for.
    pub sample_size: [usize; 2],
    center: bool,
    device: Device,
    time: TimeEmbedding,
    conv_in: Conv2d,
    down: Vec<Block>,
    mid: Option<Mid>,
    up: Vec<Block>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
    /// The order in which the parts run.
    units: Vec<Unit>,
}

/// The per-block settings of a config, checked.
struct Plan {
    channels: Vec<usize>,
    down: Vec<String>,
    up: Vec<String>,
    layers: Vec<usize>,
    heads: Vec<usize>,
    transformer_layers: Vec<usize>,
    context: usize,
    linear: bool,
    only_cross: Vec<bool>,
    resnet: ResnetSpec,
    mid_scale: f64,
}

fn has_attention(c: &Config, field: &str, name: &str) -> Result<bool> {
    match name {
        "CrossAttnDownBlock2D" | "CrossAttnUpBlock2D" => Ok(true),
        "DownBlock2D" | "UpBlock2D" => Ok(false),
        _ => bail!(c.bad(field, &format!("holds {name:?}, which is not supported"))),
    }
}

fn plan(c: &Config) -> Result<Plan> {
    c.only(&[
        ("class_embed_type", json!(null)),
        ("addition_embed_type", json!(null)),
        ("encoder_hid_dim", json!(null)),
        ("encoder_hid_dim_type", json!(null)),
        ("time_embedding_type", json!("positional")),
        ("time_embedding_dim", json!(null)),
        ("time_embedding_act_fn", json!(null)),
        ("timestep_post_act", json!(null)),
        ("time_cond_proj_dim", json!(null)),
        ("num_class_embeds", json!(null)),
        ("class_embeddings_concat", json!(false)),
        ("dual_cross_attention", json!(false)),
        ("resnet_skip_time_act", json!(false)),
        ("resnet_out_scale_factor", json!(1.0)),
        ("attention_type", json!("default")),
        ("cross_attention_norm", json!(null)),
        ("mid_block_only_cross_attention", json!(null)),
        ("reverse_transformer_layers_per_block", json!(null)),
        ("num_attention_heads", json!(null)),
        ("conv_in_kernel", json!(3)),
        ("conv_out_kernel", json!(3)),
    ])?;
    let cross_down = ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"];
    let cross_up = ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"];
    let down = c.names("down_block_types", &cross_down)?;
    let up = c.names("up_block_types", &cross_up)?;
    let n = down.len();
    ensure!(up.len() == n && n > 0, c.bad("up_block_types", &format!("must have {n} blocks, as down_block_types has")));
    let channels = match &c.json["block_out_channels"] {
        serde_json::Value::Null if n == 4 => vec![320, 640, 1280, 1280],
        _ => c.sizes("block_out_channels", n, 0)?,
    };
    let groups = c.size("norm_num_groups", 32)?;
    for &ch in &channels {
        ensure!(groups > 0 && ch % groups == 0, c.bad("norm_num_groups", &format!("does not divide {ch} channels")));
    }
    let scale_shift = match c.text("resnet_time_scale_shift", "default")?.as_str() {
        "default" => false,
        "scale_shift" => true,
        _ => bail!(c.bad("resnet_time_scale_shift", "is not supported; default and scale_shift are")),
    };
    // diffusers' old misnomer: `attention_head_dim` is the number of heads, and `num_attention_heads` is refused.
    let heads_field = "attention_head_dim";
    let heads = c.sizes(heads_field, n, 8)?;
    for (h, ch) in heads.iter().zip(&channels) {
        ensure!(ch % h == 0, c.bad(heads_field, &format!("does not divide {ch} channels")));
    }
    Ok(Plan {
        layers: c.sizes("layers_per_block", n, 2)?,
        heads,
        transformer_layers: c.sizes("transformer_layers_per_block", n, 1)?,
        context: c.size("cross_attention_dim", 1280)?,
        linear: c.flag("use_linear_projection", false)?,
        only_cross: c.flags("only_cross_attention", n)?,
        resnet: ResnetSpec {
            groups,
            eps: c.float("norm_eps", 1e-5)?,
            activation: c.activation("act_fn", "silu")?,
            time: Some(4 * channels[0]),
            scale_shift,
            output_scale: 1.0,
        },
        mid_scale: c.float("mid_block_scale_factor", 1.0)?,
        channels,
        down,
        up,
    })
}

impl Plan {
    fn transformer(&self, level: usize, only_cross: bool) -> TransformerSpec {
        TransformerSpec {
            groups: self.resnet.groups,
            heads: self.heads[level],
            layers: self.transformer_layers[level],
            context: self.context,
            linear: self.linear,
            only_cross,
        }
    }

    fn load_down(&self, l: &Loader, c: &Config, i: usize, padding: usize) -> Result<Block> {
        let l = l.at(format!("down_blocks.{i}"));
        let (cin, cout) = (self.channels[i.saturating_sub(1)], self.channels[i]);
        let cross = has_attention(c, "down_block_types", &self.down[i])?;
        let mut block = Block { resnets: vec![], attentions: vec![], down: None, up: None };
        for j in 0..self.layers[i] {
            let first = if j == 0 { cin } else { cout };
            block.resnets.push(Resnet::load(&l.at(format!("resnets.{j}")), first, cout, self.resnet)?);
            if cross {
                let spec = self.transformer(i, self.only_cross[i]);
                block.attentions.push(Transformer2d::load(&l.at(format!("attentions.{j}")), cout, spec)?);
            }
        }
        if i + 1 < self.down.len() {
            block.down = Some(Downsample::load(&l.at("downsamplers.0"), cout, padding)?);
        }
        Ok(block)
    }

    fn load_up(&self, l: &Loader, c: &Config, i: usize) -> Result<Block> {
        let l = l.at(format!("up_blocks.{i}"));
        let n = self.channels.len();
        let level = n - 1 - i;
        let cout = self.channels[level];
        let previous = self.channels[(level + 1).min(n - 1)];
        let skip_last = self.channels[level.saturating_sub(1)];
        let cross = has_attention(c, "up_block_types", &self.up[i])?;
        let layers = self.layers[level] + 1;
        let mut block = Block { resnets: vec![], attentions: vec![], down: None, up: None };
        for j in 0..layers {
            let skip = if j + 1 == layers { skip_last } else { cout };
            let cin = if j == 0 { previous } else { cout };
            block.resnets.push(Resnet::load(&l.at(format!("resnets.{j}")), cin + skip, cout, self.resnet)?);
            if cross {
                let spec = self.transformer(level, self.only_cross[level]);
                block.attentions.push(Transformer2d::load(&l.at(format!("attentions.{j}")), cout, spec)?);
            }
        }
        if level > 0 {
            block.up = Some(Upsample::load(&l.at("upsamplers.0"), cout)?);
        }
        Ok(block)
    }

    fn load_mid(&self, l: &Loader, c: &Config) -> Result<Option<Mid>> {
        let l = l.at("mid_block");
        let last = self.channels.len() - 1;
        let ch = self.channels[last];
        let spec = ResnetSpec { output_scale: self.mid_scale, ..self.resnet };
        let resnet = |j: usize| Resnet::load(&l.at(format!("resnets.{j}")), ch, ch, spec);
        let field = c.json.get("mid_block_type");
        Ok(match field.map(|v| v.as_str()) {
            None | Some(Some("UNetMidBlock2DCrossAttn")) => {
                let attention = Transformer2d::load(&l.at("attentions.0"), ch, self.transformer(last, false))?;
                Some(Mid { resnets: vec![resnet(0)?, resnet(1)?], attention: Some(attention) })
            }
            Some(Some("UNetMidBlock2D")) => Some(Mid { resnets: vec![resnet(0)?], attention: None }),
            Some(None) if c.json["mid_block_type"].is_null() => None,
            _ => {
                bail!(c.bad("mid_block_type", "is not supported; UNetMidBlock2DCrossAttn, UNetMidBlock2D and null are"))
            }
        })
    }
}

impl UNet {
    /// Loads a `unet` folder.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, of the wrong shape or not supported.
    pub fn load(dir: &Path, device: &Device, storage: Storage) -> Result<Self> {
        let c = Config::open(dir)?;
        let plan = plan(&c)?;
        let weights = Weights::open_dir(dir)?;
        let l = Loader::new(&weights, device, storage);
        let (first, n) = (plan.channels[0], plan.channels.len());
        let (in_channels, out_channels) = (c.size("in_channels", 4)?, c.size("out_channels", 4)?);
        ensure!(
            in_channels == out_channels,
            c.bad(
                "in_channels",
                &format!("differs from out_channels = {out_channels} (inpainting models are not supported)")
            )
        );
        let padding = c.size("downsample_padding", 1)?;
        ensure!(padding <= 1, c.bad("downsample_padding", "is not supported; 0 and 1 are"));
        let down = (0..n).map(|i| plan.load_down(&l, &c, i, padding)).collect::<Result<Vec<_>>>()?;
        let mid = plan.load_mid(&l, &c)?;
        let up = (0..n).map(|i| plan.load_up(&l, &c, i)).collect::<Result<Vec<_>>>()?;
        let units = units(&down, mid.is_some(), &up);
        Ok(Self {
            units,
            in_channels,
            out_channels,
            context: plan.context,
            sample_size: c.sizes("sample_size", 2, 64)?.try_into().expect("two sizes"),
            center: c.flag("center_input_sample", false)?,
            device: device.clone(),
            time: TimeEmbedding::load(
                &l.at("time_embedding"),
                first,
                4 * first,
                c.flag("flip_sin_to_cos", true)?,
                c.float("freq_shift", 0.0)?,
            )?,
            conv_in: Conv2d::same(&l, "conv_in", in_channels, first)?,
            down,
            mid,
            up,
            norm_out: GroupNorm::load(&l, "conv_norm_out", plan.resnet.groups, first, plan.resnet.eps)?,
            conv_out: Conv2d::same(&l, "conv_out", first, out_channels)?,
        })
    }
}

fn units(down: &[Block], mid: bool, up: &[Block]) -> Vec<Unit> {
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

impl Denoiser for UNet {
    fn latent_shape(&self) -> [usize; 3] {
        let [h, w] = self.sample_size;
        [self.in_channels, h, w]
    }

    fn tokens(&self, [h, w]: [usize; 2]) -> usize {
        h * w
    }

    fn context(&self) -> [usize; 2] {
        [self.context, 0]
    }

    fn linears(&self) -> Vec<&Linear> {
        let blocks = self.down.iter().flat_map(|b| &b.attentions);
        let mid = self.mid.iter().flat_map(|m| &m.attention);
        blocks.chain(mid).chain(self.up.iter().flat_map(|b| &b.attentions)).flat_map(Transformer2d::linears).collect()
    }

    fn start(&self, x: Tensor<4>, inputs: Inputs) -> State {
        let [_, _, h, w] = x.dims();
        // Every resnet activates the embedding first: once here instead of in each.
        let time = silu(self.time.forward(inputs.timesteps, &self.device));
        let x = if self.center { x * 2.0 - 1.0 } else { x };
        let x = self.conv_in.forward(x);
        let context = Some(inputs.cond.sequence.clone());
        // The image last; below it the skip connections that wait for their up block.
        State { flow: vec![x.clone(), x], fixed: Arc::new(Fixed { time, context, rotary: None, size: [h, w] }) }
    }

    fn blocks(&self) -> usize {
        self.units.len()
    }

    fn block(&self, i: usize, state: State, lora: Option<&Lora>) -> State {
        let State { mut flow, fixed } = state;
        let (time, context) = (Some(&fixed.time), fixed.context.as_ref().expect("a UNet attends to its text"));
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
                h = self.down[i].down.as_ref().expect("listed as a unit").forward(h);
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
                h = block.resnets[j].forward(Tensor::cat(vec![h, skip], 1), time, lora);
                h = attend(h, block.attentions.get(j));
            }
            Unit::Upsample(i) => {
                let size = flow.last().map(|s| [s.dims()[2], s.dims()[3]]);
                h = self.up[i].up.as_ref().expect("listed as a unit").forward(h, size);
            }
        }
        flow.push(h);
        State { flow, fixed }
    }

    fn finish(&self, mut state: State) -> Tensor<4> {
        let h = state.flow.pop().expect("the image");
        self.conv_out.forward(silu(self.norm_out.forward(h)))
    }
}
