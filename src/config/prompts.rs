//! What a run is given besides numbers: its prompts and the embedded models.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::options::Options;
use crate::io;
use crate::reward::Prompt;

/// The embedded models with the jobs that `train` runs for them.
const EMBEDDED: [(&str, &str); 2] = [
    ("emoji", include_str!("../../models/emoji/train.toml")),
    ("emoji-flow", include_str!("../../models/emoji-flow/train.toml")),
];

/// The job and the folder of an embedded model: the first where no model is named, another by its
/// name; `None` where a folder is meant.
///
/// # Errors
/// When the embedded model is not found.
pub fn embedded(model: Option<&Path>) -> Result<Option<(&'static str, PathBuf)>> {
    let found = match model {
        None => Some(&EMBEDDED[0]),
        Some(path) if path.exists() => None,
        Some(path) => EMBEDDED.iter().find(|(name, _)| path == Path::new(name)),
    };
    found.map(|(name, job)| Ok((*job, folder(name)?))).transpose()
}

/// The folder that `--model` means: an embedded model's, or the one that is named.
///
/// # Errors
/// When an embedded model is not found.
pub fn model_folder(model: Option<&Path>) -> Result<PathBuf> {
    Ok(match embedded(model)? {
        Some((_, folder)) => folder,
        None => model.expect("a model that is not embedded was named").to_path_buf(),
    })
}

/// An embedded model's folder: below the working directory, or beside the program as cargo builds
/// it.
fn folder(name: &str) -> Result<PathBuf> {
    let below = Path::new("models").join(name);
    std::iter::once(below.clone())
        .chain(io::beside_program(&below))
        .find(|d| d.join("model_index.json").is_file())
        .ok_or_else(|| {
            anyhow!(
                "the embedded model ({}) is not here; run from the repository, or give --model DIR",
                below.display()
            )
        })
}

/// The prompts of a run's options.
///
/// # Errors
/// As [`read_prompts`].
pub fn prompts(o: &Options) -> Result<Vec<Prompt>> {
    read_prompts(o.prompts.as_deref(), o.prompt.as_ref())
}

/// The held-out prompts of a run's options; none where nothing was said of them.
///
/// # Errors
/// As [`read_prompts`].
pub fn held_out(o: &Options) -> Result<Vec<Prompt>> {
    match (&o.eval_prompts, &o.eval_prompt) {
        (None, None) => Ok(Vec::new()),
        (file, list) => each_once("--eval-prompt", file.as_deref(), list.as_ref()),
    }
}

/// The prompts of a file or of the flags, each once.
///
/// # Errors
/// When the file cannot be read, a line is damaged, there is none, or one stands there twice.
pub fn read_prompts(file: Option<&Path>, list: Option<&Vec<String>>) -> Result<Vec<Prompt>> {
    each_once("--prompt", file, list)
}

fn each_once(flag: &str, file: Option<&Path>, list: Option<&Vec<String>>) -> Result<Vec<Prompt>> {
    let (list, source) = lines_of(flag, file, list)?;
    let mut seen = std::collections::BTreeSet::new();
    for p in &list {
        ensure!(
            seen.insert(&p.text),
            "{source}: the prompt {:?} stands there twice; keep one",
            p.text
        );
    }
    Ok(list)
}

/// The prompts of a file or of the flags as they stand there, and what to call their source.
///
/// # Errors
/// When the file cannot be read, a line is damaged, or there is none.
pub fn lines(file: Option<&Path>, list: Option<&Vec<String>>) -> Result<(Vec<Prompt>, String)> {
    lines_of("--prompt", file, list)
}

/// The same for a flag `FLAG TEXT`, which has a twin `FLAGs FILE`.
fn lines_of(
    flag: &str,
    file: Option<&Path>,
    list: Option<&Vec<String>>,
) -> Result<(Vec<Prompt>, String)> {
    let (list, source) = match (file, list) {
        (Some(file), Some(_)) => {
            bail!("{flag}s {}: stands beside {flag}; give one of them", file.display())
        }
        (Some(file), None) => {
            let text = io::read_text(file).with_context(|| format!("{flag}s"))?;
            // Some editors mark the beginning of a file.
            let text = text.trim_start_matches('\u{feff}');
            (
                // The ends of lines of all systems; empty lines are none.
                text.split(['\n', '\r'])
                    .map(|l| l.trim().to_string())
                    .filter(|l| !l.is_empty())
                    .collect(),
                format!("{flag}s {}", file.display()),
            )
        }
        (None, Some(list)) => (list.clone(), flag.into()),
        (None, None) => (vec![], format!("{flag}s FILE or {flag} TEXT")),
    };
    ensure!(!list.is_empty(), "{source}: there is no prompt; give at least one");
    let prompt = |line: &String| Prompt::parse(line).with_context(|| source.clone());
    let prompts = list.iter().map(prompt).collect::<Result<_>>()?;
    Ok((prompts, source))
}
