//! From options to settings: presets and defaults are filled in, and the run's folder is asked
//! where one goes on.

use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};

use super::choices::{BranchGroup, InitialNoise, LrScheduler, Objective, OldDecay, Preset, Switch};
use super::layers::REPLACED;
use super::numbers::{self, MOST};
use super::options::Options;
use super::prompts::{embedded, held_out, prompts};
use super::rollout::{Branching, Plain, Rollout};
use super::settings::Settings;
use crate::choice::name;
use crate::lora::formats;
use crate::model::{ModelFiles, ModelSpec, Storage};
use crate::ops::advantage::{Advantage, Mix};
use crate::ops::policy_objective::GuidanceGradient;
use crate::reward::{self, DEFAULT_TIMEOUT, RewardSpec};
use crate::schedule::credit::{Credit, Total};
use crate::schedule::{Grid, Sampler};

/// The rewards that a flag names.
fn specs(flag: &'static str, given: &[String]) -> Result<Vec<RewardSpec>> {
    given.iter().map(|given| RewardSpec::parse(flag, given)).collect()
}

/// Keys of a method's parts: who names one has a method in mind.
const METHOD: [&str; 5] = ["objective", "credit", "credit-total", "zeta", "branch"];

/// What a preset stands for.
struct Method {
    objective: Objective,
    credit: Credit,
    initial_noise: InitialNoise,
    advantage: Advantage,
    train_last_step: bool,
}

impl Preset {
    fn method(self) -> Method {
        match self {
            Self::Ddpo => Method {
                objective: Objective::PpoClip,
                credit: Credit::Native,
                initial_noise: InitialNoise::Own,
                advantage: Advantage::PerPrompt,
                train_last_step: true,
            },
            Self::Grpo => Method {
                objective: Objective::PpoClip,
                credit: Credit::Native,
                initial_noise: InitialNoise::Shared,
                advantage: Advantage::Group,
                train_last_step: false,
            },
            Self::Pcpo => Method {
                objective: Objective::LogHinge,
                credit: Credit::Proportionate,
                ..Self::Grpo.method()
            },
            Self::LogHinge => Method { credit: Credit::Native, ..Self::Pcpo.method() },
            Self::Released => Method { credit: Credit::Released, ..Self::Pcpo.method() },
            Self::Branch => Method { credit: Credit::Fairclip2, ..Self::Pcpo.method() },
            Self::BranchPcpo => Self::Pcpo.method(),
            Self::Nft => Method {
                objective: Objective::Nft,
                credit: Credit::Native,
                initial_noise: InitialNoise::Own,
                advantage: Advantage::GlobalStd,
                train_last_step: true,
            },
            Self::Awm => Method { objective: Objective::Awm, ..Self::Nft.method() },
        }
    }
}

impl Options {
    /// Fills in presets and defaults, and checks.
    ///
    /// # Errors
    /// Names the flag, its value and the way out.
    pub fn resolve(&self) -> Result<Settings> {
        let embedded = embedded(self.model.as_deref())?;
        let model = match &embedded {
            Some((_, folder)) => folder.clone(),
            None => self.model.clone().expect("a model that is not embedded was named"),
        };
        let family = self.files(&model)?.family;
        let mut said = self.clone();
        said.preset = self.preset.or_else(|| self.default_preset(family.is_flow()));
        let with_job;
        let o = match embedded {
            None => &said,
            Some((job, _)) => {
                let mut job: Self = toml::from_str(job)
                    .with_context(|| format!("the job of {}", model.display()))?;
                if said.branches() {
                    // It is for the job's images; roots may be another number.
                    job.updates_per_epoch = None;
                }
                with_job = said.over(&job)?;
                &with_job
            }
        };
        ensure!(
            o.grid.is_none() || family.is_flow(),
            "--grid: is for flow models; {} is one of diffusion; leave it out",
            model.display()
        );
        let sampler = o.sampler.unwrap_or(Sampler::of_trainers(family.is_flow()));
        let preset = o.preset.unwrap_or(Preset::Pcpo);
        let method = match o.objective {
            Some(Objective::Nft) => Preset::Nft.method(),
            Some(Objective::Awm) => Preset::Awm.method(),
            Some(Objective::PpoClip | Objective::LogRatio | Objective::LogHinge) | None => {
                preset.method()
            }
        };
        let (rank, alpha) = self.adapter_size(o)?;
        let prompt = prompts(o)?;
        let steps = o.steps.unwrap_or(sampler.default_steps());
        numbers::count("--steps", steps, MOST)?;
        let branches = || Branching::published(family.is_flow(), steps);
        let branch = o.branch.clone().or_else(|| preset.branches().then(branches));
        let rollout = match branch {
            Some(branch) => Rollout::Branching(o.branching(branch, preset)?),
            None => Rollout::Plain(o.plain(&method, prompt.len())?),
        };
        let objective = o.objective.unwrap_or(method.objective);
        let (clip_range, kl_beta, old_decay) = match objective {
            Objective::PpoClip | Objective::LogRatio | Objective::LogHinge => {
                (1e-4, 0.0, OldDecay::Type1)
            }
            Objective::Nft => (1e-4, 1e-4, OldDecay::Type1),
            Objective::Awm => (1.0, 1e-3, OldDecay::Awm),
        };
        let updates = match &rollout {
            Rollout::Plain(_) if objective.forward() => 1,
            Rollout::Plain(_) => 2,
            // An update takes whole roots.
            Rollout::Branching(b)
                if b.roots.saturating_mul(prompt.len().min(Branching::PROMPTS)) % 2 == 0 =>
            {
                2
            }
            Rollout::Branching(_) => 1,
        };
        let missing = || anyhow!("--reward is missing; {} are there", reward::list());
        let trained = specs("--reward", o.reward.as_ref().ok_or_else(missing)?)?;
        // What is trained on is recorded as well: a job's watched reward may be this run's reward.
        let mut watch = specs("--watch", o.watch.as_deref().unwrap_or_default())?;
        watch.retain(|w| trained.iter().all(|t| t.reward != w.reward));
        let settings = Settings {
            model,
            device: o.device.clone().unwrap_or_else(|| "auto".into()),
            compute: o.compute.unwrap_or_default(),
            memory: o.memory,
            storage: o.storage.unwrap_or(Storage::F32),
            reward: trained,
            mix: o.mix.unwrap_or(Mix::PerReward),
            watch,
            reward_device: o.reward_device.clone(),
            reward_timeout: o.reward_timeout.unwrap_or(DEFAULT_TIMEOUT as f64),
            judge_question: o.judge_question.clone(),
            judge_answer: o.judge_answer,
            model_config: o.model_config.clone(),
            vae: o.vae.clone(),
            text_encoder: o.text_encoder.clone().unwrap_or_default(),
            prediction_type: o.prediction_type,
            resolution: o.resolution,
            time_ids: o.time_ids.clone(),
            negative_time_ids: o.negative_time_ids.clone(),
            negative_prompt: o.negative_prompt.clone(),
            embeddings: o.embeddings.clone(),
            max_sequence_length: o.max_sequence_length.unwrap_or(family.default_sequence()),
            prompt,
            preset,
            objective,
            credit: o.credit.unwrap_or(method.credit),
            zeta: o.zeta,
            credit_total: o.credit_total.unwrap_or(Total::All),
            advantage: o.advantage.unwrap_or(method.advantage),
            nft_beta: o.nft_beta.unwrap_or(1.0),
            old_decay: o.old_decay.unwrap_or(old_decay),
            kl_beta: o.kl_beta.unwrap_or(kl_beta),
            epochs: o.epochs.unwrap_or(10),
            rollout,
            updates_per_epoch: o.updates_per_epoch.unwrap_or(updates),
            inner_epochs: o.inner_epochs.unwrap_or(1),
            batch: o.batch.unwrap_or(8),
            sampler,
            steps,
            eta: o.eta.unwrap_or(sampler.default_eta()),
            grid: family.is_flow().then(|| o.grid.unwrap_or(Grid::Shifted)),
            shift: o.shift,
            guidance_scale: o.guidance_scale.unwrap_or(family.default_guidance()),
            guidance_gradient: o.guidance_gradient.unwrap_or(GuidanceGradient::Both),
            activation_checkpointing: o.activation_checkpointing.unwrap_or(Switch::Auto),
            vae_tiling: o.vae_tiling.unwrap_or(Switch::Auto),
            stream_blocks: o.stream_blocks.unwrap_or(Switch::Auto),
            clip_range: o.clip_range.unwrap_or(clip_range),
            advantage_clamp: o.advantage_clamp.unwrap_or(5.0),
            tracker_size: o.tracker_size.unwrap_or(32),
            tracker_min_count: o.tracker_min_count.unwrap_or(16),
            learning_rate: o.learning_rate.unwrap_or(3e-4),
            lr_scheduler: o.lr_scheduler.unwrap_or(LrScheduler::Constant),
            lr_warmup_steps: o.lr_warmup_steps.unwrap_or(0),
            ema: o.ema,
            ema_every: o.ema_every.unwrap_or(8),
            weight_decay: o.weight_decay.unwrap_or(1e-4),
            max_grad_norm: o.max_grad_norm.unwrap_or(1.0),
            rank,
            alpha,
            target_modules: match (&o.lora, &o.target_modules) {
                (Some(_), _) => Vec::new(),
                (None, Some(targets)) => targets.clone(),
                (None, None) => family.default_targets(),
            },
            lora: o.lora.clone(),
            seed: o.seed.unwrap_or(0),
            keep_every: o.keep_every.unwrap_or(10),
            keep_last: o.keep_last.unwrap_or(2),
            sample_every: o.sample_every.unwrap_or(1),
            eval_every: o.eval_every.or(o.sample_every).unwrap_or(1),
            eval_prompt: held_out(o)?,
            eval_images: o.eval_images.unwrap_or(4),
            features: o.features.clone(),
            kl_budget: o.kl_budget,
            collapse_bound: o.collapse_bound.clone().unwrap_or_default(),
            stop_on_collapse: o.stop_on_collapse.unwrap_or(false),
            tensorboard: o.tensorboard.unwrap_or(false),
        };
        settings.check()?;
        Ok(settings)
    }

    /// The files of the model that is meant by these options and that path.
    fn files(&self, model: &Path) -> Result<ModelFiles> {
        let (config, prediction) = (self.model_config.clone(), self.prediction_type);
        ModelFiles::open(&ModelSpec { config, prediction, ..model.into() })
    }

    /// The preset where none is named, which docs/RESULTS.md chose for each family: PCPO for
    /// diffusion and, for a flow, branching where nothing is said of images, steps or the method's
    /// parts. None for an embedded job to choose.
    fn default_preset(&self, flow: bool) -> Option<Preset> {
        match self.objective {
            Some(Objective::Nft) => return Some(Preset::Nft),
            Some(Objective::Awm) => return Some(Preset::Awm),
            Some(Objective::PpoClip | Objective::LogRatio | Objective::LogHinge) | None => {}
        }
        let own = self.table().unwrap_or_default();
        let parts = REPLACED.iter().chain(&METHOD).any(|key| own.contains_key(*key));
        (flow && !parts).then_some(Preset::Branch)
    }

    /// Images with trajectories of their own, of so many prompts.
    fn plain(&self, method: &Method, prompts: usize) -> Result<Plain> {
        for (flag, given) in [
            ("--roots", self.roots.is_some()),
            ("--branch-group", self.branch_group.is_some()),
            ("--anchor-steps", self.anchor_steps.is_some()),
        ] {
            ensure!(!given, "{flag}: is for --branch K,K,.. or --preset branch; leave it out");
        }
        let group_size = self.group_size.unwrap_or(8);
        let images = group_size.saturating_mul(prompts.min(4));
        Ok(Plain {
            images_per_epoch: self.images_per_epoch.unwrap_or(images),
            group_size,
            initial_noise: self.initial_noise.unwrap_or(method.initial_noise),
            train_steps: self.train_steps,
            train_window: self.train_window.unwrap_or(false),
            train_within: self.train_within.unwrap_or(1.0),
            train_last_step: self.train_last_step.unwrap_or(method.train_last_step),
            noise_only_trained: self.noise_only_trained.unwrap_or(false),
        })
    }

    /// Images that branch off a few trajectories.
    fn branching(&self, branch: Vec<usize>, preset: Preset) -> Result<Branching> {
        let own = self.table()?;
        if let Some(key) = REPLACED.iter().find(|key| own.contains_key(**key)) {
            let (by, value) = match &self.branch {
                Some(_) => ("--branch".to_string(), &own[*key]),
                None => (format!("--preset {}", name(preset)), &own[*key]),
            };
            anyhow::bail!("--{key} {value}: {by} takes its place; leave one of the two out");
        }
        Ok(Branching {
            branch,
            roots: self.roots.unwrap_or(1),
            branch_group: self.branch_group.unwrap_or(BranchGroup::Root),
            anchor_steps: self.anchor_steps.unwrap_or(0),
        })
    }

    /// The settings of a run's folder, with what of these options may change.
    ///
    /// # Errors
    /// When the folder has no settings, or an option that may not change differs from them.
    pub fn resumed(&self, run: &Path) -> Result<Settings> {
        let path = run.join("settings.toml");
        ensure!(
            path.is_file(),
            "--resume {}: there is no settings.toml in it; give the folder of a run",
            run.display()
        );
        let saved = Self::read(&path, "--resume")?;
        // What every run has saved; defaults in their place would be another run's.
        ensure!(
            saved.model.is_some() && saved.seed.is_some() && saved.steps.is_some(),
            "{}: is damaged: lacks model, seed or steps; put back the file that the run wrote",
            path.display()
        );
        ensure!(
            self.lora.is_none(),
            "--resume {}: the run has an adapter of its own; leave --lora out",
            run.display()
        );
        let resumed = self.over(&saved)?.resolve()?;
        ensure!(
            resumed.lr_scheduler == LrScheduler::Constant || Some(resumed.epochs) == saved.epochs,
            "--epochs {}: the cosine of the learning rate ends with the {} epochs that the run \
             was begun with; leave --epochs out, or start a new run",
            resumed.epochs,
            saved.epochs.unwrap_or_default()
        );
        let free = self.free_on_resume().over(&saved)?.resolve()?;
        ensure!(
            toml::to_string(&free)? == toml::to_string(&resumed)?,
            "--resume {}: only {} can change; start a new run for the rest",
            run.display(),
            Self::FREE_ON_RESUME
        );
        Ok(resumed)
    }

    /// Rank and alpha: those of `--lora`, or of the options with the job's, `o`.
    fn adapter_size(&self, o: &Self) -> Result<(usize, f64)> {
        let Some(file) = &o.lora else {
            let rank = o.rank.unwrap_or(16);
            return Ok((rank, o.alpha.unwrap_or(rank as f64)));
        };
        ensure!(
            self.target_modules.is_none(),
            "--target-modules: the adapter of --lora {} has its own layers; leave --target-modules \
             out",
            file.display()
        );
        // A saved run has both, and may have lost the file.
        if let (Some(rank), Some(alpha)) = (self.rank, self.alpha) {
            return Ok((rank, alpha));
        }
        let adapter = formats::read(file, &[]).context("--lora")?;
        let given = [
            ("--rank", self.rank.map(|r| r as f64), adapter.rank as f64),
            ("--alpha", self.alpha, adapter.alpha),
        ];
        for (flag, given, own) in given {
            ensure!(
                given.is_none_or(|g| g == own),
                "{flag} {}: the adapter of --lora {} has {own}; leave {flag} out",
                given.unwrap_or_default(),
                file.display()
            );
        }
        Ok((adapter.rank, adapter.alpha))
    }
}
