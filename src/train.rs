//! The whole story of a run, top to bottom:
//!
//! prompt -> text embedding -> ROLLOUT -> image -> REWARD -> ADVANTAGE -> credit -> UPDATE -> adapter -> CHECKPOINT
//!
//! Everything that varies between methods is data by the time it gets here: the steps carry their credit weights, the
//! surrogate its objective. Method: Lee & Ye 2026 (PCPO), Black et al. 2023 (DDPO), Xue et al. 2025 (DanceGRPO).

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use burn::tensor::{Tensor, TensorData};
use image::RgbImage;
use serde_json::json;

use crate::adamw::{self, Hyper, clip_norm};
use crate::artifacts::{RunFolder, grid};
use crate::checkpoint::{self, State};
use crate::credit::{self, Credit, Total};
use crate::device::Compute;
use crate::dump;
use crate::lora::Adapter;
use crate::lora_io::{self, Format};
use crate::memory;
use crate::metrics;
use crate::model::{Conditioning, Pipeline};
use crate::ops::Coefficients;
use crate::ops::credit_reduce::credit_reduce;
use crate::ops::group_advantage::{group_advantage, varies};
use crate::ops::policy_objective::Surrogate;
use crate::philox::{self, Stream};
use crate::prepare::prepare;
use crate::progress::{bar, check_stop};
use crate::reward::Reward;
use crate::rollout::{Denoise, Guided, decode, for_batches, sample};
use crate::schedule::Step;
use crate::settings::{InitialNoise, Settings};
use crate::update::{Batch, Contribution, batch_gradient};

/// Largest |log rho| before the first update, as a share of the clip range: the policy has not changed, so only rounding
/// is left, and it must be small beside what decides whether an entry is clipped. With activation checkpointing the
/// passes are the same to the bit; without, attention is computed another way where gradients are tracked.
const SELF_TEST: f64 = 0.05;
/// Updates in a row that may be skipped for values that are not finite.
const MAX_SKIPPED: usize = 3;

/// Where a run writes and what it starts from.
pub struct Job {
    pub settings: Settings,
    pub out: PathBuf,
    pub resume: bool,
    pub dump: Option<dump::Request>,
}

/// What a run tells at its end.
pub struct Summary {
    pub out: PathBuf,
    /// Mean reward of the fixed prompts and noise, before and after.
    pub before: f64,
    pub after: f64,
}

pub(crate) struct Run<'a> {
    pub(crate) s: &'a Settings,
    pub(crate) compute: Compute,
    pub(crate) pipeline: Pipeline,
    pub(crate) reward: Box<dyn Reward>,
    /// All steps of the sampler, with their credit weights.
    pub(crate) steps: Vec<Step>,
    /// Rows that a block is differentiated for at a time, with activation checkpointing.
    pub(crate) rows_at_once: usize,
    /// Indices of the steps that may be trained.
    pub(crate) trainable: Vec<usize>,
    pub(crate) uncond: Conditioning,
    pub(crate) state: State,
    pub(crate) adapter: Adapter,
    pub(crate) optimizer: adamw::State,
    pub(crate) folder: RunFolder,
    pub(crate) dump: Option<dump::Request>,
    pub(crate) skipped_in_a_row: usize,
    /// Epochs that are on disk.
    pub(crate) saved: usize,
}

/// An epoch's rollout.
pub(crate) struct Rollout {
    batches: Vec<Batch>,
    trained: Vec<(usize, Step)>,
    prompts: Vec<String>,
    pub(crate) rewards: Vec<f64>,
    /// Seconds of sampling, decoding and scoring.
    pub(crate) seconds: [f64; 3],
    /// Largest memory of sampling and decoding, in bytes, where the system keeps it.
    pub(crate) peaks: [Option<u64>; 2],
}

/// Runs a job to its end.
///
/// # Errors
/// On bad settings or files before anything is written; on a failing device, reward or disk; when stopped by a signal.
/// The message says how to continue where there is something to continue from.
pub fn train(job: Job) -> Result<Summary> {
    let mut run = prepare(&job)?;
    let result = run.epochs();
    let done = run.saved;
    match result {
        Err(e) if done > 0 => Err(e.context(format!(
            "the run ended after {done} complete epochs, which are kept; continue with `pcpo-wgpu train --resume {}`",
            run.folder.dir.display()
        ))),
        other => other,
    }
}

impl Run<'_> {
    fn epochs(&mut self) -> Result<Summary> {
        // Also of a resumed run, which may have been given more epochs.
        self.folder.file("settings.toml", toml::to_string(self.s).context("settings")?.into_bytes());
        if self.state.epoch == 0 {
            let (images, score) = self.evaluate(true)?;
            self.folder.picture("grids/epoch-00000.png", &grid(&images, self.grid_columns()))?;
            self.folder.metric(&json!({ "kind": "evaluation", "epoch": 0, "reward_mean": score }));
        }
        while self.state.epoch < self.s.epochs {
            self.epoch()?;
        }
        self.finish()
    }

    fn epoch(&mut self) -> Result<()> {
        let start = Instant::now();
        let epoch = self.state.epoch;

        // ------------------------------------------------------------------------------------------ ROLLOUT, REWARD
        let rollout = self.rollout(epoch)?;
        let names: Vec<&str> = rollout.prompts.iter().map(String::as_str).collect();
        let spread = varies(&rollout.rewards, &names);
        if !spread {
            eprintln!(
                "warning: the reward {} does not vary within any group of this epoch: nothing can be learnt from it",
                self.s.reward
            );
        }

        // ------------------------------------------------------------------------------------------------ ADVANTAGE
        let s = self.s;
        let advantages =
            group_advantage(s.advantage, &rollout.rewards, &names, &mut self.state.tracker, s.advantage_clamp);

        // --------------------------------------------------------------------------------------------------- UPDATE
        let updating = Instant::now();
        memory::reset_peak();
        let progress = bar("update", rollout.batches.len() * rollout.trained.len() * s.inner_epochs);
        let mut lines = Vec::new();
        for inner in 0..s.inner_epochs {
            for share in 0..s.updates_per_epoch {
                let range = share * s.images_per_update()..(share + 1) * s.images_per_update();
                let batches: Vec<&Batch> = rollout.batches.iter().filter(|b| range.contains(&b.first)).collect();
                let first = inner == 0 && share == 0 && self.state.updates == 0;
                lines.push(self.update(&batches, &rollout.trained, &advantages[range], first, &progress)?);
            }
        }
        progress.finish_and_clear();

        // ----------------------------------------------------------------------------------------- METRICS, CHECKPOINT
        let seconds = start.elapsed().as_secs_f64();
        let update_seconds = updating.elapsed().as_secs_f64();
        self.record(&rollout, lines, seconds, update_seconds)?;
        Ok(())
    }

    /// Samples, decodes and scores an epoch's images. Image i belongs to prompt i mod P, so that every update sees
    /// every prompt.
    fn rollout(&mut self, epoch: usize) -> Result<Rollout> {
        let s = self.s;
        let (groups, total) = (s.groups(), s.images_per_epoch);
        let chosen = philox::choose(s.seed, Stream::Prompts, epoch as u32, s.prompt.len(), groups);
        let chosen: Vec<&str> = chosen.into_iter().map(|i| s.prompt[i].as_str()).collect();
        let embeddings = self.pipeline.encode(&chosen)?;
        let trained = self.trained_steps(epoch);
        let keep: Vec<usize> = trained.iter().map(|(i, _)| *i).collect();
        let mut steps = self.steps.clone();
        if s.noise_only_trained {
            for (_, step) in steps.iter_mut().enumerate().filter(|(i, _)| !keep.contains(i)) {
                *step = step.without_noise();
            }
        }
        let per_update = s.images_per_update();
        let starts: Vec<(usize, usize)> = (0..s.updates_per_epoch)
            .flat_map(|u| {
                (0..per_update).step_by(s.batch).map(move |b| (u * per_update + b, (per_update - b).min(s.batch)))
            })
            .collect();
        let base = (epoch * total) as u32;
        let lora = self.adapter.to_device(&self.compute.burn, false);
        let [c, h, w] = self.pipeline.latent_shape();
        let sampling = Instant::now();
        memory::reset_peak();
        let progress = bar("rollout", starts.len() * steps.len());
        let sampled = for_batches(&self.compute, &starts, |&(first, n)| {
            let rows = (first..first + n).map(|i| embeddings.rows(i % groups, 1)).collect();
            let (cond, uncond) = (Conditioning::cat(rows), self.uncond.repeat(n));
            let noise = (first..first + n).flat_map(|i| {
                let image = match s.initial_noise {
                    InitialNoise::Shared => i % groups,
                    InitialNoise::Own => i,
                };
                philox::noise(s.seed, Stream::InitialNoise, base + image as u32, 0, c * h * w)
            });
            let latents =
                Tensor::from_data(TensorData::new(noise.collect::<Vec<f32>>(), [n, c, h, w]), &self.compute.burn);
            let first_image = base + first as u32;
            let policy = self.policy(Some(&lora), &cond, &uncond);
            let sampled = sample(&policy, latents, &steps, &keep, (s.seed, first_image), || {
                progress.inc(1);
                check_stop()
            })?;
            Ok((Batch { first, first_image, cond, uncond, visits: sampled.visits }, sampled.latents))
        })?;
        progress.finish_and_clear();
        let sampling = sampling.elapsed().as_secs_f64();
        let decoding = Instant::now();
        let sampling_peak = memory::peak();
        memory::reset_peak();
        let (batches, latents): (Vec<Batch>, Vec<Tensor<4>>) = sampled.into_iter().unzip();
        let images = for_batches(&self.compute, &latents, |l| decode(&self.pipeline.vae, l))?.concat();
        let decoding = decoding.elapsed().as_secs_f64();
        let decoding_peak = memory::peak();
        let prompts: Vec<String> = (0..total).map(|i| chosen[i % groups].to_string()).collect();
        let scoring = Instant::now();
        let rewards = self.score(&images, &prompts)?;
        let seconds = [sampling, decoding, scoring.elapsed().as_secs_f64()];
        let peaks = [sampling_peak, decoding_peak];
        Ok(Rollout { batches, trained, prompts, rewards, seconds, peaks })
    }

    pub(crate) fn policy<'a>(
        &'a self,
        lora: Option<&'a crate::lora::Lora>,
        cond: &'a Conditioning,
        uncond: &'a Conditioning,
    ) -> Denoise<'a> {
        let net = &*self.pipeline.net;
        Denoise { compute: &self.compute, net, lora, guidance: Guided::new(net, self.s.guidance_scale), cond, uncond }
    }

    pub(crate) fn score(&mut self, images: &[RgbImage], prompts: &[String]) -> Result<Vec<f64>> {
        let names: Vec<&str> = prompts.iter().map(String::as_str).collect();
        self.reward.score(images, &names)
    }

    /// The steps that an epoch trains: all, some at random, or a window at a random place; with their credit.
    fn trained_steps(&self, epoch: usize) -> Vec<(usize, Step)> {
        let (s, all) = (self.s, &self.trainable);
        let k = s.train_steps.unwrap_or(all.len());
        let draw = |n, k| philox::choose(s.seed, Stream::TrainSteps, epoch as u32, n, k);
        let mut positions = if s.train_window {
            let start = draw(all.len() - k + 1, 1)[0];
            (start..start + k).collect()
        } else {
            draw(all.len(), k)
        };
        positions.sort_unstable();
        let (indices, mut steps): (Vec<usize>, Vec<Step>) =
            positions.into_iter().map(|p| (all[p], self.steps[all[p]])).unzip();
        if s.credit == Credit::Proportionate && s.credit_total == Total::Trained {
            let total = credit::zeta(&steps);
            credit::proportionate(&mut steps, total);
        }
        indices.into_iter().zip(steps).collect()
    }

    /// One optimizer step over the batches of an update; returns its line of metrics.
    fn update(
        &mut self,
        batches: &[&Batch],
        trained: &[(usize, Step)],
        advantages: &[f32],
        first: bool,
        progress: &indicatif::ProgressBar,
    ) -> Result<serde_json::Value> {
        let s = self.s;
        let surrogate = Surrogate {
            objective: s.objective,
            xi: s.clip_range as f32,
            beta: s.kl_beta as f32,
            guidance_gradient: s.guidance_gradient,
            scale: 1.0 / (advantages.len() * trained.len()) as f32,
        };
        let start = batches[0].first;
        let contributions: Vec<Contribution> = for_batches(&self.compute, batches, |batch| {
            let from = batch.first - start;
            let policy = self.policy(None, &batch.cond, &batch.uncond);
            let own = &advantages[from..from + batch.len()];
            let how = (own, s.seed, s.activation_checkpointing.then_some(self.rows_at_once));
            batch_gradient(&policy, &self.adapter, batch, trained, &surrogate, how, || {
                progress.inc(1);
                check_stop()
            })
        })?;
        let mut gradients = contributions[0].gradients.clone();
        for c in &contributions[1..] {
            gradients
                .iter_mut()
                .zip(&c.gradients)
                .for_each(|(sum, g)| sum.iter_mut().zip(g).for_each(|(s, g)| *s += g));
        }
        let stats = Tensor::cat(contributions.iter().map(|c| c.stats.clone()).collect(), 1);
        let weights: Vec<f32> = trained.iter().map(|(_, step)| Coefficients::from(step).w).collect();
        if first {
            self.self_test(&stats)?;
        }
        let table = credit_reduce(&self.compute, &stats, &weights)?;
        self.state.updates += 1;
        if let Some(request) = self.dump.take_if(|d| d.update == self.state.updates) {
            let (pipeline, compute, adapter) = (&self.pipeline, &self.compute, &self.adapter);
            let update = dump::Update {
                compute,
                pipeline,
                settings: s,
                surrogate: &surrogate,
                trained,
                batches,
                contributions: &contributions,
                advantages,
                adapter,
                gradients: &gradients,
            };
            dump::write(&update, &request)?;
            println!("update {} written to {}", request.update, request.file.display());
        }

        let loss = metrics::mean(&table, |t| t.loss);
        let grad_norm = clip_norm(&mut gradients, s.max_grad_norm);
        let finite = loss.is_finite() && grad_norm.is_finite();
        if finite {
            self.skipped_in_a_row = 0;
            let hyper =
                Hyper { lr: s.learning_rate, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: s.weight_decay };
            self.optimizer.update(&hyper, self.adapter.parameters(), &gradients);
        } else {
            self.skip()?;
        }
        Ok(metrics::update(self.state.epoch + 1, self.state.updates, trained, &table, grad_norm))
    }

    /// Before the first update rho is 1: anything else means that training and sampling disagree.
    fn self_test(&self, stats: &Tensor<3>) -> Result<()> {
        let rows = crate::ops::read(stats)?;
        let worst = rows.iter().step_by(crate::ops::policy_objective::STATS).fold(0f32, |m, v| m.max(v.abs()));
        let most = SELF_TEST * self.s.clip_range;
        ensure!(
            f64::from(worst) <= most,
            "self-test: |log rho| is {worst:e} before the first update, more than {SELF_TEST} of the clip range: sampling \
             and training compute different predictions on this device; use --activation-checkpointing true or a larger \
             --clip-range, or report it with the output of `pcpo-wgpu devices`"
        );
        println!("self-test: rho = 1 before the first update, to {worst:.1e}");
        Ok(())
    }

    fn skip(&mut self) -> Result<()> {
        self.state.skipped += 1;
        self.skipped_in_a_row += 1;
        eprintln!("warning: update {} has a loss or gradient that is not finite and is skipped", self.state.updates);
        if self.skipped_in_a_row == MAX_SKIPPED {
            let kept = if self.saved > 0 {
                let path = self.folder.dir.join("adapter-last-good.safetensors");
                lora_io::save(&self.adapter, &path, Format::Diffusers, self.pipeline.family)?;
                format!("the adapter after the last finite update is in {}", path.display())
            } else {
                "no epoch was completed, so nothing is kept".to_string()
            };
            bail!("{MAX_SKIPPED} updates in a row were not finite; lower --learning-rate or --max-grad-norm; {kept}");
        }
        Ok(())
    }

    fn record(
        &mut self,
        rollout: &Rollout,
        lines: Vec<serde_json::Value>,
        seconds: f64,
        update_seconds: f64,
    ) -> Result<()> {
        self.state.epoch += 1;
        let epoch = metrics::Epoch::new(self.state.epoch, rollout, &lines, seconds, update_seconds);
        lines.iter().for_each(|line| self.folder.metric(line));
        self.folder.metric(&epoch.line(self.state.skipped));
        let last = self.state.epoch == self.s.epochs;
        let (images, score) = self.evaluate(last)?;
        let columns = self.grid_columns();
        self.folder.picture(format!("grids/epoch-{:05}.png", self.state.epoch), &grid(&images, columns))?;
        self.folder.metric(&json!({ "kind": "evaluation", "epoch": self.state.epoch, "reward_mean": score }));
        self.state.metrics_lines = self.folder.metrics_lines();
        self.state.optimizer_step = self.optimizer.step;
        let family = self.pipeline.family;
        let (state, adapter, optimizer, keep) = (&self.state, &self.adapter, &self.optimizer, self.s.keep_every);
        self.folder.flush(|dir| {
            lora_io::save(adapter, &dir.join("adapter.safetensors"), Format::Diffusers, family)?;
            checkpoint::save(dir, state, (adapter, family), optimizer, keep)
        })?;
        self.saved = self.state.epoch;
        println!("{}", epoch.text(self.s.epochs));
        Ok(())
    }
}
