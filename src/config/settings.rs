//! What a run is told, resolved once and checked: [`Settings`], which is printed, and saved with
//! the run as a file that `--config` reads.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use serde::{Serialize, Serializer};

use super::choices::{LrScheduler, Objective, OldDecay, Preset, Switch};
use super::numbers;
use super::rollout::{Branching, Plain, Rollout};
use crate::device::adapters::Opening;
use crate::device::chosen::{OnHost, open_all, open_one};
use crate::device::{Compute, ComputeType};
use crate::measure::collapse::Bounds;
use crate::model::conditioning::MicroConditioning;
use crate::model::{ModelFiles, ModelSpec, Resolution, Storage};
use crate::ops::advantage::{Advantage, Mix};
use crate::ops::policy_objective::GuidanceGradient;
use crate::reward::{JudgeAnswer, Prompt, RemoteOptions, RewardSpec};
use crate::schedule::credit::{Credit, Total};
use crate::schedule::{Grid, PredictionType, Sampler, Sampling};

/// A checked run. Each field is the option of its name, see [`crate::Options`], with presets and
/// defaults resolved.
#[allow(missing_docs)]
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Settings {
    pub model: PathBuf,
    pub device: String,
    pub compute: ComputeType,
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
    pub model_config: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae: Option<PathBuf>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub text_encoder: Vec<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prediction_type: Option<PredictionType>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resolution: Option<Resolution>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time_ids: Option<Vec<f64>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative_time_ids: Option<Vec<f64>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative_prompt: Option<String>,
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
    pub advantage: Advantage,
    pub nft_beta: f64,
    pub old_decay: OldDecay,
    pub kl_beta: f64,
    pub epochs: usize,
    #[serde(flatten)]
    pub rollout: Rollout,
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
    pub activation_checkpointing: Switch,
    pub vae_tiling: Switch,
    pub stream_blocks: Switch,
    pub clip_range: f64,
    pub advantage_clamp: f64,
    pub tracker_size: usize,
    pub tracker_min_count: usize,
    pub learning_rate: f64,
    pub lr_scheduler: LrScheduler,
    pub lr_warmup_steps: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema: Option<f64>,
    pub ema_every: usize,
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
    pub keep_last: usize,
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

    /// The files of the model.
    ///
    /// # Errors
    /// As [`ModelFiles::open`].
    pub fn files(&self) -> Result<ModelFiles> {
        ModelFiles::open(&ModelSpec {
            model: self.model.clone(),
            config: self.model_config.clone(),
            vae: self.vae.clone(),
            text_encoder: self.text_encoder.clone(),
            prediction: self.prediction_type,
        })
    }

    /// What the network is told of sizes.
    ///
    /// # Errors
    /// Names the flag whose numbers are not six, or not finite.
    pub fn micro(&self) -> Result<MicroConditioning> {
        numbers::micro(self.time_ids.as_deref(), self.negative_time_ids.as_deref())
    }

    /// How servers are asked for rewards.
    pub fn remote(&self) -> RemoteOptions {
        RemoteOptions {
            timeout: Duration::from_secs_f64(self.reward_timeout),
            judge_question: self.judge_question.clone(),
            judge_answer: self.judge_answer.unwrap_or_default(),
        }
    }

    /// Opens the devices of the training, of several processes on a machine this one's.
    ///
    /// # Errors
    /// As [`open_all`], and when one cannot compute in the type.
    pub fn open_devices(&self, process: OnHost) -> Result<Vec<Compute>> {
        open_all(&self.device, self.compute.into(), process)
    }

    /// Opens the device of reward models where it is not the training's.
    ///
    /// # Errors
    /// As [`open_one`].
    pub fn open_reward_device(&self) -> Result<Option<Compute>> {
        let open = |name| open_one("--reward-device", name, Opening::default());
        self.own_reward_device().map(open).transpose()
    }

    /// Prompts an epoch.
    pub fn groups(&self) -> usize {
        match &self.rollout {
            Rollout::Plain(plain) => plain.images_per_epoch / plain.group_size,
            Rollout::Branching(_) => self.prompt.len().min(Branching::PROMPTS),
        }
    }

    /// Images an epoch.
    pub fn images_per_epoch(&self) -> usize {
        match &self.rollout {
            Rollout::Plain(plain) => plain.images_per_epoch,
            Rollout::Branching(b) => self.trajectories().saturating_mul(b.images_per_root()),
        }
    }

    /// Trajectories an epoch whose latents are kept for the updates: an image's each, or the roots.
    pub fn trajectories(&self) -> usize {
        match &self.rollout {
            Rollout::Plain(plain) => plain.images_per_epoch,
            Rollout::Branching(b) => self.groups().saturating_mul(b.roots),
        }
    }

    /// Most images whose rewards are compared.
    pub fn largest_group(&self) -> usize {
        match &self.rollout {
            Rollout::Plain(plain) => plain.group_size,
            Rollout::Branching(b) => {
                let most = b.branch.iter().copied().max().unwrap_or(0);
                most.saturating_mul(b.roots_compared())
            }
        }
    }

    /// Trained steps of a trajectory, at most.
    pub fn trained_steps(&self) -> usize {
        match &self.rollout {
            Rollout::Plain(plain) => {
                self.steps_of(plain, self.steps - usize::from(!plain.train_last_step))
            }
            Rollout::Branching(b) => b.steps().count() + b.anchor_steps,
        }
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

    /// How many of the steps that may be trained a trajectory is trained at, or of the times that
    /// may be drawn its end is noised to.
    pub fn steps_of(&self, plain: &Plain, trainable: usize) -> usize {
        plain.train_steps.unwrap_or(match self.objective {
            Objective::PpoClip | Objective::LogRatio | Objective::LogHinge => trainable,
            Objective::Nft => ((0.99 * trainable as f64) as usize).max(1),
            Objective::Awm => trainable.min(6),
        })
    }

    /// Images of one update.
    pub fn images_per_update(&self) -> usize {
        self.images_per_epoch() / self.updates_per_epoch
    }

    /// Trajectories of one update.
    pub fn trajectories_per_update(&self) -> usize {
        self.trajectories() / self.updates_per_epoch
    }

    /// Updates of the whole run.
    pub fn updates(&self) -> usize {
        self.epochs.saturating_mul(self.updates_per_epoch).saturating_mul(self.inner_epochs)
    }

    /// The learning rate of an update, counted from 0 over the run.
    pub fn learning_rate_at(&self, update: usize) -> f64 {
        let warmup = self.lr_warmup_steps;
        if update < warmup {
            return self.learning_rate * (update + 1) as f64 / warmup as f64;
        }
        match self.lr_scheduler {
            LrScheduler::Constant => self.learning_rate,
            LrScheduler::Cosine => {
                let done = (update - warmup) as f64 / (self.updates() - warmup).max(1) as f64;
                self.learning_rate * 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos())
            }
        }
    }

    /// The derived numbers, for the run's first lines; `batch` is how many images the network takes
    /// at once.
    pub fn summary(&self, batch: usize) -> String {
        let groups = match &self.rollout {
            Rollout::Plain(plain) => {
                format!("{} prompts x {} images", self.groups(), plain.group_size)
            }
            Rollout::Branching(b) => format!(
                "{} prompts x {} roots x {} branches",
                self.groups(),
                b.roots,
                b.images_per_root()
            ),
        };
        format!(
            "{} epochs of {} images: {groups}, {} steps, guidance {}; {} updates an epoch of {} \
             images in batches of {batch}",
            self.epochs,
            self.images_per_epoch(),
            self.steps,
            self.guidance_scale,
            self.updates_per_epoch * self.inner_epochs,
            self.images_per_update(),
        )
    }
}
