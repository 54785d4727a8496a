//! `--dump-update FILE[:K]`: one update whole, so that it can be recomputed outside (`scripts/verify_update.py`).

use std::path::PathBuf;

use anyhow::{Result, anyhow};
use burn::tensor::Tensor;

use crate::files::{Named, write_tensors};
use crate::lora::Adapter;
use crate::lora_io::{self, Format};
use crate::model::{Conditioning, Pipeline};
use crate::ops::philox::philox_noise;
use crate::ops::policy_objective::{STATS, Surrogate};
use crate::ops::{NoiseKey, read};
use crate::schedule::{Family, Prediction, Step};
use crate::settings::Settings;
use crate::update::{Batch, Contribution};

/// Which update goes to which file.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    pub file: PathBuf,
    /// Counted from 1 over the run.
    pub update: usize,
}

impl std::str::FromStr for Request {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (file, update) = match text.rsplit_once(':') {
            Some((file, k)) if !k.is_empty() && k.bytes().all(|b| b.is_ascii_digit()) => (file, k.parse::<usize>()?),
            _ => (text, 1),
        };
        if update == 0 || file.is_empty() {
            return Err(anyhow!("--dump-update {text}: give FILE or FILE:K, with K counted from 1"));
        }
        Ok(Self { file: file.into(), update })
    }
}

/// What an update was made of.
pub struct Update<'a> {
    pub compute: &'a crate::device::Compute,
    pub pipeline: &'a Pipeline,
    pub settings: &'a Settings,
    pub surrogate: &'a Surrogate,
    pub trained: &'a [(usize, Step)],
    pub batches: &'a [&'a Batch],
    /// Conditional and unconditional embeddings of each batch.
    pub conditioning: Vec<(Conditioning, Conditioning)>,
    pub contributions: &'a [Contribution],
    pub advantages: &'a [f32],
    pub adapter: &'a Adapter,
    pub gradients: &'a [Vec<f32>],
}

/// Writes the update. Predictions, weights and noise are in eps units where a network of diffusion predicts v, and in
/// the velocity's own for a flow.
///
/// # Errors
/// When the device fails or the file cannot be written.
pub fn write(u: &Update, request: &Request) -> Result<()> {
    let mut tensors: Vec<Named> = Vec::new();
    let images: usize = u.batches.iter().map(|b| b.len()).sum();
    let [c, h, w] = u.pipeline.latent_shape();
    let shape = vec![u.trained.len(), images, c, h, w];
    let (mut latents, mut noise, mut old, mut log_rho) = (vec![], vec![], vec![], vec![]);
    for (s, (index, step)) in u.trained.iter().enumerate() {
        for (batch, contribution) in u.batches.iter().zip(u.contributions) {
            let visit = &batch.visits[s];
            let (x, mut p) = (&visit.x, visit.old.clone());
            if u.pipeline.schedule.prediction() == Prediction::V {
                let bar = alpha_bar(step);
                let (signal, spread) = (bar.sqrt() as f32, (1.0 - bar).sqrt() as f32);
                p.iter_mut().zip(x).for_each(|(p, x)| *p = signal * *p + spread * x);
            }
            let key = NoiseKey { seed: u.settings.seed, first_image: batch.first_image, step: *index as u32 };
            noise.extend(read(&philox_noise(u.compute, batch.shape, key)?)?);
            latents.extend(x);
            old.extend(p);
            let rows = read(&contribution.stats.clone().narrow(0, s, 1))?;
            log_rho.extend(rows.iter().step_by(STATS));
        }
    }
    tensors.push(("latents".into(), shape.clone(), latents));
    tensors.push(("noise".into(), shape.clone(), noise));
    tensors.push(("eps_old".into(), shape, old));
    tensors.push(("log_rho".into(), vec![u.trained.len(), images], log_rho));
    tensors.push(("advantages".into(), vec![images], u.advantages.to_vec()));
    let per_step = |f: fn(&Step) -> f64| u.trained.iter().map(|(_, s)| f(s) as f32).collect::<Vec<f32>>();
    let steps = vec![u.trained.len()];
    tensors.push(("timesteps".into(), steps.clone(), per_step(|s| s.t)));
    tensors.push(("alphas_cumprod".into(), steps.clone(), per_step(alpha_bar)));
    tensors.push(("weights".into(), steps.clone(), per_step(|s| s.weight)));
    tensors.push(("weights_native".into(), steps.clone(), per_step(|s| s.w_native)));
    tensors.push(("quadratic".into(), steps.clone(), per_step(|s| s.quadratic)));
    tensors.push(("loss_weights".into(), steps, per_step(|s| s.loss_weight)));
    for (name, conditional) in [("prompt_embeds", true), ("negative_prompt_embeds", false)] {
        let rows = u.conditioning.iter().map(|(c, n)| if conditional { c } else { n }.sequence.clone()).collect();
        let rows: Tensor<3> = Tensor::cat(rows, 0);
        tensors.push((name.into(), rows.dims().to_vec(), read(&rows)?));
    }
    for (name, conditional) in [("pooled_prompt_embeds", true), ("negative_pooled_prompt_embeds", false)] {
        let part =
            |(c, n): &(Conditioning, Conditioning)| if conditional { c.pooled.clone() } else { n.pooled.clone() };
        if let Some(rows) = u.conditioning.iter().map(part).collect::<Option<Vec<_>>>() {
            let rows: Tensor<2> = Tensor::cat(rows, 0);
            tensors.push((name.into(), rows.dims().to_vec(), read(&rows)?));
        }
    }
    let mut gradient = u.adapter.clone();
    gradient.parameters().into_iter().zip(u.gradients).for_each(|(p, g)| p.clone_from(g));
    for (prefix, adapter) in [("lora", u.adapter), ("grad", &gradient)] {
        let named = lora_io::tensors(adapter, Format::Diffusers, u.pipeline.family).into_iter();
        tensors.extend(named.map(|(key, shape, values)| (format!("{prefix}.{key}"), shape, values)));
    }
    let word = |v: serde_json::Value| v.as_str().unwrap_or_default().to_string();
    let prediction = match u.pipeline.schedule.prediction() {
        Prediction::Epsilon => "epsilon",
        Prediction::V => "v_prediction",
        Prediction::Velocity => "velocity",
    };
    let metadata = [
        ("objective", word(serde_json::to_value(u.surrogate.objective)?)),
        ("clip_range", f64::from(u.surrogate.xi).to_string()),
        ("guidance_scale", u.settings.guidance_scale.to_string()),
        ("kl_beta", u.settings.kl_beta.to_string()),
        ("guidance_gradient", word(serde_json::to_value(u.surrogate.guidance_gradient)?)),
        ("prediction_type", prediction.to_string()),
        ("lora_rank", u.adapter.rank.to_string()),
        ("lora_alpha", u.adapter.alpha.to_string()),
        ("lora_targets", u.adapter.layers.iter().map(|l| l.name.as_str()).collect::<Vec<_>>().join(",")),
        // What the noise is keyed by, so that the update can be replayed here as well.
        ("seed", u.settings.seed.to_string()),
        ("first_image", u.batches[0].first_image.to_string()),
        ("step_indices", u.trained.iter().map(|(i, _)| i.to_string()).collect::<Vec<_>>().join(",")),
    ];
    write_tensors(&request.file, &tensors, &metadata)
}

/// The step's cumulative alpha; 0 for a flow, which has none.
fn alpha_bar(step: &Step) -> f64 {
    match step.family {
        Family::Diffusion { alpha_bar, .. } => alpha_bar,
        Family::Flow { .. } => 0.0,
    }
}
