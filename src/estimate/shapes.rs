//! What a model folder looks like from outside: the sizes of its weights and of what its blocks
//! work on, from its configurations and the headers of its weight files.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};

use crate::config::Settings;
use crate::io::weights::Weights;
use crate::kernels::frozen_weight::BLOCK;
use crate::lora::adapter::{check_targets, targeted};
use crate::lora::formats;
use crate::measure::features;
use crate::model::ModelFiles;
use crate::model::config::BlockShape;
use crate::model::loader::Storage;
use crate::model::resolution::latent_size;
use crate::model::text::clip::ClipConfig;
use crate::model::text::embeddings::PromptEmbeddings;
use crate::model::text::layout::TextLayout;
use crate::model::text::qwen3::{Qwen3Config, prefix};
use crate::model::text::t5::T5Config;
use crate::model::vae::config::VaeConfig;
use crate::reward::model_size;

/// Inputs and outputs of a layer that the adapter is on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TargetShape {
    pub inputs: usize,
    pub outputs: usize,
}

/// What the text encoders need, which run before the network is loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TextShape {
    /// Bytes of the weights that are held while they run.
    pub weights: f64,
    /// Elements of what a prompt takes in the widest layer.
    pub stream: f64,
    /// Elements of a prompt's embedding, which the host keeps.
    pub embedding: f64,
}

/// What a model folder looks like to the estimate.
#[derive(Clone, Debug)]
pub struct Shapes {
    pub blocks: Vec<BlockShape>,
    pub decoder: Vec<BlockShape>,
    /// The same for a tile of the latent.
    pub tile: Vec<BlockShape>,
    pub text: TextShape,
    /// Bytes of network and VAE in a storage type.
    pub weights: f64,
    /// Those of them that are of the network's blocks, and of the largest block.
    pub block_weights: f64,
    pub largest_block: f64,
    /// Values of the weights of reward models, and of what pictures are compared by.
    pub reward: f64,
    /// Elements of the largest matrix.
    pub largest: f64,
    /// Elements of one latent.
    pub latent: f64,
    pub targets: Vec<TargetShape>,
    pub distilled: bool,
    /// The scale of u + s (c - u) that the run's guidance stands for.
    pub guidance: f64,
    /// Whether its blocks convolve.
    pub convolves: bool,
}

/// Reads the shapes of a model folder for a run's settings; `lora` is the adapter's file where it
/// is not a fresh one.
///
/// # Errors
/// Names the file that is missing or the field that is not supported.
pub fn shapes(s: &Settings, lora: Option<&Path>) -> Result<Shapes> {
    let files = s.files()?;
    let family = files.family;
    let network = family.config(&files.network()?.config)?;
    let vae = VaeConfig::read(&files.component("vae")?.config)?;
    let size = latent_size(s.resolution, vae.factor(), network.latent_shape())?;
    let (tokens, text) = match &s.embeddings {
        Some(file) => (PromptEmbeddings::open(file)?.tokens(), TextShape::default()),
        None => {
            let (tokens, mut text) = encoders(s, &files)?;
            text.embedding = (tokens * network.context()[0]) as f64;
            (tokens, text)
        }
    };
    let (mut weights, mut largest, mut targets) = (0.0, 0f64, Vec::new());
    let mut blocks: BTreeMap<String, f64> = BTreeMap::new();
    for part in [family.network(), "vae"] {
        let whole = if part == "vae" { files.component(part)? } else { files.network()? };
        let weights_of = whole.weights()?;
        for (name, shape) in tensors(&weights_of) {
            let elements = elements(shape);
            let bytes = elements * bytes_per_weight(name, shape, s.storage);
            weights += bytes;
            let block = if part == "vae" { None } else { block_of(name) };
            if let Some(block) = &block {
                *blocks.entry(block.clone()).or_default() += bytes;
            }
            if shape.len() >= 2 && !name.contains("embed") {
                largest = largest.max(elements);
            }
            let module = name.strip_suffix(".weight").unwrap_or_default();
            let trained = lora.is_none() && targeted(module, &s.target_modules);
            if let (true, &[outputs, ref inputs @ ..]) = (trained, shape)
                && block.is_some()
            {
                targets.push(TargetShape { inputs: inputs.iter().product(), outputs });
            }
        }
    }
    if lora.is_none() {
        let network = files.network()?.weights()?;
        let layers = network.names().filter(|name| block_of(name).is_some());
        let layers: Vec<&str> = layers.filter_map(|name| name.strip_suffix(".weight")).collect();
        check_targets(&s.target_modules, &layers)?;
    }
    if let Some(file) = lora {
        let adapter = formats::read(file, &[]).context("--lora")?;
        let shape =
            |l: &crate::lora::adapter::Layer| TargetShape { inputs: l.inputs, outputs: l.outputs };
        targets.extend(adapter.layers.iter().map(shape));
    }
    let named = s.rewards().filter(|r| !r.own && s.own_reward_device().is_none());
    let reward = named.map(model_size).sum::<Result<usize>>()? + features_size(s)?;
    Ok(Shapes {
        blocks: network.block_shapes(size, tokens),
        decoder: vae.decoder_shapes(size),
        tile: vae.decoder_shapes(size.map(|side| side.min(vae.tile()))),
        text,
        weights,
        block_weights: blocks.values().sum(),
        largest_block: blocks.values().copied().fold(0.0, f64::max),
        reward: reward as f64,
        largest,
        latent: network.latent_shape()[0] as f64 * size[0] as f64 * size[1] as f64,
        targets,
        distilled: network.distilled(),
        guidance: network.guidance(s.guidance_scale),
        convolves: network.convolves(),
    })
}

fn tensors(files: &Weights) -> impl Iterator<Item = (&str, &[usize])> {
    files.names().map(|name| (name, files.shape(name).expect("a listed tensor has a shape")))
}

fn elements(shape: &[usize]) -> f64 {
    shape.iter().map(|&n| n as f64).product()
}

/// What numbered modules are blocks.
const BLOCKS: [&str; 7] = [
    "transformer_blocks",
    "single_transformer_blocks",
    "noise_refiner",
    "context_refiner",
    "layers",
    "down_blocks",
    "up_blocks",
];

/// The block that a tensor of a network belongs to. A UNet's are its resnets with their attention,
/// and its changes of size.
pub fn block_of(name: &str) -> Option<String> {
    let mut parts = name.split('.');
    let (first, number) = (parts.next()?, parts.next()?);
    if first == "mid_block" {
        return Some(first.into());
    }
    let whole = BLOCKS.contains(&first) && number.bytes().all(|b| b.is_ascii_digit());
    let within = match parts.next().filter(|_| first == "down_blocks" || first == "up_blocks") {
        Some("resnets" | "attentions") => parts.next().unwrap_or_default(),
        Some(other) => other,
        None => "",
    };
    whole.then(|| format!("{first}.{number}.{within}"))
}

/// Tokens that the network sees of a prompt, and the text encoders of a folder.
fn encoders(s: &Settings, files: &ModelFiles) -> Result<(usize, TextShape)> {
    let layout = files.family.text();
    if let TextLayout::Qwen3(_) = layout {
        return Ok((s.max_sequence_length, qwen3_shape(s, files)?));
    }
    let clip = ClipConfig::read(&files.component("text_encoder")?.config)?;
    let text = text_shape(s, files, &clip)?;
    Ok((layout.tokens(clip.max_tokens, s.max_sequence_length), text))
}

/// A Qwen3, of which one layer is held at a time.
fn qwen3_shape(s: &Settings, files: &ModelFiles) -> Result<TextShape> {
    let part = files.component("text_encoder")?;
    let (config, weights) = (Qwen3Config::read(&part.config)?, part.weights()?);
    let first = format!("{}layers.0.", prefix(&weights));
    let layer = tensors(&weights)
        .filter(|(name, _)| name.starts_with(&first))
        .map(|(name, shape)| elements(shape) * bytes_per_weight(name, shape, s.storage));
    let tokens = s.max_sequence_length as f64;
    // What is added to the scores stands beside the feed-forward.
    let stream = tokens * config.inner as f64 + tokens * tokens;
    Ok(TextShape { weights: layer.sum(), stream, ..Default::default() })
}

/// The CLIPs and the T5 of a folder.
fn text_shape(s: &Settings, files: &ModelFiles, clip: &ClipConfig) -> Result<TextShape> {
    let layout = files.family.text();
    let mut text = TextShape::default();
    for part in layout.held() {
        let weights = files.component(part)?.weights()?;
        text.weights += tensors(&weights)
            .map(|(name, shape)| elements(shape) * bytes_per_weight(name, shape, s.storage))
            .sum::<f64>();
    }
    let rows = clip.max_tokens as f64;
    text.stream = rows * clip.inner as f64;
    let Some(part) = layout.streamed().filter(|part| files.has(part)) else { return Ok(text) };
    // T5 is read layer by layer: one of them is held, beside the weights of CLIP.
    let t5 = files.component(part)?;
    let weights = t5.weights()?;
    let t5 = T5Config::read(&t5.config)?;
    let layer = tensors(&weights)
        .filter(|(name, _)| name.contains(".block.0."))
        .map(|(name, shape)| elements(shape) * bytes_per_weight(name, shape, s.storage));
    text.weights += layer.sum::<f64>();
    let rows = s.max_sequence_length as f64;
    text.stream = text.stream.max(rows * t5.inner as f64);
    Ok(text)
}

/// Bytes of one weight as [`crate::model::nn`] stores it: matrices and kernels in the storage type,
/// the rest in f32.
fn bytes_per_weight(name: &str, shape: &[usize], storage: Storage) -> f64 {
    let quantised = |bits: f64| bits / 8.0 + 4.0 / BLOCK as f64;
    let table = name.contains("token_embedding")
        || name.contains("position_embedding")
        || name.ends_with("pos_embed");
    if shape.len() < 2 || table {
        return 4.0;
    }
    let in_blocks = shape.len() == 2 && shape[1].is_multiple_of(BLOCK);
    match storage {
        Storage::F32 => 4.0,
        Storage::Q8 if in_blocks => quantised(8.0),
        Storage::Q4 if in_blocks => quantised(4.0),
        Storage::F16 | Storage::Q8 | Storage::Q4 => 2.0,
    }
}

/// Values of the weights of what pictures are compared by, on the device of the training.
fn features_size(s: &Settings) -> Result<usize> {
    let given = s.features.as_ref().filter(|_| s.own_reward_device().is_none());
    given.map_or(Ok(0), |given| features::model_size(given))
}
