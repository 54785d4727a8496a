//! ROLLOUT, DECODE, REWARD, ADVANTAGE: an epoch's images and what they are worth.

use std::time::Instant;

use anyhow::Result;
use image::RgbImage;

use super::branching;
use super::epoch::EpochState;
use super::metrics::{PeakMemory, Seconds};
use super::plan::EpochPlan;
use super::rewards::flat;
use super::run::Run;
use super::sampled::{Sampled, in_rollout};
use super::update::TrajectoryBatch;
use crate::config::Rollout;
use crate::device::system::{peak, reset_peak};
use crate::device::tensor::{read, upload};
use crate::sampling::generate::{Generated, Request, generate};
use crate::sampling::parallel::map_batches;
use crate::sampling::policy::Weighted;
use crate::sampling::trajectory::decode;

/// Samples, decodes and scores an epoch's images.
pub(super) fn rollout(run: &mut Run) -> Result<EpochState> {
    let start = Instant::now();
    let s = run.settings;
    let plan = run.plan_epoch()?;

    // ------------------------------------------------------------------------------------- ROLLOUT
    reset_peak();
    let Sampled { batches, latents, calls } = match &s.rollout {
        Rollout::Plain(_) => sample(run, &plan)?,
        Rollout::Branching(_) => branching::sample(run, &plan)?,
    };
    let (sampled, sampling_peak) = (start.elapsed().as_secs_f64(), peak());

    // ------------------------------------------------------------------------------ DECODE, REWARD
    reset_peak();
    let [c, h, w] = run.latent_shape();
    let images: Vec<RgbImage> = map_batches(&run.replicas, &latents, |replica, latents| {
        let shape = [latents.len() / (c * h * w), c, h, w];
        decode(&replica.pipeline.vae, &upload(latents, shape, &replica.compute.burn))
    })?
    .concat();
    let (decoded, decoding_peak) = (start.elapsed().as_secs_f64(), peak());
    let scores = run.score(&images, &plan.prompts)?;
    let scored = start.elapsed().as_secs_f64();

    // ----------------------------------------------------------------------------------- ADVANTAGE
    let groups: Vec<&str> = plan.groups.iter().map(String::as_str).collect();
    let advantages = scores.advantages(s, &mut run.state, &groups);
    let (rewards, scores) = (scores.totals(), scores.records(&groups));
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

/// Draws each image by a trajectory of its own, in the batches of the updates.
fn sample(run: &Run, plan: &EpochPlan) -> Result<Sampled> {
    let s = run.settings;
    // An objective of the forward process needs to know nothing but where the images end.
    let forward = s.objective.forward();
    let trained = if forward { &[][..] } else { &plan.trained };
    let keep: Vec<usize> = trained.iter().map(|step| step.index).collect();
    let parts: Vec<_> = plan.parts.iter().map(|part| part.images.clone()).collect();
    let request = Request {
        images: &plan.starts,
        batches: &parts,
        embeddings: &run.embeddings,
        policies: &[Weighted::whole(Some(run.sampling()))],
        guidance_scale: s.guidance_scale,
        steps: &plan.steps,
        keep: &keep,
        latent: run.latent_shape(),
        noise: plan.noise,
    };
    let units = parts.len() * plan.steps.len();
    let sampled = in_rollout(run, units, &|tick| {
        generate(&run.replicas, &request, tick, |_, drawn: Generated| {
            Ok((drawn.transitions, read(&drawn.latents)?, drawn.calls))
        })
    })?;
    let mut found = Sampled { batches: Vec::new(), latents: Vec::new(), calls: 0 };
    for (part, (transitions, latents, calls)) in plan.parts.iter().zip(sampled) {
        found.batches.push(TrajectoryBatch {
            noise: part.noise(plan.noise),
            latent: request.latent,
            transitions,
            ends: if forward { latents.clone() } else { Vec::new() },
            part: part.clone(),
        });
        found.latents.push(latents);
        found.calls += calls;
    }
    Ok(found)
}
