//! What a model folder looks like from outside: the sizes of its weights and of what its blocks work on, read from its
//! configurations and from the headers of its weight files. [`crate::plan`] estimates memory from them.

use std::path::Path;

use anyhow::{Context, Result};

use crate::model::config::Config;
use crate::model::pipeline::Family;
use crate::model::weights::{QUANTISED_BLOCK, Storage, Weights};
use crate::settings::Settings;

/// Sizes of one block for one row of its input, in elements.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Block {
    /// Its input with everything that waits beside it (skip connections, text tokens): what checkpointing keeps.
    pub input: f64,
    /// The stream that it works on.
    pub stream: f64,
    /// The widest tensor of its feed-forward.
    pub wide: f64,
    /// Attention scores.
    pub scores: f64,
}

/// What a model folder looks like to the estimate.
pub struct Shapes {
    pub(crate) family: Family,
    pub(crate) blocks: Vec<Block>,
    pub(crate) decoder: Vec<Block>,
    /// Bytes of the weights in a storage type.
    pub(crate) weights: f64,
    /// Elements of the largest matrix.
    pub(crate) largest: f64,
    /// Elements of one latent.
    pub(crate) latent: f64,
    /// (inputs, outputs) of the layers that the adapter is on.
    pub(crate) targets: Vec<(usize, usize)>,
    pub(crate) distilled: bool,
}

/// Reads the shapes of a model folder for a run's settings; `lora` is the adapter's file where it is not a fresh one.
///
/// # Errors
/// Names the file that is missing or the field that is not supported.
pub fn shapes(s: &Settings, lora: Option<&Path>) -> Result<Shapes> {
    let family = Family::of(&s.model)?;
    let net = s.model.join(family.network());
    let c = Config::open(&net)?;
    let vae = Config::open(&s.model.join("vae"))?;
    let channels = vae.size("latent_channels", 4)?;
    let levels = vae.names("down_block_types", &["DownEncoderBlock2D"])?.len();
    let factor = 1 << (levels - 1);
    let size = match (s.resolution, family) {
        (Some(pixels), _) => [pixels / factor; 2],
        (None, Family::Flux) => [128; 2],
        (None, _) => c.sizes("sample_size", 2, if family.is_flow() { 128 } else { 64 })?.try_into().expect("two sizes"),
    };
    let text = text_tokens(s, family)?;
    let blocks = match family {
        Family::StableDiffusion => unet_blocks(&c, size)?,
        Family::StableDiffusion3 => sd3_blocks(&c, size, text)?,
        Family::Flux => flux_blocks(&c, size, text)?,
    };
    let mut weights = 0.0;
    let mut largest = 0f64;
    let mut parts = vec![family.network(), "vae"];
    if s.embeddings.is_none() {
        // T5 is read layer by layer and never held.
        parts.extend(match family {
            Family::StableDiffusion | Family::Flux => &["text_encoder"][..],
            Family::StableDiffusion3 => &["text_encoder", "text_encoder_2"],
        });
    }
    let mut targets = Vec::new();
    for part in parts {
        let files = Weights::open_dir(&s.model.join(part))?;
        for name in files.names() {
            let shape = files.shape(name).expect("a listed tensor has a shape");
            let elements: f64 = shape.iter().product::<usize>() as f64;
            weights += elements * bytes_per_weight(name, shape, s.storage);
            if shape.len() >= 2 && !name.contains("embed") {
                largest = largest.max(elements);
            }
            let module = name.strip_suffix(".weight").unwrap_or_default();
            let targeted =
                lora.is_none() && s.target_modules.iter().any(|t| module == t || module.ends_with(&format!(".{t}")));
            if part == family.network() && shape.len() == 2 && targeted && module.contains("block") {
                targets.push((shape[1], shape[0]));
            }
        }
    }
    if let Some(file) = lora {
        let adapter = crate::lora_io::read(file, &[]).context("--lora")?;
        targets.extend(adapter.layers.iter().map(|l| (l.inputs, l.outputs)));
    }
    Ok(Shapes {
        family,
        blocks,
        decoder: decoder_blocks(&vae, size)?,
        weights,
        largest,
        latent: (channels * size[0] * size[1]) as f64,
        targets,
        distilled: family == Family::Flux,
    })
}

/// Bytes of one weight as [`crate::model::nn`] stores it: matrices and kernels in the storage type, the rest in f32.
fn bytes_per_weight(name: &str, shape: &[usize], storage: Storage) -> f64 {
    let quantised = |bits: f64| bits / 8.0 + 4.0 / QUANTISED_BLOCK as f64;
    let table = name.contains("token_embedding") || name.contains("position_embedding") || name.ends_with("pos_embed");
    match (shape.len(), storage) {
        (0 | 1, _) | (_, Storage::F32) => 4.0,
        _ if table => 4.0,
        (2, Storage::Q8) if shape[1].is_multiple_of(QUANTISED_BLOCK) => quantised(8.0),
        (2, Storage::Q4) if shape[1].is_multiple_of(QUANTISED_BLOCK) => quantised(4.0),
        _ => 2.0,
    }
}

/// Text tokens that the network sees.
fn text_tokens(s: &Settings, family: Family) -> Result<usize> {
    if let Some(file) = &s.embeddings {
        let weights = Weights::open_file(file)?;
        let shape =
            weights.shape("sequence").with_context(|| format!("--embeddings {}: not made by embed", file.display()))?;
        return Ok(shape.get(1).copied().unwrap_or(0));
    }
    Ok(match family {
        Family::Flux => s.max_sequence_length,
        _ => {
            let clip = Config::open(&s.model.join("text_encoder"))?.size("max_position_embeddings", 77)?;
            clip + if family.is_flow() { s.max_sequence_length } else { 0 }
        }
    })
}

fn sd3_blocks(c: &Config, [h, w]: [usize; 2], text: usize) -> Result<Vec<Block>> {
    let (heads, head) = (c.size("num_attention_heads", 18)?, c.size("attention_head_dim", 64)?);
    let patch = c.size("patch_size", 2)?.max(1);
    let image = (h / patch) * (w / patch);
    let (n, width) = ((image + text) as f64, (heads * head) as f64);
    let dual = c.list("dual_attention_layers")?;
    let block = |i: usize| Block {
        input: n * width,
        stream: if dual.contains(&i) { (n + 0.5 * image as f64) * width } else { n * width },
        wide: 4.0 * n * width,
        scores: heads as f64 * n * n,
    };
    Ok((0..c.size("num_layers", 18)?).map(block).collect())
}

fn flux_blocks(c: &Config, [h, w]: [usize; 2], text: usize) -> Result<Vec<Block>> {
    let (heads, head) = (c.size("num_attention_heads", 24)?, c.size("attention_head_dim", 128)?);
    let (n, width) = (((h / 2) * (w / 2) + text) as f64, (heads * head) as f64);
    let block = Block { input: n * width, stream: n * width, wide: 4.0 * n * width, scores: heads as f64 * n * n };
    let single = Block { wide: 5.0 * n * width, ..block };
    let mut blocks = vec![block; c.size("num_layers", 19)?];
    blocks.extend(vec![single; c.size("num_single_layers", 38)?]);
    Ok(blocks)
}

/// The units of a UNet, in the order in which it runs them.
fn unet_blocks(c: &Config, [h, w]: [usize; 2]) -> Result<Vec<Block>> {
    let cross = |names: &[String]| names.iter().map(|n| n.starts_with("CrossAttn")).collect::<Vec<bool>>();
    let down = cross(&c.names(
        "down_block_types",
        &["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    )?);
    let up = cross(
        &c.names("up_block_types", &["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"])?,
    );
    let n = down.len();
    let channels = match c.json["block_out_channels"].is_null() {
        true if n == 4 => vec![320, 640, 1280, 1280],
        _ => c.sizes("block_out_channels", n, 0)?,
    };
    let layers = c.sizes("layers_per_block", n, 2)?;
    let heads = c.sizes("attention_head_dim", n, 8)?;
    let mut blocks = Vec::new();
    let mut skips = Vec::new();
    let pixels = |level: usize| (h.div_ceil(1 << level) * w.div_ceil(1 << level)) as f64;
    let push = |blocks: &mut Vec<Block>, skips: &[f64], level: usize, width: usize, extra: usize, attention: bool| {
        let area = pixels(level);
        let stream = area * width as f64;
        blocks.push(Block {
            input: stream + skips.iter().sum::<f64>(),
            // A block on the way up takes its skip connection beside its own stream.
            stream: area * (width + extra / 2) as f64,
            wide: if attention { 8.0 * stream } else { 0.0 },
            scores: if attention { heads[level] as f64 * area * area } else { 0.0 },
        });
    };
    skips.push(pixels(0) * channels[0] as f64);
    for i in 0..n {
        for _ in 0..layers[i] {
            push(&mut blocks, &skips, i, channels[i], 0, down[i]);
            skips.push(pixels(i) * channels[i] as f64);
        }
        if i + 1 < n {
            push(&mut blocks, &skips, i, channels[i], 0, false);
            skips.push(pixels(i + 1) * channels[i] as f64);
        }
    }
    if !c.json["mid_block_type"].is_null() || c.json.get("mid_block_type").is_none() {
        push(&mut blocks, &skips, n - 1, channels[n - 1], channels[n - 1], true);
    }
    for (i, &attention) in up.iter().enumerate().take(n) {
        let level = n - 1 - i;
        for _ in 0..layers[level] + 1 {
            let skip = skips.pop().unwrap_or_default();
            push(&mut blocks, &skips, level, channels[level], (skip / pixels(level)) as usize, attention);
        }
        if level > 0 {
            push(&mut blocks, &skips, level - 1, channels[level], 0, false);
        }
    }
    Ok(blocks)
}

/// Levels of a VAE's decoder, for one image.
fn decoder_blocks(c: &Config, [h, w]: [usize; 2]) -> Result<Vec<Block>> {
    let n = c.names("down_block_types", &["DownEncoderBlock2D"])?.len();
    let channels = match c.json["block_out_channels"].is_null() {
        true => vec![64],
        false => c.sizes("block_out_channels", n, 0)?,
    };
    let area = (h * w) as f64;
    let deep = area * channels[n - 1] as f64;
    let attention = c.flag("mid_block_add_attention", true)?;
    let mut blocks =
        vec![Block { stream: deep, scores: if attention { area * area } else { 0.0 }, ..Default::default() }];
    for i in 0..n {
        // The first resnet of a level still has the width of the level before.
        let width = channels[n - 1 - i].max(if i > 0 { channels[n - i] } else { 0 });
        blocks.push(Block { stream: area * 4f64.powi(i as i32) * width as f64, ..Default::default() });
    }
    Ok(blocks)
}
