//! Plans an epoch whose images have a trajectory each.

use anyhow::Result;

use super::plan::{EpochPlan, Part, PlanContext, chosen, shares, with_own_total};
use crate::config::{InitialNoise, Plain, Settings};
use crate::philox::{self, Stream};
use crate::reward::Prompt;
use crate::sampling::generate::{ImageRequest, InitialLatent};
use crate::sampling::trajectory::Noise;
use crate::schedule::Step;

/// Plans an epoch. Image i has prompt i mod P of those that the epoch chose.
///
/// # Errors
/// When a prompt has no embedding.
pub(super) fn plan_images(s: &Settings, plain: &Plain, context: &PlanContext) -> Result<EpochPlan> {
    let PlanContext { epoch, layout, embeddings, steps, .. } = *context;
    let (groups, total) = (s.groups(), plain.images_per_epoch);
    let chosen = chosen(s, epoch);
    let first = (epoch * total) as u32;
    let prompts: Vec<Prompt> = (0..total).map(|i| s.prompt[chosen[i % groups]].clone()).collect();
    let image = |(i, prompt): (usize, &Prompt)| {
        let number = match plain.initial_noise {
            InitialNoise::Shared => i % groups,
            InitialNoise::Own => i,
        };
        let initial = InitialLatent::Noise(Stream::InitialNoise, first + number as u32);
        anyhow::Ok(ImageRequest { prompt: embeddings.row_of(&prompt.text)?, initial })
    };
    let forward = s.objective.forward();
    let trained = if forward { times(context) } else { trained_steps(s, plain, context) };
    let noisy = |step: &Step| {
        let quiet = plain.noise_only_trained && trained.iter().all(|t| t.index != step.index);
        if quiet || forward { step.without_noise() } else { *step }
    };
    let times_of = |image: usize| {
        let k = s.steps_of(plain, trained.len());
        let number = first + image as u32;
        philox::choose(s.seed, Stream::TrainSteps, number, trained.len(), k)
    };
    let of_update = |update: usize| {
        let (all, steps) = (shares(s, layout, update).into_iter(), trained.len());
        all.map(move |images| Part::of_images(update, images, steps))
    };
    Ok(EpochPlan {
        starts: prompts.iter().enumerate().map(image).collect::<Result<_>>()?,
        groups: prompts.iter().map(|prompt| prompt.text.clone()).collect(),
        prompts,
        steps: steps.iter().map(noisy).collect(),
        parts: (0..s.updates_per_epoch).flat_map(of_update).collect(),
        noise: Noise { seed: s.seed, first_image: first },
        policy_steps: trained.len(),
        times: if forward { (0..total).map(times_of).collect() } else { Vec::new() },
        trained,
    })
}

/// The times that an image may be noised to.
fn times(context: &PlanContext) -> Vec<Step> {
    let steps = context.trainable.iter().map(|i| context.steps[*i].of_forward_process());
    steps.collect()
}

/// The steps that an epoch trains: all, some at random, or a window at a random place; with their
/// credit.
fn trained_steps(s: &Settings, plain: &Plain, context: &PlanContext) -> Vec<Step> {
    let PlanContext { epoch, steps, trainable, .. } = *context;
    let k = plain.train_steps.unwrap_or(trainable.len());
    let draw = |n, k| philox::choose(s.seed, Stream::TrainSteps, epoch as u32, n, k);
    let mut positions = if plain.train_window {
        let start = draw(trainable.len() - k + 1, 1)[0];
        (start..start + k).collect()
    } else {
        draw(trainable.len(), k)
    };
    positions.sort_unstable();
    let mut trained: Vec<Step> = positions.into_iter().map(|p| steps[trainable[p]]).collect();
    with_own_total(s, &mut trained);
    trained
}
