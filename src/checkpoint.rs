//! Checkpoints: everything that a run needs to continue to the bit. Noise and draws are functions of the seed and the
//! counters, so no generator state is among it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use crate::adamw;
use crate::files::{self, Named};
use crate::lora::Adapter;
use crate::lora_io::{self, Format};
use crate::model::Family;
use crate::model::nn::Linear;
use crate::model::weights::Weights;
use crate::ops::group_advantage::Tracker;

const VERSION: u32 = 1;

/// The part of a checkpoint that is not tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub version: u32,
    /// SHA-256 of the network's weights.
    pub model: String,
    /// Epochs completed.
    pub epoch: usize,
    /// Updates done or skipped.
    pub updates: usize,
    pub skipped: usize,
    pub optimizer_step: u64,
    pub tracker: Tracker,
    /// Lines of metrics.jsonl that belong to the completed epochs.
    pub metrics_lines: usize,
}

impl State {
    pub fn new(model: String, tracker: Tracker) -> Self {
        Self { version: VERSION, model, epoch: 0, updates: 0, skipped: 0, optimizer_step: 0, tracker, metrics_lines: 0 }
    }
}

fn folder(run: &Path, epoch: usize) -> PathBuf {
    run.join("checkpoints").join(format!("epoch-{epoch:05}"))
}

fn epochs(run: &Path) -> Vec<usize> {
    let entries = std::fs::read_dir(run.join("checkpoints")).into_iter().flatten().flatten();
    let mut all: Vec<usize> =
        entries.filter_map(|e| e.file_name().to_str()?.strip_prefix("epoch-")?.parse().ok()).collect();
    all.sort_unstable();
    all
}

/// Writes the checkpoint of `state.epoch` whole or not at all, then drops older ones that are not a multiple of `keep`.
///
/// # Errors
/// Names the file that cannot be written.
pub fn save(
    run: &Path,
    state: &State,
    (adapter, family): (&Adapter, Family),
    optimizer: &adamw::State,
    keep: usize,
) -> Result<()> {
    let target = folder(run, state.epoch);
    let parent = run.join("checkpoints");
    std::fs::create_dir_all(&parent).with_context(|| format!("{}: cannot be made", parent.display()))?;
    let temporary = tempfile::Builder::new()
        .prefix(".partial-")
        .tempdir_in(&parent)
        .with_context(|| format!("{}: cannot be written", parent.display()))?;
    lora_io::save(adapter, &temporary.path().join("adapter.safetensors"), Format::Diffusers, family)?;
    let moments = |name: &str, values: &[Vec<f32>]| -> Vec<Named> {
        values.iter().enumerate().map(|(i, v)| (format!("{name}.{i:05}"), vec![v.len()], v.clone())).collect()
    };
    let tensors = [moments("m", &optimizer.m), moments("v", &optimizer.v)].concat();
    files::write_tensors(&temporary.path().join("optimizer.safetensors"), &tensors, &[])?;
    files::write(&temporary.path().join("state.json"), serde_json::to_string_pretty(state)?.as_bytes())?;
    if target.exists() {
        std::fs::remove_dir_all(&target).with_context(|| format!("{}: cannot be replaced", target.display()))?;
    }
    std::fs::rename(temporary.keep(), &target).with_context(|| format!("{}: cannot be written", target.display()))?;
    for old in epochs(run).into_iter().filter(|&e| e < state.epoch && e % keep != 0) {
        let _ = std::fs::remove_dir_all(folder(run, old));
    }
    Ok(())
}

/// The newest checkpoint of a run.
///
/// # Errors
/// When there is none, it is of another version or another model, or a file is damaged.
pub fn load(run: &Path, model: &str, linears: &[&Linear]) -> Result<(State, Adapter, adamw::State)> {
    let newest = epochs(run).pop().ok_or_else(|| {
        anyhow!(
            "--resume {}: there is no checkpoint in it; give the folder of a run with a completed epoch",
            run.display()
        )
    })?;
    let dir = folder(run, newest);
    let state: State = files::read_json(&dir.join("state.json"))?;
    ensure!(
        state.version == VERSION,
        "{}: version {} was written by another version of this program, which reads {VERSION}",
        dir.join("state.json").display(),
        state.version
    );
    ensure!(
        state.model == model,
        "--resume {}: the run belongs to a model with hash {:.12}, this one has {model:.12}; give --model the original folder",
        run.display(),
        state.model
    );
    let adapter = lora_io::load(&dir.join("adapter.safetensors"), linears)?;
    let path = dir.join("optimizer.safetensors");
    let weights = Weights::open_file(&path)?;
    let sizes: Vec<usize> = adapter.layers.iter().flat_map(|l| [l.a.len(), l.b.len()]).collect();
    let moments = |name: &str| -> Result<Vec<Vec<f32>>> {
        let read = |(i, n): (usize, &usize)| {
            let (values, _) = weights.f32(&format!("{name}.{i:05}"))?;
            ensure!(values.len() == *n, "{}: {name}.{i:05} has {} values, not {n}", path.display(), values.len());
            Ok(values)
        };
        sizes.iter().enumerate().map(read).collect()
    };
    let optimizer = adamw::State { step: state.optimizer_step, m: moments("m")?, v: moments("v")? };
    Ok((state, adapter, optimizer))
}
