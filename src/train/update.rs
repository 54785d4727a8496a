//! The gradient of one batch: for each trained step the policy's prediction, the objective's
//! gradient with respect to it, and from there into the adapter. Batches add up to an update.

use std::ops::Range;

use anyhow::Result;
use burn::tensor::Tensor;

use super::backward::{Forward, GradientAccumulator, LoraPair};
use crate::device::Compute;
use crate::device::tensor::{read_all, upload};
use crate::lora::Adapter;
use crate::ops::credit_reduce::{StepStats, credit_reduce};
use crate::ops::log_ratio::Predictions;
use crate::ops::policy_objective::{
    GuidanceGradient, STATS, SampleStats, Surrogate, policy_objective,
};
use crate::ops::{Coefficients, Guidance, StepContext};
use crate::sampling::policy::{Branch, Policy};
use crate::sampling::trajectory::{Noise, Transition};
use crate::schedule::Step;

/// A rollout's batch as the update sees it.
pub struct TrajectoryBatch {
    /// Which of the epoch's images.
    pub images: Range<usize>,
    /// What its steps drew.
    pub noise: Noise,
    /// Of its latents, `[B, C, H, W]`.
    pub shape: [usize; 4],
    /// One for each trained step.
    pub transitions: Vec<Transition>,
}

/// What a batch adds to an update.
pub struct BatchGradient {
    /// Gradients of A and B of each layer, in the order of [`Adapter::parameters`].
    pub gradients: Vec<Vec<f32>>,
    /// Statistics `[S, B]`.
    pub stats: Vec<SampleStats>,
    /// Rows that the policy's network has computed; guidance's are not counted twice.
    pub calls: usize,
}

/// What the gradient of a batch is told besides.
#[derive(Clone, Copy)]
pub struct GradientOptions<'a> {
    pub surrogate: &'a Surrogate,
    /// The advantage of each of the batch's images.
    pub advantage: &'a [f32],
    /// Rows that a block is differentiated for at a time, with activation checkpointing.
    pub rows_at_once: Option<usize>,
}

/// The gradient of one batch over the trained steps. The policy's adapter is `adapter` on its
/// device.
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
    let half = policy.compute.gpu.as_ref().is_some_and(|gpu| gpu.kernels.half);
    let mut sums = GradientAccumulator::new(adapter, tracked, half);
    let (mut stats, mut calls) = (Vec::with_capacity(trained.len()), 0);
    for (step, transition) in trained.iter().zip(&batch.transitions) {
        let done = step_gradient(policy, batch, step, transition, options, lora, &mut sums)?;
        stats.push(done.stats);
        calls += done.calls;
        tick();
    }
    read_gradient(sums, adapter, Tensor::cat(stats, 0), calls)
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
    let surrogate = options.surrogate;
    let conditional_only = match surrogate.guidance_gradient {
        GuidanceGradient::Both => false,
        GuidanceGradient::Conditional => guidance != Guidance::Off,
    };
    let x = upload(&transition.x, batch.shape, device);
    let old = upload(&transition.old_prediction, batch.shape, device);
    // What the sampler computed once is computed once here.
    let equal = policy.equal_rows(&transition.x);
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
    let done = policy_objective(&context, surrogate, &predictions, options.advantage)?;
    let gradient = if conditional_only {
        let n = batch.images.len();
        done.gradient.narrow(0, n, n)
    } else {
        done.gradient
    };
    forward.backward(pass.sum(gradient), sums);
    Ok(StepGradient { stats: done.stats, calls: pass.calls() })
}

/// Everything on the host, by one visit to the device.
fn read_gradient(
    sums: GradientAccumulator,
    adapter: &Adapter,
    stats: Tensor<2>,
    calls: usize,
) -> Result<BatchGradient> {
    let sums = sums.finish();
    let arrived: Vec<bool> = sums.iter().map(Option::is_some).collect();
    let tensors = sums.into_iter().flatten().chain([stats]).collect();
    let mut values = read_all(tensors)?;
    let stats = values.pop().expect("the statistics were registered last");
    let mut values = values.into_iter();
    let gradients = adapter.parameters().zip(arrived).map(|(p, arrived)| {
        // Nothing arrives at layers whose output goes nowhere.
        if arrived { values.next().expect("one for each sum") } else { vec![0.0; p.len()] }
    });
    debug_assert!(stats.len().is_multiple_of(STATS));
    Ok(BatchGradient {
        gradients: gradients.collect(),
        stats: bytemuck::cast_slice(&stats).to_vec(),
        calls,
    })
}

/// An update's gradient and statistics, batch by batch in their order.
#[derive(Default)]
pub struct UpdateGradient {
    pub gradients: Vec<Vec<f32>>,
    /// Of each batch, `[S, B]`.
    pub stats: Vec<Vec<SampleStats>>,
    /// Rows that the policy's network has computed.
    pub calls: usize,
}

impl UpdateGradient {
    /// Adds a batch: its gradient is not held any longer.
    pub fn add(&mut self, batch: BatchGradient) {
        if self.gradients.is_empty() {
            self.gradients = batch.gradients;
        } else {
            for (sum, own) in self.gradients.iter_mut().zip(&batch.gradients) {
                sum.iter_mut().zip(own).for_each(|(s, g)| *s += g);
            }
        }
        self.stats.push(batch.stats);
        self.calls += batch.calls;
    }

    /// The statistics of all images of one step, `[S, N]`.
    pub fn all_stats(&self, steps: usize) -> Vec<SampleStats> {
        let of_step = |s: usize| {
            self.stats.iter().flat_map(move |batch| {
                let images = batch.len() / steps;
                &batch[s * images..(s + 1) * images]
            })
        };
        (0..steps).flat_map(of_step).copied().collect()
    }
}

/// The statistics of each trained step over the samples of an update.
///
/// # Errors
/// When the device fails.
pub fn credit_table(
    compute: &Compute,
    trained: &[Step],
    stats: &[SampleStats],
) -> Result<Vec<StepStats>> {
    let shape = [trained.len(), stats.len() / trained.len(), STATS];
    let weights: Vec<f32> = trained.iter().map(|step| Coefficients::from(step).w).collect();
    credit_reduce(compute, &upload(bytemuck::cast_slice(stats), shape, &compute.burn), &weights)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::device::Compute;
    use crate::device::tensor::VISITS;
    use crate::model::row_map::RowMap;
    use crate::model::unet::UNet;
    use crate::model::{Conditioning, Denoiser, Storage};
    use crate::ops::policy_objective::Objective;
    use crate::philox::{Stream, noise};
    use crate::sampling::policy::{GuidanceMode, PromptPair};
    use crate::schedule::Ddim;

    /// Rows that are equal in latent and prompt are computed once, and each has its own noise,
    /// advantage and clipping: METHOD2 1c.
    #[test]
    fn equal_rows_computed_once_have_the_gradient_of_separate_ones() {
        let (compute, device) = (Compute::cpu(), Device::flex());
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/emoji/unet");
        let net = UNet::load(&dir, &device, Storage::F32).unwrap();
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
        let gradient = |rows: std::ops::Range<usize>| {
            let map = RowMap::of_equal(&prompt[rows.clone()]);
            let of = |row: usize| text(prompt[row] as u32);
            let few = map.firsts().into_iter().map(|first| of(rows.start + first));
            let cond = Conditioning::new(Tensor::cat(few.collect(), 0), None, map);
            let uncond = Conditioning::new(text(2), None, RowMap::of_equal(&vec![0; rows.len()]));
            let prompts = PromptPair { cond, uncond };
            let (compute, guidance) = (&compute, GuidanceMode::new(&net, 3.0));
            let policy =
                Policy { compute, net: &net, lora: Some(&lora), guidance, prompts: &prompts };
            let all = |first: u32| {
                rows.clone().flat_map(|row| draw(first + latents[row], size)).collect::<Vec<f32>>()
            };
            let batch = TrajectoryBatch {
                images: rows.clone(),
                noise: Noise { seed: 1, first_image: rows.start as u32 },
                shape: [rows.len(), 4, 16, 16],
                transitions: vec![Transition { x: all(3), old_prediction: all(5) }],
            };
            let advantage = &advantage[rows.clone()];
            let options = GradientOptions { surrogate: &surrogate, advantage, rows_at_once: None };
            batch_gradient(&policy, &adapter, &batch, &trained, &options, &|| {}).unwrap()
        };
        let shared = gradient(0..n);
        assert_eq!(shared.calls, 3);
        let mut separate = UpdateGradient::default();
        (0..n).for_each(|row| separate.add(gradient(row..row + 1)));
        assert_eq!(separate.calls, n);
        let clipped = shared.stats.iter().filter(|s| s.clipped > 0.0).count();
        assert!((1..n).contains(&clipped), "{clipped} of {n} rows are clipped");
        let pairs = || shared.gradients.iter().flatten().zip(separate.gradients.iter().flatten());
        let norm = |values: &mut dyn Iterator<Item = f32>| {
            values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
        };
        let off = norm(&mut pairs().map(|(a, b)| a - b)) / norm(&mut pairs().map(|(_, b)| *b));
        assert!(off <= 1e-6, "the gradient is off by {off:e} of its norm");
    }

    /// However many layers an adapter has, a batch's gradient is one visit to the device.
    #[test]
    fn a_batch_reads_its_gradient_by_one_visit() {
        let (compute, device) = (Compute::cpu(), Device::flex());
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/emoji/unet");
        let net = UNet::load(&dir, &device, Storage::F32).unwrap();
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
            images: 0..1,
            noise: Noise { seed: 1, first_image: 0 },
            shape: [1, 4, 16, 16],
            transitions: vec![transition(0), transition(1)],
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
            assert!(found.gradients.iter().flatten().any(|g| *g != 0.0));
            // On the CPU the objective takes each step's output and old prediction besides.
            assert_eq!(VISITS.get(), 2 * trained.len() + 1, "{} layers", adapter.layers.len());
        }
    }
}
