//! The gradient of one batch by an objective of the forward process: final latents are noised anew
//! to several times each, and the policy's prediction is compared there.

use anyhow::Result;
use burn::tensor::Tensor;

use super::backward::{Forward, GradientAccumulator, LoraPair};
use super::update::TrajectoryBatch;
use super::update_gradient::{BatchGradient, read_gradient};
use crate::device::tensor::upload;
use crate::kernels::rows::rows_of;
use crate::lora::{Adapter, Lora};
use crate::model::row_map::RowMap;
use crate::ops::NoiseKey;
use crate::ops::forward_objective::{
    ForwardPredictions, ForwardSurrogate, ForwardTime, forward_objective,
};
use crate::ops::philox_noise::philox_noise;
use crate::ops::policy_objective::GuidanceGradient;
use crate::sampling::policy::{Branch, Policy, PromptPair};
use crate::schedule::Step;

/// What the gradient of a batch is told besides.
#[derive(Clone, Copy)]
pub struct ForwardOptions<'a> {
    pub surrogate: &'a ForwardSurrogate,
    pub guidance_gradient: GuidanceGradient,
    /// The advantage of each of the batch's images.
    pub advantage: &'a [f32],
    /// The times of each of the batch's images, as places in the epoch's trained steps.
    pub times: &'a [Vec<usize>],
    /// How often the epoch's images have been gone through: each pass draws noise of its own.
    pub pass: usize,
    /// NFT: the policy that samples. AWM: the running mean.
    pub old: &'a Lora,
    /// AWM: the policy that sampled the epoch, where it is not the one of now.
    pub sampled: Option<&'a Lora>,
    /// Rows that a block is differentiated for at a time, with activation checkpointing.
    pub rows_at_once: Option<usize>,
    /// Whether the prediction with gradients is compared with the one without, in place of the
    /// log-ratio.
    pub test: bool,
}

/// The gradient of one batch over the times of its images. The policy's adapter is `adapter` on its
/// device.
///
/// # Errors
/// When the device fails.
///
/// # Panics
/// When the policy has no adapter.
pub fn forward_gradient(
    policy: &Policy,
    adapter: &Adapter,
    batch: &TrajectoryBatch,
    trained: &[Step],
    options: &ForwardOptions,
    tick: &dyn Fn(),
) -> Result<BatchGradient> {
    let frozen = policy.lora.expect("a policy that is trained has an adapter");
    let tracked = &frozen.tracked();
    let lora = LoraPair { tracked, frozen };
    let mut sums = GradientAccumulator::new(adapter, tracked, policy.compute);
    let [c, h, w] = batch.latent;
    let x0 = upload(&batch.ends, [batch.part.images.len(), c, h, w], &policy.compute.burn);
    let mut calls = 0;
    for at in batch.part.steps.clone() {
        let chosen = |row: &usize| options.times[*row].contains(&at);
        let rows: Vec<usize> = (0..batch.part.images.len()).filter(chosen).collect();
        if !rows.is_empty() {
            let (cond, uncond) = (policy.prompts.cond.at(&rows), policy.prompts.uncond.at(&rows));
            let prompts = PromptPair { cond, uncond };
            let own = Policy { prompts: &prompts, ..*policy };
            let key = noise_key(batch, &trained[at], options.pass);
            let all = philox_noise(policy.compute, [batch.part.images.len(), c, h, w], key);
            let (x0, z) = (rows_of(&x0, &rows), rows_of(&all, &rows));
            let advantage: Vec<f32> = rows.iter().map(|row| options.advantage[*row]).collect();
            let given = Rows { x0, z, advantage };
            let done = time_gradient(&own, &trained[at], &given, options, lora, &mut sums)?;
            sums.end_step(at, done.stats);
            calls += done.calls;
        }
        tick();
    }
    read_gradient(sums, adapter, calls)
}

/// What the noise of a batch at a time is keyed by, in a pass over the epoch's images.
pub(super) fn noise_key(batch: &TrajectoryBatch, step: &Step, pass: usize) -> NoiseKey {
    let key = batch.noise.at(step);
    // More than a sampler has steps: no two passes have one number.
    const MOST: u32 = 10_000;
    NoiseKey { step: key.step.wrapping_add(MOST.wrapping_mul(pass as u32)), ..key }
}

/// The rows of a batch that have a time.
struct Rows {
    x0: Tensor<4>,
    z: Tensor<4>,
    advantage: Vec<f32>,
}

/// What a time leaves beside its gradient.
struct TimeGradient {
    /// `[B, STATS]`
    stats: Tensor<2>,
    calls: usize,
}

/// One time's part, whose gradient is added to `sums`.
fn time_gradient(
    policy: &Policy,
    step: &Step,
    given: &Rows,
    options: &ForwardOptions,
    lora: LoraPair,
    sums: &mut GradientAccumulator,
) -> Result<TimeGradient> {
    let time = ForwardTime::from(step);
    let x = time.noised(&given.x0, &given.z);
    let rows = given.advantage.len();
    let each = RowMap::identity(rows);
    let pass = policy.pass(Branch::All, &each);
    let forward = pass.run(&x, step.t, |x, inputs| {
        Forward::run(policy.net, x, inputs, lora, options.rows_at_once)
    });
    let guidance = policy.guidance.combine;
    let of = |lora: Option<&Lora>| {
        guidance.prediction(&Policy { lora, ..*policy }.pass(Branch::All, &each).output(&x, step.t))
    };
    let now = guidance.prediction(&pass.spread(forward.output()));
    let old = of(Some(options.old));
    let sampled = options.sampled.map(|lora| of(Some(lora)));
    let base = (options.surrogate.kl_beta > 0.0).then(|| of(None));
    let predictions =
        ForwardPredictions { now: &now, old: &old, sampled: sampled.as_ref(), base: base.as_ref() };
    let (surrogate, advantage) = (options.surrogate, &given.advantage);
    let mut done = forward_objective(surrogate, &time, &x, &given.x0, &predictions, advantage);
    if options.test {
        // As a part of the prediction's largest value, which guidance makes large.
        let most = |values: Tensor<4>| values.abs().reshape([rows as i32, -1]).max_dim(1);
        let off = most(now.clone() - of(policy.lora)) / most(now).clamp_min(1.0);
        let rest = done.stats.clone().narrow(1, 1, done.stats.dims()[1] - 1);
        done.stats = Tensor::cat(vec![off, rest], 1);
    }
    let through_uncond = options.guidance_gradient.through_uncond();
    let gradient = guidance.gradient(done.gradient, through_uncond);
    forward.backward(pass.sum(gradient), sums);
    let calls = rows * (2 + usize::from(sampled.is_some()));
    Ok(TimeGradient { stats: done.stats, calls })
}
