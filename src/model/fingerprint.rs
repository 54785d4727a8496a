//! What a checkpoint is bound to: everything that a run reads of its model.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::Digest;

use super::files::ModelFiles;
use crate::choice::name;
use crate::io::weights::Weights;

impl ModelFiles {
    /// SHA-256 over everything that a run reads of its model, weights and small files alike, or
    /// over an embeddings file in place of the text encoders: what a checkpoint is bound to.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn fingerprint(&self, embeddings: Option<&Path>) -> Result<String> {
        let mut hasher = sha2::Sha256::new();
        match self.file() {
            Some(file) => file.add_to_hash(&mut hasher),
            None => self.add_folder(embeddings, &mut hasher)?,
        }
        for path in self.spec.vae.iter().chain(&self.spec.text_encoder) {
            // A VAE may be given by the folder of its model.
            let below = path.join("vae");
            add_path(if below.is_dir() { &below } else { path }, &mut hasher)?;
        }
        if let Some(configs) = &self.spec.config {
            add_small(configs, &mut hasher)?;
            for part in listed(configs, "--model-config ")?.iter().filter(|part| part.is_dir()) {
                add_small(part, &mut hasher)?;
            }
        }
        if let Some(prediction) = self.spec.prediction {
            hasher.update(name(prediction));
        }
        if let Some(file) = embeddings {
            Weights::open_file(file)?.add_to_hash(&mut hasher);
        }
        Ok(format!("{:x}", hasher.finalize()))
    }

    fn add_folder(&self, embeddings: Option<&Path>, hasher: &mut sha2::Sha256) -> Result<()> {
        // What model_index.json says of the network and of its prompts.
        let network = self.network()?.config.json;
        hasher.update([u8::from(network["is_distilled"] == true)]);
        let network = self.family.network();
        for part in listed(self.path(), "--model ")? {
            let name = part.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            let text = name.starts_with("text_encoder") || name.starts_with("tokenizer");
            let used = [network, "vae", "scheduler"].contains(&name);
            if used || (text && embeddings.is_none()) {
                add_path(&part, hasher)?;
            }
        }
        Ok(())
    }
}

/// Adds a file of weights, or a folder's small files and weights.
fn add_path(path: &Path, hasher: &mut sha2::Sha256) -> Result<()> {
    if path.is_file() {
        Weights::open_any(path)?.add_to_hash(hasher);
        return Ok(());
    }
    add_small(path, hasher)?;
    if path.join("config.json").is_file() {
        Weights::open_dir(path)?.add_to_hash(hasher);
    }
    Ok(())
}

/// Adds the small files of a folder.
fn add_small(path: &Path, hasher: &mut sha2::Sha256) -> Result<()> {
    let mut files = listed(path, "")?;
    let small = ["json", "txt", "jinja"];
    files.retain(|f| f.extension().is_some_and(|e| small.iter().any(|s| e == *s)) && f.is_file());
    for file in files {
        let bytes = std::fs::read(&file);
        hasher.update(bytes.with_context(|| format!("{}: cannot be read", file.display()))?);
    }
    Ok(())
}

/// What a folder holds, in the order of the names.
fn listed(dir: &Path, flag: &str) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir)
        .with_context(|| format!("{flag}{}: cannot be read", dir.display()))?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    Ok(paths)
}
