//! Checkpoints: everything that a run needs to continue to the bit. Noise and draws are functions of the seed and the
//! counters, so no generator state is among it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::adamw;
use crate::files::{self, Named};
use crate::lora::Adapter;
use crate::lora_io::{self, Format};
use crate::model::Family;
use crate::model::nn::Linear;
use crate::model::weights::Weights;
use crate::ops::group_advantage::Tracker;

const VERSION: u32 = 2;
/// What the folder of a checkpoint is called until it is whole.
const PARTIAL: &str = ".partial-";
/// The checkpoint of a complete epoch, with its number behind it.
const EPOCH: &str = "epoch-";
/// The checkpoint of an epoch that was stopped between two of its updates, with their number behind it; more than one only
/// where a run was killed while it saved.
const UNFINISHED: &str = "unfinished-";

/// The part of a checkpoint that is not tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub version: u32,
    /// SHA-256 of the model's files.
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
    /// The epoch that was stopped, where one was.
    pub unfinished: Option<Unfinished>,
}

/// An epoch that was stopped between two updates. Its prompts, noise and steps are functions of the seed; its visits and
/// advantages are in visits.safetensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Unfinished {
    #[serde(with = "files::exact")]
    pub rewards: Vec<f64>,
    /// The metrics of the updates that are done, as written.
    pub lines: Vec<String>,
    pub seconds: Seconds,
    #[serde(skip)]
    pub tensors: Vec<Named>,
}

/// Where an epoch's time went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seconds {
    pub rollout: f64,
    pub decode: f64,
    pub reward: f64,
    pub update: f64,
}

impl Seconds {
    pub fn all(&self) -> f64 {
        self.rollout + self.decode + self.reward + self.update
    }
}

impl State {
    pub fn new(model: String, tracker: Tracker) -> Self {
        Self {
            version: VERSION,
            model,
            epoch: 0,
            updates: 0,
            skipped: 0,
            optimizer_step: 0,
            tracker,
            metrics_lines: 0,
            unfinished: None,
        }
    }
}

fn folder(run: &Path, epoch: usize) -> PathBuf {
    run.join("checkpoints").join(format!("{EPOCH}{epoch:05}"))
}

/// The folders among a run's checkpoints whose names begin with a prefix, in the order of their numbers.
fn named(run: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(run.join("checkpoints")).into_iter().flatten().flatten();
    let mut all: Vec<PathBuf> =
        entries.filter(|e| e.file_name().to_string_lossy().starts_with(prefix)).map(|e| e.path()).collect();
    all.sort_unstable();
    all
}

/// The epochs that have a checkpoint.
fn epochs(run: &Path) -> Vec<usize> {
    let number = |dir: PathBuf| dir.file_name()?.to_str()?.strip_prefix(EPOCH)?.parse().ok();
    let mut all: Vec<usize> = named(run, EPOCH).into_iter().filter_map(number).collect();
    all.sort_unstable();
    all
}

/// Writes the checkpoint of a state whole or not at all, then drops older ones that are not a multiple of `keep`, and what
/// an epoch that is complete by now had left.
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
    let parent = run.join("checkpoints");
    let target = match state.unfinished {
        Some(_) => parent.join(format!("{UNFINISHED}{:06}", state.updates)),
        None => folder(run, state.epoch),
    };
    std::fs::create_dir_all(&parent).with_context(|| format!("{}: cannot be made", parent.display()))?;
    let temporary = tempfile::Builder::new()
        .prefix(PARTIAL)
        .tempdir_in(&parent)
        .with_context(|| format!("{}: cannot be written", parent.display()))?;
    lora_io::save(adapter, &temporary.path().join("adapter.safetensors"), Format::Diffusers, family)?;
    let moments = |name: &str, values: &[Vec<f32>]| -> Vec<Named> {
        values.iter().enumerate().map(|(i, v)| (format!("{name}.{i:05}"), vec![v.len()], v.clone())).collect()
    };
    let tensors = [moments("m", &optimizer.m), moments("v", &optimizer.v)].concat();
    files::write_tensors(&temporary.path().join("optimizer.safetensors"), &tensors, &[])?;
    if let Some(work) = &state.unfinished {
        files::write_tensors(&temporary.path().join("visits.safetensors"), &work.tensors, &[])?;
    }
    files::write(&temporary.path().join("state.json"), serde_json::to_string_pretty(state)?.as_bytes())?;
    if target.exists() {
        std::fs::remove_dir_all(&target).with_context(|| format!("{}: cannot be replaced", target.display()))?;
    }
    std::fs::rename(temporary.keep(), &target).with_context(|| format!("{}: cannot be written", target.display()))?;
    for old in named(run, UNFINISHED).into_iter().filter(|old| *old != target) {
        let _ = std::fs::remove_dir_all(old);
    }
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
    // What a killed run was writing.
    for partial in named(run, PARTIAL) {
        let _ = std::fs::remove_dir_all(partial);
    }
    let newest = epochs(run).pop();
    let read = |dir: PathBuf| -> Result<(PathBuf, State)> {
        let path = dir.join("state.json");
        let state: serde_json::Value = files::read_json(&path)?;
        ensure!(
            state["version"] == VERSION,
            "{}: version {} was written by another version of this program, which reads {VERSION}",
            path.display(),
            state["version"]
        );
        let state = serde_json::from_value(state).with_context(|| format!("{}: is damaged", path.display()))?;
        Ok((dir, state))
    };
    let stopped = named(run, UNFINISHED).pop().map(read).transpose()?;
    let (dir, mut state) = match (stopped, newest) {
        // One that an epoch's own checkpoint has overtaken was about to be removed.
        (Some((dir, state)), newest) if newest.is_none_or(|n| state.epoch >= n) => (dir, state),
        (_, Some(epoch)) => read(folder(run, epoch))?,
        (_, None) => {
            bail!("--resume {}: there is no checkpoint in it; give the folder of a run that was saved", run.display())
        }
    };
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
    if let Some(work) = &mut state.unfinished {
        let weights = Weights::open_file(&dir.join("visits.safetensors"))?;
        for name in weights.names() {
            let (values, shape) = weights.f32(name)?;
            work.tensors.push((name.to_string(), shape, values));
        }
    }
    let optimizer = adamw::State { step: state.optimizer_step, m: moments("m")?, v: moments("v")? };
    Ok((state, adapter, optimizer))
}
