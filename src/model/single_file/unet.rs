//! UNets of Stable Diffusion 1 and 2 and SDXL: diffusers' `UNet2DConditionModel` from the layout of
//! CompVis and Stability AI.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::part::{Part, count, shape};
use crate::io::weights::Weights;
use crate::model::conditioning::TIME_IDS;
use crate::model::unet::config::{LevelConfig, MidKind};
use crate::model::unet::original::renamings;

/// What is known of a UNet besides its tensors.
pub struct Traits {
    pub xl: bool,
    /// Stable Diffusion 2.
    pub second: bool,
    pub predicts_v: bool,
    /// Width of SDXL's pooled text, where the second encoder shows it.
    pub pooled: Option<usize>,
}

impl Traits {
    /// Whether it is of Stable Diffusion 1.
    fn is_first(&self) -> bool {
        !self.xl && !self.second
    }
}

/// Width of a head of Stable Diffusion 2 and SDXL, and number of heads of Stable Diffusion 1.
const HEAD: usize = 64;
const HEADS: usize = 8;
/// Width of the embedding of one of SDXL's sizes.
const TIME: usize = 256;

/// The network with diffusers' names.
pub fn part(mut weights: Weights, traits: &Traits) -> Result<Part> {
    let levels = levels(&weights, traits)?;
    let mid = mid(&weights);
    let config = config(&weights, traits, &levels, mid)?;
    let names: Vec<String> = weights.names().map(str::to_string).collect();
    let modules = renamings(&levels, mid);
    for name in names {
        if let Some(ours) = modules.iter().find_map(|module| module.to_ours(&name)) {
            weights.rename(&name, &ours);
        }
    }
    let ours = ["down_blocks.", "mid_block.", "up_blocks.", "conv_", "time_embedding.", "add_emb"];
    weights.keep(|name| ours.iter().any(|start| name.starts_with(start)));
    Ok(Part { weights, config })
}

/// What stands between the way down and the way up.
fn mid(weights: &Weights) -> MidKind {
    let resnet = weights.has("middle_block.0.in_layers.2.weight");
    match (resnet, weights.has("middle_block.1.norm.weight")) {
        (false, _) => MidKind::None,
        (true, true) => MidKind::CrossAttention,
        (true, false) => MidKind::Resnet,
    }
}

fn levels(weights: &Weights, traits: &Traits) -> Result<Vec<LevelConfig>> {
    let new = LevelConfig {
        channels: 0,
        layers: 0,
        heads: 0,
        transformer_layers: 1,
        only_cross: false,
        down_attends: false,
        up_attends: false,
    };
    let mut levels = vec![new.clone()];
    for block in 1.. {
        let at = format!("input_blocks.{block}");
        if weights.has(&format!("{at}.0.op.weight")) {
            levels.push(new.clone());
            continue;
        }
        let name = format!("{at}.0.in_layers.2.weight");
        if !weights.has(&name) {
            break;
        }
        let level = levels.last_mut().expect("there is one");
        level.channels = shape::<4>(weights, &name)?[0];
        level.layers += 1;
        level.heads = if traits.is_first() { HEADS } else { (level.channels / HEAD).max(1) };
        let depth = count(weights, |i| format!("{at}.1.transformer_blocks.{i}."));
        level.down_attends = depth > 0;
        level.transformer_layers = depth.max(1);
    }
    ensure!(
        levels.iter().all(|level| level.layers > 0),
        "{}: input_blocks has a level without a resnet; the file is damaged",
        weights.source().display()
    );
    let mut block = 0;
    for level in levels.iter_mut().rev() {
        level.up_attends = weights.has(&format!("output_blocks.{block}.1.norm.weight"));
        block += level.layers + 1;
    }
    // The middle has the layers of the deepest level, which may have none itself.
    let depth = count(weights, |i| format!("middle_block.1.transformer_blocks.{i}."));
    if let Some(last) = levels.last_mut().filter(|level| !level.down_attends) {
        last.transformer_layers = depth.max(1);
    }
    Ok(levels)
}

fn config(
    weights: &Weights,
    traits: &Traits,
    levels: &[LevelConfig],
    mid: MidKind,
) -> Result<Value> {
    let [_, input, ..] = shape::<4>(weights, "input_blocks.0.0.weight")?;
    let [output, ..] = shape::<4>(weights, "out.2.weight")?;
    let text = weights.names().find(|name| name.ends_with(".attn2.to_k.weight"));
    let context = text.map(|name| shape::<2>(weights, name)).transpose()?.map(|[_, width]| width);
    let side = match (traits.xl, traits.second && traits.predicts_v) {
        (true, _) => 128,
        (false, true) => 96,
        (false, false) => 64,
    };
    let name = |attends: bool, kind: &str| match attends {
        true => format!("CrossAttn{kind}Block2D"),
        false => format!("{kind}Block2D"),
    };
    let each = |f: &dyn Fn(&LevelConfig) -> usize| levels.iter().map(f).collect::<Vec<usize>>();
    let mid_type = match mid {
        MidKind::None => Value::Null,
        MidKind::CrossAttention => json!("UNetMidBlock2DCrossAttn"),
        MidKind::Resnet => json!("UNetMidBlock2D"),
    };
    // The way up begins at the deepest level.
    let up = levels.iter().rev().map(|level| name(level.up_attends, "Up"));
    let mut config = json!({
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": one_or_all(each(&|level| level.heads)),
        "block_out_channels": each(&|level| level.channels),
        "center_input_sample": false,
        "cross_attention_dim": context.unwrap_or(768),
        "down_block_types": levels.iter().map(|l| name(l.down_attends, "Down")).collect::<Vec<_>>(),
        "downsample_padding": 1,
        "flip_sin_to_cos": true,
        "freq_shift": 0,
        "in_channels": input,
        "layers_per_block": one_or_all(each(&|level| level.layers)),
        "mid_block_scale_factor": 1,
        "mid_block_type": mid_type,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": output,
        "sample_size": side,
        "transformer_layers_per_block": one_or_all(each(&|level| level.transformer_layers)),
        "up_block_types": up.collect::<Vec<_>>(),
        "use_linear_projection": !traits.is_first(),
    });
    if traits.xl {
        let [_, all] = shape::<2>(weights, "label_emb.0.0.weight")?;
        let shown = traits.pooled.filter(|pooled| all > *pooled && (all - pooled) % TIME_IDS == 0);
        config["addition_embed_type"] = json!("text_time");
        config["addition_time_embed_dim"] =
            json!(shown.map_or(TIME, |pooled| (all - pooled) / TIME_IDS));
        config["projection_class_embeddings_input_dim"] = json!(all);
    }
    Ok(config)
}

/// One number where all are equal, as published configurations have it.
fn one_or_all(each: Vec<usize>) -> Value {
    match each.iter().all(|n| *n == each[0]) {
        true => json!(each[0]),
        false => json!(each),
    }
}
