//! Whether a run can be made of its settings.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};

use super::numbers::{self, MOST, MOST_RANK, Range};
use super::settings::Settings;
use crate::measure::features::clip_path;
use crate::ops::advantage::Advantage;
use crate::ops::policy_objective::Objective;
use crate::reward::{self, RewardSpec};
use crate::schedule::Sampler;
use crate::schedule::credit::{Credit, Total};

impl Settings {
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
            ("--ema-every", self.ema_every),
            ("--tracker-size", self.tracker_size),
            ("--tracker-min-count", self.tracker_min_count),
        ] {
            numbers::count(flag, value, MOST)?;
        }
        numbers::number("--train-within", self.train_within, Range::Positive)?;
        ensure!(
            self.train_within <= 1.0,
            "--train-within {}: must be at most 1, which is all steps",
            self.train_within
        );
        numbers::optional("--ema", self.ema, Range::Below(1.0))?;
        ensure!(
            (2..=MOST).contains(&self.keep_last),
            "--keep-last {}: must be at least 2 and at most {MOST}; whether the newest checkpoint \
             can be used shows when the next epoch is drawn",
            self.keep_last
        );
        ensure!(
            self.lr_warmup_steps < self.updates(),
            "--lr-warmup-steps {}: the run has {} updates; give fewer",
            self.lr_warmup_steps,
            self.updates()
        );
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
            self.credit != Credit::Fairclip2 || self.objective != Objective::PpoClip,
            "--credit fairclip2: is not defined for --objective ppo-clip; use log-hinge, or \
             --credit fairclip"
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
}
