//! VAEs: diffusers' `AutoencoderKL` from the layout of CompVis, in a model's file or alone.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::part::{Part, count, shape};
use crate::io::weights::Weights;
use crate::model::component::Component;
use crate::model::family::Family;

/// Parts of a level, its attention and what is outside: the authors' names and diffusers'.
const PARTS: [(&str, &str); 14] = [
    (".nin_shortcut.", ".conv_shortcut."),
    (".downsample.conv.", ".downsamplers.0.conv."),
    (".upsample.conv.", ".upsamplers.0.conv."),
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."),
    (".mid.attn_1.q.", ".mid_block.attentions.0.to_q."),
    (".mid.attn_1.k.", ".mid_block.attentions.0.to_k."),
    (".mid.attn_1.v.", ".mid_block.attentions.0.to_v."),
    (".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0."),
    (".block.", ".resnets."),
    (".norm_out.", ".conv_norm_out."),
    (".down.", ".down_blocks."),
    (".up.", ".up_blocks."),
];

/// The VAE that `--vae` names: a folder in diffusers' layout, a model folder with one, or a file.
///
/// # Errors
/// When it holds none.
pub fn vae_of(path: &Path, family: Family) -> Result<Component> {
    if path.is_dir() {
        let below = path.join("vae");
        return Component::folder(if below.is_dir() { &below } else { path });
    }
    let whole = Weights::open_any(path)?;
    let places = ["first_stage_model.", "vae.", ""].into_iter().map(|prefix| whole.view(prefix));
    let tensors = places.into_iter().find(|tensors| tensors.has("decoder.conv_in.weight"));
    let tensors = tensors.with_context(|| format!("{}: holds no VAE", path.display()))?;
    ensure!(
        family != Family::Flux2,
        "{}: FLUX.2's VAE in one file is not supported; give diffusers' folder of it",
        path.display()
    );
    Ok(part(tensors, family)?.component(path, "vae"))
}

/// Scaling and shift of a family's latents.
fn factors(family: Family) -> [f64; 2] {
    match family {
        Family::StableDiffusion => [0.18215, 0.0],
        Family::StableDiffusionXl => [0.13025, 0.0],
        Family::StableDiffusion3 => [1.5305, 0.0609],
        Family::Flux | Family::ZImage => [0.3611, 0.1159],
        // Its latents are normalised by a batch norm.
        Family::Flux2 => [1.0, 0.0],
    }
}

/// The VAE with diffusers' names.
pub(super) fn part(mut weights: Weights, family: Family) -> Result<Part> {
    let path = weights.source().display().to_string();
    if !weights.has("decoder.mid_block.resnets.0.norm1.weight") {
        rename(&mut weights);
    }
    weights.keep(|name| {
        ["encoder.", "decoder.", "quant_conv.", "post_quant_conv."]
            .iter()
            .any(|start| name.starts_with(start))
    });
    let levels = count(&weights, |i| format!("encoder.down_blocks.{i}."));
    ensure!(levels > 0, "{path}: its VAE has no encoder; give a whole one by --vae");
    let width = |i: usize| {
        let name = format!("encoder.down_blocks.{i}.resnets.0.conv1.weight");
        anyhow::Ok(shape::<4>(&weights, &name)?[0])
    };
    let channels = (0..levels).map(width).collect::<Result<Vec<_>>>()?;
    let [_, latent, ..] = shape::<4>(&weights, "decoder.conv_in.weight")?;
    let [scaling, shift] = factors(family);
    let config = json!({
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": channels,
        "down_block_types": vec!["DownEncoderBlock2D"; levels],
        "force_upcast": family != Family::StableDiffusion,
        "in_channels": 3,
        "latent_channels": latent,
        "layers_per_block": count(&weights, |j| format!("encoder.down_blocks.0.resnets.{j}.")),
        "mid_block_add_attention": weights.has("decoder.mid_block.attentions.0.to_q.weight"),
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": if family == Family::StableDiffusion { 512 } else { 1024 },
        "scaling_factor": scaling,
        "shift_factor": if shift == 0.0 { json!(null) } else { json!(shift) },
        "up_block_types": vec!["UpDecoderBlock2D"; levels],
        "use_post_quant_conv": weights.has("post_quant_conv.weight"),
        "use_quant_conv": weights.has("quant_conv.weight"),
    });
    Ok(Part { weights, config })
}

/// Gives tensors diffusers' names. Its decoder counts levels from the deepest on.
fn rename(weights: &mut Weights) {
    let levels = count(weights, |i| format!("decoder.up.{i}."));
    let names: Vec<String> = weights.names().map(str::to_string).collect();
    for name in names {
        let mut ours = name.clone();
        if let Some((i, rest)) =
            name.strip_prefix("decoder.up.").and_then(|rest| rest.split_once('.'))
            && let Some(level) = i.parse().ok().and_then(|i: usize| levels.checked_sub(i + 1))
        {
            ours = format!("decoder.up.{level}.{rest}");
        }
        for (theirs, part) in PARTS {
            ours = ours.replace(theirs, part);
        }
        weights.rename(&name, &ours);
        // Attention's projections are 1x1 convolutions there.
        if ours.contains(".attentions.") {
            weights.flatten(&ours);
        }
    }
}
