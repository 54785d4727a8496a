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
mod branching;
#[doc(hidden)]
pub mod checkpoint;
mod control;
mod dump;
mod epoch;
mod epoch_record;
mod evaluation;
mod evaluation_record;
mod fit;
mod followers;
#[doc(hidden)]
pub mod forward;
mod gradient;
mod job;
mod label;
mod measures;
mod memory;
pub mod metrics;
pub mod observer;
#[doc(hidden)]
pub mod plan;
mod plan_branches;
mod plan_images;
mod prepare;
mod recovery;
mod rewards;
mod rollout;
mod run;
#[doc(hidden)]
pub mod run_folder;
mod sampled;
mod self_test;
mod steps;
#[doc(hidden)]
pub mod update;
#[doc(hidden)]
pub mod update_gradient;
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
use self::followers::Followers;
use self::gradient::{Loss, gradient};
pub use self::job::{DumpRequest, Job};
use self::measures::evaluate;
use self::memory::PhaseMemory;
use self::metrics::{About, Record, Took, UpdateRecord};
pub use self::observer::{Event, Observer, Silent};
use self::prepare::{Prepared, prepare};
use self::recovery::{diverged, keep_beginning, restore, suspend, test_restored};
use self::rollout::rollout;
use self::run::Run;
pub use self::run::Summary;
use self::run_folder::{ABOUT, SETTINGS, open_grid};
pub use self::steps::check;
use self::update::TrajectoryBatch;
use self::update_gradient::{UpdateGradient, all_stats, credit_table};
use self::watch::best_epoch;
use crate::device;
use crate::sampling::fleet::Picture;
use crate::sampling::trajectory::NotFinite;

/// Updates in a row that may be skipped for values that are not finite.
const MAX_SKIPPED: usize = 3;

/// Runs a job to its end.
///
/// # Errors
/// On bad settings or files before anything is written; on a failing device, reward or disk; when
/// the adapter diverges; when it was asked to stop. The message says how to continue where there is
/// something to continue from.
pub fn train(mut job: Job, observer: &dyn Observer) -> Result<Summary> {
    let Prepared { mut run, transitions } = prepare(&mut job, observer)?;
    let result = device::guard(|| {
        // Also of a resumed run, which may have been given more epochs.
        let settings = toml::to_string(run.settings).context("settings")?;
        run.folder.file(SETTINGS, settings.into_bytes());
        let about = About::this(&run.fleet.names.join(" + "));
        run.folder.file(ABOUT, serde_json::to_vec_pretty(&about)?);
        if run.folder.writes() {
            wishes::forget(&run.folder.dir);
        }
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
    run.fleet.world.agree(result).map_err(|e| match &run.kept {
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
    let result = run.fleet.world.agree(result);
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

/// The updates of an epoch that are not done yet. A signal is heard between two of them.
fn updates(run: &mut Run, state: &mut EpochState) -> Result<()> {
    let s = run.settings;
    PhaseMemory::begin();
    let per_pass: usize = state.plan.parts.iter().map(|part| part.steps.len()).sum();
    // Of several processes each sees its own share go on.
    let per_pass = per_pass.div_ceil(run.fleet.world.size());
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
            run.hear_stop_together()?;
        }
    }
    run.observer.on(Event::PhaseEnds);
    state.peaks.update = PhaseMemory::end(&run.fleet);
    Ok(())
}

/// One optimizer step over the batches of an update.
fn update(run: &mut Run, state: &EpochState) -> Result<UpdateRecord> {
    let s = run.settings;
    let share = state.updates.len() % s.updates_per_epoch;
    let own = |b: &&TrajectoryBatch| b.part.update == share;
    let batches: Vec<&TrajectoryBatch> = state.batches.iter().filter(own).collect();
    let loss = Loss::new(s, state.entries(s, &batches), state.rows(&batches));
    if let Loss::Policy(surrogate) = &loss
        && state.restored
        && !run.tested
        // Whose device the first batch is on.
        && run.fleet.world.is_first()
    {
        test_restored(run, state, batches[0], surrogate)?;
    }
    let sum = gradient(run, state, &batches, &loss)?;
    let first = run.fleet.world.is_first();
    let stepped = first.then(|| optimizer_step(run, state, &batches, &loss, sum));
    // As metrics.jsonl has it.
    let told = stepped.map(|record| Ok(serde_json::to_string(&record?)?));
    let record: UpdateRecord = serde_json::from_str(&run.fleet.world.from_first(told)?)?;
    run.tested = true;
    run.state.updates = record.update;
    if record.skipped {
        run.state.skipped += 1;
        run.skipped_in_a_row += 1;
        run.warn(&format!(
            "update {} has a loss or gradient that is not finite and is skipped",
            record.update
        ));
    } else {
        run.skipped_in_a_row = 0;
        run.share_adapter()?;
        let step = run.optimizer.step;
        run.followers.after_step(s, &run.adapter, step);
    }
    Ok(record)
}

/// The step of an update's gradient, which the first of several processes takes.
fn optimizer_step(
    run: &mut Run,
    state: &EpochState,
    batches: &[&TrajectoryBatch],
    loss: &Loss,
    mut sum: UpdateGradient,
) -> Result<UpdateRecord> {
    let s = run.settings;
    if !run.tested {
        let found = self_test::self_test(s, &all_stats(&sum.steps), &sum.gradients)?;
        let self_test::SelfTest { of, largest, bound } = found;
        run.observer.on(Event::SelfTest { of, largest, bound });
    }
    let trained = &state.plan.trained[..state.plan.policy_steps];
    let table = credit_table(&run.first().compute, trained, &sum)?;
    let number = run.state.updates + 1;
    if let Some(request) = run.dump.take_if(|d| d.update == number) {
        let update = dump::Update { run, batches, loss, gradient: &sum, state };
        dump::write(&update, &request)?;
        run.observer.on(Event::Dumped { update: number, file: &request.file });
    }
    let grad_norm = clip_norm(&mut sum.gradients, s.max_grad_norm);
    let epoch = run.state.epoch + 1;
    let took = Took { learning_rate: s.learning_rate_at(number - 1), grad_norm, calls: sum.calls };
    let record = UpdateRecord::new(epoch, number, &table, took);
    if !record.skipped {
        let config = AdamWConfig::new(record.learning_rate, s.weight_decay);
        run.optimizer.update(&config, run.adapter.parameters_mut(), &sum.gradients);
    }
    Ok(record)
}

/// METRICS, CHECKPOINT
fn record(run: &mut Run, done: &EpochState) -> Result<()> {
    let s = run.settings;
    let state = RunState { epoch: run.state.epoch + 1, unfinished: None, ..run.state.clone() };
    let mut record = done.record(state.epoch, state.skipped);
    record.device_batches = run.fleet.take_counts()?;
    // Before anything is changed: a reward program that dies here must not cost the epoch.
    let shown = if state.epoch == s.epochs || state.epoch.is_multiple_of(s.eval_every) {
        Some(evaluate(run, Extent::Full)?)
    } else if state.epoch.is_multiple_of(s.sample_every) {
        Some(evaluate(run, Extent::Row)?)
    } else {
        None
    };
    if shown.is_none() || run.followers != Followers::default() {
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
    let before = run.followers.clone();
    run.followers.after_epoch(s, &run.adapter, run.optimizer.step);
    if let Err(e) = run.save(state.clone(), Vec::new()) {
        // What is saved in its place is the epoch as it was before its end.
        run.followers = before;
        return Err(e);
    }
    run.state = state;
    run.kept = Some(format!("{} complete epochs", run.state.epoch));
    run.observer.on(Event::Epoch { record: &record, epochs: s.epochs });
    Ok(())
}

/// The run's first and last pictures side by side.
fn finish(run: &mut Run) -> Result<Summary> {
    let (dir, last) = (run.folder.dir.clone(), run.state.epoch);
    let world = &run.fleet.world;
    let before =
        world.from_first(world.is_first().then(|| open_grid(&dir, 0).map(Picture::from)))?;
    let before = RgbImage::from(before);
    let drawn = open_grid(&dir, last).ok().filter(|g| g.dimensions() == before.dimensions());
    // The run was meant to be longer when its last epoch was drawn, in one row or not at all.
    let undrawn = world.from_first(world.is_first().then(|| Ok(drawn.is_none())))?;
    let after = if undrawn {
        let shown = evaluate(run, Extent::Full)?;
        let grid = shown.grid.clone();
        run.show(last, shown)?;
        Some(grid)
    } else {
        drawn
    };
    if let Some(after) = after {
        run.folder.picture("before_after.png", &before_after(&before, &after))?;
    }
    let written = run.folder.flush(|_| Ok(()));
    run.fleet.world.agree(written)?;
    let (before, after) = (run.folder.reward_of(0)?, run.folder.reward_of(last)?);
    let best_epoch = best_epoch(run.settings, run.folder.records());
    run.written();
    Ok(Summary { before, after, best_epoch, stopped: run.collapsed(), out: dir })
}
