//! A part of a file, and what is read off the names and shapes of its tensors.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::io::weights::Weights;
use crate::model::component::Component;
use crate::model::config::Config;

/// A part's tensors under diffusers' names, and what its config.json would say.
pub struct Part {
    pub weights: Weights,
    pub config: Value,
}

impl Part {
    /// As a component.
    pub fn component(self, file: &Path, name: &str) -> Component {
        let path = PathBuf::from(format!("{}: {name}", file.display()));
        Component::part(Config { path, json: self.config }, self.weights)
    }
}

/// How many numbers from 0 on have a tensor whose name begins with what `prefix` makes of them.
pub fn count(weights: &Weights, prefix: impl Fn(usize) -> String) -> usize {
    (0..).take_while(|&i| weights.names_from(&prefix(i)).next().is_some()).count()
}

/// A tensor's shape, of so many dimensions.
///
/// # Errors
/// When it is missing, or of others.
pub fn shape<const D: usize>(weights: &Weights, name: &str) -> Result<[usize; D]> {
    let path = weights.source().display();
    let found = weights.shape(name).with_context(|| format!("{path}: tensor {name} is missing"))?;
    found.try_into().ok().with_context(|| {
        format!("{path}: tensor {name} has shape {found:?}, expected {D} dimensions")
    })
}
