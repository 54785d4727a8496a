//! Qwen3's tokenizer: a prompt is what a user says in a chat, put into words by the template that
//! stands with the tokenizer.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use minijinja::{Environment, context};
use serde_json::{Value, json};

use super::qwen3::Tokens;
use super::tokenizer::{MOST_TOKENS, from_json, special};

/// Text to token numbers.
pub struct ChatTokenizer {
    inner: tokenizers::Tokenizer,
    template: Environment<'static>,
    /// Where the template stands, for messages.
    source: PathBuf,
    /// Whether the answer may begin with thoughts.
    thinking: bool,
    pad: u32,
    /// Whether padding stands before a prompt.
    left: bool,
    /// Tokens in each row.
    length: usize,
}

/// The name of the one template.
const CHAT: &str = "chat_template";

impl ChatTokenizer {
    /// Loads a `tokenizer` folder; rows are `length` tokens long.
    ///
    /// # Errors
    /// Names the file that is missing or cannot be used, or the length that is out of range.
    pub fn load(dir: &Path, length: usize, thinking: bool) -> Result<Self> {
        ensure!(
            (1..=MOST_TOKENS).contains(&length),
            "--max-sequence-length {length}: must lie between 1 and {MOST_TOKENS}"
        );
        let path = dir.join("tokenizer.json");
        ensure!(
            path.is_file(),
            "{}: missing; a folder with vocab.json and merges.txt alone gets one from \
             `AutoTokenizer.from_pretrained(..).save_pretrained(..)`",
            path.display()
        );
        let mut inner = from_json(&path)?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| anyhow!("{}: {e}", path.display()))?;
        let config_file = dir.join("tokenizer_config.json");
        let config: Value =
            if config_file.is_file() { crate::io::read_json(&config_file)? } else { json!({}) };
        let token = special(std::slice::from_ref(&config), "pad_token", "<|endoftext|>");
        let pad = inner.token_to_id(&token).with_context(|| {
            format!("{}: pad_token {token:?} is not in the vocabulary", dir.display())
        })?;
        let left = match config["padding_side"].as_str() {
            None | Some("right") => false,
            Some("left") => true,
            Some(other) => anyhow::bail!(
                "{}: padding_side = {other:?} is neither left nor right",
                config_file.display()
            ),
        };
        let (source, text) = template_of(dir, &config_file, &config)?;
        let template = environment(&source, text)?;
        Ok(Self { inner, template, source, thinking, pad, left, length })
    }

    /// A prompt as the chat has it.
    ///
    /// # Errors
    /// When the template refuses it.
    fn chat(&self, prompt: &str) -> Result<String> {
        let messages = json!([{ "role": "user", "content": prompt }]);
        let told = context! {
            messages,
            add_generation_prompt => true,
            enable_thinking => self.thinking,
        };
        let template = self.template.get_template(CHAT);
        template
            .and_then(|template| template.render(told))
            .map_err(|e| anyhow!("{}: cannot be applied: {e:#}", self.source.display()))
    }

    /// One row of exactly `length` tokens: the chat, cut where it is too long, and padding.
    ///
    /// # Errors
    /// When the text cannot be tokenized.
    pub fn encode(&self, prompt: &str) -> Result<Tokens> {
        let chat = self.chat(prompt)?;
        let encoding =
            self.inner.encode_fast(chat, true).map_err(|e| anyhow!("prompt {prompt:?}: {e}"))?;
        let own = encoding.get_ids();
        let own = &own[..own.len().min(self.length)];
        ensure!(!own.is_empty(), "prompt {prompt:?}: has no token");
        let padding = self.length - own.len();
        let (before, after) = if self.left { (padding, 0) } else { (0, padding) };
        let filled = |n: usize| std::iter::repeat_n(self.pad, n);
        Ok(Tokens {
            ids: filled(before).chain(own.iter().copied()).chain(filled(after)).collect(),
            own: (0..self.length).map(|i| i >= before && i < before + own.len()).collect(),
        })
    }
}

/// The template and where it stands: in a file of its own, or in the tokenizer's configuration.
fn template_of(dir: &Path, config_file: &Path, config: &Value) -> Result<(PathBuf, String)> {
    let own = dir.join("chat_template.jinja");
    if own.is_file() {
        let text = std::fs::read_to_string(&own);
        let text = text.with_context(|| format!("{}: cannot be read", own.display()))?;
        return Ok((own, text));
    }
    // One template, or several by name.
    let named = |list: &Vec<Value>| {
        let default = list.iter().find(|t| t["name"] == "default");
        default.and_then(|t| t["template"].as_str().map(str::to_string))
    };
    let given = &config[CHAT];
    let text = given.as_str().map(str::to_string).or_else(|| given.as_array().and_then(named));
    let text = text.with_context(|| {
        format!(
            "{}: has no chat_template, and there is no {}; Qwen3's tokenizer has one",
            config_file.display(),
            own.display()
        )
    })?;
    Ok((config_file.to_path_buf(), text))
}

/// The template as transformers sets Jinja up for it.
fn environment(source: &Path, text: String) -> Result<Environment<'static>> {
    let mut env = Environment::new();
    // A template that does not end is refused; Qwen3's takes some hundred instructions.
    env.set_fuel(Some(10_000_000));
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("raise_exception", |what: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, what))
    });
    env.add_template_owned(CHAT, text)
        .map_err(|e| anyhow!("{}: chat_template cannot be used: {e:#}", source.display()))?;
    Ok(env)
}
