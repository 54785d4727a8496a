//! A part of a model, a network, an encoder or the VAE: its configuration and its weights, wherever
//! they come from.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::config::Config;
use crate::io::weights::Weights;

/// A part of a model. Its weights are opened when they are asked for: what needs only the
/// configuration does without them.
#[derive(Clone)]
pub struct Component {
    pub config: Config,
    files: Files,
}

#[derive(Clone)]
enum Files {
    /// A folder in diffusers' or transformers' layout.
    Folder(PathBuf),
    /// A part of a file, under the names that it has in such a folder.
    Part(Weights),
}

impl Component {
    /// A folder with a `config.json`.
    ///
    /// # Errors
    /// When that is missing or not a JSON object.
    pub fn folder(dir: &Path) -> Result<Self> {
        Ok(Self { config: Config::open(dir)?, files: Files::Folder(dir.to_path_buf()) })
    }

    /// A part of a file, whose tensors have the names of diffusers' classes.
    pub fn part(config: Config, weights: Weights) -> Self {
        Self { config, files: Files::Part(weights) }
    }

    /// Of a file, the same with the configuration of a folder, where that has one: it says what
    /// tensors do not show.
    ///
    /// # Errors
    /// When that configuration is damaged.
    pub fn configured(mut self, folder: &Path) -> Result<Self> {
        if matches!(self.files, Files::Part(_)) && folder.join("config.json").is_file() {
            self.config = Config::open(folder)?;
        }
        Ok(self)
    }

    /// Its tensors.
    ///
    /// # Errors
    /// When a weight file is missing or damaged.
    pub fn weights(&self) -> Result<Weights> {
        match &self.files {
            Files::Folder(dir) => Weights::open_dir(dir),
            Files::Part(weights) => Ok(weights.clone()),
        }
    }
}
