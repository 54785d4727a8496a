//! The whole story of a run, top to bottom:
//!
//! prompt -> text embedding -> ROLLOUT -> image -> REWARD -> ADVANTAGE -> credit -> UPDATE ->
//! adapter -> CHECKPOINT
//!
//! Everything that varies between methods is data by the time it gets here: the steps carry their
//! credit weights, the surrogate its objective. Method: Lee & Ye 2026 (PCPO), Black et al. 2023
//! (DDPO), Xue et al. 2025 (DanceGRPO).

#[doc(hidden)]
pub mod adamw;
#[doc(hidden)]
pub mod backward;
mod base_features;
#[doc(hidden)]
pub mod checkpoint;
mod control;
mod dump;
mod epoch;
mod epoch_record;
mod evaluation;
mod evaluation_record;
mod gradient;
mod measures;
pub mod metrics;
pub mod observer;
mod prepare;
mod recovery;
mod rewards;
mod run;
#[doc(hidden)]
pub mod run_folder;
mod self_test;
#[doc(hidden)]
pub mod update;
mod update_record;
#[doc(hidden)]
pub mod watch;
#[doc(hidden)]
pub mod wishes;

use std::time::Instant;

use anyhow::{Context, Result, bail};
use image::RgbImage;

use self::adamw::{AdamWConfig, clip_norm};
use self::checkpoint::RunState;
use self::epoch::EpochState;
use self::evaluation::{Extent, before_after};
use self::gradient::gradient;
use self::measures::evaluate;
use self::metrics::{About, PeakMemory, Record, Seconds, Took, UpdateRecord};
pub use self::observer::{Event, Observer, Silent};
use self::prepare::{Prepared, prepare};
use self::recovery::{diverged, keep_beginning, restore, suspend, test_restored};
use self::rewards::flat;
use self::run::Run;
pub use self::run::{DumpRequest, Job, Summary};
use self::run_folder::{ABOUT, SETTINGS, open_grid};
use self::update::{TrajectoryBatch, credit_table};
use self::watch::best_epoch;
use crate::device;
use crate::device::system::{peak, reset_peak};
use crate::device::tensor::{read, upload};
use crate::ops::policy_objective::Surrogate;
use crate::sampling::generate::{Generated, Request, generate};
use crate::sampling::parallel::map_batches;
use crate::sampling::policy::Weighted;
use crate::sampling::trajectory::{Noise, NotFinite, decode};

/// Updates in a row that may be skipped for values that are not finite.
const MAX_SKIPPED: usize = 3;

/// Runs a job to its end.
///
/// # Errors
/// On bad settings or files before anything is written; on a failing device, reward or disk; when
/// the adapter diverges; when it was asked to stop. The message says how to continue where there is
/// something to continue from.
pub fn train(mut job: Job, observer: &dyn Observer) -> Result<Summary> {
    let reward = job.reward.take();
    let Prepared { mut run, transitions } = prepare(&mut job, reward, observer)?;
    let result = device::guard(|| {
        // Also of a resumed run, which may have been given more epochs.
        let settings = toml::to_string(run.settings).context("settings")?;
        run.folder.file(SETTINGS, settings.into_bytes());
        let about = About::this(&run.first().compute.name);
        run.folder.file(ABOUT, serde_json::to_vec_pretty(&about)?);
        wishes::forget(&run.folder.dir);
        let mut restored = restore(&mut run, transitions)?;
        // A run that has gone back to its beginning has its first pictures already.
        if run.state.epoch == 0 && restored.is_none() && run.folder.reward_of(0).is_err() {
            begin(&mut run)?;
        }
        while run.state.epoch < run.settings.epochs && run.collapsed().is_none() {
            epoch(&mut run, restored.take())?;
        }
        finish(&mut run)
    });
    result.map_err(|e| match &run.kept {
        None => e,
        Some(kept) => e.context(format!(
            "the run ended; {kept} are kept; continue with `pcpo-wgpu train --resume {}`",
            run.folder.dir.display()
        )),
    })
}

/// The pictures and the reward before anything is learnt.
fn begin(run: &mut Run) -> Result<()> {
    let before = evaluate(run, Extent::Full)?;
    run.show(0, before)?;
    run.state.metrics_lines = run.folder.records().len();
    Ok(())
}

/// One epoch: the one that was stopped, or the next.
fn epoch(run: &mut Run, restored: Option<EpochState>) -> Result<()> {
    let mut state = match restored {
        Some(state) => state,
        None => {
            let before = run.snapshot();
            let state = match rollout(run) {
                Err(e) if e.is::<NotFinite>() => return Err(diverged(run, e)),
                other => other?,
            };
            // Its pictures are finite: it can be gone back to.
            run.good = Some(before);
            state
        }
    };
    // A panic of the device in the middle of an update leaves the state before the update.
    let result = device::guard(|| updates(run, &mut state).and_then(|()| record(run, &state)));
    match result {
        // An adapter with an infinity in it could not be read again.
        Err(e) if e.is::<NotFinite>() || !run.adapter.is_finite() => Err(diverged(run, e)),
        // What was learnt is kept, whatever stopped the epoch.
        Err(e) if !state.updates.is_empty() => match suspend(run, &state) {
            Ok(()) => Err(e),
            Err(disk) => {
                Err(e.context(format!("the updates of this epoch could not be saved ({disk:#})")))
            }
        },
        other => other,
    }
}

/// A batch of a rollout.
struct Sampled {
    batch: TrajectoryBatch,
    /// Where its images end.
    latents: Vec<f32>,
    calls: usize,
}

/// Samples, decodes and scores an epoch's images.
fn rollout(run: &mut Run) -> Result<EpochState> {
    let start = Instant::now();
    let s = run.settings;
    let plan = run.plan_epoch()?;

    // ------------------------------------------------------------------------------------- ROLLOUT
    let keep: Vec<usize> = plan.trained.iter().map(|step| step.index).collect();
    let latent @ [c, h, w] = run.latent_shape();
    let request = Request {
        images: &plan.images,
        batches: &plan.batches,
        embeddings: &run.embeddings,
        uncond: run.embeddings.row_of("")?,
        policies: &[Weighted::whole(Some(&run.adapter))],
        guidance_scale: s.guidance_scale,
        steps: &plan.steps,
        keep: &keep,
        latent,
        noise: plan.noise,
    };
    reset_peak();
    let units = plan.batches.len() * plan.steps.len();
    run.observer.on(Event::PhaseBegins { phase: "rollout", units, done: 0 });
    let tick = || {
        run.observer.on(Event::PhaseAdvances);
        run.hear_stop()
    };
    let sampled = generate(&run.replicas, &request, &tick, |_, drawn: Generated| {
        let first_image = plan.noise.first_image + drawn.images.start as u32;
        let batch = TrajectoryBatch {
            noise: Noise { first_image, ..plan.noise },
            shape: [drawn.images.len(), c, h, w],
            images: drawn.images,
            transitions: drawn.transitions,
        };
        Ok(Sampled { batch, latents: read(&drawn.latents)?, calls: drawn.calls })
    });
    run.observer.on(Event::PhaseEnds);
    let (mut batches, mut latents, mut calls) = (Vec::new(), Vec::new(), 0);
    for sampled in sampled? {
        batches.push(sampled.batch);
        latents.push(sampled.latents);
        calls += sampled.calls;
    }
    let (sampled, sampling_peak) = (start.elapsed().as_secs_f64(), peak());

    // ------------------------------------------------------------------------------ DECODE, REWARD
    reset_peak();
    let images: Vec<RgbImage> = map_batches(&run.replicas, &latents, |replica, latents| {
        let shape = [latents.len() / (c * h * w), c, h, w];
        decode(&replica.pipeline.vae, &upload(latents, shape, &replica.compute.burn))
    })?
    .concat();
    let (decoded, decoding_peak) = (start.elapsed().as_secs_f64(), peak());
    let scores = run.score(&images, &plan.prompts)?;
    let scored = start.elapsed().as_secs_f64();

    // ----------------------------------------------------------------------------------- ADVANTAGE
    let names: Vec<&str> = plan.prompts.iter().map(|p| p.text.as_str()).collect();
    let advantages = scores.advantages(s, &mut run.state, &names);
    let (rewards, scores) = (scores.totals(), scores.records(&names));
    for warning in flat(s, &scores, &advantages) {
        run.warn(&warning);
    }
    let seconds = Seconds {
        rollout: sampled,
        decode: decoded - sampled,
        reward: scored - decoded,
        update: 0.0,
    };
    let peaks = PeakMemory { rollout: sampling_peak, decode: decoding_peak, update: None };
    Ok(EpochState {
        batches,
        plan,
        rewards,
        scores,
        advantages,
        rollout_calls: calls,
        updates: Vec::new(),
        seconds,
        peaks,
        restored: false,
    })
}

/// The updates of an epoch that are not done yet. A signal is heard between two of them.
fn updates(run: &mut Run, state: &mut EpochState) -> Result<()> {
    let s = run.settings;
    reset_peak();
    let per_pass = state.batches.len() * state.plan.trained.len();
    let total = s.updates_per_epoch * s.inner_epochs;
    let (units, done) =
        (per_pass * s.inner_epochs, per_pass * state.updates.len() / s.updates_per_epoch);
    run.observer.on(Event::PhaseBegins { phase: "update", units, done });
    while state.updates.len() < total {
        control::hear(run, state)?;
        let start = Instant::now();
        let record = update(run, state)?;
        state.updates.push(record);
        state.seconds.update += start.elapsed().as_secs_f64();
        if run.skipped_in_a_row == MAX_SKIPPED {
            bail!(NotFinite(format!("{MAX_SKIPPED} updates in a row were not finite")));
        }
        if state.updates.len() < total {
            run.hear_stop()?;
        }
    }
    run.observer.on(Event::PhaseEnds);
    state.peaks.update = peak();
    Ok(())
}

/// One optimizer step over the batches of an update.
fn update(run: &mut Run, state: &EpochState) -> Result<UpdateRecord> {
    let s = run.settings;
    let share = state.updates.len() % s.updates_per_epoch;
    let images = share * s.images_per_update()..(share + 1) * s.images_per_update();
    let own = |b: &&TrajectoryBatch| images.contains(&b.images.start);
    let batches: Vec<&TrajectoryBatch> = state.batches.iter().filter(own).collect();
    let trained = &state.plan.trained;
    let surrogate = Surrogate {
        objective: s.objective,
        clip_range: s.clip_range as f32,
        beta: s.kl_beta as f32,
        guidance_gradient: s.guidance_gradient,
        scale: 1.0 / (images.len() * trained.len()) as f32,
    };
    if state.restored && !run.tested {
        test_restored(run, state, batches[0], &surrogate)?;
    }
    let mut sum = gradient(run, state, &batches, &surrogate)?;
    let stats = sum.all_stats(trained.len());
    if !run.tested {
        let found = self_test::self_test(s, &stats, &sum.gradients)?;
        run.observer.on(Event::SelfTest { largest: found.largest, bound: found.bound });
        run.tested = true;
    }
    let table = credit_table(&run.first().compute, trained, &stats)?;
    let number = run.state.updates + 1;
    if let Some(request) = run.dump.take_if(|d| d.update == number) {
        let update = dump::Update {
            run,
            plan: &state.plan,
            batches: &batches,
            surrogate: &surrogate,
            gradient: &sum,
            advantages: &state.advantages[images.clone()],
        };
        dump::write(&update, &request)?;
        run.observer.on(Event::Dumped { update: number, file: &request.file });
    }
    let grad_norm = clip_norm(&mut sum.gradients, s.max_grad_norm);
    let epoch = run.state.epoch + 1;
    let took = Took { learning_rate: s.learning_rate_at(number - 1), grad_norm, calls: sum.calls };
    let record = UpdateRecord::new(epoch, number, trained, &table, took);
    run.state.updates = number;
    if record.skipped {
        run.state.skipped += 1;
        run.skipped_in_a_row += 1;
        run.warn(&format!(
            "update {number} has a loss or gradient that is not finite and is skipped"
        ));
    } else {
        run.skipped_in_a_row = 0;
        let config = AdamWConfig::new(record.learning_rate, s.weight_decay);
        run.optimizer.update(&config, run.adapter.parameters_mut(), &sum.gradients);
        run.average();
    }
    Ok(record)
}

/// METRICS, CHECKPOINT
fn record(run: &mut Run, done: &EpochState) -> Result<()> {
    let s = run.settings;
    let state = RunState { epoch: run.state.epoch + 1, unfinished: None, ..run.state.clone() };
    let mut record = done.record(state.epoch, state.skipped);
    // Before anything is changed: a reward program that dies here must not cost the epoch.
    let shown = if state.epoch == s.epochs || state.epoch.is_multiple_of(s.eval_every) {
        Some(evaluate(run, Extent::Full)?)
    } else if state.epoch.is_multiple_of(s.sample_every) {
        Some(evaluate(run, Extent::Row)?)
    } else {
        None
    };
    if shown.is_none() || run.ema.is_some() {
        // No grid of the policy itself is due: one picture shows whether it may be saved.
        run.draw(&run.plan_evaluation(Extent::Probe)?)?;
    }
    keep_beginning(run)?;
    done.updates.iter().for_each(|update| run.folder.record(Record::Update(update.clone())));
    // The watch compares the rollouts' rewards, this one's among them.
    run.folder.record(Record::Epoch(record.clone()));
    if let Some(shown) = shown {
        run.show(state.epoch, shown)?;
    }
    record.warnings = std::mem::take(&mut run.warnings);
    run.folder.amend(&record);
    let state = RunState { metrics_lines: run.folder.records().len(), ..state };
    run.save(state.clone(), Vec::new())?;
    run.state = state;
    run.kept = Some(format!("{} complete epochs", run.state.epoch));
    run.observer.on(Event::Epoch { record: &record, epochs: s.epochs });
    Ok(())
}

/// The run's first and last pictures side by side.
fn finish(run: &mut Run) -> Result<Summary> {
    let (dir, last) = (run.folder.dir.clone(), run.state.epoch);
    let before = open_grid(&dir, 0)?;
    let drawn = open_grid(&dir, last).ok().filter(|g| g.dimensions() == before.dimensions());
    let after = match drawn {
        Some(grid) => grid,
        // The run was meant to be longer when its last epoch was drawn, in one row or not at all.
        None => {
            let shown = evaluate(run, Extent::Full)?;
            let grid = shown.grid.clone();
            run.show(last, shown)?;
            grid
        }
    };
    run.folder.picture("before_after.png", &before_after(&before, &after))?;
    run.folder.flush(|_| Ok(()))?;
    let (before, after) = (run.folder.reward_of(0)?, run.folder.reward_of(last)?);
    let best_epoch = best_epoch(run.settings, run.folder.records());
    run.written();
    Ok(Summary { before, after, best_epoch, stopped: run.collapsed(), out: dir })
}
