//! ROLLOUT, DECODE, REWARD, ADVANTAGE: an epoch's images and what they are worth.

use std::time::Instant;

use anyhow::Result;
use image::RgbImage;

use super::branching;
use super::epoch::EpochState;
use super::memory::{PeakMemory, PhaseMemory};
use super::metrics::Seconds;
use super::plan::{EpochPlan, Part};
use super::rewards::flat;
use super::run::Run;
use super::sampled::{Ends, Sampled, in_rollout};
use super::update::TrajectoryBatch;
use crate::config::Rollout;
use crate::device::tensor::{read, upload};
use crate::sampling::fleet::Batch;
use crate::sampling::generate::{Generated, Request, generate};
use crate::sampling::policy::Weighted;
use crate::sampling::trajectory::decode;

/// Samples, decodes and scores an epoch's images.
pub(super) fn rollout(run: &mut Run) -> Result<EpochState> {
    let start = Instant::now();
    let s = run.settings;
    let plan = run.plan_epoch()?;
    // What was drawn to look at belongs to no epoch.
    run.fleet.take_counts()?;

    // ------------------------------------------------------------------------------------- ROLLOUT
    PhaseMemory::begin();
    let Sampled { batches, latents, calls } = match &s.rollout {
        Rollout::Plain(_) => sample(run, &plan)?,
        Rollout::Branching(_) => branching::sample(run, &plan)?,
    };
    let sampled = start.elapsed().as_secs_f64();
    let sampling_memory = PhaseMemory::end(&run.fleet);

    // ------------------------------------------------------------------------------ DECODE, REWARD
    PhaseMemory::begin();
    let [c, h, w] = run.latent_shape();
    let device = |ends: &Ends| ends.images.device;
    let pictures = run.fleet.map(&latents, device, |replica, Ends { images, latents }| {
        let shape = [images.rows.len(), c, h, w];
        decode(&replica.pipeline.vae, &upload(latents, shape, &replica.compute.burn))
    });
    let decoded = start.elapsed().as_secs_f64();
    let decoding_memory = PhaseMemory::end(&run.fleet);
    // Each process scores what its devices have drawn.
    let numbers: Vec<usize> = latents.iter().flat_map(|ends| ends.images.rows.clone()).collect();
    let pictures: Vec<RgbImage> =
        run.fleet.world.agree(pictures)?.into_iter().flat_map(|(_, pictures)| pictures).collect();
    let scores = run.score(&numbers, &pictures, &plan.prompts)?;
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
    let peaks =
        PeakMemory { rollout: sampling_memory, decode: decoding_memory, ..Default::default() };
    Ok(EpochState {
        batches,
        plan,
        rewards,
        scores,
        advantages,
        rollout_calls: run.fleet.world.all(Ok(calls))?.iter().sum(),
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
    let share = |part: &Part| Batch { rows: part.images.clone(), device: part.device };
    let parts: Vec<Batch> = plan.parts.iter().map(share).collect();
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
        generate(&run.fleet, &request, tick, |_, drawn: Generated| {
            Ok((drawn.transitions, read(&drawn.latents)?, drawn.calls))
        })
    })?;
    let batch = |part: &Part| TrajectoryBatch {
        noise: part.noise(plan.noise),
        latent: request.latent,
        transitions: Vec::new(),
        ends: Vec::new(),
        part: part.clone(),
    };
    let batches = plan.parts.iter().map(batch).collect();
    let mut found = Sampled { batches, latents: Vec::new(), calls: 0 };
    for (i, (transitions, latents, calls)) in sampled {
        let batch = &mut found.batches[i];
        batch.transitions = transitions;
        if forward {
            batch.ends.clone_from(&latents);
        }
        found.latents.push(Ends { images: parts[i].clone(), latents });
        found.calls += calls;
    }
    Ok(found)
}
