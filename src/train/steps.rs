//! The steps of a run: all that the sampler takes, and those that may be trained. Whether settings
//! have any is known without a device.

use anyhow::{Result, ensure};

use super::plan_branches::steps_without_branches;
use super::rewards::Rewards;
use crate::config::{Branching, Objective, Plain, Rollout, Settings};
use crate::model::pipeline::check_time_ids;
use crate::model::resolution::latent_size;
use crate::model::vae::config::VaeConfig;
use crate::schedule::{Schedule, Step, credit};

/// What can be said against a run's settings without a device and without the networks' weights:
/// by `plan`, by `compare` before its first run, and before a run opens anything.
///
/// # Errors
/// Names the flag or the file that does not fit.
pub fn check(s: &Settings) -> Result<()> {
    Rewards::check(s)?;
    let files = s.files()?;
    let network = files.family.config(&files.network()?.config)?;
    let vae = VaeConfig::read(&files.component("vae")?.config)?;
    let size = latent_size(s.resolution, vae.factor(), network.latent_shape())?;
    check_time_ids(s.micro()?, &*network)?;
    let schedule = files.schedule()?;
    let native = schedule.steps(&s.sampling(network.tokens(size)))?;
    // A model that clips can be drawn with, and planned for; `train` says what stands in its way.
    if native[0].clips() { Ok(()) } else { credited(s, &schedule, native).map(drop) }
}

/// All steps with their credit, and the indices of those that may be trained; `tokens` is how many
/// the network makes of a latent.
pub(super) fn steps(
    s: &Settings,
    schedule: &Schedule,
    tokens: usize,
) -> Result<(Vec<Step>, Vec<usize>)> {
    let native = schedule.steps(&s.sampling(tokens))?;
    ensure!(
        !native[0].clips(),
        "{}: scheduler_config.json: clip_sample = true (DDIM's default where the field is absent) \
         cannot be trained, a clipped mean is not linear; write \"clip_sample\": false there",
        s.model.display()
    );
    credited(s, schedule, native)
}

/// The same of the sampler's own steps.
fn credited(
    s: &Settings,
    schedule: &Schedule,
    native: Vec<Step>,
) -> Result<(Vec<Step>, Vec<usize>)> {
    let steps = credit::apply(s.credit, schedule, native, s.zeta)?;
    let trainable = match &s.rollout {
        Rollout::Plain(plain) => trainable(s, plain, &steps)?,
        Rollout::Branching(branching) => {
            check_branches(branching, &steps)?;
            // The last step has no noise with some samplers, and too little with all.
            (0..steps.len() - 1).filter(|i| steps[*i].trainable()).collect()
        }
    };
    if let Rollout::Branching(b) = &s.rollout {
        let bare = steps_without_branches(b, &trainable).len();
        ensure!(
            b.anchor_steps <= bare,
            "--anchor-steps {}: only {bare} steps have no branches; lower it",
            b.anchor_steps
        );
    }
    Ok((steps, trainable))
}

/// The indices of the steps that a trajectory may be trained at, or of the times that its end may
/// be noised to.
fn trainable(s: &Settings, plain: &Plain, steps: &[Step]) -> Result<Vec<usize>> {
    let last = steps.len() - 1;
    // What rounding leaves of a third of nine steps is still three.
    let within = (steps.len() as f64 * plain.train_within + 1e-9) as usize;
    let may = |i: &usize| {
        let fits = match s.objective {
            Objective::Nft => steps[*i].can_be_noised_to(),
            // The first time after the noise, and every second one, as published.
            Objective::Awm => {
                let published = *i == 1 || *i > 1 && i.is_multiple_of(2);
                steps[*i].can_be_noised_to() && published
            }
            Objective::PpoClip | Objective::LogRatio | Objective::LogHinge => steps[*i].trainable(),
        };
        fits && *i < within && (*i != last || plain.train_last_step)
    };
    let trainable: Vec<usize> = (0..steps.len()).filter(may).collect();
    ensure!(
        !trainable.is_empty(),
        "--steps {}: leaves no step to train within --train-within {}; use more, or \
         --train-last-step",
        steps.len(),
        plain.train_within
    );
    if let Some(k) = plain.train_steps {
        ensure!(
            k <= trainable.len(),
            "--train-steps {k}: only {} steps can be trained; lower it",
            trainable.len()
        );
    }
    Ok(trainable)
}

/// Whether the steps with branches have a density.
fn check_branches(branching: &Branching, steps: &[Step]) -> Result<()> {
    for (i, k) in branching.steps() {
        ensure!(
            steps[i].trainable(),
            "--branch: {k} branches at step {} of {}, which the sampler takes without noise; end \
             the list before it",
            i + 1,
            steps.len()
        );
    }
    Ok(())
}
