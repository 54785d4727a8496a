//! Which files a reward's model is read from: a folder in transformers' or open_clip's layout, or a
//! weight file with its configuration beside it.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};

use crate::io::weights::Weights;
use crate::io::{self, checkpoint};

/// Names of a folder's weights, in the order in which they are tried.
const NAMES: [&str; 6] = [
    "model.safetensors",
    "model.fp16.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pt",
    "pytorch_model.bin",
];

/// What a path means.
pub struct Files {
    pub weights: Weights,
    /// Where configuration and tokenizer lie.
    pub folder: PathBuf,
}

impl Files {
    /// Opens the weights that a path means: a file, or what a folder holds, where `first` are the
    /// names that are tried before those of CLIP's models.
    ///
    /// # Errors
    /// Names the path: there is no such thing, it holds no weights, or several that could be meant.
    pub fn open(path: &Path, first: &[&str]) -> Result<Self> {
        let path = &found(path);
        ensure!(
            path.exists(),
            "{}: there is no such file or folder; give the folder of the model, or its weight file",
            path.display()
        );
        if path.is_dir() {
            return Ok(Self { weights: of_folder(path, first)?, folder: path.to_path_buf() });
        }
        let above = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Ok(Self { weights: Weights::open_any(path)?, folder: above.to_path_buf() })
    }

    /// Values of the weights of a CLIP's image encoder.
    pub fn vision_size(&self) -> usize {
        // `vision_model`, `visual_projection` and `visual`.
        self.weights.elements(|name| name.starts_with("vis"))
    }
}

/// The path, or what comes with the program under it, `models/..`, where it is run elsewhere.
fn found(path: &Path) -> PathBuf {
    let ours = !path.exists() && path.starts_with("models");
    let beside = ours.then(|| io::beside_program(path).find(|p| p.exists())).flatten();
    beside.unwrap_or_else(|| path.to_path_buf())
}

fn of_folder(dir: &Path, first: &[&str]) -> Result<Weights> {
    if let Some(found) = first.iter().chain(&NAMES).map(|n| dir.join(n)).find(|f| f.is_file()) {
        return Weights::open_any(&found);
    }
    if dir.join("model.safetensors.index.json").is_file() {
        return Weights::open_dir(dir);
    }
    let is_weights = |f: &PathBuf| {
        let safe = f.extension().is_some_and(|end| end.eq_ignore_ascii_case("safetensors"));
        f.is_file() && (safe || checkpoint::is_one(f))
    };
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    let mut found: Vec<PathBuf> = entries.filter(is_weights).collect();
    found.sort();
    match &found[..] {
        [one] => Weights::open_any(one),
        [] => bail!(
            "{}: holds no weights; expected model.safetensors, open_clip_model.safetensors or one \
             .pt file",
            dir.display()
        ),
        _ => bail!(
            "{}: holds {} weight files ({} and {}, ..); name the one that is meant",
            dir.display(),
            found.len(),
            found[0].display(),
            found[1].display()
        ),
    }
}
