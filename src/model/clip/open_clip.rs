//! open_clip's names and layouts of a dual encoder's tensors, as transformers'.

use anyhow::Result;

use crate::io::weights::Weights;

/// Names outside the layers, open_clip's and transformers'.
const NAMES: [(&str, &str); 14] = [
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.weight", "text_model.final_layer_norm.weight"),
    ("ln_final.bias", "text_model.final_layer_norm.bias"),
    ("text_projection", "text_projection.weight"),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.weight", "vision_model.pre_layrnorm.weight"),
    ("visual.ln_pre.bias", "vision_model.pre_layrnorm.bias"),
    ("visual.ln_post.weight", "vision_model.post_layernorm.weight"),
    ("visual.ln_post.bias", "vision_model.post_layernorm.bias"),
    ("visual.proj", "visual_projection.weight"),
    ("logit_scale", "logit_scale"),
];

/// Parts of a layer, open_clip's and transformers'.
const PARTS: [(&str, &str); 5] = [
    ("ln_1", "layer_norm1"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
];

/// The tensor that open_clip's weights have and transformers' have not.
const OWN: &str = "visual.conv1.weight";

/// Whose names a dual encoder's tensors have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Layout {
    Transformers,
    /// OpenAI's own files keep their sizes as tensors; their activation is the quick gelu.
    OpenClip {
        openai: bool,
    },
}

impl Layout {
    pub fn of(weights: &Weights) -> Self {
        if !weights.has(OWN) {
            return Self::Transformers;
        }
        let openai = weights.has("input_resolution") || weights.has("context_length");
        Self::OpenClip { openai }
    }
}

/// Gives tensors transformers' names: q, k and v apart, and projections as linear layers have them.
///
/// # Errors
/// When a tensor of q, k and v cannot be split in three.
pub fn as_transformers(weights: &mut Weights) -> Result<()> {
    let names: Vec<String> = weights.names().map(str::to_string).collect();
    for name in names {
        // Models with a text tower of their own have it below `text`.
        let short = name.strip_prefix("text.").unwrap_or(&name);
        if let Some((_, ours)) = NAMES.iter().find(|(theirs, _)| *theirs == short) {
            weights.rename(&name, ours);
            if ours.ends_with("_projection.weight") {
                weights.transpose(ours);
            }
            continue;
        }
        let (tower, rest) = match short.strip_prefix("visual.") {
            Some(rest) => ("vision_model", rest),
            None => ("text_model", short),
        };
        let Some((i, part)) =
            rest.strip_prefix("transformer.resblocks.").and_then(|rest| rest.split_once('.'))
        else {
            continue;
        };
        let layer = format!("{tower}.encoder.layers.{i}");
        if let Some(kind) = part.strip_prefix("attn.in_proj_") {
            let of = |p: &str| format!("{layer}.self_attn.{p}_proj.{kind}");
            weights.split(&name, &["q", "k", "v"].map(of))?;
        } else if let Some((part, kind)) = part.rsplit_once('.')
            && let Some((_, ours)) = PARTS.iter().find(|(theirs, _)| *theirs == part)
        {
            weights.rename(&name, &format!("{layer}.{ours}.{kind}"));
        }
    }
    Ok(())
}
