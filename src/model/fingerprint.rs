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
        let given = [&self.spec.vae, &self.spec.config].into_iter().flatten();
        for path in given.chain(&self.spec.text_encoder) {
            add_path(path, &mut hasher)?;
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
    let mut files = listed(path, "")?;
    files.retain(|f| f.extension().is_some_and(|e| e == "json" || e == "txt") && f.is_file());
    for file in files {
        let bytes = std::fs::read(&file);
        hasher.update(bytes.with_context(|| format!("{}: cannot be read", file.display()))?);
    }
    if path.join("config.json").is_file() {
        Weights::open_dir(path)?.add_to_hash(hasher);
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
