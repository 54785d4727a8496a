//! A `UNet2DConditionModel`'s configuration, checked once for the network and for the memory
//! estimate.

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

use crate::model::blocks::{ResnetSpec, TransformerSpec};
use crate::model::conditioning::TIME_IDS;
use crate::model::config::{BlockShape, Config, NetworkConfig};

/// More levels than any UNet has: each halves the latent.
const MOST_LEVELS: usize = 16;

/// What stands between the way down and the way up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MidKind {
    None,
    /// One resnet.
    Resnet,
    /// Two resnets with attention between them.
    CrossAttention,
}

/// What SDXL's UNet is told besides: the pooled text, and sizes in pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Addition {
    /// Width of the pooled text.
    pub pooled: usize,
    /// Width of the embedding of each of [`TIME_IDS`] numbers.
    pub time: usize,
}

impl Addition {
    /// Width of all of it side by side.
    pub fn width(self) -> usize {
        self.pooled + TIME_IDS * self.time
    }

    /// `addition_embed_type`, where there is one.
    fn read(c: &Config) -> Result<Option<Self>> {
        match c.text("addition_embed_type", "")?.as_str() {
            "" => return Ok(None),
            "text_time" => {}
            _ => bail!(c.bad("addition_embed_type", "is not supported; text_time and null are")),
        }
        let time = c.width("addition_time_embed_dim", 256)?;
        let field = "projection_class_embeddings_input_dim";
        let all = c.width(field, 2816)?;
        ensure!(
            all > TIME_IDS * time,
            c.bad(field, &format!("leaves no pooled text beside {TIME_IDS} embeddings of {time}"))
        );
        Ok(Some(Self { pooled: all - TIME_IDS * time, time }))
    }
}

/// One level: its blocks on the way down and up.
#[derive(Clone, Debug)]
pub struct LevelConfig {
    pub channels: usize,
    /// Resnets on the way down; on the way up there is one more.
    pub layers: usize,
    pub heads: usize,
    pub transformer_layers: usize,
    /// Whether its first attention is to the text too.
    pub only_cross: bool,
    /// Whether the level's block on the way down attends, and the one on the way up.
    pub down_attends: bool,
    pub up_attends: bool,
}

/// A UNet's settings.
#[derive(Clone, Debug)]
pub struct UNetConfig {
    /// From the latent inwards.
    pub levels: Vec<LevelConfig>,
    pub mid: MidKind,
    pub mid_scale: f64,
    /// Channels of a latent.
    pub channels: usize,
    /// Width of the text.
    pub context: usize,
    /// Latent height and width that the network was made for.
    pub sample_size: [usize; 2],
    pub linear: bool,
    pub resnet: ResnetSpec,
    pub downsample_padding: usize,
    pub center_input: bool,
    pub flip_sin_to_cos: bool,
    pub freq_shift: f64,
    pub addition: Option<Addition>,
}

/// Refuses what the network here cannot compute.
fn supported(c: &Config) -> Result<()> {
    c.only(&[
        ("class_embed_type", Value::Null),
        ("encoder_hid_dim", Value::Null),
        ("encoder_hid_dim_type", Value::Null),
        ("time_embedding_type", json!("positional")),
        ("time_embedding_dim", Value::Null),
        ("time_embedding_act_fn", Value::Null),
        ("timestep_post_act", Value::Null),
        ("time_cond_proj_dim", Value::Null),
        ("num_class_embeds", Value::Null),
        ("class_embeddings_concat", json!(false)),
        ("dual_cross_attention", json!(false)),
        ("resnet_skip_time_act", json!(false)),
        ("resnet_out_scale_factor", json!(1.0)),
        ("attention_type", json!("default")),
        ("cross_attention_norm", Value::Null),
        ("mid_block_only_cross_attention", Value::Null),
        ("reverse_transformer_layers_per_block", Value::Null),
        ("num_attention_heads", Value::Null),
        ("conv_in_kernel", json!(3)),
        ("conv_out_kernel", json!(3)),
    ])
}

/// Whether each block of a list attends.
fn attends(c: &Config, field: &str, default: &[&str]) -> Result<Vec<bool>> {
    let kind = |name: String| match name.as_str() {
        "CrossAttnDownBlock2D" | "CrossAttnUpBlock2D" => Ok(true),
        "DownBlock2D" | "UpBlock2D" => Ok(false),
        _ => Err(c.bad(field, &format!("holds {name:?}, which is not supported"))),
    };
    c.names(field, default)?.into_iter().map(kind).collect()
}

fn mid_kind(c: &Config) -> Result<MidKind> {
    // Here an absent field and null differ: null is no middle at all.
    Ok(match c.json.get("mid_block_type") {
        None => MidKind::CrossAttention,
        Some(Value::Null) => MidKind::None,
        Some(kind) if kind == "UNetMidBlock2DCrossAttn" => MidKind::CrossAttention,
        Some(kind) if kind == "UNetMidBlock2D" => MidKind::Resnet,
        Some(_) => bail!(c.bad(
            "mid_block_type",
            "is not supported; UNetMidBlock2DCrossAttn, UNetMidBlock2D and null are"
        )),
    })
}

impl UNetConfig {
    /// Reads a `unet`'s `config.json`.
    ///
    /// # Errors
    /// Names the field that is not supported.
    pub fn read(c: &Config) -> Result<Self> {
        supported(c)?;
        let levels = levels(c)?;
        let channels = c.width("in_channels", 4)?;
        let out = c.width("out_channels", 4)?;
        ensure!(
            channels == out,
            c.bad(
                "in_channels",
                &format!("differs from out_channels = {out} (inpainting models are not supported)")
            )
        );
        let downsample_padding = c.size("downsample_padding", 1)?;
        ensure!(
            downsample_padding <= 1,
            c.bad("downsample_padding", "is not supported; 0 and 1 are")
        );
        Ok(Self {
            resnet: resnet(c, &levels)?,
            levels,
            mid: mid_kind(c)?,
            mid_scale: c.float("mid_block_scale_factor", 1.0)?,
            channels,
            context: c.width("cross_attention_dim", 1280)?,
            sample_size: c.sides("sample_size", 64)?,
            linear: c.flag("use_linear_projection", false)?,
            downsample_padding,
            center_input: c.flag("center_input_sample", false)?,
            flip_sin_to_cos: c.flag("flip_sin_to_cos", true)?,
            freq_shift: c.float("freq_shift", 0.0)?,
            addition: Addition::read(c)?,
        })
    }

    /// How the attention of a level is built.
    pub fn transformer(&self, level: usize, only_cross: bool) -> TransformerSpec {
        let l = &self.levels[level];
        TransformerSpec {
            groups: self.resnet.groups,
            heads: l.heads,
            layers: l.transformer_layers,
            context: self.context,
            linear: self.linear,
            only_cross,
        }
    }
}

fn levels(c: &Config) -> Result<Vec<LevelConfig>> {
    let cross_down =
        ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"];
    let cross_up = ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"];
    let down = attends(c, "down_block_types", &cross_down)?;
    let up = attends(c, "up_block_types", &cross_up)?;
    let n = down.len();
    ensure!(
        up.len() == n,
        c.bad("up_block_types", &format!("must have {n} blocks, as down_block_types has"))
    );
    ensure!(
        n <= MOST_LEVELS,
        c.bad("down_block_types", &format!("has {n} levels; at most {MOST_LEVELS} are supported"))
    );
    let channels =
        c.widths("block_out_channels", n, if n == 4 { &[320, 640, 1280, 1280] } else { &[] })?;
    // diffusers' old misnomer: `attention_head_dim` is the number of heads, and
    // `num_attention_heads` is refused.
    let heads = c.counts("attention_head_dim", n, 8)?;
    for (&heads, &width) in heads.iter().zip(&channels) {
        c.divides("attention_head_dim", heads, &[width])?;
    }
    let layers = c.counts("layers_per_block", n, 2)?;
    let transformer_layers = c.counts("transformer_layers_per_block", n, 1)?;
    let only_cross = c.flags("only_cross_attention", n)?;
    let level = |i: usize| LevelConfig {
        channels: channels[i],
        layers: layers[i],
        heads: heads[i],
        transformer_layers: transformer_layers[i],
        only_cross: only_cross[i],
        down_attends: down[i],
        // The way up begins at the deepest level.
        up_attends: up[n - 1 - i],
    };
    Ok((0..n).map(level).collect())
}

fn resnet(c: &Config, levels: &[LevelConfig]) -> Result<ResnetSpec> {
    let groups = c.count("norm_num_groups", 32)?;
    let channels: Vec<usize> = levels.iter().map(|l| l.channels).collect();
    c.divides("norm_num_groups", groups, &channels)?;
    let scale_shift = match c.text("resnet_time_scale_shift", "default")?.as_str() {
        "default" => false,
        "scale_shift" => true,
        _ => {
            bail!(c.bad("resnet_time_scale_shift", "is not supported; default and scale_shift are"))
        }
    };
    Ok(ResnetSpec {
        groups,
        eps: c.float("norm_eps", 1e-5)?,
        activation: c.activation("act_fn", "silu")?,
        time: Some(4 * channels[0]),
        scale_shift,
        output_scale: 1.0,
    })
}

impl NetworkConfig for UNetConfig {
    fn latent_shape(&self) -> [usize; 3] {
        let [h, w] = self.sample_size;
        [self.channels, h, w]
    }

    fn context(&self) -> [usize; 2] {
        [self.context, self.addition.map_or(0, |a| a.pooled)]
    }

    fn takes_time_ids(&self) -> bool {
        self.addition.is_some()
    }

    fn distilled(&self) -> bool {
        false
    }

    fn tokens(&self, [h, w]: [usize; 2]) -> usize {
        h * w
    }

    fn convolves(&self) -> bool {
        true
    }

    fn block_shapes(&self, size: [usize; 2], _text: usize) -> Vec<BlockShape> {
        let mut run = Run { config: self, size, skips: Vec::new(), blocks: Vec::new() };
        let n = self.levels.len();
        run.keep(0, self.levels[0].channels);
        for (i, level) in self.levels.iter().enumerate() {
            for _ in 0..level.layers {
                run.push(i, level.channels, 0, level.down_attends);
                run.keep(i, level.channels);
            }
            if i + 1 < n {
                run.push(i, level.channels, 0, false);
                run.keep(i + 1, level.channels);
            }
        }
        let deepest = self.levels[n - 1].channels;
        match self.mid {
            MidKind::None => {}
            MidKind::Resnet | MidKind::CrossAttention => run.push(n - 1, deepest, deepest, true),
        }
        for (i, level) in self.levels.iter().enumerate().rev() {
            for _ in 0..level.layers + 1 {
                let skip = run.skips.pop().unwrap_or_default();
                let width = (skip / run.pixels(i)) as usize;
                run.push(i, level.channels, width, level.up_attends);
            }
            if i > 0 {
                run.push(i - 1, level.channels, 0, false);
            }
        }
        run.blocks
    }
}

/// A walk through the network that lists its blocks.
struct Run<'a> {
    config: &'a UNetConfig,
    size: [usize; 2],
    /// Elements of the skip connections that wait.
    skips: Vec<f64>,
    blocks: Vec<BlockShape>,
}

impl Run<'_> {
    fn pixels(&self, level: usize) -> f64 {
        let [h, w] = self.size;
        h.div_ceil(1 << level) as f64 * w.div_ceil(1 << level) as f64
    }

    fn keep(&mut self, level: usize, width: usize) {
        self.skips.push(self.pixels(level) * width as f64);
    }

    fn push(&mut self, level: usize, width: usize, extra: usize, attends: bool) {
        let area = self.pixels(level);
        let stream = area * width as f64;
        let heads = self.config.levels[level].heads as f64;
        self.blocks.push(BlockShape {
            input: stream + self.skips.iter().sum::<f64>(),
            // A block on the way up takes its skip connection beside its own stream.
            stream: area * (width + extra / 2) as f64,
            wide: if attends { 8.0 * stream } else { 0.0 },
            depth: if attends { self.config.levels[level].transformer_layers as f64 } else { 1.0 },
            scores: if attends { heads * area * area } else { 0.0 },
        });
    }
}
