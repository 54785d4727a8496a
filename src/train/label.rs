//! What a run's adapter files say of themselves: all of it from settings and weights, so that equal
//! runs write equal files.

use crate::choice::name;
use crate::config::Settings;
use crate::lora::Label;
use crate::model::{Family, Pipeline};
use crate::sampling::Replica;
use crate::schedule::Prediction;

/// Prompts that a file names at most.
const MOST_PROMPTS: usize = 8;

/// The label of the adapter after so many epochs, by modelspec 1.0 and sd-scripts' words, and by
/// our own.
pub(super) fn label(s: &Settings, replica: &Replica, epochs: usize) -> Label {
    let pipeline = &replica.pipeline;
    let [_, h, w] = pipeline.latent_shape();
    let [height, width] = [h, w].map(|side| side * pipeline.vae.factor);
    let rewards: Vec<&str> = s.reward.iter().map(|spec| reward_name(&spec.reward)).collect();
    let rewards = rewards.join(" + ");
    let prompts: Vec<&str> =
        s.prompt.iter().take(MOST_PROMPTS).map(|prompt| prompt.text.as_str()).collect();
    let predicts = match pipeline.schedule.prediction() {
        Prediction::Epsilon => "epsilon",
        Prediction::V => "v",
        Prediction::Velocity => "velocity",
    };
    let entries = [
        ("modelspec.sai_model_spec", "1.0.0".to_string()),
        ("modelspec.architecture", format!("{}/lora", architecture(pipeline))),
        ("modelspec.implementation", "diffusers".into()),
        ("modelspec.title", format!("{} towards {rewards}", name(s.preset))),
        ("modelspec.resolution", format!("{width}x{height}")),
        ("modelspec.prediction_type", predicts.into()),
        ("modelspec.trigger_phrase", prompts.join(", ")),
        ("ss_resolution", format!("({width}, {height})")),
        ("ss_seed", s.seed.to_string()),
        ("pcpo.reward", rewards.clone()),
        ("pcpo.method", name(s.preset)),
        ("pcpo.objective", name(s.objective)),
        ("pcpo.credit", name(s.credit)),
        ("pcpo.epochs", epochs.to_string()),
        ("pcpo.seed", s.seed.to_string()),
    ];
    let about = entries.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
    Label { network: pipeline.family.network(), about }
}

/// A reward without what follows it: paths and addresses are nobody's business but the run's.
fn reward_name(reward: &str) -> &str {
    match reward.split_once(':') {
        Some(("color", _)) | None => reward,
        Some((name, _)) => name,
    }
}

/// modelspec's name of an architecture.
fn architecture(pipeline: &Pipeline) -> &'static str {
    let second = pipeline.second;
    // Its models of 768 pixels predict v.
    let v = pipeline.schedule.prediction() == Prediction::V;
    match pipeline.family {
        Family::StableDiffusion if second && v => "stable-diffusion-v2-768-v",
        Family::StableDiffusion if second => "stable-diffusion-v2-512",
        Family::StableDiffusion => "stable-diffusion-v1",
        Family::StableDiffusionXl => "stable-diffusion-xl-v1-base",
        Family::StableDiffusion3 => "stable-diffusion-3",
        Family::Flux => "flux-1-dev",
        Family::Flux2 => "flux-2-klein",
        Family::ZImage => "z-image",
    }
}
