//! `--dump-update FILE[:K]`: one update whole, so that it can be recomputed outside
//! (`scripts/verify_update.py`).

use anyhow::Result;
use burn::tensor::Tensor;

use super::epoch::EpochPlan;
use super::run::{DumpRequest, Run};
use super::update::{TrajectoryBatch, UpdateGradient};
use crate::choice::name;
use crate::device::tensor::read;
use crate::io::tensors::{HostTensor, write_tensors};
use crate::lora::formats::{self, Format};
use crate::model::Conditioning;
use crate::ops::philox_noise::philox_noise;
use crate::ops::policy_objective::Surrogate;
use crate::sampling::generate::prompt_pair;
use crate::sampling::policy::PromptPair;
use crate::schedule::{Prediction, Step, StepKind};

/// What an update was made of.
pub(crate) struct Update<'a> {
    pub run: &'a Run<'a>,
    pub plan: &'a EpochPlan,
    pub batches: &'a [&'a TrajectoryBatch],
    pub surrogate: &'a Surrogate,
    pub gradient: &'a UpdateGradient,
    pub advantages: &'a [f32],
}

/// Writes the update. Predictions, weights and noise are in eps units where a network of diffusion
/// predicts v, and in the velocity's own for a flow.
///
/// # Errors
/// When the device fails or the file cannot be written.
pub(crate) fn write(u: &Update, request: &DumpRequest) -> Result<()> {
    let mut tensors = transitions(u)?;
    tensors.extend(per_step(&u.plan.trained));
    tensors.extend(embeddings(u)?);
    let mut gradient = u.run.adapter.clone();
    gradient.parameters_mut().zip(&u.gradient.gradients).for_each(|(p, g)| p.clone_from(g));
    let network = u.run.first().pipeline.family.network();
    for (prefix, adapter) in [("lora", &u.run.adapter), ("grad", &gradient)] {
        let named = formats::tensors(adapter, Format::Diffusers, network).into_iter();
        tensors.extend(named.map(|t| HostTensor { name: format!("{prefix}.{}", t.name), ..t }));
    }
    write_tensors(&request.file, &tensors, &metadata(u))
}

/// Latents, noise, old predictions, log rho and advantages.
fn transitions(u: &Update) -> Result<Vec<HostTensor>> {
    let trained = &u.plan.trained;
    let images: usize = u.batches.iter().map(|b| b.images.len()).sum();
    let [c, h, w] = u.run.first().pipeline.latent_shape();
    let shape = [trained.len(), images, c, h, w];
    let (mut latents, mut noise, mut old) = (vec![], vec![], vec![]);
    for (s, step) in trained.iter().enumerate() {
        for batch in u.batches {
            let transition = &batch.transitions[s];
            let key = batch.noise.at(step);
            noise.extend(read(&philox_noise(&u.run.first().compute, batch.shape, key)?)?);
            latents.extend(&transition.x);
            old.extend(in_eps(u, step, &transition.x, &transition.old_prediction));
        }
    }
    let stats = u.gradient.all_stats(trained.len());
    let log_rho = stats.iter().map(|s| s.log_rho).collect();
    Ok(vec![
        HostTensor::new("latents", shape, latents),
        HostTensor::new("noise", shape, noise),
        HostTensor::new("eps_old", shape, old),
        HostTensor::new("log_rho", [trained.len(), images], log_rho),
        HostTensor::new("advantages", [images], u.advantages.to_vec()),
    ])
}

/// A prediction in eps units where the network predicts v.
fn in_eps(u: &Update, step: &Step, x: &[f32], prediction: &[f32]) -> Vec<f32> {
    match u.run.first().pipeline.schedule.prediction() {
        Prediction::Epsilon | Prediction::Velocity => prediction.to_vec(),
        Prediction::V => {
            let bar = alpha_bar(step);
            let (signal, spread) = (bar.sqrt() as f32, (1.0 - bar).sqrt() as f32);
            prediction.iter().zip(x).map(|(p, x)| signal * p + spread * x).collect()
        }
    }
}

fn per_step(trained: &[Step]) -> Vec<HostTensor> {
    let column = |name: &str, f: fn(&Step) -> f64| {
        HostTensor::new(name, [trained.len()], trained.iter().map(|s| f(s) as f32).collect())
    };
    vec![
        column("timesteps", |s| s.t),
        column("alphas_cumprod", alpha_bar),
        column("weights", |s| s.weight),
        column("weights_native", |s| s.w_native),
        column("quadratic", |s| s.quadratic),
        column("loss_weights", |s| s.loss_weight),
    ]
}

fn embeddings(u: &Update) -> Result<Vec<HostTensor>> {
    let (replica, embeddings) = (u.run.first(), &u.run.embeddings);
    let uncond = embeddings.row_of("")?;
    let pair = |b: &&TrajectoryBatch| {
        prompt_pair(replica, embeddings, uncond, &u.plan.images[b.images.clone()])
    };
    let prompts: Vec<PromptPair> = u.batches.iter().map(pair).collect::<Result<_>>()?;
    let mut tensors = Vec::new();
    for (prefix, conditional) in [("", true), ("negative_", false)] {
        let parts = || prompts.iter().map(|p| if conditional { &p.cond } else { &p.uncond });
        let each = |p: &Conditioning| p.rows.spread(p.sequence.clone());
        let sequence: Tensor<3> = Tensor::cat(parts().map(each).collect(), 0);
        let name = format!("{prefix}prompt_embeds");
        tensors.push(HostTensor::new(name, sequence.dims(), read(&sequence)?));
        let each = |p: &Conditioning| Some(p.rows.spread(p.pooled.clone()?));
        let pooled: Option<Vec<Tensor<2>>> = parts().map(each).collect();
        if let Some(pooled) = pooled {
            let pooled = Tensor::cat(pooled, 0);
            let name = format!("{prefix}pooled_prompt_embeds");
            tensors.push(HostTensor::new(name, pooled.dims(), read(&pooled)?));
        }
    }
    Ok(tensors)
}

fn metadata(u: &Update) -> Vec<(&'static str, String)> {
    let prediction = match u.run.first().pipeline.schedule.prediction() {
        Prediction::Epsilon => "epsilon",
        Prediction::V => "v_prediction",
        Prediction::Velocity => "velocity",
    };
    let targets: Vec<&str> = u.run.adapter.layers.iter().map(|l| l.name.as_str()).collect();
    let indices: Vec<String> = u.plan.trained.iter().map(|s| s.index.to_string()).collect();
    vec![
        ("objective", name(u.surrogate.objective)),
        ("clip_range", f64::from(u.surrogate.clip_range).to_string()),
        ("guidance_scale", u.run.settings.guidance_scale.to_string()),
        ("kl_beta", u.run.settings.kl_beta.to_string()),
        ("guidance_gradient", name(u.surrogate.guidance_gradient)),
        ("prediction_type", prediction.to_string()),
        ("lora_rank", u.run.adapter.rank.to_string()),
        ("lora_alpha", u.run.adapter.alpha.to_string()),
        ("lora_targets", targets.join(",")),
        // What the noise is keyed by, so that the update can be replayed here as well.
        ("seed", u.run.settings.seed.to_string()),
        ("first_image", u.batches[0].noise.first_image.to_string()),
        ("step_indices", indices.join(",")),
    ]
}

/// The step's cumulative alpha; 0 for a flow, which has none.
fn alpha_bar(step: &Step) -> f64 {
    match step.kind {
        StepKind::Diffusion { alpha_bar, .. } => alpha_bar,
        StepKind::Flow { .. } => 0.0,
    }
}
