//! From prompts to what a network is conditioned on: the text encoders of each family, put together as diffusers'
//! pipelines do, or a file of embeddings that were made before.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use burn::tensor::{Device, Tensor, TensorData};

use super::clip::ClipText;
use super::denoiser::Conditioning;
use super::pipeline::Family;
use super::t5::T5Encoder;
use super::tokenizer::Tokenizer;
use super::weights::{Storage, Weights};
use crate::files::{Named, write_tensors};

/// A CLIP encoder with its tokenizer.
struct Clip {
    tokenizer: Tokenizer,
    model: ClipText,
}

impl Clip {
    fn load(dir: &Path, suffix: &str, device: &Device, storage: Storage) -> Result<Self> {
        let model = ClipText::load(&dir.join(format!("text_encoder{suffix}")), device, storage)?;
        Ok(Self { tokenizer: Tokenizer::load(&dir.join(format!("tokenizer{suffix}")), model.max_tokens)?, model })
    }

    fn encode(&self, prompts: &[&str]) -> Result<super::clip::ClipOutput> {
        self.model.forward(&rows(&self.tokenizer, prompts)?)
    }
}

fn rows(tokenizer: &Tokenizer, prompts: &[&str]) -> Result<Vec<Vec<u32>>> {
    prompts.iter().map(|p| tokenizer.encode(p)).collect()
}

/// A T5 encoder with its tokenizer.
struct T5 {
    tokenizer: Tokenizer,
    model: T5Encoder,
}

impl T5 {
    fn open(dir: &Path, suffix: &str, length: usize, device: &Device, storage: Storage) -> Result<Self> {
        Ok(Self {
            tokenizer: Tokenizer::load_t5(&dir.join(format!("tokenizer{suffix}")), length)?,
            model: T5Encoder::open(&dir.join(format!("text_encoder{suffix}")), device, storage)?,
        })
    }

    fn encode(&self, prompts: &[&str]) -> Result<Tensor<3>> {
        self.model.forward(&rows(&self.tokenizer, prompts)?)
    }
}

/// The text encoders of a family.
#[allow(clippy::large_enum_variant)] // There is one of it.
enum Encoders {
    /// Stable Diffusion 1 and 2: one CLIP's last hidden state.
    One(Clip),
    /// Stable Diffusion 3: two CLIPs side by side in the width, filled up with zeros to `width`; then T5's tokens, or
    /// as many zeros where a folder has no T5.
    Three { clips: [Clip; 2], t5: Option<T5>, length: usize, width: usize },
    /// FLUX: T5's tokens, and CLIP's pooled state.
    Pooled { clip: Clip, t5: T5 },
}

/// Embeddings of prompts, made by `pcpo-wgpu embed`.
struct File {
    path: PathBuf,
    weights: Weights,
    rows: HashMap<String, usize>,
}

#[allow(clippy::large_enum_variant)] // There is one of it.
enum Source {
    Encoders(Encoders),
    File(File),
}

/// Where text embeddings come from.
pub struct Text {
    source: Source,
    device: Device,
}

impl Text {
    /// Loads a model folder's encoders. `length` is the number of T5 tokens, `width` the sequence width that the network
    /// takes.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, damaged or not supported.
    pub fn load(
        dir: &Path,
        family: Family,
        length: usize,
        width: usize,
        device: &Device,
        storage: Storage,
    ) -> Result<Self> {
        let clip = |suffix: &str| Clip::load(dir, suffix, device, storage);
        let encoders = match family {
            Family::StableDiffusion => Encoders::One(clip("")?),
            Family::StableDiffusion3 => {
                let clips = [clip("")?, clip("_2")?];
                let own: usize = clips.iter().map(|c| c.model.width).sum();
                ensure!(
                    own <= width,
                    "{}: the two CLIP encoders are {own} wide together, joint_attention_dim is {width}; the parts belong to different models",
                    dir.display()
                );
                let t5 = match dir.join("text_encoder_3").is_dir() {
                    true => Some(T5::open(dir, "_3", length, device, storage)?),
                    false => None,
                };
                Encoders::Three { clips, t5, length, width }
            }
            Family::Flux => Encoders::Pooled { clip: clip("")?, t5: T5::open(dir, "_2", length, device, storage)? },
        };
        Ok(Self { source: Source::Encoders(encoders), device: device.clone() })
    }

    /// Opens a file of embeddings.
    ///
    /// # Errors
    /// When it is not one that `embed` wrote.
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        let weights = Weights::open_file(path)?;
        let prompts: Vec<String> = serde_json::from_str(&weights.metadata("prompts")?)
            .with_context(|| format!("{}: metadata entry prompts", path.display()))?;
        let shape = weights.shape("sequence");
        ensure!(
            shape.is_some_and(|s| s.len() == 3 && s[0] == prompts.len()),
            "{}: tensor sequence has shape {shape:?}, expected [{}, T, D]; make the file with `pcpo-wgpu embed`",
            path.display(),
            prompts.len()
        );
        let rows = prompts.into_iter().enumerate().map(|(i, p)| (p, i)).collect();
        Ok(Self { source: Source::File(File { path: path.to_path_buf(), weights, rows }), device: device.clone() })
    }

    /// Widths of the sequence and of the pooled embedding (0 without one).
    pub fn widths(&self) -> [usize; 2] {
        match &self.source {
            Source::Encoders(Encoders::One(clip)) => [clip.model.width, 0],
            Source::Encoders(Encoders::Three { clips, width, t5, .. }) => {
                let width = t5.as_ref().map_or(*width, |t5| t5.model.width);
                [width, clips.iter().map(|c| c.model.pooled_width()).sum()]
            }
            Source::Encoders(Encoders::Pooled { clip, t5 }) => [t5.model.width, clip.model.pooled_width()],
            Source::File(file) => {
                let last = |name: &str| file.weights.shape(name).and_then(|s| s.last().copied()).unwrap_or(0);
                [last("sequence"), last("pooled")]
            }
        }
    }

    /// Text embeddings of prompts.
    ///
    /// # Errors
    /// When a prompt cannot be tokenized, or is not in the file of embeddings.
    pub fn encode<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Conditioning> {
        let prompts: Vec<&str> = prompts.iter().map(AsRef::as_ref).collect();
        let b = prompts.len();
        Ok(match &self.source {
            Source::Encoders(Encoders::One(clip)) => {
                Conditioning { sequence: clip.encode(&prompts)?.last, pooled: None }
            }
            Source::Encoders(Encoders::Three { clips, t5, length, width }) => {
                let [first, second] = [clips[0].encode(&prompts)?, clips[1].encode(&prompts)?];
                let clip = Tensor::cat(vec![first.penultimate, second.penultimate], 2);
                let [_, t, own] = clip.dims();
                let clip = match width - own {
                    0 => clip,
                    missing => Tensor::cat(vec![clip, Tensor::zeros([b, t, missing], &self.device)], 2),
                };
                let sequence = match t5 {
                    Some(t5) => Tensor::cat(vec![clip, t5.encode(&prompts)?], 1),
                    None if *length == 0 => clip,
                    None => Tensor::cat(vec![clip, Tensor::zeros([b, *length, *width], &self.device)], 1),
                };
                Conditioning { sequence, pooled: Some(Tensor::cat(vec![first.pooled, second.pooled], 1)) }
            }
            Source::Encoders(Encoders::Pooled { clip, t5 }) => {
                Conditioning { pooled: Some(clip.encode(&prompts)?.pooled), sequence: t5.encode(&prompts)? }
            }
            Source::File(file) => file.look_up(&prompts, &self.device)?,
        })
    }
}

impl File {
    fn look_up(&self, prompts: &[&str], device: &Device) -> Result<Conditioning> {
        let b = prompts.len();
        let shape = self.weights.shape("sequence").expect("checked when the file was opened").to_vec();
        let pooled = self.weights.shape("pooled").and_then(|s| s.last().copied());
        let (mut sequences, mut pooleds) = (Vec::new(), Vec::new());
        for prompt in prompts {
            let row = self.rows.get(*prompt).with_context(|| {
                format!(
                    "--embeddings {}: has no embedding of the prompt {prompt:?}; make the file again with `pcpo-wgpu embed` and all prompts",
                    self.path.display()
                )
            })?;
            sequences.extend(self.weights.row("sequence", *row, &shape[1..])?);
            if let Some(width) = pooled {
                pooleds.extend(self.weights.row("pooled", *row, &[width])?);
            }
        }
        Ok(Conditioning {
            sequence: Tensor::from_data(TensorData::new(sequences, [b, shape[1], shape[2]]), device),
            pooled: pooled.map(|width| Tensor::from_data(TensorData::new(pooleds, [b, width]), device)),
        })
    }
}

/// Writes the embeddings of prompts, and of the empty prompt that guidance needs, as [`Text::open`] reads them:
/// `sequence` `[N, T, D]` and `pooled` `[N, P]` in f32, and the prompts as a JSON list in the metadata.
///
/// # Errors
/// When a prompt cannot be encoded, the device fails, or the file cannot be written.
pub fn write_embeddings(text: &Text, prompts: &[String], path: &Path) -> Result<()> {
    // A few at a time through T5, whose scores grow with the number of prompts; its layers are read once a group.
    const GROUP: usize = 16;
    let mut all = vec![String::new()];
    all.extend(prompts.iter().filter(|p| !p.is_empty()).cloned());
    let (mut sequence, mut pooled, mut shape, mut width) = (Vec::new(), Vec::new(), [0, 0], 0);
    for group in all.chunks(GROUP) {
        let encoded = text.encode(group)?;
        let [_, t, d] = encoded.sequence.dims();
        shape = [t, d];
        sequence.extend(crate::ops::read(&encoded.sequence)?);
        if let Some(p) = encoded.pooled {
            width = p.dims()[1];
            pooled.extend(crate::ops::read(&p)?);
        }
    }
    let mut tensors: Vec<Named> = vec![("sequence".into(), vec![all.len(), shape[0], shape[1]], sequence)];
    if width > 0 {
        tensors.push(("pooled".into(), vec![all.len(), width], pooled));
    }
    write_tensors(path, &tensors, &[("prompts", serde_json::to_string(&all).context("prompts")?)])
}
