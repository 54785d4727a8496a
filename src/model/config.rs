//! Fields of diffusers' config files. A value that is not supported is an error that names it.

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail, ensure};
use serde_json::Value;

use super::nn::Activation;

/// One config.json with its path, for messages.
pub struct Config {
    pub path: PathBuf,
    pub json: Value,
}

impl Config {
    /// Reads `dir/config.json`.
    ///
    /// # Errors
    /// When the file is missing or not JSON.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        Ok(Self { json: crate::files::read_json(&path)?, path })
    }

    pub fn bad(&self, field: &str, what: &str) -> anyhow::Error {
        anyhow!("{}: {field} = {} {what}", self.path.display(), self.json[field])
    }

    /// A non-negative integer with a default for an absent or null field.
    pub fn size(&self, field: &str, default: usize) -> Result<usize> {
        match &self.json[field] {
            Value::Null => Ok(default),
            v => v.as_u64().map(|n| n as usize).ok_or_else(|| self.bad(field, "is not a whole number")),
        }
    }

    pub fn float(&self, field: &str, default: f64) -> Result<f64> {
        match &self.json[field] {
            Value::Null => Ok(default),
            v => v.as_f64().ok_or_else(|| self.bad(field, "is not a number")),
        }
    }

    pub fn flag(&self, field: &str, default: bool) -> Result<bool> {
        match &self.json[field] {
            Value::Null => Ok(default),
            v => v.as_bool().ok_or_else(|| self.bad(field, "is not true or false")),
        }
    }

    pub fn text(&self, field: &str, default: &str) -> Result<String> {
        match &self.json[field] {
            Value::Null => Ok(default.to_string()),
            v => v.as_str().map(str::to_string).ok_or_else(|| self.bad(field, "is not a string")),
        }
    }

    /// A list of strings.
    pub fn names(&self, field: &str, default: &[&str]) -> Result<Vec<String>> {
        match &self.json[field] {
            Value::Null => Ok(default.iter().map(|s| s.to_string()).collect()),
            Value::Array(list) => list
                .iter()
                .map(|v| v.as_str().map(str::to_string).ok_or_else(|| self.bad(field, "is not a list of strings")))
                .collect(),
            _ => Err(self.bad(field, "is not a list of strings")),
        }
    }

    /// A list of whole numbers; empty for an absent field.
    pub fn list(&self, field: &str) -> Result<Vec<usize>> {
        match &self.json[field] {
            Value::Null => Ok(vec![]),
            Value::Array(list) => list
                .iter()
                .map(|v| v.as_u64().map(|n| n as usize))
                .collect::<Option<_>>()
                .ok_or_else(|| self.bad(field, "is not a list of whole numbers")),
            _ => Err(self.bad(field, "is not a list of whole numbers")),
        }
    }

    /// A positive number, or a list of `n` of them, one for each block.
    pub fn sizes(&self, field: &str, n: usize, default: usize) -> Result<Vec<usize>> {
        let list = match &self.json[field] {
            Value::Null => vec![default; n],
            Value::Array(list) => list
                .iter()
                .map(|v| v.as_u64().map(|x| x as usize))
                .collect::<Option<Vec<_>>>()
                .ok_or_else(|| self.bad(field, "is not a list of whole numbers"))?,
            v => vec![v.as_u64().ok_or_else(|| self.bad(field, "is not a whole number"))? as usize; n],
        };
        ensure!(list.len() == n, self.bad(field, &format!("has {} entries for {n} blocks", list.len())));
        ensure!(list.iter().all(|&x| x > 0), self.bad(field, "must be positive"));
        Ok(list)
    }

    /// One flag, or a list of `n`.
    pub fn flags(&self, field: &str, n: usize) -> Result<Vec<bool>> {
        match &self.json[field] {
            Value::Null => Ok(vec![false; n]),
            Value::Bool(b) => Ok(vec![*b; n]),
            Value::Array(list) if list.len() == n => {
                list.iter().map(|v| v.as_bool().ok_or_else(|| self.bad(field, "is not a list of flags"))).collect()
            }
            _ => Err(self.bad(field, &format!("is not a flag or a list of {n}"))),
        }
    }

    pub fn activation(&self, field: &str, default: &str) -> Result<Activation> {
        match self.text(field, default)?.as_str() {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu" => Ok(Activation::Gelu),
            "quick_gelu" => Ok(Activation::QuickGelu),
            "relu" => Ok(Activation::Relu),
            _ => Err(self.bad(field, "is not supported; silu, gelu, quick_gelu and relu are")),
        }
    }

    /// Refuses every field of `fields` whose value is neither absent, null, nor the one given.
    ///
    /// # Errors
    /// Names the first such field.
    pub fn only(&self, fields: &[(&str, Value)]) -> Result<()> {
        for (field, supported) in fields {
            let found = &self.json[*field];
            if !found.is_null() && found != supported {
                bail!(self.bad(field, &format!("is not supported; only {supported} or null is")));
            }
        }
        Ok(())
    }
}
