//! How far a policy has gone from the model without its adapter, along its own trajectories.

use anyhow::Result;

use super::Replica;
use super::fleet::Fleet;
use super::generate::{Generated, Request, generate, prompt_pair};
use super::policy::{Branch, GuidanceMode, Policy};
use super::trajectory::Noise;
use crate::device::tensor::{read, upload};
use crate::model::row_map::RowMap;
use crate::ops::{self, Coefficients, StepContext};
use crate::schedule::Step;

/// The KL of each image's trajectory to the model without adapter, summed over the steps with
/// noise: `K = sum_i 1/2 mean_D[(b_i / sigma_i)^2 (p - p_base)^2]`, where p is the prediction after
/// guidance. Times D, the values of a latent, it is in nats. A step without noise has no density
/// and is not counted; without any adapter K is 0 and nothing is drawn.
///
/// # Errors
/// As [`generate`].
pub fn trajectory_kl(
    fleet: &Fleet,
    request: &Request,
    tick: &(dyn Fn() -> Result<()> + Sync),
) -> Result<Vec<f64>> {
    if request.policies.iter().all(|p| p.value.is_none()) {
        return Ok(vec![0.0; request.images.len()]);
    }
    let noisy: Vec<&Step> = request.steps.iter().filter(|step| step.sigma > 0.0).collect();
    let keep: Vec<usize> = noisy.iter().map(|step| step.index).collect();
    let request = Request { keep: &keep, ..*request };
    let kl = |replica: &Replica, drawn: Generated| batch_kl(replica, &request, &noisy, &drawn);
    Ok(fleet.share(generate(fleet, &request, tick, kl))?.concat())
}

/// The same for the images of a batch.
fn batch_kl(
    replica: &Replica,
    request: &Request,
    noisy: &[&Step],
    drawn: &Generated,
) -> Result<Vec<f64>> {
    let (compute, net) = (&replica.compute, &*replica.pipeline.net);
    let images = &request.images[drawn.images.clone()];
    let prompts = prompt_pair(replica, request.embeddings, images, request.latent)?;
    let guidance = GuidanceMode::new(net, request.guidance_scale);
    let base = Policy { compute, net, lora: None, guidance, prompts: &prompts };
    let each = RowMap::identity(images.len());
    let base = base.pass(Branch::All, &each).keeping();
    let [c, h, w] = request.latent;
    let first_image = request.noise.first_image + drawn.images.start as u32;
    let noise = Noise { first_image, ..request.noise };
    let mut sums = vec![0.0; images.len()];
    for (step, own) in noisy.iter().zip(&drawn.transitions) {
        let x = upload(&own.x, [images.len(), c, h, w], &compute.burn);
        let context = StepContext {
            compute,
            guidance: guidance.combine,
            coefficients: Coefficients::from(*step),
            key: noise.at(step),
        };
        let base = read(&ops::step(&context, &x, &base.output(&x, step.t)).prediction)?;
        let weight = (step.b / step.sigma).powi(2) / 2.0;
        let rows = own.old_prediction.chunks(c * h * w).zip(base.chunks(c * h * w));
        for (sum, (p, base)) in sums.iter_mut().zip(rows) {
            let squares = p.iter().zip(base).map(|(&p, &b)| f64::from(p - b).powi(2));
            *sum += weight * squares.sum::<f64>() / p.len() as f64;
        }
    }
    Ok(sums)
}
