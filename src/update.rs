//! The gradient of one batch: for each trained step the policy's prediction, the objective's gradient with respect to
//! it, and from there into the adapter. Batches add up to an update.

use anyhow::Result;
use burn::tensor::Tensor;

use crate::lora::Adapter;
use crate::model::Conditioning;
use crate::ops::policy_objective::{GuidanceGradient, Surrogate, policy_objective};
use crate::ops::{Coefficients, Guidance, NoiseKey};
use crate::rollout::{Denoise, Visit};
use crate::schedule::Step;

/// A rollout's batch as the update sees it.
pub struct Batch {
    /// Position of its first image in the epoch.
    pub first: usize,
    /// Number of its first image over the whole run: what its noise is keyed by.
    pub first_image: u32,
    pub cond: Conditioning,
    pub uncond: Conditioning,
    /// One visit for each trained step.
    pub visits: Vec<Visit>,
}

impl Batch {
    pub fn len(&self) -> usize {
        self.cond.sequence.dims()[0]
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

/// The gradient of one batch over the trained steps, given as (index in the schedule, step).
///
/// # Errors
/// When the device fails, or `tick` (called after each step) asks to stop.
pub fn batch_gradient(
    policy: &Denoise,
    adapter: &Adapter,
    batch: &Batch,
    trained: &[(usize, Step)],
    surrogate: &Surrogate,
    (advantage, seed): (&[f32], u64),
    tick: impl Fn() -> Result<()>,
) -> Result<Contribution> {
    let compute = policy.compute;
    let lora = adapter.to_device(&compute.burn, true);
    let frozen = adapter.to_device(&compute.burn, false);
    let reference = Denoise { lora: None, ..*policy };
    let mut sums: Vec<Option<Tensor<2>>> = vec![None; 2 * adapter.layers.len()];
    let mut stats = Vec::with_capacity(trained.len());
    for ((index, step), visit) in trained.iter().zip(&batch.visits) {
        // The tracked output, and the whole output that the objective reads.
        let conditional_only =
            surrogate.guidance_gradient == GuidanceGradient::Conditional && policy.guidance != Guidance::Off;
        let tracked = Denoise { lora: Some(&lora), ..*policy };
        let (output, whole) = if conditional_only {
            let conditional = tracked.conditional(&visit.x, step.t);
            let unconditional = Denoise { lora: Some(&frozen), ..*policy }.unconditional(&visit.x, step.t);
            let whole = Tensor::cat(vec![unconditional, conditional.clone().inner()], 0);
            (conditional, whole)
        } else {
            let output = tracked.output(&visit.x, step.t);
            (output.clone(), output.inner())
        };
        let reference = (surrogate.beta > 0.0).then(|| reference.output(&visit.x, step.t));
        let key = NoiseKey { seed, first_image: batch.first_image, step: *index as u32 };
        let c = Coefficients::from(step);
        let (gradient, rows) = policy_objective(
            compute,
            surrogate,
            &whole,
            &visit.old,
            reference.as_ref(),
            advantage,
            policy.guidance,
            &c,
            key,
        );
        let gradient = if conditional_only { gradient.narrow(0, batch.len(), batch.len()) } else { gradient };
        let mut grads = (output * gradient.autodiff()).sum().backward();
        for (layer, sums) in adapter.layers.iter().zip(sums.chunks_mut(2)) {
            let pair = lora.get(&layer.name).expect("the adapter's own layer");
            for (matrix, sum) in [&pair.a, &pair.b].into_iter().zip(sums) {
                // Layers behind a detached branch get no gradient.
                if let Some(g) = matrix.grad_remove(&mut grads) {
                    *sum = Some(match sum.take() {
                        Some(s) => s + g,
                        None => g,
                    });
                }
            }
        }
        stats.push(rows.unsqueeze::<3>());
        tick()?;
    }
    let sizes = adapter.layers.iter().flat_map(|l| [l.a.len(), l.b.len()]);
    let read = |(sum, n): (Option<Tensor<2>>, usize)| match sum {
        Some(sum) => crate::ops::read(&sum),
        None => Ok(vec![0.0; n]),
    };
    let gradients = sums.into_iter().zip(sizes).map(read).collect::<Result<_>>()?;
    Ok(Contribution { gradients, stats: Tensor::cat(stats, 0) })
}
