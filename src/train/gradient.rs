//! The gradient of an update over all devices.

use anyhow::Result;

use super::epoch::EpochState;
use super::observer::Event;
use super::run::Run;
use super::update::{GradientOptions, TrajectoryBatch, UpdateGradient, batch_gradient};
use crate::ops::policy_objective::Surrogate;
use crate::sampling::Replica;
use crate::sampling::generate::{lora_of, prompt_pair, upload_adapter};
use crate::sampling::parallel::fold_batches;
use crate::sampling::policy::{GuidanceMode, Policy};

/// The gradient of an update, batch by batch.
pub(super) fn gradient(
    run: &Run,
    state: &EpochState,
    batches: &[&TrajectoryBatch],
    surrogate: &Surrogate,
) -> Result<UpdateGradient> {
    let s = run.settings;
    let loras = upload_adapter(&run.replicas, Some(&run.adapter));
    let uncond = run.embeddings.row_of("")?;
    let mut sum = UpdateGradient::default();
    let work = |replica: &Replica, batch: &&TrajectoryBatch| {
        let net = &*replica.pipeline.net;
        let images = &state.plan.images[batch.images.clone()];
        let prompts = prompt_pair(replica, &run.embeddings, uncond, images)?;
        let policy = Policy {
            compute: &replica.compute,
            net,
            lora: lora_of(&loras, &run.replicas, replica),
            guidance: GuidanceMode::new(net, s.guidance_scale),
            prompts: &prompts,
        };
        let options = GradientOptions {
            surrogate,
            advantage: &state.advantages[batch.images.clone()],
            rows_at_once: run.rows_at_once,
        };
        let tick = || run.observer.on(Event::PhaseAdvances);
        batch_gradient(&policy, &run.adapter, batch, &state.plan.trained, &options, &tick)
    };
    fold_batches(&run.replicas, batches, work, |batch| {
        sum.add(batch);
        Ok(())
    })?;
    Ok(sum)
}
