//! The gradient of an update over all devices.

use anyhow::{Context, Result};

use super::epoch::EpochState;
use super::forward::{ForwardOptions, forward_gradient};
use super::observer::Event;
use super::run::Run;
use super::update::{GradientOptions, TrajectoryBatch, batch_gradient};
use super::update_gradient::{BatchGradient, UpdateGradient};
use crate::config::{Objective, Settings};
use crate::lora::{Adapter, Lora};
use crate::ops::forward_objective::{ForwardObjective, ForwardSurrogate};
use crate::ops::policy_objective::{self, Surrogate};
use crate::sampling::Replica;
use crate::sampling::fleet::in_their_order;
use crate::sampling::generate::{lora_of, upload_adapter};
use crate::sampling::policy::{GuidanceMode, Policy};

/// What an update minimises.
pub(super) enum Loss {
    /// A surrogate of the steps of trajectories.
    Policy(Surrogate),
    /// An objective of the forward process.
    Forward(ForwardSurrogate),
}

impl Loss {
    /// A mean over so many pairs of an image and a step or time; the KL's over `rows` of them.
    pub fn new(s: &Settings, entries: usize, rows: usize) -> Self {
        let scale = 1.0 / entries as f32;
        let policy = |objective| {
            Self::Policy(Surrogate {
                objective,
                clip_range: s.clip_range as f32,
                beta: (s.kl_beta * (entries as f64 / rows as f64)) as f32,
                guidance_gradient: s.guidance_gradient,
                scale,
            })
        };
        let forward = |objective| {
            Self::Forward(ForwardSurrogate {
                objective,
                clamp: s.advantage_clamp as f32,
                kl_beta: s.kl_beta as f32,
                scale,
            })
        };
        match s.objective {
            Objective::PpoClip => policy(policy_objective::Objective::PpoClip),
            Objective::LogRatio => policy(policy_objective::Objective::LogRatio),
            Objective::LogHinge => policy(policy_objective::Objective::LogHinge),
            Objective::Nft => forward(ForwardObjective::Nft { beta: s.nft_beta as f32 }),
            Objective::Awm => forward(ForwardObjective::Awm { clip_range: s.clip_range as f32 }),
        }
    }
}

/// The gradient of an update, batch by batch in their order; in the first of several processes.
pub(super) fn gradient(
    run: &Run,
    state: &EpochState,
    batches: &[&TrajectoryBatch],
    loss: &Loss,
) -> Result<UpdateGradient> {
    let adapters = match loss {
        Loss::Policy(_) => Adapters::of_policy(run),
        Loss::Forward(_) => Adapters::of_forward(run, state)?,
    };
    let mut sum = UpdateGradient::default();
    let work = |replica: &Replica, batch: &&TrajectoryBatch| {
        batch_on(replica, run, state, batch, loss, &adapters)
    };
    let (fleet, device) = (&run.fleet, |batch: &&TrajectoryBatch| batch.part.device);
    if fleet.world.size() == 1 {
        fleet.fold(batches, device, work, |_, batch| {
            sum.add(batch);
            Ok(())
        })?;
        return Ok(sum);
    }
    let of_all = fleet.world.gather(fleet.map(batches, device, work))?;
    in_their_order(of_all).into_iter().for_each(|batch| sum.add(batch));
    Ok(sum)
}

/// Adapters on every replica's device.
struct Adapters {
    now: Vec<Lora>,
    /// The old policy of an objective of the forward process.
    old: Vec<Lora>,
    /// The policy that sampled the epoch, where AWM asks for it: none in the epoch's first update,
    /// where it is the one of now.
    sampled: Vec<Lora>,
}

impl Adapters {
    fn of_policy(run: &Run) -> Self {
        let now = upload_adapter(&run.fleet.replicas, Some(&run.adapter));
        Self { now, old: Vec::new(), sampled: Vec::new() }
    }

    fn of_forward(run: &Run, state: &EpochState) -> Result<Self> {
        let later = run.settings.objective == Objective::Awm && !state.updates.is_empty();
        let good = || {
            let good = run.good.as_ref().context("the state before the epoch is not known")?;
            anyhow::Ok::<&Adapter>(&good.adapter)
        };
        let sampled = later.then(good).transpose()?;
        Ok(Self {
            old: upload_adapter(&run.fleet.replicas, run.followers.old.as_ref()),
            sampled: upload_adapter(&run.fleet.replicas, sampled),
            ..Self::of_policy(run)
        })
    }
}

/// The gradient of one batch on a replica.
fn batch_on(
    replica: &Replica,
    run: &Run,
    state: &EpochState,
    batch: &TrajectoryBatch,
    loss: &Loss,
    adapters: &Adapters,
) -> Result<BatchGradient> {
    let (s, plan) = (run.settings, &state.plan);
    let net = &*replica.pipeline.net;
    let prompts = run.prompts_of(replica, plan, &batch.part)?;
    let policy = Policy {
        compute: &replica.compute,
        net,
        lora: lora_of(&adapters.now, &run.fleet.replicas, replica),
        guidance: GuidanceMode::new(net, s.guidance_scale),
        prompts: &prompts,
    };
    let advantage = &state.advantages_of(&batch.part);
    let tick = || run.observer.on(Event::PhaseAdvances);
    let rows_at_once = run.rows_at_once;
    match loss {
        Loss::Policy(surrogate) => {
            let options = GradientOptions { surrogate, advantage, rows_at_once };
            batch_gradient(&policy, &run.adapter, batch, &plan.trained, &options, &tick)
        }
        Loss::Forward(surrogate) => {
            let old = lora_of(&adapters.old, &run.fleet.replicas, replica);
            let options = ForwardOptions {
                surrogate,
                guidance_gradient: s.guidance_gradient,
                advantage,
                times: &plan.times[batch.part.images.clone()],
                pass: state.updates.len() / s.updates_per_epoch,
                old: old.context("the old policy is not known")?,
                sampled: lora_of(&adapters.sampled, &run.fleet.replicas, replica),
                rows_at_once,
                test: !run.tested,
            };
            forward_gradient(&policy, &run.adapter, batch, &plan.trained, &options, &tick)
        }
    }
}
