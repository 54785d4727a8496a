//! CLIP's tokenizer, from tokenizer.json or from vocab.json and merges.txt, and T5's, from
//! tokenizer.json.

use std::path::Path;

use anyhow::{Result, anyhow, ensure};
use serde_json::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

/// T5 tokens that diffusers' pipelines take at most.
pub const MOST_TOKENS: usize = 512;

/// Text to token numbers of one fixed length.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The start token, which T5 has none of.
    bos: Option<u32>,
    eos: u32,
    pad: u32,
    /// Tokens in each row, start, end and padding included.
    pub length: usize,
}

/// The settings of CLIP's slow tokenizer (transformers' `CLIPTokenizer`).
fn from_vocabulary(dir: &Path) -> Result<tokenizers::Tokenizer> {
    let fail = |e: tokenizers::Error| {
        anyhow!("{}: vocab.json and merges.txt cannot be used: {e}", dir.display())
    };
    let text = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let bpe = BPE::from_file(&text("vocab.json"), &text("merges.txt"))
        .end_of_word_suffix("</w>".into())
        .continuing_subword_prefix(String::new())
        .unk_token("<|endoftext|>".into())
        .build()
        .map_err(fail)?;
    let mut inner = tokenizers::Tokenizer::new(bpe);
    let spaces =
        Replace::new(tokenizers::normalizers::replace::ReplacePattern::Regex(r"\s+".into()), " ")
            .map_err(fail)?;
    let steps: Vec<NormalizerWrapper> = vec![NFC.into(), spaces.into(), Lowercase.into()];
    inner.with_normalizer(Some(Normalizers::new(steps)));
    let words = concat!(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|",
        r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    );
    let split =
        Split::new(SplitPattern::Regex(words.into()), SplitDelimiterBehavior::Removed, true)
            .map_err(fail)?;
    let steps: Vec<PreTokenizerWrapper> =
        vec![split.into(), ByteLevel::new(false, true, true).into()];
    inner.with_pre_tokenizer(Some(Sequence::new(steps)));
    Ok(inner)
}

/// A special token's text: a string or an object with `content`, in either of the two config files.
fn special(configs: &[Value], field: &str, default: &str) -> String {
    let text = |v: &Value| v.as_str().or_else(|| v["content"].as_str()).map(str::to_string);
    configs.iter().find_map(|c| text(&c[field])).unwrap_or_else(|| default.to_string())
}

impl Tokenizer {
    /// Loads a `tokenizer` folder; rows are at most `max_tokens` long.
    ///
    /// # Errors
    /// Names the file that is missing or cannot be used.
    pub fn load(dir: &Path, max_tokens: usize) -> Result<Self> {
        let fast = dir.join("tokenizer.json");
        let mut inner = if fast.is_file() {
            tokenizers::Tokenizer::from_file(&fast)
                .map_err(|e| anyhow!("{}: cannot be used: {e}", fast.display()))?
        } else {
            ensure!(
                dir.join("vocab.json").is_file() && dir.join("merges.txt").is_file(),
                "{}: no tokenizer.json and no vocab.json with merges.txt",
                dir.display()
            );
            from_vocabulary(dir)?
        };
        // Start, end, padding and length are ours, from the tokenizer's own configs.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| anyhow!("{}: {e}", dir.display()))?;
        let mut configs = Vec::new();
        for name in ["tokenizer_config.json", "special_tokens_map.json"] {
            let path = dir.join(name);
            if path.is_file() {
                configs.push(crate::io::read_json::<Value>(&path)?);
            }
        }
        // As transformers does: the map wins over the config, unless the config lists its added
        // tokens.
        if configs.first().is_some_and(|c| c["added_tokens_decoder"].is_null()) {
            configs.reverse();
        }
        let fields = [
            ("bos_token", "<|startoftext|>"),
            ("eos_token", "<|endoftext|>"),
            ("pad_token", "<|endoftext|>"),
        ];
        // Special tokens are cut out of a prompt before BPE: with SD 2's pad token, every "!" is
        // padding.
        let added = fields
            .map(|(field, default)| AddedToken::from(special(&configs, field, default), true));
        inner.add_special_tokens(&added);
        let id = |(field, default): (&str, &str)| {
            let token = special(&configs, field, default);
            inner.token_to_id(&token).ok_or_else(|| {
                anyhow!("{}: {field} {token:?} is not in the vocabulary", dir.display())
            })
        };
        let (bos, eos, pad) = (id(fields[0])?, id(fields[1])?, id(fields[2])?);
        // A tokenizer without a limit of its own writes an astronomically large number.
        let own = configs.iter().find_map(|c| c["model_max_length"].as_f64()).filter(|&n| n < 1e9);
        let length = own.map_or(max_tokens, |n| n as usize);
        ensure!(
            (2..=max_tokens).contains(&length),
            "{}: model_max_length = {length} does not fit the text encoder's {max_tokens} tokens",
            dir.display()
        );
        Ok(Self { inner, bos: Some(bos), eos, pad, length })
    }

    /// Loads T5's tokenizer; rows are `length` tokens long.
    ///
    /// # Errors
    /// Names the file that is missing or cannot be used, or the length that is out of range.
    pub fn load_t5(dir: &Path, length: usize) -> Result<Self> {
        ensure!(
            (1..=MOST_TOKENS).contains(&length),
            "--max-sequence-length {length}: must lie between 1 and {MOST_TOKENS} where there is a \
             T5"
        );
        let path = dir.join("tokenizer.json");
        ensure!(
            path.is_file(),
            "{}: missing; a folder with spiece.model alone gets one from \
             `T5TokenizerFast.from_pretrained(..).save_pretrained(..)`",
            path.display()
        );
        let mut inner = tokenizers::Tokenizer::from_file(&path)
            .map_err(|e| anyhow!("{}: cannot be used: {e}", path.display()))?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| anyhow!("{}: {e}", path.display()))?;
        let id = |token: &str| {
            inner
                .token_to_id(token)
                .ok_or_else(|| anyhow!("{}: {token:?} is not in the vocabulary", path.display()))
        };
        let (eos, pad) = (id("</s>")?, id("<pad>")?);
        Ok(Self { inner, bos: None, eos, pad, length })
    }

    /// One row of exactly `length` tokens: start, text (cut where too long), end, padding.
    ///
    /// # Errors
    /// When the text cannot be tokenized.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding =
            self.inner.encode_fast(text, false).map_err(|e| anyhow!("prompt {text:?}: {e}"))?;
        let mut row: Vec<u32> = self.bos.into_iter().collect();
        row.extend(encoding.get_ids().iter().take(self.length - 1 - row.len()));
        row.push(self.eos);
        row.resize(self.length, self.pad);
        Ok(row)
    }
}
