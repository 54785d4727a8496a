//! Layers of options: flags over a file over a recipe over an embedded model's job, and what a run
//! that goes on may change.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};

use super::choices::{Objective, Preset};
use super::numbers;
use super::options::Options;

/// Keys in whose place branching comes.
pub(super) const REPLACED: [&str; 8] = [
    "images-per-epoch",
    "group-size",
    "train-steps",
    "train-last-step",
    "train-window",
    "train-within",
    "noise-only-trained",
    "initial-noise",
];

/// Keys of branching.
const BRANCHING: [&str; 4] = ["branch", "roots", "branch-group", "anchor-steps"];

/// Keys in whose place an objective of the forward process has values of its own.
const OF_TRAJECTORIES: [&str; 9] = [
    "objective",
    "credit",
    "advantage",
    "clip-range",
    "kl-beta",
    "train-steps",
    "train-window",
    "noise-only-trained",
    "updates-per-epoch",
];

impl Options {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// Names the file and the key that is unknown or of the wrong type.
    pub fn from_file(path: &Path) -> Result<Self> {
        Self::read(path, "--config")
    }

    /// The same of a file that another flag gives.
    ///
    /// # Errors
    /// As [`Self::from_file`].
    pub(crate) fn read(path: &Path, flag: &str) -> Result<Self> {
        let text = crate::io::read_text(path).map_err(|e| anyhow!("{flag} {e:#}"))?;
        toml::from_str(&text).with_context(|| format!("{flag} {}", path.display()))
    }

    /// What may change when a run goes on: what alters none of the numbers that it draws or learns.
    pub(super) fn free_on_resume(&self) -> Self {
        Self {
            model: self.model.clone(),
            model_config: self.model_config.clone(),
            vae: self.vae.clone(),
            text_encoder: self.text_encoder.clone(),
            epochs: self.epochs,
            device: self.device.clone(),
            memory: self.memory,
            keep_every: self.keep_every,
            keep_last: self.keep_last,
            sample_every: self.sample_every,
            stream_blocks: self.stream_blocks,
            reward_device: self.reward_device.clone(),
            reward_timeout: self.reward_timeout,
            eval_every: self.eval_every,
            kl_budget: self.kl_budget,
            collapse_bound: self.collapse_bound.clone(),
            stop_on_collapse: self.stop_on_collapse,
            tensorboard: self.tensorboard,
            ..Default::default()
        }
    }

    /// What may change when a run goes on, in words.
    pub const FREE_ON_RESUME: &str = "--epochs, --device, --memory, --keep-every, --keep-last, \
                                      --sample-every, --eval-every, --kl-budget, --collapse-bound, \
                                      --stop-on-collapse, --tensorboard, --stream-blocks, \
                                      --reward-device, --reward-timeout and --model, \
                                      --model-config, --vae and --text-encoder (the same ones \
                                      elsewhere)";

    /// `self` where it says something, `base` elsewhere.
    ///
    /// # Errors
    /// When a path is not UTF-8 or a number does not fit TOML's 63 bits.
    pub fn over(&self, base: &Self) -> Result<Self> {
        let (own, mut merged) = (self.table()?, base.table()?);
        let says = |keys: &[&str]| keys.iter().any(|key| own.contains_key(*key));
        let (trained, held_out) = (["prompt", "prompts"], ["eval-prompt", "eval-prompts"]);
        // One word on the prompts replaces all of the other's: the held-out ones belong to them,
        // and how many pictures each has.
        if says(&trained) {
            trained.iter().for_each(|key| drop(merged.remove(*key)));
        }
        if says(&trained) || says(&held_out) {
            let all = held_out.iter().chain(&["eval-images"]);
            all.for_each(|key| drop(merged.remove(*key)));
        }
        // How many images there are, and which of their steps are trained, is told by the branches.
        if self.branches() {
            REPLACED.iter().for_each(|key| drop(merged.remove(*key)));
        } else if self.preset.is_some() || self.forward() {
            BRANCHING.iter().for_each(|key| drop(merged.remove(*key)));
        }
        // Those of an objective of trajectories are no good for one of ends.
        let was_forward = base.forward();
        if self.forward() && !was_forward {
            OF_TRAJECTORIES.iter().for_each(|key| drop(merged.remove(*key)));
        }
        merged.extend(own);
        Ok(merged.try_into()?)
    }

    /// Whether these options themselves ask for branching.
    pub(super) fn branches(&self) -> bool {
        self.branch.is_some() || self.preset.is_some_and(Preset::branches)
    }

    /// Whether these options themselves ask for an objective of the forward process.
    pub(super) fn forward(&self) -> bool {
        self.objective.is_some_and(Objective::forward) || self.preset.is_some_and(Preset::forward)
    }

    pub(super) fn table(&self) -> Result<toml::Table> {
        for (flag, path) in self.paths() {
            ensure!(
                path.to_str().is_some(),
                "{flag} {}: is not UTF-8, and cannot be saved with the run; rename it",
                path.display()
            );
        }
        let json = serde_json::to_value(self).context("options")?;
        for (key, value) in json.as_object().into_iter().flatten() {
            let numbers = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
            for number in numbers.iter().filter_map(serde_json::Value::as_u64) {
                numbers::fits_toml(&format!("--{key}"), number)?;
            }
        }
        toml::Table::try_from(self).context("options")
    }

    /// All files and folders, with their flags.
    fn paths(&self) -> impl Iterator<Item = (&'static str, &PathBuf)> {
        let one = [
            ("--model", &self.model),
            ("--model-config", &self.model_config),
            ("--vae", &self.vae),
            ("--embeddings", &self.embeddings),
            ("--prompts", &self.prompts),
            ("--lora", &self.lora),
            ("--eval-prompts", &self.eval_prompts),
        ];
        let one = one.into_iter().filter_map(|(flag, path)| Some((flag, path.as_ref()?)));
        let encoders = self.text_encoder.iter().flatten();
        one.chain(encoders.map(|path| ("--text-encoder", path)))
    }
}
