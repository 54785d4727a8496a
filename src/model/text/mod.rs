//! From prompts to what a network is conditioned on: the text encoders of each family, put together
//! as diffusers' pipelines do.

pub mod chat;
pub mod clip;
pub mod embeddings;
pub mod layout;
pub mod qwen3;
pub mod t5;
pub mod tokenizer;

use anyhow::{Context, Result, ensure};
use burn::tensor::{Device, Tensor};

use self::chat::ChatTokenizer;
use self::clip::{ClipOutput, ClipText};
use self::embeddings::PromptEmbeddings;
use self::layout::TextLayout;
use self::qwen3::{Qwen3Encoder, States, Tokens};
use self::t5::T5Encoder;
use self::tokenizer::Tokenizer;
use super::files::ModelFiles;
use super::loader::Storage;
use crate::device::tensor::read;

/// A CLIP encoder with its tokenizer.
struct Clip {
    tokenizer: Tokenizer,
    model: ClipText,
}

impl Clip {
    fn load(files: &ModelFiles, part: &str, device: &Device, storage: Storage) -> Result<Self> {
        let model = ClipText::load(&files.component(part)?, device, storage)?;
        let sizes = [model.max_tokens, model.vocabulary];
        Ok(Self { tokenizer: files.clip_tokenizer(part, sizes)?, model })
    }

    fn encode(&self, prompts: &[String]) -> Result<ClipOutput> {
        self.model.forward(&rows(&self.tokenizer, prompts)?)
    }
}

fn rows(tokenizer: &Tokenizer, prompts: &[String]) -> Result<Vec<Vec<u32>>> {
    prompts.iter().map(|p| tokenizer.encode(p)).collect()
}

/// A T5 encoder with its tokenizer.
struct T5 {
    tokenizer: Tokenizer,
    model: T5Encoder,
}

impl T5 {
    fn open(
        files: &ModelFiles,
        part: &str,
        length: usize,
        device: &Device,
        storage: Storage,
    ) -> Result<Self> {
        Ok(Self {
            tokenizer: Tokenizer::load_t5(&files.t5_tokenizer(part)?, length)?,
            model: T5Encoder::open(&files.component(part)?, device, storage)?,
        })
    }

    /// `[N, T, width]` on the host.
    fn encode(&self, prompts: &[String]) -> Result<Vec<f32>> {
        self.model.forward(&rows(&self.tokenizer, prompts)?)
    }
}

/// A Qwen3 encoder with its tokenizer.
struct Qwen3 {
    tokenizer: ChatTokenizer,
    model: Qwen3Encoder,
    states: States,
}

impl Qwen3 {
    fn open(
        files: &ModelFiles,
        states: States,
        length: usize,
        device: &Device,
        storage: Storage,
    ) -> Result<Self> {
        let part = "text_encoder";
        let component = files.component(part).with_context(|| {
            format!(
                "{}: its text encoder cannot be used; give one by --text-encoder DIR, or its work \
                 by --embeddings FILE",
                files.shown()
            )
        })?;
        // Z-Image's pipeline leaves room for thoughts, FLUX.2's does not.
        let thinking = states == States::SecondLast;
        Ok(Self {
            tokenizer: ChatTokenizer::load(&files.chat_tokenizer()?, length, thinking)?,
            model: Qwen3Encoder::open(&component, states, device, storage)?,
            states,
        })
    }

    /// Embeddings of prompts: of Z-Image without padding, which its network does not see.
    fn encode(&self, prompts: &[String]) -> Result<PromptEmbeddings> {
        let rows = prompts.iter().map(|p| self.tokenizer.encode(p));
        let mut rows: Vec<Tokens> = rows.collect::<Result<_>>()?;
        let alone = self.states == States::SecondLast;
        if alone {
            rows.iter_mut().for_each(Tokens::leave_padding_out);
        }
        let width = self.model.width();
        let mut states = self.model.forward(&rows)?;
        let lengths: Vec<usize> = rows.iter().map(|row| row.ids.len()).collect();
        let tokens = lengths.iter().copied().max().unwrap_or(0);
        states.iter_mut().for_each(|state| state.resize(tokens * width, 0.0));
        let made = PromptEmbeddings::new(prompts, [tokens, width], states.concat(), Vec::new());
        Ok(if alone { made.of_lengths(lengths) } else { made })
    }
}

/// The text encoders of a model.
pub struct TextEncoders {
    parts: Parts,
    /// Tokens of T5 or Qwen3.
    length: usize,
    /// Width of the network's sequence.
    width: usize,
}

#[allow(clippy::large_enum_variant)] // There is one of it.
enum Parts {
    Clip(Clip),
    TwoClips([Clip; 2]),
    TwoClipsAndT5 { clips: [Clip; 2], t5: Option<T5> },
    T5AndPooledClip { clip: Clip, t5: T5 },
    Qwen3(Qwen3),
}

impl TextEncoders {
    /// Loads a model's encoders. `length` is the number of tokens of T5 or Qwen3, `width` the
    /// sequence width that the network takes.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, damaged or not supported.
    pub fn load(
        files: &ModelFiles,
        length: usize,
        width: usize,
        device: &Device,
        storage: Storage,
    ) -> Result<Self> {
        let layout = files.family.text();
        let clip = |part: &str| Clip::load(files, part, device, storage);
        let t5 = || {
            let part = layout.streamed().filter(|part| files.has(part));
            part.map(|part| T5::open(files, part, length, device, storage)).transpose()
        };
        let two = || {
            let clips = [clip("text_encoder")?, clip("text_encoder_2")?];
            fit_together(files, &clips, width)?;
            anyhow::Ok(clips)
        };
        let parts = match layout {
            TextLayout::Qwen3(states) => {
                Parts::Qwen3(Qwen3::open(files, states, length, device, storage)?)
            }
            TextLayout::Clip => Parts::Clip(clip("text_encoder")?),
            TextLayout::TwoClips => Parts::TwoClips(two()?),
            TextLayout::TwoClipsAndT5 => Parts::TwoClipsAndT5 { clips: two()?, t5: t5()? },
            TextLayout::T5AndPooledClip => {
                let t5 = t5()?.with_context(|| {
                    let part = layout.streamed().unwrap_or_default();
                    format!(
                        "{}: {part} is missing; give it by --text-encoder DIR|FILE, or its work by \
                         --embeddings FILE",
                        files.shown()
                    )
                })?;
                Parts::T5AndPooledClip { clip: clip("text_encoder")?, t5 }
            }
        };
        Ok(Self { parts, length, width })
    }

    /// Widths of the sequence and of the pooled embedding (0 without one).
    pub fn widths(&self) -> [usize; 2] {
        match &self.parts {
            Parts::Clip(clip) => [clip.model.width, 0],
            Parts::TwoClips(clips) => {
                let width = clips.iter().map(|c| c.model.width).sum();
                [width, clips[1].model.pooled_width()]
            }
            Parts::TwoClipsAndT5 { clips, t5 } => {
                let width = t5.as_ref().map_or(self.width, |t5| t5.model.width);
                [width, clips.iter().map(|c| c.model.pooled_width()).sum()]
            }
            Parts::T5AndPooledClip { clip, t5 } => [t5.model.width, clip.model.pooled_width()],
            Parts::Qwen3(qwen) => [qwen.model.width(), 0],
        }
    }

    /// Text embeddings of prompts; equal ones are encoded once, and each by itself: a prompt has
    /// the same bits whatever others a run has.
    ///
    /// # Errors
    /// When a prompt cannot be tokenized, or the device fails.
    pub fn encode(&self, prompts: &[String]) -> Result<PromptEmbeddings> {
        let mut seen = std::collections::HashSet::new();
        let prompts: Vec<String> = prompts.iter().filter(|p| seen.insert(*p)).cloned().collect();
        if let Parts::Qwen3(qwen) = &self.parts {
            return qwen.encode(&prompts);
        }
        let (mut clips, mut pooled) = (Vec::new(), Vec::new());
        for prompt in prompts.chunks(1) {
            let part = self.encode_clips(prompt)?;
            if let Some(sequence) = part.sequence {
                clips.push(read(&sequence)?);
            }
            if let Some(part) = part.pooled {
                pooled.extend(read(&part)?);
            }
        }
        let clips = clips.concat();
        let n = prompts.len();
        let sequence = match &self.parts {
            Parts::Clip(_) | Parts::TwoClips(_) | Parts::Qwen3(_) => clips,
            Parts::T5AndPooledClip { t5, .. } => t5.encode(&prompts)?,
            Parts::TwoClipsAndT5 { t5, .. } => {
                let t5 = match t5 {
                    Some(t5) => t5.encode(&prompts)?,
                    None => vec![0.0; n * self.length * self.width],
                };
                interleave(&clips, &t5, n)
            }
        };
        let width = self.widths()[0];
        let tokens = sequence.len() / (n * width).max(1);
        Ok(PromptEmbeddings::new(&prompts, [tokens, width], sequence, pooled))
    }

    /// What CLIP encoders make of a few prompts.
    fn encode_clips(&self, prompts: &[String]) -> Result<ClipPart> {
        Ok(match &self.parts {
            Parts::Qwen3(_) => ClipPart { sequence: None, pooled: None },
            Parts::Clip(clip) => {
                ClipPart { sequence: Some(clip.encode(prompts)?.last), pooled: None }
            }
            Parts::T5AndPooledClip { clip, .. } => {
                ClipPart { sequence: None, pooled: Some(clip.encode(prompts)?.pooled) }
            }
            Parts::TwoClips(clips) => {
                let [first, second] = [clips[0].encode(prompts)?, clips[1].encode(prompts)?];
                let both = Tensor::cat(vec![first.penultimate, second.penultimate], 2);
                ClipPart { sequence: Some(both), pooled: Some(second.pooled) }
            }
            Parts::TwoClipsAndT5 { clips, .. } => {
                let [first, second] = [clips[0].encode(prompts)?, clips[1].encode(prompts)?];
                let both = Tensor::cat(vec![first.penultimate, second.penultimate], 2);
                let [b, t, own] = both.dims();
                let sequence = if own < self.width {
                    let zeros = Tensor::zeros([b, t, self.width - own], &both.device());
                    Tensor::cat(vec![both, zeros], 2)
                } else {
                    both
                };
                let pooled = Tensor::cat(vec![first.pooled, second.pooled], 1);
                ClipPart { sequence: Some(sequence), pooled: Some(pooled) }
            }
        })
    }
}

/// Checks that two CLIP encoders belong together, in a network that takes a width.
fn fit_together(files: &ModelFiles, clips: &[Clip; 2], width: usize) -> Result<()> {
    let own: usize = clips.iter().map(|c| c.model.width).sum();
    ensure!(
        own <= width,
        "{}: the two CLIP encoders are {own} wide together, the network takes {width}; the parts \
         belong to different models",
        files.shown()
    );
    let [first, second] = [&clips[0], &clips[1]].map(|c| c.tokenizer.length);
    ensure!(
        first == second,
        "{}: model_max_length is {first} in tokenizer/ and {second} in tokenizer_2/; the two CLIP \
         encoders take one length",
        files.shown()
    );
    Ok(())
}

struct ClipPart {
    sequence: Option<Tensor<3>>,
    pooled: Option<Tensor<2>>,
}

/// Each of `n` rows of `a` with the same row of `b` behind it.
fn interleave(a: &[f32], b: &[f32], n: usize) -> Vec<f32> {
    let (a_row, b_row) = (a.len() / n.max(1), b.len() / n.max(1));
    let mut all = Vec::with_capacity(a.len() + b.len());
    for i in 0..n {
        all.extend_from_slice(&a[i * a_row..(i + 1) * a_row]);
        all.extend_from_slice(&b[i * b_row..(i + 1) * b_row]);
    }
    all
}
