//! Text encoders: transformers' `CLIPTextModel` and `T5EncoderModel` from a model's file, or from a
//! file of their own.

use std::path::Path;

use anyhow::{Result, bail, ensure};
use serde_json::json;

use super::part::{Part, count, shape};
use crate::io::weights::Weights;
use crate::model::clip::open_clip::as_transformers;
use crate::model::component::Component;
use crate::model::family::Family;
use crate::model::text::qwen3::prefix;

/// What an encoder is, which its tensors do not show.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// OpenAI's, or another in transformers' layout.
    Clip,
    /// Of open_clip's project: its activation is the exact gelu.
    Open,
    /// The same without its last layer, as Stable Diffusion 2 takes it.
    OpenShort,
    /// Google's T5.
    T5,
    /// Of Z-Image and FLUX.2 klein.
    Qwen3,
}

/// Where files have encoders, with the names of the folders that they would be.
fn places(family: Family) -> &'static [(&'static str, &'static str, Kind)] {
    match family {
        Family::StableDiffusion => &[
            ("text_encoder", "cond_stage_model.transformer.", Kind::Clip),
            ("text_encoder", "cond_stage_model.model.", Kind::OpenShort),
        ],
        Family::StableDiffusionXl => &[
            ("text_encoder", "conditioner.embedders.0.transformer.", Kind::Clip),
            ("text_encoder_2", "conditioner.embedders.1.model.", Kind::Open),
        ],
        Family::StableDiffusion3 => &[
            ("text_encoder", "text_encoders.clip_l.transformer.", Kind::Clip),
            ("text_encoder_2", "text_encoders.clip_g.transformer.", Kind::Open),
            ("text_encoder_3", "text_encoders.t5xxl.transformer.", Kind::T5),
        ],
        Family::Flux => &[
            ("text_encoder", "text_encoders.clip_l.transformer.", Kind::Clip),
            ("text_encoder_2", "text_encoders.t5xxl.transformer.", Kind::T5),
        ],
        Family::Flux2 | Family::ZImage => &[],
    }
}

/// The encoders of a model's file.
pub(super) fn parts_of(whole: &Weights, family: Family) -> Result<Vec<(&'static str, Part)>> {
    let mut parts = Vec::new();
    for (name, prefix, kind) in places(family) {
        let tensors = whole.view(prefix);
        if tensors.names().next().is_some() {
            parts.push((*name, part(tensors, *kind)?));
        }
    }
    Ok(parts)
}

/// Whether what `--text-encoder` names, a folder in transformers' layout or a file, is a T5.
///
/// # Errors
/// When it cannot be read.
pub fn is_t5(path: &Path) -> Result<bool> {
    if path.is_dir() {
        return Ok(Component::folder(path)?.config.json["model_type"] == "t5");
    }
    Ok(Weights::open_any(path)?.has("encoder.block.0.layer.0.SelfAttention.q.weight"))
}

/// The encoder that `--text-encoder` names, of a kind.
///
/// # Errors
/// When it holds none.
pub fn text_encoder_of(path: &Path, kind: Kind) -> Result<Component> {
    if path.is_dir() {
        return Component::folder(path);
    }
    let tensors = Weights::open_any(path)?;
    let kind = match kind {
        // Files in transformers' layout have left out the last layer already.
        Kind::OpenShort if !tensors.has("token_embedding.weight") => Kind::Open,
        kind => kind,
    };
    Ok(part(tensors, kind)?.component(path, "text encoder"))
}

fn part(tensors: Weights, kind: Kind) -> Result<Part> {
    match kind {
        Kind::T5 => t5(tensors),
        Kind::Qwen3 => qwen3(&tensors),
        Kind::Clip | Kind::Open | Kind::OpenShort => clip(tensors, kind),
    }
}

/// A CLIP with transformers' names.
fn clip(mut weights: Weights, kind: Kind) -> Result<Part> {
    if weights.has("token_embedding.weight") {
        as_transformers(&mut weights)?;
    }
    let bare = weights.has("embeddings.token_embedding.weight");
    if bare {
        let names: Vec<String> = weights.names().map(str::to_string).collect();
        for name in names.iter().filter(|n| !n.starts_with("text_projection")) {
            weights.rename(name, &format!("text_model.{name}"));
        }
    }
    let mut layers = count(&weights, |i| format!("text_model.encoder.layers.{i}."));
    let path = weights.source().display().to_string();
    if kind == Kind::OpenShort {
        ensure!(layers > 1, "{path}: its text encoder has no layer before the last");
        layers -= 1;
    }
    let last = format!("text_model.encoder.layers.{layers}.");
    let projected = kind != Kind::OpenShort;
    weights.keep(|name| {
        (name.starts_with("text_model.")
            && !name.ends_with("position_ids")
            && !name.starts_with(&last))
            || (projected && name == "text_projection.weight")
    });
    let embeddings = "text_model.embeddings";
    let [words, width] = shape(&weights, &format!("{embeddings}.token_embedding.weight"))?;
    let [tokens, _] = shape::<2>(&weights, &format!("{embeddings}.position_embedding.weight"))?;
    let fc1 = "text_model.encoder.layers.0.mlp.fc1.weight";
    let [inner, _] = shape::<2>(&weights, fc1)?;
    let projection = match weights.shape("text_projection.weight") {
        Some(&[outputs, _]) => Some(outputs),
        Some(other) => bail!("{path}: text_projection has shape {other:?}, expected a matrix"),
        None => None,
    };
    const HEAD: usize = 64;
    let class = match projection {
        Some(_) => "CLIPTextModelWithProjection",
        None => "CLIPTextModel",
    };
    let config = json!({
        "architectures": [class],
        "bos_token_id": 0,
        // The largest token: its number depends on the vocabulary.
        "eos_token_id": 2,
        "hidden_act": if kind == Kind::Clip { "quick_gelu" } else { "gelu" },
        "hidden_size": width,
        "intermediate_size": inner,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": tokens,
        "model_type": "clip_text_model",
        "num_attention_heads": (width / HEAD).max(1),
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "projection_dim": projection.unwrap_or(width),
        "vocab_size": words,
    });
    Ok(Part { weights, config })
}

/// A Qwen3, whose names are transformers' already. Its base of the rotary embedding is that of all
/// published ones.
fn qwen3(weights: &Weights) -> Result<Part> {
    let prefix = prefix(weights);
    let matrix = |name: &str| shape::<2>(weights, &format!("{prefix}{name}.weight"));
    let [words, width] = matrix("embed_tokens")?;
    let [queries, _] = matrix("layers.0.self_attn.q_proj")?;
    let [keys, _] = matrix("layers.0.self_attn.k_proj")?;
    let [inner, _] = matrix("layers.0.mlp.gate_proj")?;
    let [head] = shape::<1>(weights, &format!("{prefix}layers.0.self_attn.q_norm.weight"))?;
    let config = json!({
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": head,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": inner,
        "model_type": "qwen3",
        "num_attention_heads": queries / head.max(1),
        "num_hidden_layers": count(weights, |i| format!("{prefix}layers.{i}.")),
        "num_key_value_heads": keys / head.max(1),
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "vocab_size": words,
    });
    Ok(Part { weights: weights.clone(), config })
}

/// A T5, whose names are transformers' already.
fn t5(mut weights: Weights) -> Result<Part> {
    weights.keep(|name| name.starts_with("encoder.") || name == "shared.weight");
    let shared = weights.has("shared.weight");
    let table = if shared { "shared.weight" } else { "encoder.embed_tokens.weight" };
    let [words, width] = shape(&weights, table)?;
    let block = "encoder.block.0.layer";
    let bias = format!("{block}.0.SelfAttention.relative_attention_bias.weight");
    let [buckets, heads] = shape(&weights, &bias)?;
    let [all, _] = shape::<2>(&weights, &format!("{block}.0.SelfAttention.q.weight"))?;
    let gated = weights.has(&format!("{block}.1.DenseReluDense.wi_0.weight"));
    let wi = if gated { "wi_0" } else { "wi" };
    let [inner, _] = shape::<2>(&weights, &format!("{block}.1.DenseReluDense.{wi}.weight"))?;
    let config = json!({
        "architectures": ["T5EncoderModel"],
        "d_ff": inner,
        "d_kv": all / heads.max(1),
        "d_model": width,
        "dense_act_fn": if gated { "gelu_new" } else { "relu" },
        "feed_forward_proj": if gated { "gated-gelu" } else { "relu" },
        "is_gated_act": gated,
        "layer_norm_epsilon": 1e-6,
        "model_type": "t5",
        "num_heads": heads,
        "num_layers": count(&weights, |i| format!("encoder.block.{i}.")),
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": buckets,
        "vocab_size": words,
    });
    Ok(Part { weights, config })
}
