//! Transformers of Stable Diffusion 3 and FLUX.1: diffusers' `SD3Transformer2DModel` and
//! `FluxTransformer2DModel` from the layouts of Stability AI and Black Forest Labs.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::part::{Part, count, shape};
use crate::io::weights::Weights;

/// Names outside the blocks of Stable Diffusion 3, the authors' and diffusers'.
const SD3: [(&str, &str); 9] = [
    ("pos_embed", "pos_embed.pos_embed"),
    ("x_embedder.proj", "pos_embed.proj"),
    ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    ("context_embedder", "context_embedder"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear"),
];

/// Parts of a block of its image and of its text.
const SD3_IMAGE: [(&str, &str); 9] = [
    ("adaLN_modulation.1", "norm1.linear"),
    ("attn.ln_q", "attn.norm_q"),
    ("attn.ln_k", "attn.norm_k"),
    ("attn.proj", "attn.to_out.0"),
    ("attn2.ln_q", "attn2.norm_q"),
    ("attn2.ln_k", "attn2.norm_k"),
    ("attn2.proj", "attn2.to_out.0"),
    ("mlp.fc1", "ff.net.0.proj"),
    ("mlp.fc2", "ff.net.2"),
];
const SD3_TEXT: [(&str, &str); 6] = [
    ("adaLN_modulation.1", "norm1_context.linear"),
    ("attn.ln_q", "attn.norm_added_q"),
    ("attn.ln_k", "attn.norm_added_k"),
    ("attn.proj", "attn.to_add_out"),
    ("mlp.fc1", "ff_context.net.0.proj"),
    ("mlp.fc2", "ff_context.net.2"),
];

/// Names outside the blocks of FLUX.1.
const FLUX: [(&str, &str); 10] = [
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear"),
];

/// Parts of its blocks with two streams and with one; norms of queries and keys are called scales.
const FLUX_DOUBLE: [(&str, &str); 12] = [
    ("img_mod.lin", "norm1.linear"),
    ("txt_mod.lin", "norm1_context.linear"),
    ("img_attn.norm.query_norm.scale", "attn.norm_q.weight"),
    ("img_attn.norm.key_norm.scale", "attn.norm_k.weight"),
    ("txt_attn.norm.query_norm.scale", "attn.norm_added_q.weight"),
    ("txt_attn.norm.key_norm.scale", "attn.norm_added_k.weight"),
    ("img_attn.proj", "attn.to_out.0"),
    ("txt_attn.proj", "attn.to_add_out"),
    ("img_mlp.0", "ff.net.0.proj"),
    ("img_mlp.2", "ff.net.2"),
    ("txt_mlp.0", "ff_context.net.0.proj"),
    ("txt_mlp.2", "ff_context.net.2"),
];
const FLUX_SINGLE: [(&str, &str); 4] = [
    ("modulation.lin", "norm.linear"),
    ("norm.query_norm.scale", "attn.norm_q.weight"),
    ("norm.key_norm.scale", "attn.norm_k.weight"),
    ("linear2", "proj_out"),
];

const IMAGE_QKV: [&str; 3] = ["to_q", "to_k", "to_v"];
const TEXT_QKV: [&str; 3] = ["add_q_proj", "add_k_proj", "add_v_proj"];

/// Width of a head of Stable Diffusion 3, and side of its latents.
const SD3_HEAD: usize = 64;
const SD3_SIDE: usize = 128;

/// What is done to a network's list of tensors.
struct Renamer {
    weights: Weights,
}

impl Renamer {
    /// Renames a module, or one tensor.
    fn module(&mut self, theirs: &str, ours: &str) {
        self.weights.rename(theirs, ours);
        for kind in ["weight", "bias"] {
            self.weights.rename(&format!("{theirs}.{kind}"), &format!("{ours}.{kind}"));
        }
    }

    fn block(&mut self, theirs: &str, ours: &str, parts: &[(&str, &str)]) {
        for (part, own) in parts {
            self.module(&format!("{theirs}.{part}"), &format!("{ours}.{own}"));
        }
    }

    /// Splits a module's rows in so many shares.
    fn split(&mut self, theirs: &str, ours: &str, parts: &[(&str, usize)]) -> Result<()> {
        for kind in ["weight", "bias"] {
            let part = |(part, share): &(&str, usize)| (format!("{ours}.{part}.{kind}"), *share);
            let parts: Vec<(String, usize)> = parts.iter().map(part).collect();
            self.weights.split_by(&format!("{theirs}.{kind}"), &parts)?;
        }
        Ok(())
    }

    /// Splits queries, keys and values.
    fn qkv(&mut self, theirs: &str, ours: &str, parts: [&str; 3]) -> Result<()> {
        self.split(theirs, ours, &parts.map(|part| (part, 1)))
    }

    /// diffusers has scale before shift where the authors have shift before scale.
    fn swap(&mut self, ours: &str) {
        for kind in ["weight", "bias"] {
            self.weights.swap_halves(&format!("{ours}.{kind}"));
        }
    }

    /// What has diffusers' names.
    fn done(mut self, starts: &[&str]) -> Weights {
        self.weights.keep(|name| starts.iter().any(|start| name.starts_with(start)));
        self.weights
    }
}

/// Stable Diffusion 3's transformer.
pub fn sd3(weights: Weights) -> Result<Part> {
    let layers = count(&weights, |i| format!("joint_blocks.{i}."));
    let config = sd3_config(&weights, layers)?;
    let mut r = Renamer { weights };
    r.block_outside(&SD3);
    for i in 0..layers {
        let ours = format!("transformer_blocks.{i}");
        let [image, text] = ["x_block", "context_block"].map(|s| format!("joint_blocks.{i}.{s}"));
        r.block(&image, &ours, &SD3_IMAGE);
        r.block(&text, &ours, &SD3_TEXT);
        r.qkv(&format!("{image}.attn.qkv"), &format!("{ours}.attn"), IMAGE_QKV)?;
        r.qkv(&format!("{image}.attn2.qkv"), &format!("{ours}.attn2"), IMAGE_QKV)?;
        r.qkv(&format!("{text}.attn.qkv"), &format!("{ours}.attn"), TEXT_QKV)?;
    }
    // The last block's text is only attended to.
    r.swap(&format!("transformer_blocks.{}.norm1_context.linear", layers - 1));
    r.swap("norm_out.linear");
    let starts =
        ["pos_embed.", "time_text_embed.", "context_embedder.", "transformer_blocks.", "norm_out."];
    let starts = [&starts[..], &["proj_out."]].concat();
    Ok(Part { weights: r.done(&starts), config })
}

fn sd3_config(weights: &Weights, layers: usize) -> Result<Value> {
    let [width, channels, patch, _] = shape(weights, "x_embedder.proj.weight")?;
    let norm = "joint_blocks.0.x_block.attn.ln_q.weight";
    let head = if weights.has(norm) { shape::<1>(weights, norm)?[0] } else { SD3_HEAD };
    let [_, cells, _] = shape::<3>(weights, "pos_embed")?;
    let side = cells.isqrt();
    let [_, joint] = shape::<2>(weights, "context_embedder.weight")?;
    let [_, pooled] = shape::<2>(weights, "y_embedder.mlp.0.weight")?;
    let second = |i: &usize| weights.has(&format!("joint_blocks.{i}.x_block.attn2.qkv.weight"));
    Ok(json!({
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": head,
        "caption_projection_dim": width,
        "dual_attention_layers": (0..layers).filter(second).collect::<Vec<_>>(),
        "in_channels": channels,
        "joint_attention_dim": joint,
        "num_attention_heads": width / head.max(1),
        "num_layers": layers,
        "out_channels": channels,
        "patch_size": patch,
        "pooled_projection_dim": pooled,
        "pos_embed_max_size": side,
        "qk_norm": if weights.has(norm) { json!("rms_norm") } else { Value::Null },
        "sample_size": SD3_SIDE.min(side * patch),
    }))
}

impl Renamer {
    fn block_outside(&mut self, parts: &[(&str, &str)]) {
        for (theirs, ours) in parts {
            self.module(theirs, ours);
        }
    }
}

/// FLUX.1's transformer.
pub fn flux(weights: Weights) -> Result<Part> {
    let config = flux_config(&weights)?;
    let double = count(&weights, |i| format!("double_blocks.{i}."));
    let single = count(&weights, |i| format!("single_blocks.{i}."));
    let mut r = Renamer { weights };
    r.block_outside(&FLUX);
    for i in 0..double {
        let (theirs, ours) = (format!("double_blocks.{i}"), format!("transformer_blocks.{i}"));
        r.block(&theirs, &ours, &FLUX_DOUBLE);
        r.qkv(&format!("{theirs}.img_attn.qkv"), &format!("{ours}.attn"), IMAGE_QKV)?;
        r.qkv(&format!("{theirs}.txt_attn.qkv"), &format!("{ours}.attn"), TEXT_QKV)?;
    }
    for i in 0..single {
        let theirs = format!("single_blocks.{i}");
        let ours = format!("single_transformer_blocks.{i}");
        r.block(&theirs, &ours, &FLUX_SINGLE);
        // The feed-forward is four times as wide as the stream.
        let parts = [("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1), ("proj_mlp", 4)];
        r.split(&format!("{theirs}.linear1"), &ours, &parts)?;
    }
    r.swap("norm_out.linear");
    let starts = ["x_embedder.", "context_embedder.", "time_text_embed.", "transformer_blocks."];
    let rest = ["single_transformer_blocks.", "norm_out.", "proj_out."];
    Ok(Part { weights: r.done(&[&starts[..], &rest].concat()), config })
}

fn flux_config(weights: &Weights) -> Result<Value> {
    let [width, token] = shape(weights, "img_in.weight")?;
    let [_, joint] = shape::<2>(weights, "txt_in.weight")?;
    let [_, pooled] = shape::<2>(weights, "vector_in.in_layer.weight")?;
    let [head] = shape(weights, "double_blocks.0.img_attn.norm.query_norm.scale")?;
    ensure!(
        head > 0 && width % head == 0,
        "{}: the norm of queries has {head} values, which do not divide the width {width}",
        weights.source().display()
    );
    let mut config = json!({
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": head,
        "guidance_embeds": weights.has("guidance_in.in_layer.weight"),
        "in_channels": token,
        "joint_attention_dim": joint,
        "num_attention_heads": width / head,
        "num_layers": count(weights, |i| format!("double_blocks.{i}.")),
        "num_single_layers": count(weights, |i| format!("single_blocks.{i}.")),
        "patch_size": 1,
        "pooled_projection_dim": pooled,
    });
    // An eighth of a head for the first axis, the rest for the other two.
    let first = head / 8;
    config["axes_dims_rope"] = json!([first, (head - first) / 2, (head - first) / 2]);
    Ok(config)
}
