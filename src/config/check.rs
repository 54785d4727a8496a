//! Whether a run can be made of its settings.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};

use super::choices::{Objective, Switch};
use super::numbers::{self, MOST, MOST_RANK, Range};
use super::rollout::{Branching, Plain, Rollout};
use super::settings::Settings;
use crate::choice::name;
use crate::measure::features::clip_path;
use crate::ops::advantage::Advantage;
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
            ("--updates-per-epoch", self.updates_per_epoch),
            ("--inner-epochs", self.inner_epochs),
            ("--batch", self.batch),
            ("--steps", self.steps),
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
        ensure!(
            self.stream_blocks != Switch::True || self.activation_checkpointing != Switch::False,
            "--stream-blocks true: a block's weights are there for the time of its work alone; \
             give --activation-checkpointing true or auto (a run that began without it goes on \
             without it, and without streaming)"
        );
        numbers::count("--rank", self.rank, MOST_RANK)?;
        self.micro()?;
        numbers::sequence_length(self.max_sequence_length)?;
        for (flag, value, range) in [
            ("--clip-range", self.clip_range, self.clip_ranges()),
            ("--nft-beta", self.nft_beta, Range::Positive),
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
        match &self.rollout {
            Rollout::Plain(plain) => self.check_plain(plain)?,
            Rollout::Branching(branching) => self.check_branching(branching)?,
        }
        // Images are numbered over the whole run, and the last numbers are the grids'.
        ensure!(
            (self.epochs as u64) * (self.images_per_epoch() as u64)
                < u64::from(u32::MAX) - MOST as u64,
            "--epochs {}: makes more images than noise is numbered for; lower it, or the images \
             of an epoch",
            self.epochs
        );
        Ok(())
    }

    fn check_plain(&self, plain: &Plain) -> Result<()> {
        let (images, group) = (plain.images_per_epoch, plain.group_size);
        for (flag, value) in [
            ("--images-per-epoch", images),
            ("--group-size", group),
            ("--train-steps", plain.train_steps.unwrap_or(1)),
        ] {
            numbers::count(flag, value, MOST)?;
        }
        numbers::number("--train-within", plain.train_within, Range::Positive)?;
        ensure!(
            plain.train_within <= 1.0,
            "--train-within {}: must be at most 1, which is all steps",
            plain.train_within
        );
        ensure!(
            !plain.train_window || plain.train_steps.is_some(),
            "--train-window true: a window of how many steps? give --train-steps K"
        );
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
        ensure!(
            self.advantage != Advantage::Group || group > 1,
            "--group-size 1: group advantages need at least 2 images a prompt; use --advantage \
             global"
        );
        Ok(())
    }

    fn check_branching(&self, b: &Branching) -> Result<()> {
        let given = b.branch.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        numbers::count("--roots", b.roots, MOST)?;
        ensure!(
            b.branch.len() <= self.steps,
            "--branch {given}: says something of {} steps, and there are --steps {}",
            b.branch.len(),
            self.steps
        );
        ensure!(
            b.images_per_root() > 0,
            "--branch {given}: has no branch; give the images of each step, such as 6,6,8,10"
        );
        numbers::count("--branch times the roots", self.images_per_epoch(), MOST)?;
        ensure!(
            self.trajectories().is_multiple_of(self.updates_per_epoch),
            "--updates-per-epoch {}: an update takes whole roots, and an epoch has {} ({} prompts \
             x --roots {}); use a divisor of that, or other --roots",
            self.updates_per_epoch,
            self.trajectories(),
            self.groups(),
            b.roots
        );
        ensure!(
            self.advantage != Advantage::Group
                || b.steps().all(|(_, k)| k * b.roots_compared() > 1),
            "--branch {given}: group advantages need at least 2 branches at a step that has any; \
             use more, or --branch-group prompt with more --roots"
        );
        ensure!(
            b.anchor_steps <= self.steps - b.steps().count(),
            "--anchor-steps {}: only {} steps have no branches; lower it",
            b.anchor_steps,
            self.steps - b.steps().count()
        );
        ensure!(
            b.anchor_steps == 0 || self.kl_beta > 0.0,
            "--anchor-steps {}: holds the roots by the KL, which needs --kl-beta; give both",
            b.anchor_steps
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
            self.lora.is_some() || !self.target_modules.is_empty(),
            "--target-modules: names no layer; leave it out for all attention projections"
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
        if self.objective.forward() { self.check_forward() } else { self.check_noise() }
    }

    /// A policy's steps need noise.
    fn check_noise(&self) -> Result<()> {
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

    /// What an objective of the forward process has nothing to do with.
    fn check_forward(&self) -> Result<()> {
        let objective = name(self.objective);
        let Rollout::Plain(plain) = &self.rollout else {
            anyhow::bail!(
                "--objective {objective}: trains on images as they end, and branches are trained \
                 at a step; use log-hinge, or no branches"
            )
        };
        ensure!(
            self.credit == Credit::Native,
            "--credit {}: shares out a trajectory's credit, and --objective {objective} has no \
             trajectory; leave it out",
            name(self.credit)
        );
        ensure!(
            self.clip_range <= 1.0,
            "--clip-range {}: must be at most 1 for --objective {objective}",
            self.clip_range
        );
        for (flag, given) in [
            ("--train-window", plain.train_window),
            ("--noise-only-trained", plain.noise_only_trained),
        ] {
            ensure!(
                !given,
                "{flag} true: is for steps with noise, and --objective {objective} has none; leave \
                 it out"
            );
        }
        Ok(())
    }

    /// What a clip range may be: AWM's bounds a ratio, and 1 is its published one.
    fn clip_ranges(&self) -> Range {
        if self.objective == Objective::Awm { Range::Positive } else { Range::Below(1.0) }
    }
}
