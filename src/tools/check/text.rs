//! Text encoders against a reference, by token numbers.

use anyhow::{Result, ensure};
use burn::tensor::Tensor;

use super::subject::{Comparison, Subject};
use crate::io::tensors::HostTensor;
use crate::model::text::clip::ClipText;
use crate::model::text::qwen3::{Qwen3Config, Qwen3Encoder, States, Tokens};
use crate::model::text::tokenizer::MOST_TOKENS;
use crate::model::{Component, ModelFiles};
use crate::tools::errors::relative_error;

/// A pipeline's embeddings of prompts.
pub(super) const PROMPT_EMBEDS: &str = "out.prompt_embeds";

impl Subject<'_> {
    /// An encoder alone: CLIP's last hidden state against the sequence of a diffusion model, or
    /// what Z-Image or FLUX.2 take of a Qwen3, by the width of the reference.
    pub(super) fn text_encoder(&self, encoder: &Component) -> Result<Option<Comparison>> {
        if !self.reference.has("in.input_ids") {
            return Ok(None);
        }
        if Qwen3Config::is_of(&encoder.config) {
            let width = Qwen3Config::read(&encoder.config)?.width;
            let shape = self.reference.file.shape(PROMPT_EMBEDS);
            let three = shape.and_then(<[usize]>::last).is_some_and(|&n| n == 3 * width);
            return self.qwen3(encoder, if three { States::Three } else { States::SecondLast });
        }
        let text = ClipText::load(encoder, &self.compute.burn, self.asked.storage)?;
        let last = text.forward(&self.token_numbers("in.input_ids")?)?.last;
        let name = "encoder_hidden_states";
        self.compare_tensor(name, "in.encoder_hidden_states", &last).map(Some)
    }

    /// What SDXL's two encoders make of token numbers.
    pub(super) fn two_text_encoders(&self, files: &ModelFiles) -> Result<Vec<Comparison>> {
        let r = &self.reference;
        let parts = ["text_encoder", "text_encoder_2"];
        let tokens = ["in.input_ids", "in.input_ids_2"].map(|name| r.has(name));
        if tokens != [true; 2] || !parts.iter().all(|part| files.has(part)) {
            return Ok(Vec::new());
        }
        let run = |part: &str, ids: &str| {
            let part = files.component(part)?;
            let text = ClipText::load(&part, &self.compute.burn, self.asked.storage)?;
            text.forward(&self.token_numbers(ids)?)
        };
        let first = run(parts[0], "in.input_ids")?;
        let second = run(parts[1], "in.input_ids_2")?;
        let mut lines = Vec::new();
        if r.has(PROMPT_EMBEDS) {
            let both = Tensor::cat(vec![first.penultimate, second.penultimate], 2);
            lines.push(self.compare_tensor("encoder_hidden_states", PROMPT_EMBEDS, &both)?);
        }
        let pooled = "out.pooled_prompt_embeds";
        if r.has(pooled) {
            lines.push(self.compare_tensor("pooled_projections", pooled, &second.pooled)?);
        }
        Ok(lines)
    }

    /// What a Qwen3 makes of token numbers. Z-Image sees no padding, and none is compared.
    pub(super) fn qwen3(&self, encoder: &Component, states: States) -> Result<Option<Comparison>> {
        let r = &self.reference;
        if !r.has("in.input_ids") || !r.has(PROMPT_EMBEDS) {
            return Ok(None);
        }
        let ids = self.token_numbers("in.input_ids")?;
        ensure!(
            ids[0].len() <= MOST_TOKENS,
            "{}: in.input_ids has rows of {} tokens; pipelines take {MOST_TOKENS} at most",
            r.path().display(),
            ids[0].len()
        );
        let mask = match r.has("in.attention_mask") {
            true => r.values("in.attention_mask", ids.iter().map(Vec::len).sum())?,
            false => vec![1.0; ids.iter().map(Vec::len).sum()],
        };
        let own = mask.chunks(ids[0].len()).map(|row| row.iter().map(|v| *v != 0.0).collect());
        let rows: Vec<Tokens> =
            ids.into_iter().zip(own).map(|(ids, own)| Tokens { ids, own }).collect();
        let (compute, storage) = (self.compute, self.asked.storage);
        let model = Qwen3Encoder::open(encoder, states, &compute.burn, storage)?;
        let found = model.forward(&rows)?;
        let shape = [rows.len(), rows[0].ids.len(), model.width()];
        let compared: Vec<bool> = match states {
            States::SecondLast => rows.iter().flat_map(|row| row.own.clone()).collect(),
            States::Three => vec![true; shape[0] * shape[1]],
        };
        let found = HostTensor::new("prompt_embeds", shape, found.concat());
        self.compare_tokens("prompt_embeds", PROMPT_EMBEDS, &found, &compared).map(Some)
    }

    /// Compares those of the tokens, `[B, T]`, of embeddings `[B, T, D]`.
    pub(super) fn compare_tokens(
        &self,
        name: &'static str,
        reference: &str,
        found: &HostTensor,
        compared: &[bool],
    ) -> Result<Comparison> {
        let expected = self.reference.file.raw(reference)?;
        let [rows, tokens, width] = found.shape[..] else { unreachable!("embeddings of rows") };
        let most = expected.shape.get(1).copied().unwrap_or(0);
        ensure!(
            expected.shape == [rows, most, width] && tokens <= most,
            "{}: {reference} has shape {:?}, the model gives {:?}",
            self.reference.path().display(),
            expected.shape,
            found.shape
        );
        ensure!(
            compared.contains(&true),
            "{}: the mask leaves nothing of {reference} to compare",
            self.reference.path().display()
        );
        let of = |values: &[f32], tokens: usize| {
            let at = |row: usize, i: usize| &values[(row * tokens + i) * width..][..width];
            let all = (0..rows).flat_map(|row| (0..found.shape[1]).map(move |i| (row, i)));
            let wanted = all.filter(|(row, i)| compared[row * found.shape[1] + i]);
            wanted.flat_map(|(row, i)| at(row, i).to_vec()).collect::<Vec<f32>>()
        };
        let error = relative_error(&of(&found.values, tokens), &of(&expected.values, most));
        Ok(Comparison { name, error })
    }
}
