//! What a run is told, resolved once and checked: [`Settings`], which is printed, and saved with
//! the run as a file that `--config` reads.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde::{Serialize, Serializer};

use super::checkpointing::Checkpointing;
use super::numbers::{self, MOST, MOST_RANK, Range};
use super::options::{InitialNoise, Preset};
use crate::measure::collapse::Bounds;
use crate::measure::features::clip_path;
use crate::model::Storage;
use crate::ops::advantage::{Advantage, Mix};
use crate::ops::policy_objective::{GuidanceGradient, Objective};
use crate::reward::{self, JudgeAnswer, Prompt, RemoteOptions, RewardSpec};
use crate::schedule::credit::{Credit, Total};
use crate::schedule::{Grid, Sampler, Sampling};

/// A checked run. Each field is the option of its name, see [`crate::Options`], with presets and
/// defaults resolved.
#[allow(missing_docs)]
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Settings {
    pub model: PathBuf,
    pub device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<f64>,
    pub storage: Storage,
    #[serde(serialize_with = "one_or_several")]
    pub reward: Vec<RewardSpec>,
    pub mix: Mix,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub watch: Vec<RewardSpec>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reward_device: Option<String>,
    pub reward_timeout: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub judge_question: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub judge_answer: Option<JudgeAnswer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resolution: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embeddings: Option<PathBuf>,
    pub max_sequence_length: usize,
    pub prompt: Vec<Prompt>,
    pub preset: Preset,
    pub objective: Objective,
    pub credit: Credit,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zeta: Option<f64>,
    pub credit_total: Total,
    pub initial_noise: InitialNoise,
    pub advantage: Advantage,
    pub train_last_step: bool,
    pub kl_beta: f64,
    pub epochs: usize,
    pub images_per_epoch: usize,
    pub group_size: usize,
    pub updates_per_epoch: usize,
    pub inner_epochs: usize,
    pub batch: usize,
    pub sampler: Sampler,
    pub steps: usize,
    pub eta: f64,
    /// Of a flow; diffusion has its scheduler's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grid: Option<Grid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shift: Option<f64>,
    pub guidance_scale: f64,
    pub guidance_gradient: GuidanceGradient,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_steps: Option<usize>,
    pub train_window: bool,
    pub noise_only_trained: bool,
    pub activation_checkpointing: Checkpointing,
    pub clip_range: f64,
    pub advantage_clamp: f64,
    pub tracker_size: usize,
    pub tracker_min_count: usize,
    pub learning_rate: f64,
    pub weight_decay: f64,
    pub max_grad_norm: f64,
    pub rank: usize,
    pub alpha: f64,
    /// None where the layers are those of `lora`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub target_modules: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<PathBuf>,
    pub seed: u64,
    pub keep_every: usize,
    pub sample_every: usize,
    pub eval_every: usize,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub eval_prompt: Vec<Prompt>,
    pub eval_images: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub features: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_budget: Option<f64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub collapse_bound: Vec<String>,
    pub stop_on_collapse: bool,
    pub tensorboard: bool,
}

/// Prompts that a grid shows at most, and an evaluation of training prompts has.
pub const GRID_COLUMNS: usize = 4;

/// One as a text, as it has always been written; several as a list.
fn one_or_several<S: Serializer>(
    specs: &[RewardSpec],
    to: S,
) -> std::result::Result<S::Ok, S::Error> {
    match specs {
        [one] => one.serialize(to),
        several => to.collect_seq(several),
    }
}

impl Settings {
    /// All rewards, those that are trained on and those that are watched.
    pub fn rewards(&self) -> impl Iterator<Item = &RewardSpec> {
        self.reward.iter().chain(&self.watch)
    }

    /// The device of the reward models, where it is not the training's.
    pub fn own_reward_device(&self) -> Option<&str> {
        self.reward_device.as_deref().filter(|name| *name != self.device)
    }

    /// How servers are asked for rewards.
    pub fn remote(&self) -> RemoteOptions {
        RemoteOptions {
            timeout: Duration::from_secs_f64(self.reward_timeout),
            judge_question: self.judge_question.clone(),
            judge_answer: self.judge_answer.unwrap_or_default(),
        }
    }

    /// Prompts an epoch.
    pub fn groups(&self) -> usize {
        self.images_per_epoch / self.group_size
    }

    /// What the run asks of its schedule; `tokens` is how many the network makes of a latent.
    pub fn sampling(&self, tokens: usize) -> Sampling {
        let grid = self.grid.unwrap_or(Grid::Shifted);
        Sampling {
            sampler: self.sampler,
            steps: self.steps,
            eta: self.eta,
            grid,
            shift: self.shift,
            tokens,
        }
    }

    /// The prompts of evaluations: held-out ones, or the first of the training's.
    pub fn evaluation_prompts(&self) -> &[Prompt] {
        if self.eval_prompt.is_empty() {
            &self.prompt[..self.groups().min(GRID_COLUMNS)]
        } else {
            &self.eval_prompt
        }
    }

    /// Pictures of an evaluation.
    pub fn evaluated(&self) -> usize {
        self.eval_images.saturating_mul(self.evaluation_prompts().len())
    }

    /// The bounds of the watch.
    ///
    /// # Errors
    /// As [`Bounds::new`].
    pub fn collapse_bounds(&self) -> Result<Bounds> {
        Bounds::new(&self.collapse_bound)
    }

    /// Images of one update.
    pub fn images_per_update(&self) -> usize {
        self.images_per_epoch / self.updates_per_epoch
    }

    /// Whether a run can be made of them.
    ///
    /// # Errors
    /// Names the flag, its value and what is allowed.
    pub fn check(&self) -> Result<()> {
        self.check_numbers()?;
        self.check_images()?;
        self.check_rewards()?;
        self.check_evaluation()?;
        self.check_method()
    }

    fn check_numbers(&self) -> Result<()> {
        for (flag, value) in [
            ("--epochs", self.epochs),
            ("--images-per-epoch", self.images_per_epoch),
            ("--group-size", self.group_size),
            ("--updates-per-epoch", self.updates_per_epoch),
            ("--inner-epochs", self.inner_epochs),
            ("--batch", self.batch),
            ("--steps", self.steps),
            ("--train-steps", self.train_steps.unwrap_or(1)),
            ("--keep-every", self.keep_every),
            ("--sample-every", self.sample_every),
            ("--eval-every", self.eval_every),
            ("--eval-images", self.eval_images),
            ("--tracker-size", self.tracker_size),
            ("--tracker-min-count", self.tracker_min_count),
        ] {
            numbers::count(flag, value, MOST)?;
        }
        numbers::count("--rank", self.rank, MOST_RANK)?;
        numbers::resolution(self.resolution)?;
        numbers::sequence_length(self.max_sequence_length)?;
        for (flag, value, range) in [
            ("--clip-range", self.clip_range, Range::Below(1.0)),
            ("--advantage-clamp", self.advantage_clamp, Range::Positive),
            ("--learning-rate", self.learning_rate, Range::Positive),
            ("--max-grad-norm", self.max_grad_norm, Range::Positive),
            ("--alpha", self.alpha, Range::Positive),
            ("--kl-beta", self.kl_beta, Range::NotNegative),
            ("--weight-decay", self.weight_decay, Range::NotNegative),
            ("--guidance-scale", self.guidance_scale, Range::NotNegative),
            ("--eta", self.eta, Range::NotNegative),
            ("--reward-timeout", self.reward_timeout, Range::Below(1e6)),
        ] {
            numbers::number(flag, value, range)?;
        }
        for (flag, value) in [
            ("--memory", self.memory),
            ("--zeta", self.zeta),
            ("--shift", self.shift),
            ("--kl-budget", self.kl_budget),
        ] {
            numbers::optional(flag, value, Range::Positive)?;
        }
        Ok(())
    }

    /// How images, groups, prompts and updates fit together.
    fn check_images(&self) -> Result<()> {
        let (images, group) = (self.images_per_epoch, self.group_size);
        let updates = self.updates_per_epoch;
        ensure!(
            images.is_multiple_of(group),
            "--images-per-epoch {images}: must be a multiple of --group-size {group}"
        );
        ensure!(
            images.is_multiple_of(updates),
            "--images-per-epoch {images}: must be a multiple of --updates-per-epoch {updates}"
        );
        ensure!(
            self.groups() <= self.prompt.len(),
            "--images-per-epoch {images}: makes {} prompts an epoch, only {} are given; lower it \
             or raise --group-size",
            self.groups(),
            self.prompt.len()
        );
        // Images are numbered over the whole run, and the last numbers are the grids'.
        ensure!(
            (self.epochs as u64) * (images as u64) < u64::from(u32::MAX) - MOST as u64,
            "--epochs {}: makes more images than noise is numbered for; lower it or \
             --images-per-epoch",
            self.epochs
        );
        Ok(())
    }

    fn check_rewards(&self) -> Result<()> {
        ensure!(!self.reward.is_empty(), "--reward: names no reward; give at least one");
        let mut seen = BTreeSet::new();
        for spec in self.rewards() {
            ensure!(
                seen.insert(&spec.reward),
                "{} {}: stands there twice; give it once",
                spec.flag,
                spec.shown
            );
        }
        if let Some(watched) = self.watch.iter().find(|spec| spec.weight != 1.0) {
            anyhow::bail!("--watch {}: is not trained on; leave the weight out", watched.shown);
        }
        let rewards: Vec<RewardSpec> = self.rewards().cloned().collect();
        let (question, answer) = (self.judge_question.is_some(), self.judge_answer.is_some());
        reward::check_judge(&rewards, question, answer)
    }

    fn check_evaluation(&self) -> Result<()> {
        numbers::count("--eval-images times the prompts", self.evaluated(), MOST)?;
        self.collapse_bounds()?;
        self.features.iter().try_for_each(|given| clip_path(given).map(drop))
    }

    /// What a method's parts ask of each other.
    fn check_method(&self) -> Result<()> {
        ensure!(
            self.advantage != Advantage::PerPrompt || self.tracker_min_count <= self.tracker_size,
            "--tracker-min-count {}: more than the tracker keeps (--tracker-size {})",
            self.tracker_min_count,
            self.tracker_size
        );
        ensure!(
            self.advantage != Advantage::Group || self.group_size > 1,
            "--group-size 1: group advantages need at least 2 images a prompt; use --advantage \
             global"
        );
        ensure!(
            self.lora.is_some() || !self.target_modules.is_empty(),
            "--target-modules: names no layer; leave it out for all attention projections"
        );
        ensure!(
            !self.train_window || self.train_steps.is_some(),
            "--train-window true: a window of how many steps? give --train-steps K"
        );
        ensure!(
            self.credit_total == Total::All || self.credit == Credit::Proportionate,
            "--credit-total trained: is for --credit proportionate; leave it out"
        );
        if let Some(zeta) = self.zeta {
            ensure!(
                self.credit_total == Total::All,
                "--zeta {zeta}: fixes the total credit, and --credit-total trained computes it; \
                 leave one of them out"
            );
        }
        ensure!(
            self.sampler != Sampler::Ode,
            "--sampler ode: a step without noise cannot be trained; use flow-grpo, dance or cps, \
             with --train-steps K --noise-only-trained where only K steps shall have noise"
        );
        ensure!(
            self.eta > 0.0,
            "--eta {}: a step without noise cannot be trained; use 1, or more than 0",
            self.eta
        );
        Ok(())
    }

    /// The derived numbers, for the run's first lines; `batch` is how many images the network takes
    /// at once.
    pub fn summary(&self, batch: usize) -> String {
        format!(
            "{} epochs of {} images: {} prompts x {} images, {} steps, guidance {}; {} updates an \
             epoch of {} images in batches of {}",
            self.epochs,
            self.images_per_epoch,
            self.groups(),
            self.group_size,
            self.steps,
            self.guidance_scale,
            self.updates_per_epoch * self.inner_epochs,
            self.images_per_update(),
            batch
        )
    }
}
