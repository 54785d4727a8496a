//! Checkpoints: everything that a run needs to continue to the bit. Noise and draws are functions
//! of the seed and the counters, so no generator state is among it. Nothing in one depends on time,
//! place or device: equal runs write equal checkpoints.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::adamw::AdamWState;
use super::followers::Followers;
use super::metrics::{ScoreRecord, Seconds, UpdateRecord, lines};
use crate::io;
use crate::io::tensors::{HostTensor, TensorParts, write_parts, write_tensors};
use crate::io::weights::Weights;
use crate::lora::Label;
use crate::lora::formats::{self, Format};
use crate::lora::{Adapter, LayerShape};
use crate::ops::advantage::Tracker;

const VERSION: u32 = 2;
/// The folder of checkpoints in a run's.
const FOLDER: &str = "checkpoints";
/// The checkpoint of a complete epoch, with its number behind it.
const EPOCH: &str = "epoch-";
/// The checkpoint of an epoch that was stopped between two of its updates, with their number behind
/// it; more than one only where a run was killed while it saved.
const UNFINISHED: &str = "unfinished-";
/// The tensors of an epoch that was stopped.
const TRANSITIONS: &str = "visits.safetensors";

/// The part of a checkpoint that is not tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunState {
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
    /// Trackers of the rewards behind the first, where each is normalised on its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more_trackers: Vec<Tracker>,
    /// Lines of metrics.jsonl that belong to the completed epochs.
    pub metrics_lines: usize,
    /// The epoch that was stopped, where one was.
    pub unfinished: Option<Unfinished>,
}

/// An epoch that was stopped between two updates. Its prompts, noise and steps are functions of the
/// seed; its transitions and advantages are in a file of tensors beside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Unfinished {
    #[serde(with = "io::exact")]
    pub rewards: Vec<f64>,
    /// What each reward gave.
    #[serde(default)]
    pub scores: BTreeMap<String, ScoreRecord>,
    /// The updates that are done, as metrics.jsonl will have them.
    #[serde(rename = "lines", with = "lines")]
    pub updates: Vec<UpdateRecord>,
    /// Rows that the network computed in the rollout, where it is said.
    #[serde(default)]
    pub rollout_calls: Option<usize>,
    /// Where the epoch's time went, in checkpoints from before metrics.jsonl said it.
    #[serde(default, skip_serializing)]
    pub seconds: Option<Seconds>,
}

impl RunState {
    /// Before the first epoch.
    pub fn new(model: String, tracker: Tracker) -> Self {
        Self {
            version: VERSION,
            model,
            epoch: 0,
            updates: 0,
            skipped: 0,
            optimizer_step: 0,
            tracker,
            more_trackers: Vec::new(),
            metrics_lines: 0,
            unfinished: None,
        }
    }
}

/// A run's state with what was learnt.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    pub state: RunState,
    pub adapter: Adapter,
    pub optimizer: AdamWState,
    pub followers: Followers,
}

/// A checkpoint that was read.
pub struct Loaded {
    pub snapshot: Snapshot,
    /// The tensors of the epoch that was stopped, where one was.
    pub transitions: Option<Weights>,
}

/// What a checkpoint is written of.
pub struct Parts<'a> {
    pub state: &'a RunState,
    pub adapter: &'a Adapter,
    pub optimizer: &'a AdamWState,
    pub followers: &'a Followers,
    /// What the adapters' files say of themselves.
    pub label: Label,
}

/// Which checkpoints stay.
#[derive(Clone, Copy, Debug)]
pub struct Keep {
    /// How many of the newest, at least 2.
    pub last: usize,
    /// Epochs from one that stays for good to the next.
    pub every: usize,
}

fn folder(run: &Path, epoch: usize) -> PathBuf {
    run.join(FOLDER).join(format!("{EPOCH}{epoch:05}"))
}

/// The folders among a run's checkpoints whose names begin with a prefix, by what follows it.
fn named(run: &Path, prefix: &str) -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(run.join(FOLDER)).into_iter().flatten().flatten();
    let wanted = |e: std::fs::DirEntry| {
        Some((e.file_name().to_str()?.strip_prefix(prefix)?.to_string(), e.path()))
    };
    entries.filter_map(wanted).collect()
}

/// The checkpoints whose names are a prefix and a number, in the order of the numbers.
fn numbered(run: &Path, prefix: &str) -> BTreeMap<usize, PathBuf> {
    let number = |(rest, path): (String, PathBuf)| Some((rest.parse().ok()?, path));
    named(run, prefix).into_iter().filter_map(number).collect()
}

/// Whether an epoch has a checkpoint.
pub fn exists(run: &Path, epoch: usize) -> bool {
    folder(run, epoch).is_dir()
}

/// Writes the checkpoint of a state whole or not at all, then drops what an epoch that is complete
/// by now had left, and of the epochs before the newest `keep.last` those whose number is not a
/// multiple of `keep.every`. The epoch before the newest stays: whether the newest policy can be
/// used shows when an epoch is drawn with it. `transitions` are the tensors of an epoch that was
/// stopped.
///
/// # Errors
/// Names the file that cannot be written.
pub fn save(run: &Path, parts: &Parts, transitions: Vec<TensorParts>, keep: Keep) -> Result<()> {
    let target = write(run, parts, transitions)?;
    let outdated =
        |e: usize| e + keep.last <= parts.state.epoch && (e == 0 || !e.is_multiple_of(keep.every));
    let epochs = numbered(run, EPOCH).into_iter().filter(|(epoch, _)| outdated(*epoch));
    let unfinished = numbered(run, UNFINISHED).into_iter().filter(|(_, old)| *old != target);
    for (_, old) in unfinished.chain(epochs) {
        // What cannot be removed does no harm: the newest is what counts.
        let _ = io::remove_dir(&old);
    }
    Ok(())
}

/// Makes a complete epoch the newest of a run: later ones, and one that was stopped, are dropped
/// once its own checkpoint stands.
///
/// # Errors
/// Names the file that cannot be written.
pub fn rewind(run: &Path, parts: &Parts) -> Result<()> {
    if !exists(run, parts.state.epoch) {
        write(run, parts, Vec::new())?;
    }
    let later = numbered(run, EPOCH).into_iter().filter(|(epoch, _)| *epoch > parts.state.epoch);
    // Newest first: what a kill leaves of the rest is later than this epoch still, and goes back
    // to it again.
    let mut later: Vec<PathBuf> = later.map(|(_, dir)| dir).collect();
    later.extend(numbered(run, UNFINISHED).into_values());
    later.iter().rev().try_for_each(|dir| io::remove_dir(dir))
}

/// Writes the checkpoint of a state whole or not at all, beside those that are there.
///
/// # Errors
/// Names the file that cannot be written.
pub fn write(run: &Path, parts: &Parts, transitions: Vec<TensorParts>) -> Result<PathBuf> {
    let parent = run.join(FOLDER);
    let target = match parts.state.unfinished {
        Some(_) => parent.join(format!("{UNFINISHED}{:06}", parts.state.updates)),
        None => folder(run, parts.state.epoch),
    };
    io::write_dir(&target, |dir| {
        let Parts { state, adapter, optimizer, followers, label } = parts;
        formats::save(adapter, &dir.join("adapter.safetensors"), Format::Diffusers, label)?;
        followers.save(dir, label)?;
        let moments = [("m", &optimizer.m), ("v", &optimizer.v)].into_iter();
        let tensors: Vec<HostTensor> = moments
            .flat_map(|(name, all)| all.iter().enumerate().map(move |(i, v)| moment(name, i, v)))
            .collect();
        write_tensors(&dir.join("optimizer.safetensors"), &tensors, &[])?;
        if state.unfinished.is_some() {
            write_parts(&dir.join(TRANSITIONS), transitions, &[])?;
        }
        io::write(&dir.join("state.json"), serde_json::to_string_pretty(state)?.as_bytes())
    })?;
    Ok(target)
}

fn moment(name: &str, i: usize, values: &[f32]) -> HostTensor {
    HostTensor::new(format!("{name}.{i:05}"), [values.len()], values.to_vec())
}

/// The newest checkpoint of a run, where there is one: a run that was cut short in its first saving
/// has none.
///
/// # Errors
/// When it is of another version or another model, or a file is damaged.
pub fn load(run: &Path, model: &str, linears: &[LayerShape]) -> Result<Option<Loaded>> {
    // What a killed run was writing.
    io::sweep(&run.join(FOLDER));
    let newest = numbered(run, EPOCH).into_keys().next_back();
    if let Some(dir) = numbered(run, UNFINISHED).into_values().next_back() {
        let state = read_state(&dir)?;
        // One that an epoch's own checkpoint has overtaken was about to be removed.
        if newest.is_none_or(|n| state.epoch >= n) {
            return read(run, &dir, state, model, linears).map(Some);
        }
    }
    let Some(epoch) = newest else { return Ok(None) };
    let dir = folder(run, epoch);
    read(run, &dir, read_state(&dir)?, model, linears).map(Some)
}

/// The newest checkpoint of an epoch before one, where there is one.
///
/// # Errors
/// When a file is damaged.
pub fn load_before(
    run: &Path,
    epoch: usize,
    model: &str,
    linears: &[LayerShape],
) -> Result<Option<Snapshot>> {
    let earlier = numbered(run, EPOCH).into_iter().rfind(|(e, _)| *e < epoch);
    let Some((_, dir)) = earlier else { return Ok(None) };
    let loaded = read(run, &dir, read_state(&dir)?, model, linears)?;
    Ok(Some(loaded.snapshot))
}

fn read_state(dir: &Path) -> Result<RunState> {
    let path = dir.join("state.json");
    let state: serde_json::Value = io::read_json(&path)?;
    ensure!(state["version"].is_u64(), "{}: is damaged: has no version", path.display());
    ensure!(
        state["version"] == VERSION,
        "{}: version {} was written by another version of this program, which reads {VERSION}",
        path.display(),
        state["version"]
    );
    serde_json::from_value(state).with_context(|| format!("{}: is damaged", path.display()))
}

fn read(
    run: &Path,
    dir: &Path,
    state: RunState,
    model: &str,
    linears: &[LayerShape],
) -> Result<Loaded> {
    ensure!(
        state.model == model,
        "--resume {}: the run belongs to a model with hash {:.12}, this one has {model:.12}; give \
         --model the original folder",
        run.display(),
        state.model
    );
    let adapter = formats::load(&dir.join("adapter.safetensors"), linears)?;
    let path = dir.join("optimizer.safetensors");
    let file = Weights::open_file(&path)?;
    let moments = |name: &str| -> Result<Vec<Vec<f32>>> {
        let read = |(i, parameter): (usize, &Vec<f32>)| {
            let (found, n) = (file.f32(&format!("{name}.{i:05}"))?, parameter.len());
            ensure!(
                found.values.len() == n,
                "{}: {} has {} values, not {n}",
                path.display(),
                found.name,
                found.values.len()
            );
            Ok(found.values)
        };
        adapter.parameters().enumerate().map(read).collect()
    };
    let optimizer = AdamWState { step: state.optimizer_step, m: moments("m")?, v: moments("v")? };
    let transitions = match state.unfinished {
        Some(_) => Some(Weights::open_file(&dir.join(TRANSITIONS))?),
        None => None,
    };
    let followers = Followers::load(dir, linears)?;
    Ok(Loaded { snapshot: Snapshot { state, adapter, optimizer, followers }, transitions })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stopped epoch is larger than all else on the host: it goes to the file from where it lies.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_stopped_epoch_is_written_without_a_copy() {
        use crate::device::system::{peak, reset_peak};
        let dir = tempfile::tempdir().unwrap();
        let values = vec![1.0f32; 4 << 20];
        let transitions = (0..8).map(|i| TensorParts {
            name: format!("x.{i}"),
            shape: vec![2, values.len()],
            parts: vec![&values, &values],
        });
        let tracker = Tracker::default();
        let unfinished = Unfinished {
            rewards: vec![],
            scores: BTreeMap::new(),
            rollout_calls: None,
            updates: vec![],
            seconds: None,
        };
        let state = RunState { unfinished: Some(unfinished), ..RunState::new("x".into(), tracker) };
        let adapter = Adapter { rank: 1, alpha: 1.0, layers: vec![] };
        let optimizer = AdamWState::default();
        let (adapter, optimizer) = (&adapter, &optimizer);
        let followers = &Followers::default();
        let label = Label::plain("unet");
        let parts = Parts { state: &state, adapter, optimizer, followers, label };
        reset_peak();
        let before = peak().unwrap();
        let target = write(dir.path(), &parts, transitions.collect()).unwrap();
        let taken = peak().unwrap() - before;
        // Other tests of this process take some meanwhile; a copy alone would be 256.
        assert!(taken < 128 << 20, "{} MiB for a file of 256", taken >> 20);
        let file = Weights::open_file(&target.join(TRANSITIONS)).unwrap();
        assert_eq!(file.shape("x.7"), Some(&[2, values.len()][..]));
    }
}
