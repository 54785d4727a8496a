//! The gradient of one batch: for each trained step the policy's prediction, the objective's
//! gradient with respect to it, and from there into the adapter. Batches add up to an update.

use std::ops::Range;

use anyhow::Result;
use burn::tensor::Tensor;

use super::backward::{Forward, GradientAccumulator, LoraPair};
use crate::device::Compute;
use crate::device::tensor::{read_all, upload};
use crate::lora::Adapter;
use crate::model::Inputs;
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
    let mut sums = GradientAccumulator::new(adapter, tracked);
    let mut stats = Vec::with_capacity(trained.len());
    for (step, transition) in trained.iter().zip(&batch.transitions) {
        stats.push(step_gradient(policy, batch, step, transition, options, lora, &mut sums)?);
        tick();
    }
    read_gradient(sums, adapter, Tensor::cat(stats, 0))
}

/// One step's part: adds its gradient, and gives its statistics `[B, STATS]`.
fn step_gradient(
    policy: &Policy,
    batch: &TrajectoryBatch,
    step: &Step,
    transition: &Transition,
    options: &GradientOptions,
    lora: LoraPair,
    sums: &mut GradientAccumulator,
) -> Result<Tensor<2>> {
    let (net, guidance, device) = (policy.net, policy.guidance.combine, &policy.compute.burn);
    let surrogate = options.surrogate;
    let conditional_only = match surrogate.guidance_gradient {
        GuidanceGradient::Both => false,
        GuidanceGradient::Conditional => guidance != Guidance::Off,
    };
    let x = upload(&transition.x, batch.shape, device);
    let old = upload(&transition.old_prediction, batch.shape, device);
    let branch = if conditional_only { Branch::Conditional } else { Branch::All };
    let forward = policy.pass(branch, &x, step.t, |x, inputs| {
        Forward::run(net, x, inputs, lora, options.rows_at_once)
    });
    // The whole output, which the objective reads.
    let output = if conditional_only {
        let run = |x, inputs: Inputs| net.forward(x, inputs, policy.lora);
        let unconditional = policy.pass(Branch::Unconditional, &x, step.t, run);
        Tensor::cat(vec![unconditional, forward.output()], 0)
    } else {
        forward.output()
    };
    let base = Policy { lora: None, ..*policy };
    let base = (surrogate.beta > 0.0).then(|| base.output(&x, step.t));
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
    forward.backward(gradient, sums);
    Ok(done.stats)
}

/// Everything on the host, by one visit to the device.
fn read_gradient(
    sums: GradientAccumulator,
    adapter: &Adapter,
    stats: Tensor<2>,
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
    })
}

/// An update's gradient and statistics, batch by batch in their order.
#[derive(Default)]
pub struct UpdateGradient {
    pub gradients: Vec<Vec<f32>>,
    /// Of each batch, `[S, B]`.
    pub stats: Vec<Vec<SampleStats>>,
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
    use crate::model::unet::UNet;
    use crate::model::{Conditioning, Denoiser, Storage};
    use crate::ops::policy_objective::Objective;
    use crate::philox::{Stream, noise};
    use crate::sampling::policy::{GuidanceMode, PromptPair};
    use crate::schedule::Ddim;

    /// However many layers an adapter has, a batch's gradient is one visit to the device.
    #[test]
    fn a_batch_reads_its_gradient_by_one_visit() {
        let (compute, device) = (Compute::cpu(), Device::flex());
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/emoji/unet");
        let net = UNet::load(&dir, &device, Storage::F32).unwrap();
        let draw = |i: u32, n: usize| noise(1, Stream::Evaluation, i, 0, n);
        let text = |i: u32| Conditioning {
            sequence: upload(&draw(i, 16 * 128), [1, 16, 128], &device),
            pooled: None,
        };
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
