//! The whole story of a run, top to bottom:
//!
//! prompt -> text embedding -> ROLLOUT -> image -> REWARD -> ADVANTAGE -> credit -> UPDATE -> adapter -> CHECKPOINT
//!
//! Everything that varies between methods is data by the time it gets here: the steps carry their credit weights, the
//! surrogate its objective. Method: Lee & Ye 2026 (PCPO), Black et al. 2023 (DDPO), Xue et al. 2025 (DanceGRPO).

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn::tensor::{Tensor, TensorData};
use image::RgbImage;

use crate::adamw::{self, Hyper, clip_norm};
use crate::artifacts::RunFolder;
use crate::checkpoint::{self, Seconds, State};
use crate::credit::{self, Credit, Total};
use crate::device::Compute;
use crate::dump;
use crate::lora::Adapter;
use crate::lora_io::{self, Format};
use crate::memory;
use crate::metrics;
use crate::model::{Conditioning, Pipeline};
use crate::ops::credit_reduce::credit_reduce;
use crate::ops::group_advantage::{group_advantage, varies};
use crate::ops::policy_objective::Surrogate;
use crate::ops::{Coefficients, read};
use crate::options::InitialNoise;
use crate::philox::{self, Stream};
use crate::prepare::prepare;
use crate::progress::{Bar, bar, check_stop};
use crate::reward::Reward;
use crate::rollout::{Denoise, Guided, decode, for_batches, sample};
use crate::schedule::Step;
use crate::self_test::self_test;
use crate::settings::Settings;
use crate::update::{Batch, Contribution, batch_gradient};
use crate::work::{Draw, Work};

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
    /// The prompts of the grids.
    pub(crate) fixed: Conditioning,
    pub(crate) state: State,
    pub(crate) adapter: Adapter,
    pub(crate) optimizer: adamw::State,
    pub(crate) folder: RunFolder,
    pub(crate) dump: Option<dump::Request>,
    pub(crate) skipped_in_a_row: usize,
    /// The adapter and the optimizer before the last step that was taken: their loss was finite.
    pub(crate) last_good: Option<(Adapter, adamw::State)>,
    /// What is on disk to continue from, in words.
    pub(crate) kept: Option<String>,
}

/// Runs a job to its end.
///
/// # Errors
/// On bad settings or files before anything is written; on a failing device, reward or disk; when stopped by a signal.
/// The message says how to continue where there is something to continue from.
pub fn train(job: Job) -> Result<Summary> {
    let mut run = prepare(&job)?;
    let result = run.epochs();
    result.map_err(|e| match &run.kept {
        None => e,
        Some(kept) => e.context(format!(
            "the run ended; {kept} are kept; continue with `pcpo-wgpu train --resume {}`",
            run.folder.dir.display()
        )),
    })
}

impl Run<'_> {
    fn epochs(&mut self) -> Result<Summary> {
        // Also of a resumed run, which may have been given more epochs.
        self.folder.file("settings.toml", toml::to_string(self.s).context("settings")?.into_bytes());
        if self.state.epoch == 0 && self.state.unfinished.is_none() {
            let (images, score) = self.evaluate(true)?;
            self.show(0, &images, score)?;
            self.state.metrics_lines = self.folder.metrics_lines();
        }
        while self.state.epoch < self.s.epochs {
            self.epoch()?;
        }
        self.finish()
    }

    fn epoch(&mut self) -> Result<()> {
        let mut work = match self.state.unfinished.take() {
            Some(unfinished) => self.take_up(unfinished)?,
            None => self.rollout(self.state.epoch)?,
        };
        let result = self.updates(&mut work).and_then(|()| self.record(&work));
        match result {
            // What was learnt is kept, whatever stopped the epoch.
            Err(e) if !work.lines.is_empty() => match self.put_away(&work) {
                Ok(()) => Err(e),
                Err(disk) => Err(e.context(format!("the updates of this epoch could not be saved ({disk:#})"))),
            },
            other => other,
        }
    }

    /// Samples, decodes and scores an epoch's images.
    fn rollout(&mut self, epoch: usize) -> Result<Work> {
        let start = Instant::now();
        let s = self.s;
        let draw = self.draw(epoch)?;

        // -------------------------------------------------------------------------------------------------- ROLLOUT
        let keep: Vec<usize> = draw.trained.iter().map(|(i, _)| *i).collect();
        let mut steps = self.steps.clone();
        if s.noise_only_trained {
            for (_, step) in steps.iter_mut().enumerate().filter(|(i, _)| !keep.contains(i)) {
                *step = step.without_noise();
            }
        }
        let lora = self.adapter.to_device(&self.compute.burn, false);
        let [c, h, w] = self.pipeline.latent_shape();
        memory::reset_peak();
        let progress = bar("rollout", draw.starts.len() * steps.len());
        let sampled = for_batches(&self.compute, &draw.starts, |&(first, n)| {
            let (cond, uncond) = draw.conditioning(self, (first, n));
            let noise = (first..first + n).flat_map(|i| {
                let image = match s.initial_noise {
                    InitialNoise::Shared => i % s.groups(),
                    InitialNoise::Own => i,
                };
                philox::noise(s.seed, Stream::InitialNoise, draw.base + image as u32, 0, c * h * w)
            });
            let shape = [n, c, h, w];
            let latents = Tensor::from_data(TensorData::new(noise.collect::<Vec<f32>>(), shape), &self.compute.burn);
            let first_image = draw.base + first as u32;
            let policy = self.policy(Some(&lora), &cond, &uncond);
            let sampled = sample(&policy, latents, &steps, &keep, (s.seed, first_image), || {
                progress.inc(1);
                check_stop()
            })?;
            Ok((Batch { first, first_image, shape, visits: sampled.visits }, sampled.latents))
        })?;
        progress.finish();
        let (batches, latents): (Vec<Batch>, Vec<Tensor<4>>) = sampled.into_iter().unzip();
        let (sampling, sampling_peak) = (start.elapsed().as_secs_f64(), memory::peak());

        // ------------------------------------------------------------------------------------------- DECODE, REWARD
        memory::reset_peak();
        let images = for_batches(&self.compute, &latents, |l| decode(&self.pipeline.vae, l))?.concat();
        let (decoded, decoding_peak) = (start.elapsed().as_secs_f64(), memory::peak());
        let rewards = self.score(&images, &draw.prompts)?;
        let scored = start.elapsed().as_secs_f64();

        // ------------------------------------------------------------------------------------------------ ADVANTAGE
        let names: Vec<&str> = draw.prompts.iter().map(String::as_str).collect();
        let advantages = group_advantage(s.advantage, &rewards, &names, &mut self.state.tracker, s.advantage_clamp);
        let flat = s.group_size > 1 && !varies(&rewards, &names);
        if flat || advantages.iter().all(|a| *a == 0.0) {
            eprintln!(
                "warning: the reward {} does not vary within any group of this epoch: nothing can be learnt from it",
                s.reward
            );
        }
        let seconds = Seconds { rollout: sampling, decode: decoded - sampling, reward: scored - decoded, update: 0.0 };
        let peaks = [sampling_peak, decoding_peak, None];
        Ok(Work { batches, draw, rewards, advantages, lines: Vec::new(), seconds, peaks })
    }

    /// The updates of an epoch that are not done yet. A signal is heard between two of them.
    fn updates(&mut self, work: &mut Work) -> Result<()> {
        let s = self.s;
        memory::reset_peak();
        let trained = work.draw.trained.len();
        let (per_pass, total) = (work.batches.len() * trained, s.updates_per_epoch * s.inner_epochs);
        let progress = bar("update", per_pass * s.inner_epochs);
        progress.set_position((per_pass * work.lines.len() / s.updates_per_epoch) as u64);
        while work.lines.len() < total {
            let start = Instant::now();
            let share = work.lines.len() % s.updates_per_epoch;
            let range = share * s.images_per_update()..(share + 1) * s.images_per_update();
            let batches: Vec<&Batch> = work.batches.iter().filter(|b| range.contains(&b.first)).collect();
            let line = self.update(&batches, &work.draw, &work.advantages[range], &progress)?;
            work.lines.push(line.to_string());
            work.seconds.update += start.elapsed().as_secs_f64();
            if self.skipped_in_a_row == MAX_SKIPPED {
                return self.give_up();
            }
            if work.lines.len() < total {
                check_stop()?;
            }
        }
        progress.finish();
        work.peaks[2] = memory::peak();
        Ok(())
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
    pub(crate) fn trained_steps(&self, epoch: usize) -> Vec<(usize, Step)> {
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
        draw: &Draw,
        advantages: &[f32],
        progress: &Bar,
    ) -> Result<serde_json::Value> {
        let (s, trained) = (self.s, &draw.trained[..]);
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
            let (cond, uncond) = draw.conditioning(self, (batch.first, batch.len()));
            let policy = self.policy(None, &cond, &uncond);
            let own = &advantages[from..from + batch.len()];
            let how = (own, s.seed, s.activation_checkpointing.then_some(self.rows_at_once));
            batch_gradient(&policy, &self.adapter, batch, trained, &surrogate, how, || {
                progress.inc(1);
                Ok(())
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
        if self.state.updates == 0 {
            self_test(s, &read(&stats)?, &gradients)?;
        }
        let table = credit_reduce(&self.compute, &stats, &weights)?;
        let number = self.state.updates + 1;
        if let Some(request) = self.dump.take_if(|d| d.update == number) {
            let (pipeline, compute, adapter) = (&self.pipeline, &self.compute, &self.adapter);
            let update = dump::Update {
                compute,
                pipeline,
                settings: s,
                surrogate: &surrogate,
                trained,
                batches,
                conditioning: batches.iter().map(|b| draw.conditioning(self, (b.first, b.len()))).collect(),
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
        self.state.updates = number;
        if loss.is_finite() && grad_norm.is_finite() {
            self.skipped_in_a_row = 0;
            self.last_good = Some((self.adapter.clone(), self.optimizer.clone()));
            let hyper =
                Hyper { lr: s.learning_rate, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: s.weight_decay };
            self.optimizer.update(&hyper, self.adapter.parameters(), &gradients);
        } else {
            self.state.skipped += 1;
            self.skipped_in_a_row += 1;
            eprintln!("warning: update {number} has a loss or gradient that is not finite and is skipped");
        }
        Ok(metrics::update(self.state.epoch + 1, number, trained, &table, grad_norm))
    }

    /// Goes back to where the loss was still finite; the caller keeps that state.
    fn give_up(&mut self) -> Result<()> {
        let from = match self.last_good.take() {
            Some((adapter, optimizer)) => {
                (self.adapter, self.optimizer) = (adapter, optimizer);
                let file = self.folder.dir.join("adapter.safetensors");
                format!("--lora {} starts it from the last adapter whose loss was finite", file.display())
            }
            // Resumed with an adapter that was broken already.
            None => format!("start it from an earlier epoch in {}", self.folder.dir.join("checkpoints").display()),
        };
        bail!(
            "{MAX_SKIPPED} updates in a row were not finite; lower --learning-rate or --max-grad-norm in a new run; {from}"
        )
    }

    /// METRICS, CHECKPOINT
    fn record(&mut self, work: &Work) -> Result<()> {
        let state = State { epoch: self.state.epoch + 1, unfinished: None, ..self.state.clone() };
        let epoch = metrics::Epoch::new(state.epoch, work);
        // Before anything is changed: a reward program that dies here must not cost the epoch.
        let (images, score) = self.evaluate(state.epoch == self.s.epochs)?;
        work.lines.iter().for_each(|line| self.folder.metric(line));
        self.folder.metric(epoch.line(state.skipped));
        self.show(state.epoch, &images, score)?;
        let state = State { metrics_lines: self.folder.metrics_lines(), ..state };
        self.save(state.clone())?;
        self.state = state;
        self.kept = Some(format!("{} complete epochs", self.state.epoch));
        println!("{}", epoch.text(self.s.epochs));
        Ok(())
    }

    /// Writes what is pending, the adapter, and the checkpoint of a state.
    pub(crate) fn save(&mut self, state: State) -> Result<()> {
        let state = State { optimizer_step: self.optimizer.step, ..state };
        let (adapter, optimizer, family, keep) =
            (&self.adapter, &self.optimizer, self.pipeline.family, self.s.keep_every);
        self.folder.flush(|dir| {
            lora_io::save(adapter, &dir.join("adapter.safetensors"), Format::Diffusers, family)?;
            checkpoint::save(dir, &state, (adapter, family), optimizer, keep)
        })
    }
}
