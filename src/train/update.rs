//! The gradient of one batch: for each trained step the policy's prediction, the objective's
//! gradient with respect to it, and from there into the adapter.

use anyhow::Result;
use burn::tensor::{Device, Tensor};

use super::backward::{Forward, GradientAccumulator, LoraPair};
use super::plan::Part;
use super::update_gradient::{BatchGradient, read_gradient};
use crate::device::tensor::upload;
use crate::lora::Adapter;
use crate::model::row_map::RowMap;
use crate::ops::log_ratio::Predictions;
use crate::ops::policy_objective::{GuidanceGradient, Surrogate, policy_objective};
use crate::ops::{Coefficients, Guidance, StepContext};
use crate::sampling::policy::{Branch, Policy};
use crate::sampling::trajectory::{Noise, Transition};
use crate::schedule::Step;

/// A rollout's batch as the update sees it.
pub struct TrajectoryBatch {
    /// Which part of its epoch it is.
    pub part: Part,
    /// What its rows drew in their steps.
    pub noise: Noise,
    /// Of a latent, `[C, H, W]`.
    pub latent: [usize; 3],
    /// One for each of the part's steps, of the part's trajectories; none for an objective of the
    /// forward process.
    pub transitions: Vec<Transition>,
    /// Where its images end, `[B, C, H, W]`, for an objective of the forward process.
    pub ends: Vec<f32>,
}

impl TrajectoryBatch {
    /// Its transition at one of the epoch's trained steps, where it has one.
    pub fn at(&self, step: usize) -> Option<&Transition> {
        self.transitions.get(step.checked_sub(self.part.steps.start)?)
    }

    /// Values of its trajectories, `[T, C, H, W]`, as a tensor of its rows, `[B, C, H, W]`.
    pub fn rows(&self, values: &[f32], device: &Device) -> Tensor<4> {
        let [c, h, w] = self.latent;
        self.part.rows.spread(upload(values, [self.part.rows.few(), c, h, w], device))
    }

    /// Which of its rows have one latent and one prompt at a step.
    pub fn equal_rows(&self, policy: &Policy, x: &[f32]) -> RowMap {
        let rows = &self.part.rows;
        if rows.few() == rows.len() { policy.equal_rows(x) } else { rows.clone() }
    }
}

/// What the gradient of a batch is told besides.
#[derive(Clone, Copy)]
pub struct GradientOptions<'a> {
    pub surrogate: &'a Surrogate,
    /// The advantage of each of the batch's rows.
    pub advantage: &'a [f32],
    /// Rows that a block is differentiated for at a time, with activation checkpointing.
    pub rows_at_once: Option<usize>,
}

/// The gradient of one batch over its part of the epoch's trained steps. The policy's adapter is
/// `adapter` on its device.
///
/// # Errors
/// When the device fails.
///
/// # Panics
/// When the policy has no adapter.
pub fn batch_gradient(
    policy: &Policy,
    adapter: &Adapter,
    batch: &TrajectoryBatch,
    trained: &[Step],
    options: &GradientOptions,
    tick: &dyn Fn(),
) -> Result<BatchGradient> {
    let frozen = policy.lora.expect("a policy that is trained has an adapter");
    let tracked = &frozen.tracked();
    let lora = LoraPair { tracked, frozen };
    let mut sums = GradientAccumulator::new(adapter, tracked, policy.compute);
    let steps = batch.part.steps.clone();
    let mut calls = 0;
    for (at, transition) in steps.zip(&batch.transitions) {
        let step = &trained[at];
        let done = step_gradient(policy, batch, step, transition, options, lora, &mut sums)?;
        sums.end_step(at, done.stats);
        calls += done.calls;
        tick();
    }
    read_gradient(sums, adapter, calls)
}

/// What a step leaves beside its gradient.
struct StepGradient {
    /// `[B, STATS]`
    stats: Tensor<2>,
    calls: usize,
}

/// One step's part, whose gradient is added to `sums`.
fn step_gradient(
    policy: &Policy,
    batch: &TrajectoryBatch,
    step: &Step,
    transition: &Transition,
    options: &GradientOptions,
    lora: LoraPair,
    sums: &mut GradientAccumulator,
) -> Result<StepGradient> {
    let (net, guidance, device) = (policy.net, policy.guidance.combine, &policy.compute.burn);
    let own = options.surrogate;
    let surrogate = &Surrogate { scale: own.scale * step.row_weight as f32, ..*own };
    let conditional_only = match surrogate.guidance_gradient {
        GuidanceGradient::Both => false,
        GuidanceGradient::Conditional => guidance != Guidance::Off,
    };
    let x = batch.rows(&transition.x, device);
    let old = batch.rows(&transition.old_prediction, device);
    // What the sampler computed once is computed once here.
    let equal = batch.equal_rows(policy, &transition.x);
    let branch = if conditional_only { Branch::Conditional } else { Branch::All };
    let pass = policy.pass(branch, &equal);
    let forward =
        pass.run(&x, step.t, |x, inputs| Forward::run(net, x, inputs, lora, options.rows_at_once));
    // The whole output, which the objective reads.
    let output = if conditional_only {
        let unconditional = policy.pass(Branch::Unconditional, &equal).output(&x, step.t);
        Tensor::cat(vec![unconditional, pass.spread(forward.output())], 0)
    } else {
        pass.spread(forward.output())
    };
    let base = Policy { lora: None, ..*policy };
    let base = (surrogate.beta > 0.0).then(|| base.pass(Branch::All, &equal).output(&x, step.t));
    let context = StepContext {
        compute: policy.compute,
        guidance,
        coefficients: Coefficients::from(step),
        key: batch.noise.at(step),
    };
    let predictions = Predictions { model_out: &output, old: &old, base: base.as_ref() };
    let done = policy_objective(&context, surrogate, &predictions, options.advantage);
    let gradient = if conditional_only {
        let n = batch.part.rows.len();
        done.gradient.narrow(0, n, n)
    } else {
        done.gradient
    };
    forward.backward(pass.sum(gradient), sums);
    Ok(StepGradient { stats: done.stats, calls: pass.calls() })
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::super::update_gradient::{UpdateGradient, all_stats};
    use super::*;
    use crate::device::Compute;
    use crate::device::tensor::VISITS;
    use crate::model::unet::UNet;
    use crate::model::{Component, Conditioning, Denoiser, Storage};
    use crate::ops::policy_objective::Objective;
    use crate::philox::{Stream, noise};
    use crate::sampling::fleet::Batch;
    use crate::sampling::policy::{GuidanceMode, PromptPair};
    use crate::schedule::Ddim;

    /// Rows that are equal in latent and prompt are computed once, and each has its own noise,
    /// advantage and clipping: METHOD2 1c.
    #[test]
    fn equal_rows_computed_once_have_the_gradient_of_separate_ones() {
        let (compute, device) = (Compute::cpu(), Device::flex());
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/emoji/unet");
        let net =
            UNet::load(&Component::folder(&dir).unwrap(), &device, Storage::F32, None).unwrap();
        let draw = |i: u32, n: usize| noise(1, Stream::Evaluation, i, 0, n);
        let text = |i: u32| upload(&draw(i, 16 * 128), [1, 16, 128], &device);
        let trained = Ddim::stable_diffusion().steps(8, 1.0).unwrap()[2..3].to_vec();
        let targets: Vec<String> = ["to_q", "to_k", "to_v"].map(String::from).into();
        let adapter = Adapter::new(&net.linears(), &targets, 2, 2.0, 1).unwrap();
        let lora = adapter.to_device(&device);
        // Three rows of one latent and prompt, one of another latent, one of another prompt.
        let (latents, prompt) = ([0, 0, 1, 0, 0], [0, 0, 0, 0, 1]);
        let n = latents.len();
        let size = 4 * 16 * 16;
        let advantage = [1.0, -1.0, 0.5, 2.0, -0.5];
        let surrogate = Surrogate {
            objective: Objective::LogHinge,
            clip_range: 2e-3,
            beta: 0.0,
            guidance_gradient: GuidanceGradient::Both,
            scale: 1.0 / n as f32,
        };
        let gradient = |images: Range<usize>, rows: RowMap| {
            let of = |row: usize| text(prompt[row] as u32);
            let map = RowMap::of_equal(&prompt[images.clone()]);
            let few = map.firsts().into_iter().map(|first| of(images.start + first));
            let cond = Conditioning::new(Tensor::cat(few.collect(), 0), None, map);
            let uncond = Conditioning::new(text(2), None, RowMap::of_equal(&vec![0; images.len()]));
            let prompts = PromptPair { cond, uncond };
            let (compute, guidance) = (&compute, GuidanceMode::new(&net, 3.0));
            let policy =
                Policy { compute, net: &net, lora: Some(&lora), guidance, prompts: &prompts };
            let all = |first: u32| -> Vec<f32> {
                let kept = rows.firsts().into_iter();
                kept.flat_map(|row| draw(first + latents[images.start + row], size)).collect()
            };
            let batch = TrajectoryBatch {
                noise: Noise { seed: 1, first_image: images.start as u32 },
                latent: [4, 16, 16],
                transitions: vec![Transition { x: all(3), old_prediction: all(5) }],
                ends: Vec::new(),
                part: Part {
                    rows: rows.clone(),
                    ..Part::of_images(0, Batch { rows: images.clone(), device: 0 }, 1)
                },
            };
            let advantage = &advantage[images.clone()];
            let options = GradientOptions { surrogate: &surrogate, advantage, rows_at_once: None };
            batch_gradient(&policy, &adapter, &batch, &trained, &options, &|| {}).unwrap()
        };
        let mut separate = UpdateGradient::default();
        (0..n).for_each(|row| separate.add(gradient(row..row + 1, RowMap::identity(1))));
        assert_eq!(separate.calls, n);
        // Found equal by their values, and said to be, as branches of a root are.
        let branches: Vec<_> = latents.iter().zip(prompt).collect();
        for rows in [RowMap::identity(n), RowMap::of_equal(&branches)] {
            let shared = gradient(0..n, rows);
            assert_eq!(shared.calls, 3);
            let stats = all_stats(&shared.steps);
            let clipped = stats.iter().filter(|s| s.clipped > 0.0).count();
            assert!((1..n).contains(&clipped), "{clipped} of {n} rows are clipped");
            let one = shared.gradients.iter().flatten();
            let pairs = || one.clone().zip(separate.gradients.iter().flatten());
            let norm = |values: &mut dyn Iterator<Item = f32>| {
                values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
            };
            // One step and one batch: their gradient is the update's.
            let (own, whole) = (shared.steps[0].grad_norm, norm(&mut one.clone().copied()));
            assert!((own / whole - 1.0).abs() <= 1e-5, "{own:e} and {whole:e}");
            let off = norm(&mut pairs().map(|(a, b)| a - b)) / norm(&mut pairs().map(|(_, b)| *b));
            assert!(off <= 1e-6, "the gradient is off by {off:e} of its norm");
        }
    }

    /// However many layers an adapter has, a batch's gradient is one visit to the device.
    #[test]
    fn a_batch_reads_its_gradient_by_one_visit() {
        let (compute, device) = (Compute::cpu(), Device::flex());
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/emoji/unet");
        let net =
            UNet::load(&Component::folder(&dir).unwrap(), &device, Storage::F32, None).unwrap();
        let draw = |i: u32, n: usize| noise(1, Stream::Evaluation, i, 0, n);
        let text =
            |i: u32| Conditioning::of_each(upload(&draw(i, 16 * 128), [1, 16, 128], &device), None);
        let prompts = PromptPair { cond: text(0), uncond: text(1) };
        let trained = Ddim::stable_diffusion().steps(8, 1.0).unwrap()[2..4].to_vec();
        let transition = |i: u32| Transition {
            x: draw(2 + i, 4 * 16 * 16),
            old_prediction: draw(4 + i, 4 * 16 * 16),
        };
        let batch = TrajectoryBatch {
            part: Part::of_images(0, Batch { rows: 0..1, device: 0 }, 2),
            noise: Noise { seed: 1, first_image: 0 },
            latent: [4, 16, 16],
            transitions: vec![transition(0), transition(1)],
            ends: Vec::new(),
        };
        let surrogate = Surrogate {
            objective: Objective::LogHinge,
            clip_range: 1e-3,
            beta: 0.0,
            guidance_gradient: GuidanceGradient::Both,
            scale: 0.5,
        };
        for targets in [&["to_q"][..], &["to_q", "to_k", "to_v", "to_out.0"]] {
            let targets: Vec<String> = targets.iter().map(|t| t.to_string()).collect();
            let adapter = Adapter::new(&net.linears(), &targets, 2, 2.0, 1).unwrap();
            let lora = adapter.to_device(&device);
            let guidance = GuidanceMode::new(&net, 3.0);
            let policy = Policy {
                compute: &compute,
                net: &net,
                lora: Some(&lora),
                guidance,
                prompts: &prompts,
            };
            let options =
                GradientOptions { surrogate: &surrogate, advantage: &[1.0], rows_at_once: None };
            VISITS.set(0);
            let found =
                batch_gradient(&policy, &adapter, &batch, &trained, &options, &|| {}).unwrap();
            let square: f64 = found.gradients.iter().flatten().map(|g| f64::from(*g).powi(2)).sum();
            let of_steps: Vec<f64> = found.steps.iter().map(|step| step.grad_norm).collect();
            let least = (of_steps[0] - of_steps[1]).abs();
            assert!((least..=of_steps[0] + of_steps[1]).contains(&square.sqrt()), "{of_steps:?}");
            assert!(square > 0.0);
            // On the CPU the objective takes each step's output and old prediction besides.
            assert_eq!(VISITS.get(), 2 * trained.len() + 1, "{} layers", adapter.layers.len());
        }
    }
}
