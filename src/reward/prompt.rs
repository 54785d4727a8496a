//! A prompt, and what else its line says.

use std::fmt;

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

/// A prompt with its metadata, which rewards may use: a line of a prompts' file is the text itself,
/// or a JSON object `{"prompt": TEXT, ...}`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Prompt {
    /// What is drawn.
    pub text: String,
    /// The other fields of its line.
    pub metadata: Map<String, Value>,
}

impl Prompt {
    /// A prompt without metadata.
    pub fn plain(text: impl Into<String>) -> Self {
        Self { text: text.into(), metadata: Map::new() }
    }

    /// Reads a line. One that begins with `{"` is JSON; any other is the text itself.
    ///
    /// # Errors
    /// When it begins like JSON and is none, or has no text under `prompt`.
    pub fn parse(line: &str) -> Result<Self> {
        if !is_json(line) {
            return Ok(Self::plain(line));
        }
        let short: String = line.chars().take(100).collect();
        let line = line.trim();
        let bad = || format!("{short:?} begins like a JSON object and is none");
        let mut metadata: Map<String, Value> = serde_json::from_str(line).with_context(bad)?;
        let text = metadata.remove("prompt");
        let text = text.ok_or_else(|| anyhow!("{short:?} has no field \"prompt\""))?;
        ensure!(text.is_string(), "{short:?}: its field \"prompt\" is {text}, not a text");
        Ok(Self { text: text.as_str().unwrap_or_default().to_string(), metadata })
    }
}

fn is_json(line: &str) -> bool {
    line.strip_prefix('{').is_some_and(|rest| rest.trim_start().starts_with('"'))
}

/// The line that [`Prompt::parse`] reads.
impl fmt::Display for Prompt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.metadata.is_empty() && !is_json(&self.text) {
            return f.write_str(&self.text);
        }
        let mut all = Map::new();
        all.insert("prompt".into(), self.text.clone().into());
        all.extend(self.metadata.clone());
        write!(f, "{}", Value::Object(all))
    }
}

impl Serialize for Prompt {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}
