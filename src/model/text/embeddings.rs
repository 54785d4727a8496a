//! Text embeddings of a run's prompts, made once: on the host, or rows of a file that
//! `pcpo-wgpu embed` wrote.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use burn::tensor::Device;

use crate::device::tensor::upload;
use crate::io::tensors::{HostTensor, write_tensors};
use crate::io::weights::Weights;
use crate::model::conditioning::Conditioning;
use crate::model::row_map::RowMap;

/// Embeddings of prompts, by their row.
pub struct PromptEmbeddings {
    rows: HashMap<String, usize>,
    /// Tokens and width of a prompt's sequence.
    sequence: [usize; 2],
    /// Width of a prompt's pooled embedding, 0 without one.
    pooled: usize,
    /// Tokens of each prompt's own, where the others are zeros; empty where all are.
    lengths: Vec<usize>,
    source: Source,
    /// The row of what guidance leads away from.
    uncond: usize,
}

/// The row of no text at all: zeros.
const ZEROS: usize = usize::MAX;

enum Source {
    Host { sequence: Vec<f32>, pooled: Vec<f32> },
    File(Weights),
}

impl PromptEmbeddings {
    /// Embeddings that were just made: `sequence` `[N, T, D]` and `pooled` `[N, P]`.
    pub fn new(
        prompts: &[String],
        [tokens, width]: [usize; 2],
        sequence: Vec<f32>,
        pooled: Vec<f32>,
    ) -> Self {
        let rows = prompts.iter().cloned().zip(0..).collect();
        let pooled_width = pooled.len() / prompts.len().max(1);
        Self {
            rows,
            sequence: [tokens, width],
            pooled: pooled_width,
            lengths: Vec::new(),
            source: Source::Host { sequence, pooled },
            uncond: ZEROS,
        }
    }

    /// The same, where of each prompt's tokens so many are its own.
    pub fn of_lengths(self, lengths: Vec<usize>) -> Self {
        Self { lengths, ..self }
    }

    /// Opens a file of embeddings; rows are read when asked for.
    ///
    /// # Errors
    /// When it is not one that `embed` wrote.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Weights::open_file(path)?;
        let prompts: Vec<String> = serde_json::from_str(&file.required_metadata("prompts")?)
            .with_context(|| format!("{}: metadata entry prompts", path.display()))?;
        let n = prompts.len();
        let shape = file.shape("sequence").map(<[usize]>::to_vec);
        let sequence = match shape.as_deref() {
            Some(&[rows, tokens, width]) if rows == n && tokens > 0 => Some([tokens, width]),
            _ => None,
        };
        let sequence = sequence.with_context(|| {
            format!(
                "{}: tensor sequence has shape {shape:?}, expected [{n}, T, D]; make the file with \
                 `pcpo-wgpu embed`",
                path.display()
            )
        })?;
        let pooled = match file.shape("pooled") {
            None => 0,
            Some(&[rows, width]) if rows == n => width,
            Some(other) => anyhow::bail!(
                "{}: tensor pooled has shape {other:?}, expected [{n}, P]; make the file with \
                 `pcpo-wgpu embed`",
                path.display()
            ),
        };
        let lengths = lengths(&file, n, sequence[0])?;
        let rows = prompts.into_iter().zip(0..).collect();
        let source = Source::File(file);
        Ok(Self { rows, sequence, pooled, lengths, source, uncond: ZEROS })
    }

    /// The same, where guidance leads away from a text; from zeros where there is none.
    ///
    /// # Errors
    /// When the text has not been encoded.
    pub fn against(self, negative: Option<&str>) -> Result<Self> {
        let uncond = negative.map_or(Ok(ZEROS), |text| self.row_of(text))?;
        Ok(Self { uncond, ..self })
    }

    /// The row of what guidance leads away from.
    pub fn uncond(&self) -> usize {
        self.uncond
    }

    /// Widths of the sequence and of the pooled embedding (0 without one).
    pub fn widths(&self) -> [usize; 2] {
        [self.sequence[1], self.pooled]
    }

    /// Whether it says how many tokens each prompt has of its own.
    pub fn has_lengths(&self) -> bool {
        !self.lengths.is_empty()
    }

    /// Tokens of a sequence.
    pub fn tokens(&self) -> usize {
        self.sequence[0]
    }

    /// The row of a prompt.
    ///
    /// # Errors
    /// When the file of embeddings has none of it.
    pub fn row_of(&self, prompt: &str) -> Result<usize> {
        self.rows.get(prompt).copied().with_context(|| match &self.source {
            Source::File(file) => format!(
                "--embeddings {}: has no embedding of the prompt {prompt:?}; make the file again \
                 with `pcpo-wgpu embed` and all prompts",
                file.source().display()
            ),
            Source::Host { .. } => format!("the prompt {prompt:?} has not been encoded"),
        })
    }

    /// The conditions of images whose rows are named, each row once, on a device.
    ///
    /// # Errors
    /// When a row of a file is damaged.
    pub fn conditioning(&self, rows: &[usize], device: &Device) -> Result<Conditioning> {
        let [tokens, width] = self.sequence;
        let (mut sequences, mut pooleds, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        let map = RowMap::of_equal(rows);
        for row in map.firsts().into_iter().map(|image| rows[image]) {
            if !self.lengths.is_empty() {
                lengths.push(self.lengths.get(row).copied().unwrap_or(tokens));
            }
            match &self.source {
                _ if row == ZEROS => {
                    sequences.resize(sequences.len() + tokens * width, 0.0);
                    pooleds.resize(pooleds.len() + self.pooled, 0.0);
                }
                Source::Host { sequence, pooled } => {
                    let (n, p) = (tokens * width, self.pooled);
                    sequences.extend_from_slice(&sequence[row * n..(row + 1) * n]);
                    pooleds.extend_from_slice(&pooled[row * p..(row + 1) * p]);
                }
                Source::File(file) => {
                    sequences.extend(file.row("sequence", row, &[tokens, width])?);
                    if self.pooled > 0 {
                        pooleds.extend(file.row("pooled", row, &[self.pooled])?);
                    }
                }
            }
        }
        let few = map.few();
        let sequence = upload(&sequences, [few, tokens, width], device);
        let pooled = (self.pooled > 0).then(|| upload(&pooleds, [few, self.pooled], device));
        Ok(Conditioning::new(sequence, pooled, map).with_lengths(lengths))
    }

    /// Writes embeddings that were just made as [`Self::open`] reads them: `sequence` `[N, T, D]`,
    /// `pooled` `[N, P]` and `lengths` `[N]` in f32, and the prompts as a JSON list in the
    /// metadata.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(self, path: &Path) -> Result<()> {
        let mut prompts: Vec<(String, usize)> = self.rows.into_iter().collect();
        prompts.sort_by_key(|(_, row)| *row);
        let prompts: Vec<String> = prompts.into_iter().map(|(prompt, _)| prompt).collect();
        let (n, [tokens, width]) = (prompts.len(), self.sequence);
        let Source::Host { sequence, pooled } = self.source else {
            anyhow::bail!("{}: embeddings of a file are not written again", path.display())
        };
        let mut tensors = vec![HostTensor::new("sequence", [n, tokens, width], sequence)];
        if self.pooled > 0 {
            tensors.push(HostTensor::new("pooled", [n, self.pooled], pooled));
        }
        if !self.lengths.is_empty() {
            let lengths = self.lengths.iter().map(|n| *n as f32).collect();
            tensors.push(HostTensor::new("lengths", [n], lengths));
        }
        let prompts = serde_json::to_string(&prompts).context("prompts")?;
        write_tensors(path, &tensors, &[("prompts", prompts)])
    }
}

/// How many of its tokens are each prompt's own, where a file says so.
fn lengths(file: &Weights, n: usize, tokens: usize) -> Result<Vec<usize>> {
    if !file.has("lengths") {
        return Ok(Vec::new());
    }
    let found = file.f32("lengths")?;
    let fits = |v: &f32| v.fract() == 0.0 && (1.0..=tokens as f32).contains(v);
    ensure!(
        found.shape == [n] && found.values.iter().all(fits),
        "{}: tensor lengths must be {n} whole numbers from 1 to {tokens}; make the file with \
         `pcpo-wgpu embed`",
        file.source().display()
    );
    Ok(found.values.iter().map(|v| *v as usize).collect())
}

/// Checks that text embeddings are of the widths that a network takes.
///
/// # Errors
/// Names `source`, the file or folder that they come from.
pub fn fits(context: [usize; 2], widths: [usize; 2], source: &str) -> Result<()> {
    ensure!(
        widths == context,
        "{source}: text embeddings are {} wide and pooled {}, the network takes {} and {}; the \
         parts belong to different models",
        widths[0],
        widths[1],
        context[0],
        context[1]
    );
    Ok(())
}
