//! What keeps a run's work: an epoch is suspended and restored, and a run that has diverged goes
//! back to its last good state.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow};

use super::checkpoint::{self, Parts, RunState, Snapshot, Unfinished};
use super::epoch::EpochState;
use super::evaluation::Extent;
use super::label::label;
use super::metrics::{Record, SuspendedRecord};
use super::observer::Event;
use super::plan::Part;
use super::run::{BEST, EMA, Run};
use super::self_test::self_test;
use super::update::{GradientOptions, TrajectoryBatch, batch_gradient};
use super::update_gradient::all_stats;
use super::watch::best_epoch;
use crate::device::tensor::{read, upload};
use crate::io::weights::Weights;
use crate::lora::formats::{self, Format};
use crate::ops::policy_objective::Surrogate;
use crate::ops::{self, Coefficients, StepContext};
use crate::sampling::policy::{Branch, GuidanceMode, Policy, PromptPair};
use crate::sampling::trajectory::Transition;
use crate::schedule::Step;

/// Writes the run as it stands between two updates: settings, metrics and pictures so far, the
/// adapter, and a checkpoint that goes on with the next update.
pub(super) fn suspend(run: &mut Run, state: &EpochState) -> Result<()> {
    // What the epoch's end had recorded when it could not be saved.
    run.forget_after(run.state.epoch, run.state.metrics_lines);
    keep_beginning(run)?;
    let epoch = run.state.epoch + 1;
    // The times are the log's, not the checkpoint's: equal runs have equal checkpoints.
    run.folder.record(Record::Suspended(SuspendedRecord { epoch, seconds: state.seconds }));
    let unfinished = Unfinished {
        rewards: state.rewards.clone(),
        scores: state.scores.clone(),
        rollout_calls: Some(state.rollout_calls),
        updates: state.updates.clone(),
        seconds: None,
    };
    let stopped = RunState { unfinished: Some(unfinished), ..run.state.clone() };
    let others = of_others(run, state)?;
    run.save(stopped, state.tensors(&others))?;
    run.kept = Some(format!("{} updates of epoch {epoch}", state.updates.len()));
    Ok(())
}

/// What other processes have sampled of an epoch, by the batch's number, in the one that writes.
fn of_others(run: &Run, state: &EpochState) -> Result<BTreeMap<usize, TrajectoryBatch>> {
    let fleet = &run.fleet;
    let mine = |(_, batch): &(usize, &TrajectoryBatch)| {
        !fleet.world.is_first() && fleet.local(batch.part.device).is_some()
    };
    let own = state.batches.iter().enumerate().filter(mine);
    type Sampled = (usize, (Vec<Transition>, Vec<f32>));
    let own: Vec<Sampled> =
        own.map(|(i, batch)| (i, (batch.transitions.clone(), batch.ends.clone()))).collect();
    let whole = |(i, (transitions, ends)): Sampled| {
        let TrajectoryBatch { part, noise, latent, .. } = &state.batches[i];
        let (part, noise, latent) = (part.clone(), *noise, *latent);
        (i, TrajectoryBatch { part, noise, latent, transitions, ends })
    };
    Ok(fleet.world.gather(Ok(own))?.into_iter().flatten().map(whole).collect())
}

/// A policy may turn out to have diverged when it is drawn with: the state before the first epoch,
/// which has no checkpoint of its own, is kept beside what comes of it.
pub(super) fn keep_beginning(run: &mut Run) -> Result<()> {
    let Some(good) = run.good.clone().filter(|g| g.state.epoch == 0) else { return Ok(()) };
    let written = if run.folder.writes() && !checkpoint::exists(&run.folder.dir, 0) {
        let parts = parts(run, &good);
        run.folder.flush(|dir| checkpoint::write(dir, &parts, Vec::new()).map(drop))
    } else {
        Ok(())
    };
    run.fleet.world.agree(written)
}

fn parts<'a>(run: &Run, snapshot: &'a Snapshot) -> Parts<'a> {
    let Snapshot { state, adapter, optimizer, followers } = snapshot;
    let label = label(run.settings, run.first(), state.epoch);
    Parts { state, adapter, optimizer, followers, label }
}

/// Restores the epoch that the run was stopped in, where it was.
///
/// # Errors
/// When the checkpoint does not fit the settings.
pub(super) fn restore(run: &mut Run, transitions: Option<Weights>) -> Result<Option<EpochState>> {
    let dropped = run.forget_after(run.state.epoch, run.state.metrics_lines);
    let Some(unfinished) = run.state.unfinished.take() else { return Ok(None) };
    let file = transitions.ok_or_else(|| anyhow!("the stopped epoch has no tensors"))?;
    let seconds = dropped.iter().rev().find_map(|record| match record {
        Record::Suspended(s) => Some(s.seconds),
        Record::Update(_) | Record::Epoch(_) | Record::Evaluation(_) => None,
    });
    let seconds = seconds.or(unfinished.seconds).unwrap_or_default();
    let (plan, latent) = (run.plan_epoch()?, run.latent_shape());
    // Its beginning is a complete epoch.
    run.good = earlier(run, run.state.epoch + 1)?;
    let is_mine = |part: &Part| run.fleet.local(part.device).is_some();
    EpochState::restore(plan, is_mine, latent, &file, unfinished, seconds).map(Some)
}

/// The self-test of an epoch that another process began: its adapter has been updated since, so
/// that rho is not 1 any more. The policy of now takes the first batch's steps anew, by the way
/// that sampling goes, and the update has to find what it says.
pub(super) fn test_restored(
    run: &mut Run,
    state: &EpochState,
    batch: &TrajectoryBatch,
    surrogate: &Surrogate,
) -> Result<()> {
    let (s, replica) = (run.settings, run.first());
    let (compute, net) = (&replica.compute, &*replica.pipeline.net);
    let lora = run.adapter.to_device(&compute.burn);
    let prompts = run.prompts_of(replica, &state.plan, &batch.part)?;
    let guidance = GuidanceMode::new(net, s.guidance_scale);
    let policy = Policy { compute, net, lora: Some(&lora), guidance, prompts: &prompts };
    let again = |(step, before): (&Step, &Transition)| {
        let few = batch.part.rows.firsts();
        let alone = PromptPair { cond: prompts.cond.at(&few), uncond: prompts.uncond.at(&few) };
        let policy = Policy { prompts: &alone, ..policy };
        let [c, h, w] = batch.latent;
        let x = upload(&before.x, [few.len(), c, h, w], &compute.burn);
        let context = StepContext {
            compute,
            guidance: guidance.combine,
            coefficients: Coefficients::from(step),
            key: batch.noise.at(step),
        };
        let pass = policy.pass(Branch::All, &policy.equal_rows(&before.x));
        let next = ops::step(&context, &x, &pass.output(&x, step.t));
        anyhow::Ok(Transition { x: before.x.clone(), old_prediction: read(&next.prediction)? })
    };
    let trained = &state.plan.trained;
    let steps = trained[batch.part.steps.clone()].iter().zip(&batch.transitions);
    let own = TrajectoryBatch {
        part: batch.part.clone(),
        noise: batch.noise,
        latent: batch.latent,
        transitions: steps.map(again).collect::<Result<_>>()?,
        ends: Vec::new(),
    };
    let options = GradientOptions {
        surrogate,
        advantage: &state.advantages_of(&batch.part),
        rows_at_once: run.rows_at_once,
    };
    let found = batch_gradient(&policy, &run.adapter, &own, trained, &options, &|| {})?;
    let passed = self_test(s, &all_stats(&found.steps), &found.gradients)?;
    run.observer.on(Event::SelfTest {
        of: passed.of,
        largest: passed.largest,
        bound: passed.bound,
    });
    run.tested = true;
    Ok(())
}

/// Ends a run whose values are not finite any more, which `error` says: it goes back to its last
/// good state and saves that. A model that was never finite is no run that has diverged.
pub(super) fn diverged(run: &mut Run, error: anyhow::Error) -> anyhow::Error {
    if run.state.updates == 0 {
        return error;
    }
    let (s, dir) = (run.settings, run.folder.dir.clone());
    let updates = run.state.updates;
    let advice =
        format!("lower --learning-rate {} or --max-grad-norm {}", s.learning_rate, s.max_grad_norm);
    // What is on disk would end like this again: nobody is told to continue with it.
    run.kept = None;
    let found = last_good(run);
    let good = match run.fleet.world.agree(found) {
        Ok(Some(good)) => good,
        Ok(None) => {
            return error.context(format!(
                "the run has diverged after {updates} updates, and no earlier state is in {}; \
                 {advice} in a new run",
                dir.join("checkpoints").display()
            ));
        }
        Err(unreadable) => {
            return error.context(format!("the run cannot go back ({unreadable:#})"));
        }
    };
    let epoch = good.state.epoch;
    if let Err(device) = draws(run, &good) {
        return error.context(format!(
            "the pictures of the state after {epoch} epochs are not finite on this device either \
             ({device:#}); {} is left as it was: continue it with another --device",
            dir.display()
        ));
    }
    if let Err(disk) = go_back(run, good) {
        return error.context(format!("the run cannot go back ({disk:#})"));
    }
    error.context(format!(
        "the run has diverged after {updates} updates and went back to its state after {epoch} \
         epochs, which is saved; {advice} in a new run, which --lora {} starts from there",
        dir.join("adapter.safetensors").display()
    ))
}

/// Whether a state's pictures are finite on this device: one is drawn.
fn draws(run: &mut Run, good: &Snapshot) -> Result<()> {
    let now = std::mem::replace(&mut run.adapter, good.adapter.clone());
    let drawn = run.plan_evaluation(Extent::Probe).and_then(|plan| run.draw(&plan));
    run.adapter = now;
    drawn.map(drop)
}

/// The newest state before this one whose pictures were finite: of this process, or on disk.
fn last_good(run: &mut Run) -> Result<Option<Snapshot>> {
    if let Some(good) = run.good.take() {
        return Ok(Some(good));
    }
    earlier(run, run.state.epoch)
}

/// The newest complete epoch on disk before one.
fn earlier(run: &Run, epoch: usize) -> Result<Option<Snapshot>> {
    let linears = run.first().pipeline.net.linears();
    checkpoint::load_before(&run.folder.dir, epoch, &run.state.model, &linears)
}

/// Makes a state the run's own, in memory and on disk.
fn go_back(run: &mut Run, good: Snapshot) -> Result<()> {
    let best = best_epoch(run.settings, run.folder.records());
    let best_is_gone = best.is_some_and(|epoch| epoch > good.state.epoch);
    run.forget_after(good.state.epoch, good.state.metrics_lines);
    let parts = parts(run, &good);
    let label = &parts.label;
    let written = run.folder.flush(|dir| {
        let file = dir.join("adapter.safetensors");
        formats::save(&good.adapter, &file, Format::Diffusers, label)?;
        if let Some(ema) = &good.followers.mean {
            formats::save(ema, &dir.join(EMA), Format::Diffusers, label)?;
        }
        if best_is_gone {
            let shown = good.followers.mean.as_ref().unwrap_or(&good.adapter);
            formats::save(shown, &dir.join(BEST), Format::Diffusers, label)?;
        }
        checkpoint::rewind(dir, &parts)
    });
    run.fleet.world.agree(written)?;
    let Snapshot { state, adapter, optimizer, followers } = good;
    (run.state, run.adapter, run.optimizer, run.followers) = (state, adapter, optimizer, followers);
    Ok(())
}
