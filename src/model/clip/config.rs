//! The numbers of a dual encoder: from transformers' or open_clip's configuration, or read off its
//! tensors.

use std::path::Path;

use anyhow::{Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use super::open_clip::Layout;
use super::vision::VisionConfig;
use crate::io::weights::Weights;
use crate::model::config::Config;
use crate::model::nn::Activation;
use crate::model::picture::{Fit, Preparation};
use crate::model::text::clip::{ClipConfig, LARGEST};

/// The numbers of both encoders, and how pictures are prepared.
pub struct DualConfig {
    pub vision: VisionConfig,
    /// None where the weights have no text encoder.
    pub text: Option<ClipConfig>,
    pub preparation: Preparation,
    /// What tokens behind the end are where the folder has no tokenizer.
    pub pad: u32,
}

/// open_clip's end of a text in CLIP's own vocabulary; transformers pads with it.
const CLIP_END: u32 = 49407;

impl DualConfig {
    /// Of the files beside weights that have got transformers' names; `layout` is what they had.
    ///
    /// # Errors
    /// Names the file and the field that is missing or not supported.
    pub fn read(folder: &Path, weights: &Weights, layout: Layout) -> Result<Self> {
        let open_clip = folder.join("open_clip_config.json");
        let found = match layout {
            Layout::OpenClip { .. } if open_clip.is_file() => of_open_clip(&open_clip),
            Layout::Transformers if folder.join("config.json").is_file() => {
                of_transformers(folder, weights)
            }
            Layout::Transformers | Layout::OpenClip { .. } => of_tensors(weights, layout),
        }?;
        let text = found.text.as_ref().map(|t| ("text_model", t.layers));
        for (tower, layers) in text.into_iter().chain([("vision_model", found.vision.layers)]) {
            ensure!(
                !weights.has(&format!("{tower}.encoder.layers.{layers}.layer_norm1.weight")),
                "{}: has more layers in {tower} than the {layers} of the configuration beside it; \
                 do they belong together?",
                weights.source().display()
            );
        }
        Ok(found)
    }
}

/// A part of a configuration, as one of its own; an absent one is all defaults.
fn part(c: &Config, name: &str) -> Result<Config> {
    let json = match &c.json[name] {
        Value::Null => json!({}),
        Value::Object(_) => c.json[name].clone(),
        _ => bail!(c.bad(name, "is not an object")),
    };
    Ok(Config { path: format!("{}, {name}", c.path.display()).into(), json })
}

/// A tower's part of transformers' configuration; old files hold some of its fields in a second
/// object, which wins.
fn tower(c: &Config, name: &str) -> Result<Config> {
    let mut found = part(c, name)?;
    if let (Some(fields), Some(more)) =
        (found.json.as_object_mut(), c.json[format!("{name}_dict")].as_object())
    {
        fields.extend(more.clone());
    }
    Ok(found)
}

fn patches(c: &Config, field: &str, vision: VisionConfig) -> Result<VisionConfig> {
    // Pixels of a last patch that is not whole are left out, as a convolution does.
    let what = format!("is larger than the picture's side {}", vision.size);
    ensure!(vision.patch <= vision.size, c.bad(field, &what));
    Ok(vision)
}

/// `config.json` with `preprocessor_config.json`.
fn of_transformers(folder: &Path, weights: &Weights) -> Result<DualConfig> {
    let c = Config::open(folder)?;
    let class = c.json["architectures"][0].as_str();
    let known = ["CLIPModel", "CLIPVisionModelWithProjection"];
    ensure!(
        class.is_none_or(|class| known.contains(&class)),
        c.bad("architectures", "is not supported; CLIPModel is")
    );
    // An image encoder alone has its fields at the top.
    let alone = class == Some("CLIPVisionModelWithProjection");
    let v = if alone { Config::read(&c.path)? } else { tower(&c, "vision_config")? };
    let projection = c.width("projection_dim", 512)?;
    let width = v.width("hidden_size", 768)?;
    v.only(&[("num_channels", json!(3))])?;
    let vision = VisionConfig {
        width,
        heads: v.heads("num_attention_heads", 12, width)?,
        inner: v.width("intermediate_size", 3072)?,
        layers: v.count("num_hidden_layers", 12)?,
        size: v.width("image_size", 224)?,
        patch: v.width("patch_size", 32)?,
        projection,
        eps: v.positive("layer_norm_eps", 1e-5)?,
        activation: v.activation("hidden_act", "quick_gelu")?,
    };
    let vision = patches(&v, "patch_size", vision)?;
    let has_text = weights.has("text_model.final_layer_norm.weight");
    let text = match has_text && !alone {
        true => Some(ClipConfig::of(&tower(&c, "text_config")?, projection)?),
        false => None,
    };
    let preparation = preparation(folder, vision.size)?;
    Ok(DualConfig { vision, text, preparation, pad: CLIP_END })
}

/// `preprocessor_config.json`, or the part of a processor's file that newer versions write; CLIP's
/// own where there is neither.
fn preparation(folder: &Path, size: usize) -> Result<Preparation> {
    let own = folder.join("preprocessor_config.json");
    let whole = folder.join("processor_config.json");
    let c = if own.is_file() {
        Config::read(&own)?
    } else if whole.is_file() {
        part(&Config::read(&whole)?, "image_processor")?
    } else {
        return Ok(Preparation::clip(Fit::Transformers, size));
    };
    let found = Preparation::from_json(&c)?;
    ensure!(
        found.crop == size,
        "{}: crop_size = {}, but the model's image_size is {size}",
        c.path.display(),
        found.crop
    );
    Ok(found)
}

/// `open_clip_config.json`.
fn of_open_clip(path: &Path) -> Result<DualConfig> {
    let c = Config::read(path)?;
    let model = part(&c, "model_cfg")?;
    let (v, t) = (part(&model, "vision_cfg")?, part(&model, "text_cfg")?);
    v.only(&[
        ("timm_model_name", Value::Null),
        ("ls_init_value", Value::Null),
        ("attentional_pool", json!(false)),
        ("global_average_pool", json!(false)),
        ("no_ln_pre", json!(false)),
        ("pool_type", json!("tok")),
        ("pos_embed_type", json!("learnable")),
        ("final_ln_after_pool", json!(false)),
        ("input_patchnorm", json!(false)),
    ])?;
    t.only(&[
        ("hf_model_name", Value::Null),
        ("ls_init_value", Value::Null),
        ("embed_cls", json!(false)),
        ("no_causal_mask", json!(false)),
        ("proj_type", json!("linear")),
        ("proj_bias", json!(false)),
        ("pool_type", json!("argmax")),
        ("tokenizer_kwargs", Value::Null),
    ])?;
    for tower in [&v, &t] {
        tower.only(&[
            ("norm_kwargs", Value::Null),
            ("act_kwargs", Value::Null),
            ("block_type", Value::Null),
            ("attn_type", Value::Null),
            ("qk_norm", json!(false)),
            ("scaled_cosine_attn", json!(false)),
            ("scale_heads", json!(false)),
            ("scale_attn", json!(false)),
            ("scale_attn_inner", json!(false)),
            ("scale_fc", json!(false)),
        ])?;
    }
    ensure!(
        v.json["layers"].is_u64() && v.json["width"].is_u64(),
        v.bad("layers", "and width must be whole numbers: CLIP's image encoder is a ViT")
    );
    let quick = model.flag("quick_gelu", false)?;
    let activation = if quick { Activation::QuickGelu } else { Activation::Gelu };
    let projection = model.width("embed_dim", 512)?;
    let width = v.width("width", 768)?;
    let head = v.width("head_width", 64)?;
    let ratio = |c: &Config, width: usize| {
        let ratio = c.positive("mlp_ratio", 4.0)?;
        Ok::<usize, anyhow::Error>((width as f64 * ratio) as usize)
    };
    ensure!(
        width.is_multiple_of(head),
        v.bad("head_width", &format!("does not divide the width {width}"))
    );
    let vision = VisionConfig {
        width,
        heads: width / head,
        inner: ratio(&v, width)?,
        layers: v.count("layers", 12)?,
        size: v.width("image_size", 224)?,
        patch: v.width("patch_size", 16)?,
        projection,
        eps: 1e-5,
        activation,
    };
    let vision = patches(&v, "patch_size", vision)?;
    let width = t.width("width", 512)?;
    let text = ClipConfig {
        width,
        heads: t.heads("heads", 8, width)?,
        inner: ratio(&t, width)?,
        layers: t.count("layers", 12)?,
        vocabulary: t.width("vocab_size", 49408)?,
        max_tokens: t.width("context_length", 77)?,
        projection,
        eps: 1e-5,
        activation,
        end: LARGEST,
    };
    let p = part(&c, "preprocess_cfg")?;
    p.only(&[
        ("interpolation", json!("bicubic")),
        ("mode", json!("RGB")),
        ("fill_color", json!(0)),
    ])?;
    let fit = match p.text("resize_mode", "shortest")?.as_str() {
        "shortest" => Fit::OpenClip,
        "squash" => Fit::Stretch,
        _ => bail!(p.bad("resize_mode", "is not supported; shortest and squash are")),
    };
    let side = match &p.json["size"] {
        Value::Null => vision.size,
        Value::Array(sides) if sides.len() == 2 && sides[0] == sides[1] => {
            sides[0].as_u64().unwrap_or_default() as usize
        }
        one => one.as_u64().unwrap_or_default() as usize,
    };
    let what = format!("is not the model's image_size {}", vision.size);
    ensure!(side == vision.size, p.bad("size", &what));
    let mut preparation = Preparation::clip(fit, vision.size);
    preparation.mean = p.channels("mean", preparation.mean)?;
    preparation.std = p.channels("std", preparation.std)?;
    ensure!(preparation.std.iter().all(|&s| s > 0.0), p.bad("std", "must be positive"));
    Ok(DualConfig { vision, text: Some(text), preparation, pad: 0 })
}

/// Widths of the known image encoders with their heads: ViT-B, L, H and bigG.
const KNOWN: [(usize, usize); 4] = [(768, 12), (1024, 16), (1280, 16), (1664, 16)];

/// Read off the tensors. Of the known shapes ViT-B and ViT-L are OpenAI's in transformers' names.
fn of_tensors(weights: &Weights, layout: Layout) -> Result<DualConfig> {
    let source = weights.source().display();
    let shape = |name: &str, dims: usize| {
        let found = weights.shape(name).filter(|s| s.len() == dims && !s.contains(&0));
        found.map(<[usize]>::to_vec).ok_or_else(|| match weights.shape(name) {
            Some(other) => {
                anyhow!("{source}: tensor {name} has shape {other:?}, which is no CLIP's")
            }
            None => anyhow!("{source}: tensor {name} is missing: these are not a CLIP's weights"),
        })
    };
    let layers = |tower: &str| {
        let of = |i: usize| format!("{tower}.encoder.layers.{i}.layer_norm1.weight");
        (0..).take_while(|&i| weights.has(&of(i))).count()
    };
    let kernel = shape("vision_model.embeddings.patch_embedding.weight", 4)?;
    let (width, patch) = (kernel[0], kernel[2]);
    let positions = shape("vision_model.embeddings.position_embedding.weight", 2)?[0];
    ensure!(positions > 1, "{source}: an image encoder of {positions} tokens sees no picture");
    let tokens = positions - 1;
    let projection = shape("visual_projection.weight", 2)?[0];
    let known = KNOWN.iter().find(|(w, _)| *w == width).map(|(_, heads)| *heads);
    let heads = match (known, layout) {
        (Some(heads), _) => heads,
        // ViT-H's rule.
        (None, Layout::OpenClip { .. }) if width.is_multiple_of(80) => width / 80,
        (None, _) => bail!(
            "{source}: an image encoder {width} wide is none of ViT-B, L, H and bigG; put its {} \
             beside it",
            if layout == Layout::Transformers { "config.json" } else { "open_clip_config.json" }
        ),
    };
    let quick = match layout {
        Layout::Transformers => width <= 1024,
        Layout::OpenClip { openai } => openai,
    };
    let activation = if quick { Activation::QuickGelu } else { Activation::Gelu };
    let vision = VisionConfig {
        width,
        heads,
        inner: shape("vision_model.encoder.layers.0.mlp.fc1.weight", 2)?[0],
        layers: layers("vision_model"),
        size: patch * tokens.isqrt(),
        patch,
        projection,
        eps: 1e-5,
        activation,
    };
    let text = match weights.has("text_model.final_layer_norm.weight") {
        false => None,
        true => {
            let tokens = shape("text_model.embeddings.token_embedding.weight", 2)?;
            let (vocabulary, width) = (tokens[0], tokens[1]);
            ensure!(
                width.is_multiple_of(64),
                "{source}: a text encoder {width} wide has no heads of 64; put its configuration \
                 beside it"
            );
            Some(ClipConfig {
                width,
                heads: width / 64,
                inner: shape("text_model.encoder.layers.0.mlp.fc1.weight", 2)?[0],
                layers: layers("text_model"),
                vocabulary,
                max_tokens: shape("text_model.embeddings.position_embedding.weight", 2)?[0],
                projection,
                eps: 1e-5,
                activation,
                end: LARGEST,
            })
        }
    };
    let (fit, pad) = match layout {
        Layout::Transformers => (Fit::Transformers, CLIP_END),
        Layout::OpenClip { .. } => (Fit::OpenClip, 0),
    };
    let preparation = Preparation::clip(fit, vision.size);
    Ok(DualConfig { vision, text, preparation, pad })
}
