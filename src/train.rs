//! The whole story of a run, top to bottom:
//!
//! prompt -> text embedding -> ROLLOUT -> image -> REWARD -> ADVANTAGE -> credit -> UPDATE -> adapter -> CHECKPOINT
//!
//! Everything that varies between methods is data by the time it gets here: the steps carry their credit weights, the
//! surrogate its objective. Method: Lee & Ye 2026 (PCPO), Black et al. 2023 (DDPO), Xue et al. 2025 (DanceGRPO).

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use burn::tensor::{Tensor, TensorData};
use image::RgbImage;
use serde_json::json;

use crate::adamw::{self, Hyper, clip_norm};
use crate::artifacts::{RunFolder, before_after, grid};
use crate::checkpoint::{self, State};
use crate::credit;
use crate::device::{self, Compute};
use crate::dump;
use crate::lora::Adapter;
use crate::lora_io::{self, Format};
use crate::model::pipeline::{Conditioning, Pipeline, fingerprint};
use crate::ops::Guidance;
use crate::ops::credit_reduce::{StepStats, credit_reduce};
use crate::ops::group_advantage::{Tracker, group_advantage, varies};
use crate::ops::policy_objective::Surrogate;
use crate::philox::{self, Stream};
use crate::progress::{bar, check_stop};
use crate::reward::{self, Reward};
use crate::rollout::{Denoise, decode, for_batches, sample};
use crate::schedule::Step;
use crate::settings::{InitialNoise, Settings};
use crate::update::{Batch, Contribution, batch_gradient};

/// Largest |log rho| before the first update: the policy has not changed, so only rounding is left.
const SELF_TEST: f32 = 1e-6;
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

struct Run<'a> {
    s: &'a Settings,
    compute: Compute,
    pipeline: Pipeline,
    reward: Box<dyn Reward>,
    /// All steps of the sampler, with their credit weights.
    steps: Vec<Step>,
    /// Indices of the steps that may be trained.
    trainable: Vec<usize>,
    uncond: Conditioning,
    state: State,
    adapter: Adapter,
    optimizer: adamw::State,
    folder: RunFolder,
    dump: Option<dump::Request>,
    skipped_in_a_row: usize,
}

/// An epoch's rollout.
struct Rollout {
    batches: Vec<Batch>,
    trained: Vec<(usize, Step)>,
    prompts: Vec<String>,
    rewards: Vec<f64>,
    seconds: [f64; 3],
}

/// Runs a job to its end.
///
/// # Errors
/// On bad settings or files before anything is written; on a failing device, reward or disk; when stopped by a signal.
/// The message says how to continue where there is something to continue from.
pub fn train(job: Job) -> Result<Summary> {
    let mut run = prepare(&job)?;
    let result = run.epochs();
    let done = run.state.epoch;
    match result {
        Err(e) if done > 0 && run.folder.dir.exists() => Err(e.context(format!(
            "the run ended after {done} complete epochs, which are kept; continue with `pcpo-wgpu train --resume {}`",
            run.folder.dir.display()
        ))),
        other => other,
    }
}

// ---------------------------------------------------------------------------------------------------- PREPARATION

fn prepare(job: &Job) -> Result<Run<'_>> {
    let s = &job.settings;
    let new_folder = if job.resume { None } else { Some(RunFolder::new(&job.out)?) };
    let reward = reward::parse(&s.reward)?;
    let compute = device::open(&s.device)?;
    let pipeline = Pipeline::load(&s.model, &compute.burn, s.storage)?;
    let native = pipeline.schedule.steps(s.steps, s.eta)?;
    ensure!(
        native[0].clip.is_infinite(),
        "{}: scheduler_config.json: clip_sample = true cannot be trained (a clipped mean is not linear); set it to false",
        s.model.display()
    );
    let steps = credit::apply(s.credit, &pipeline.schedule, native)?;
    let last = steps.len() - 1;
    let trainable: Vec<usize> =
        (0..steps.len()).filter(|&i| steps[i].trainable() && (i != last || s.train_last_step)).collect();
    ensure!(!trainable.is_empty(), "--steps {}: leaves no step to train; use more, or --train-last-step true", s.steps);
    if let Some(k) = s.train_steps {
        ensure!(k <= trainable.len(), "--train-steps {k}: only {} steps can be trained; lower it", trainable.len());
    }
    let linears = pipeline.unet.linears();
    let model = fingerprint(&s.model)?;
    let tracker = Tracker { size: s.tracker_size, min_count: s.tracker_min_count, ..Default::default() };
    let (state, adapter, optimizer, folder) = if job.resume {
        let (state, adapter, optimizer) = checkpoint::load(&job.out, &model, &linears)?;
        let folder = RunFolder::resume(&job.out, state.metrics_lines)?;
        println!("resuming {} after epoch {}", job.out.display(), state.epoch);
        (state, adapter, optimizer, folder)
    } else {
        let adapter = match &s.lora {
            Some(file) => lora_io::load(file, &linears).context("--lora")?,
            None => Adapter::new(&linears, &s.target_modules, s.rank, s.alpha, s.seed)?,
        };
        let optimizer = adamw::State::new(adapter.layers.iter().flat_map(|l| [l.a.len(), l.b.len()]));
        (State::new(model, tracker), adapter, optimizer, new_folder.expect("a new run has a new folder"))
    };
    println!(
        "model: {}, LoRA of rank {} on {} layers, {} values",
        s.model.display(),
        adapter.rank,
        adapter.layers.len(),
        adapter.len()
    );
    println!("run: {}", s.summary());
    println!(
        "method: {:?} with {:?} credit over {} of {} steps, reward {}",
        s.objective,
        s.credit,
        s.train_steps.unwrap_or(trainable.len()),
        steps.len(),
        s.reward
    );
    let uncond = pipeline.encode(&[""])?;
    Ok(Run {
        s,
        compute,
        reward,
        steps,
        trainable,
        uncond,
        state,
        adapter,
        optimizer,
        folder,
        pipeline,
        dump: job.dump.clone(),
        skipped_in_a_row: 0,
    })
}

impl Run<'_> {
    fn epochs(&mut self) -> Result<Summary> {
        if self.state.epoch == 0 {
            self.folder.file("settings.toml", toml::to_string(self.s).context("settings")?.into_bytes());
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
            for (i, step) in steps.iter_mut().enumerate().filter(|(i, _)| !keep.contains(i)) {
                *step = self.pipeline.schedule.with_sigma(step.t, step.alpha_bar, step.alpha_bar_prev, 0.0);
                debug_assert!(!step.trainable(), "step {i} has no noise");
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
        let progress = bar("rollout", starts.len() * steps.len());
        let sampled = for_batches(&self.compute, &starts, |&(first, n)| {
            let rows: Vec<Tensor<3>> = (first..first + n).map(|i| embeddings.rows(i % groups, 1).sequence).collect();
            let (cond, uncond) = (Conditioning { sequence: Tensor::cat(rows, 0) }, self.uncond.repeat(n));
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
        let (batches, latents): (Vec<Batch>, Vec<Tensor<4>>) = sampled.into_iter().unzip();
        let images = for_batches(&self.compute, &latents, |l| decode(&self.pipeline.vae, l))?.concat();
        let decoding = decoding.elapsed().as_secs_f64();
        let prompts: Vec<String> = (0..total).map(|i| chosen[i % groups].to_string()).collect();
        let scoring = Instant::now();
        let rewards = self.score(&images, &prompts)?;
        let seconds = [sampling, decoding, scoring.elapsed().as_secs_f64()];
        Ok(Rollout { batches, trained, prompts, rewards, seconds })
    }

    fn policy<'a>(
        &'a self,
        lora: Option<&'a crate::lora::Lora>,
        cond: &'a Conditioning,
        uncond: &'a Conditioning,
    ) -> Denoise<'a> {
        let guidance = Guidance::new(self.s.guidance_scale);
        Denoise { compute: &self.compute, unet: &self.pipeline.unet, lora, guidance, cond, uncond }
    }

    fn score(&mut self, images: &[RgbImage], prompts: &[String]) -> Result<Vec<f64>> {
        let names: Vec<&str> = prompts.iter().map(String::as_str).collect();
        self.reward.score(images, &names)
    }

    /// The steps that an epoch trains: all, some at random, or a window at a random place.
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
        positions.into_iter().map(|p| (all[p], self.steps[all[p]])).collect()
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
            batch_gradient(&policy, &self.adapter, batch, trained, &surrogate, (own, s.seed), || {
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
        let weights: Vec<f32> = trained.iter().map(|(_, step)| (step.weight * step.unit) as f32).collect();
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

        let loss = mean(&table, |t| t.loss);
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
        let steps: Vec<_> = trained
            .iter()
            .zip(&table)
            .map(|((_, step), t)| {
                let mut line = serde_json::to_value(t).expect("statistics are numbers");
                line["t"] = json!(step.t);
                line
            })
            .collect();
        Ok(json!({
            "kind": "update", "epoch": self.state.epoch + 1, "update": self.state.updates,
            "loss": loss, "clip_frac": mean(&table, |t| t.clip_frac), "approx_kl": mean(&table, |t| t.approx_kl),
            "kl": mean(&table, |t| t.kl), "log_rho_mean": mean(&table, |t| t.log_rho_mean),
            "log_rho_std": pooled_std(&table), "grad_norm": grad_norm, "skipped": !finite, "steps": steps,
        }))
    }

    /// Before the first update rho is 1: anything else means that training and sampling disagree.
    fn self_test(&self, stats: &Tensor<3>) -> Result<()> {
        let rows = crate::ops::read(stats)?;
        let worst = rows.iter().step_by(crate::ops::policy_objective::STATS).fold(0f32, |m, v| m.max(v.abs()));
        ensure!(
            worst <= SELF_TEST,
            "self-test: |log rho| is {worst:e} before the first update, more than {SELF_TEST:e}: sampling and training \
             compute different predictions on this device; report it with the output of `pcpo-wgpu devices`"
        );
        println!("self-test: rho = 1 before the first update, to {worst:.1e}");
        Ok(())
    }

    fn skip(&mut self) -> Result<()> {
        self.state.skipped += 1;
        self.skipped_in_a_row += 1;
        eprintln!("warning: update {} has a loss or gradient that is not finite and is skipped", self.state.updates);
        if self.skipped_in_a_row == MAX_SKIPPED {
            bail!(
                "{MAX_SKIPPED} updates in a row were not finite; lower --learning-rate or --max-grad-norm; the last good \
                 adapter is that of the last completed epoch"
            );
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
        let over_updates =
            |field: &str| lines.iter().filter_map(|l| l[field].as_f64()).sum::<f64>() / lines.len() as f64;
        let (clip_frac, approx_kl) = (over_updates("clip_frac"), over_updates("approx_kl"));
        let n = rollout.rewards.len() as f64;
        let reward = rollout.rewards.iter().sum::<f64>() / n;
        let std = (rollout.rewards.iter().map(|r| (r - reward).powi(2)).sum::<f64>() / n).sqrt();
        let [rollout_seconds, decode_seconds, reward_seconds] = rollout.seconds;
        self.state.epoch += 1;
        lines.iter().for_each(|line| self.folder.metric(line));
        self.folder.metric(&json!({
            "kind": "epoch", "epoch": self.state.epoch, "reward_mean": reward, "reward_std": std,
            "clip_frac": clip_frac, "approx_kl": approx_kl, "images_per_second": n / seconds, "seconds": seconds,
            "rollout_seconds": rollout_seconds, "decode_seconds": decode_seconds, "reward_seconds": reward_seconds,
            "update_seconds": update_seconds, "skipped_updates": self.state.skipped,
        }));
        let last = self.state.epoch == self.s.epochs;
        let (images, score) = self.evaluate(last)?;
        let columns = self.grid_columns();
        self.folder.picture(format!("grids/epoch-{:05}.png", self.state.epoch), &grid(&images, columns))?;
        self.folder.metric(&json!({ "kind": "evaluation", "epoch": self.state.epoch, "reward_mean": score }));
        self.state.metrics_lines = self.folder.metrics_lines();
        self.state.optimizer_step = self.optimizer.step;
        let (state, adapter, optimizer, keep) = (&self.state, &self.adapter, &self.optimizer, self.s.keep_every);
        self.folder.flush(|dir| {
            lora_io::save(adapter, &dir.join("adapter.safetensors"), Format::Diffusers)?;
            checkpoint::save(dir, state, adapter, optimizer, keep)
        })?;
        println!(
            "epoch {}/{}: reward {reward:.4} +- {std:.4}, clipped {:.0}%, approx. KL {approx_kl:.2e}, {seconds:.1} s",
            self.state.epoch,
            self.s.epochs,
            100.0 * clip_frac
        );
        Ok(())
    }

    // ---------------------------------------------------------------------------------------------------- EVALUATION

    fn grid_columns(&self) -> usize {
        self.s.groups().min(4)
    }

    /// Pictures of fixed prompts and noise, and their mean reward. `full` takes four rows instead of one: the reward
    /// before and after is worth the time, the epochs between have their rollout's.
    fn evaluate(&mut self, full: bool) -> Result<(Vec<RgbImage>, f64)> {
        let s = self.s;
        let columns = self.grid_columns();
        let total = if full { 4 * columns } else { columns };
        let prompts: Vec<String> = (0..total).map(|i| s.prompt[i % columns].clone()).collect();
        let [c, h, w] = self.pipeline.latent_shape();
        let lora = self.adapter.to_device(&self.compute.burn, false);
        let starts: Vec<usize> = (0..total).step_by(columns).collect();
        let rows = for_batches(&self.compute, &starts, |&first| {
            let cond = self.pipeline.encode(&prompts[first..first + columns])?;
            let uncond = self.uncond.repeat(columns);
            let noise: Vec<f32> = (first..first + columns)
                .flat_map(|i| philox::noise(s.seed, Stream::Evaluation, i as u32, 0, c * h * w))
                .collect();
            let latents = Tensor::from_data(TensorData::new(noise, [columns, c, h, w]), &self.compute.burn);
            let policy = self.policy(Some(&lora), &cond, &uncond);
            // Images numbered from the top, which no rollout reaches.
            let first_image = u32::MAX - (total - first) as u32;
            let sampled = sample(&policy, latents, &self.steps, &[], (s.seed, first_image), check_stop)?;
            decode(&self.pipeline.vae, &sampled.latents)
        })?;
        let images = rows.concat();
        let scores = self.score(&images, &prompts)?;
        Ok((images, scores.iter().sum::<f64>() / total as f64))
    }

    fn finish(&mut self) -> Result<Summary> {
        let dir = self.folder.dir.clone();
        let path = |epoch: usize| dir.join(format!("grids/epoch-{epoch:05}.png"));
        let after = image::open(path(self.s.epochs)).context("the last grid")?.to_rgb8();
        self.folder.picture("before_after.png", &before_after(&path(0), &after)?)?;
        self.folder.flush(|_| Ok(()))?;
        let score = |epoch: usize| evaluation(&dir, epoch);
        Ok(Summary { before: score(0)?, after: score(self.s.epochs)?, out: dir.clone() })
    }
}

/// The evaluation's mean reward after an epoch, from the run's metrics.
fn evaluation(dir: &Path, epoch: usize) -> Result<f64> {
    let text = crate::files::read_text(&dir.join("metrics.jsonl"))?;
    let lines = text.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
    let line = lines.filter(|l| l["kind"] == "evaluation" && l["epoch"] == epoch).last();
    line.and_then(|l| l["reward_mean"].as_f64()).with_context(|| format!("no evaluation of epoch {epoch}"))
}

fn mean(table: &[StepStats], f: impl Fn(&StepStats) -> f32) -> f64 {
    table.iter().map(|t| f64::from(f(t))).sum::<f64>() / table.len() as f64
}

/// Standard deviation of log rho over all steps and samples.
fn pooled_std(table: &[StepStats]) -> f64 {
    let whole = mean(table, |t| t.log_rho_mean);
    let square = |t: &StepStats| f64::from(t.log_rho_std).powi(2) + (f64::from(t.log_rho_mean) - whole).powi(2);
    (table.iter().map(square).sum::<f64>() / table.len() as f64).sqrt()
}
