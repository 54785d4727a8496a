//! Which files hold a component's weights: one, or several that an index names.

use std::path::{Component, Path, PathBuf};

use anyhow::{Result, anyhow, bail, ensure};
use serde_json::Value;

/// The candidates for a component's weight file, in the order in which they are tried.
///
/// # Errors
/// When there is none, or an index is damaged.
pub fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    for stem in ["diffusion_pytorch_model", "model"] {
        for suffix in ["", ".fp16"] {
            let one = dir.join(format!("{stem}{suffix}.safetensors"));
            if one.is_file() {
                return Ok(vec![one]);
            }
            let index = dir.join(format!("{stem}.safetensors.index{suffix}.json"));
            if index.is_file() {
                return shards(dir, &index);
            }
        }
    }
    bail!(
        "{}: no weights found; expected diffusion_pytorch_model.safetensors or model.safetensors, \
         alone, as .fp16 variant or with an index (.bin files: convert them with diffusers)",
        dir.display()
    )
}

/// The files that an index names, all of which lie beside it.
fn shards(dir: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let json: Value = super::read_json(index)?;
    let map = json["weight_map"].as_object().filter(|m| !m.is_empty());
    let map = map.ok_or_else(|| anyhow!("{}: field weight_map is missing", index.display()))?;
    let mut names = Vec::new();
    for (tensor, file) in map {
        let name = file.as_str().unwrap_or_default();
        let plain = Path::new(name).components().all(|c| matches!(c, Component::Normal(_)));
        ensure!(
            !name.is_empty() && plain,
            "{}: weight_map of {tensor} is {file}, not the name of a file beside the index",
            index.display()
        );
        names.push(dir.join(name));
    }
    names.sort_unstable();
    names.dedup();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_names_only_files_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join("model.safetensors.index.json");
        for name in ["../a.safetensors", "/a.safetensors", "", "b/../../a.safetensors"] {
            let text = serde_json::json!({ "weight_map": { "x": name } }).to_string();
            std::fs::write(&index, text).unwrap();
            let error = weight_files(dir.path()).err().unwrap().to_string();
            assert!(error.contains("weight_map of x") && error.contains("index.json"), "{error}");
        }
    }
}
