//! The gradient of one batch: for each trained step the policy's prediction, the objective's gradient with respect to
//! it, and from there into the adapter. Batches add up to an update.

use anyhow::Result;
use burn::tensor::{Tensor, TensorData};

use crate::backward::{Forward, Sums};
use crate::lora::Adapter;
use crate::ops::policy_objective::{GuidanceGradient, Surrogate, policy_objective};
use crate::ops::{Coefficients, Guidance, NoiseKey};
use crate::rollout::{Branch, Denoise, Visit};
use crate::schedule::Step;

/// A rollout's batch as the update sees it.
pub struct Batch {
    /// Position of its first image in the epoch.
    pub first: usize,
    /// Number of its first image over the whole run: what its noise is keyed by.
    pub first_image: u32,
    /// Of its latents, `[B, C, H, W]`.
    pub shape: [usize; 4],
    /// One visit for each trained step.
    pub visits: Vec<Visit>,
}

impl Batch {
    pub fn len(&self) -> usize {
        self.shape[0]
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a batch adds to an update.
pub struct Contribution {
    /// Gradients of A and B of each layer, in the order of [`Adapter::parameters`].
    pub gradients: Vec<Vec<f32>>,
    /// Statistics `[S, B, STATS]`.
    pub stats: Tensor<3>,
}

/// The gradient of one batch over the trained steps, given as (index in the schedule, step). `by_block` holds the
/// activations of one block and so many rows at a time (see [`crate::backward`]).
///
/// # Errors
/// When the device fails, or `tick` (called after each step) asks to stop.
pub fn batch_gradient(
    policy: &Denoise,
    adapter: &Adapter,
    batch: &Batch,
    trained: &[(usize, Step)],
    surrogate: &Surrogate,
    (advantage, seed, by_block): (&[f32], u64, Option<usize>),
    tick: impl Fn() -> Result<()>,
) -> Result<Contribution> {
    let (compute, net, guidance) = (policy.compute, policy.net, policy.guidance.combine);
    let lora = adapter.to_device(&compute.burn, true);
    let frozen = adapter.to_device(&compute.burn, false);
    let detached = Denoise { lora: Some(&frozen), ..*policy };
    let reference = Denoise { lora: None, ..*policy };
    let mut sums = Sums::new(adapter, &lora);
    let mut stats = Vec::with_capacity(trained.len());
    let conditional_only = surrogate.guidance_gradient == GuidanceGradient::Conditional && guidance != Guidance::Off;
    let branch = if conditional_only { Branch::Conditional } else { Branch::All };
    for ((index, step), visit) in trained.iter().zip(&batch.visits) {
        let tensor = |values: &[f32]| Tensor::from_data(TensorData::new(values.to_vec(), batch.shape), &compute.burn);
        let (x, old) = (tensor(&visit.x), tensor(&visit.old));
        let forward =
            policy.pass(branch, &x, step.t, |x, inputs| Forward::run(net, x, inputs, [&lora, &frozen], by_block));
        // The whole output, which the objective reads.
        let output = if conditional_only {
            let run = |x, inputs: crate::model::Inputs| net.forward(x, inputs, detached.lora);
            let unconditional = detached.pass(Branch::Unconditional, &x, step.t, run);
            Tensor::cat(vec![unconditional, forward.output()], 0)
        } else {
            forward.output()
        };
        let reference = (surrogate.beta > 0.0).then(|| reference.output(&x, step.t));
        let key = NoiseKey { seed, first_image: batch.first_image, step: *index as u32 };
        let c = Coefficients::from(step);
        let (gradient, rows) =
            policy_objective(compute, surrogate, &output, &old, reference.as_ref(), advantage, guidance, &c, key)?;
        let gradient = if conditional_only { gradient.narrow(0, batch.len(), batch.len()) } else { gradient };
        forward.backward(gradient, &mut sums);
        stats.push(rows.unsqueeze::<3>());
        tick()?;
    }
    Ok(Contribution { gradients: sums.read()?, stats: Tensor::cat(stats, 0) })
}
