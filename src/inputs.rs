//! What a run is given besides numbers: its prompts and the embedded model.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, ensure};

use crate::settings::Options;

/// The embedded model's folder: below the working directory, or beside the program as cargo builds it.
///
/// # Errors
/// When it is in neither place.
pub fn embedded_model() -> Result<PathBuf> {
    let here = PathBuf::from("models/emoji");
    let program = std::env::current_exe().ok();
    let beside = program.iter().flat_map(|p| p.ancestors().skip(1).take(4)).map(|d| d.join("models/emoji"));
    std::iter::once(here).chain(beside).find(|d| d.join("model_index.json").is_file()).ok_or_else(|| {
        anyhow!("the embedded model (models/emoji) is not here; run from the repository, or give --model DIR")
    })
}

/// The prompts of a file or of the flags, each once.
///
/// # Errors
/// When the file cannot be read, there is none, or one stands there twice.
pub fn prompts(o: &Options) -> Result<Vec<String>> {
    let (list, source) = match (&o.prompts, &o.prompt) {
        (Some(file), _) => {
            let text = crate::files::read_text(file).context("--prompts")?;
            (
                text.lines().map(|l| l.trim().to_string()).filter(|l| !l.is_empty()).collect(),
                format!("--prompts {}", file.display()),
            )
        }
        (None, Some(list)) => (list.clone(), "--prompt".into()),
        (None, None) => (vec![], "--prompts FILE or --prompt TEXT".into()),
    };
    ensure!(!list.is_empty(), "{source}: there is no prompt; give at least one");
    let mut seen = std::collections::BTreeSet::new();
    for p in &list {
        ensure!(seen.insert(p), "{source}: the prompt {p:?} stands there twice; keep one");
    }
    Ok(list)
}
