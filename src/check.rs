//! `pcpo-wgpu check`: compares a model folder with a reference file that PyTorch and diffusers wrote
//! (`scripts/reference.py`). Format: README, "Check a model".

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use burn::tensor::{Tensor, TensorData};
use serde::Deserialize;

use crate::device::Compute;
use crate::model::clip::ClipText;
use crate::model::pipeline::{Conditioning, load_schedule};
use crate::model::tokenizer::Tokenizer;
use crate::model::unet::UNet;
use crate::model::vae::Vae;
use crate::model::weights::{Storage, Weights};
use crate::ops::Guidance;
use crate::rollout::{Denoise, sample};

/// One line of the answer.
pub struct Comparison {
    pub name: &'static str,
    /// Largest absolute error over the reference's standard deviation; infinite where a value is not finite.
    pub error: f64,
}

/// `reference.json`, beside the reference file.
#[derive(Deserialize)]
struct Run {
    prompts: Vec<String>,
    steps: usize,
    guidance: f64,
    eta: f64,
}

/// A component's folder: below the model folder, or the folder itself.
fn component(dir: &Path, name: &str, class: &str) -> Option<PathBuf> {
    let below = dir.join(name);
    if below.join("config.json").is_file() {
        return Some(below);
    }
    let json: serde_json::Value = crate::files::read_json(&dir.join("config.json")).ok()?;
    let own = json["_class_name"] == class || json["architectures"][0] == class;
    own.then(|| dir.to_path_buf())
}

struct Reference {
    weights: Weights,
}

impl Reference {
    fn has(&self, name: &str) -> bool {
        self.weights.has(name)
    }

    /// Values as they are: a value that is not finite is a failed comparison, not an unreadable file.
    fn tensor<const D: usize>(&self, name: &str, compute: &Compute) -> Result<Tensor<D>> {
        let (values, shape) = self.weights.raw(name)?;
        ensure!(
            shape.len() == D,
            "{}: {name} has shape {shape:?}, expected {D} dimensions",
            self.weights.source().display()
        );
        let shape: [usize; D] = shape.try_into().expect("checked above");
        Ok(Tensor::from_data(TensorData::new(values, shape), &compute.burn))
    }

    fn compare<const D: usize>(&self, name: &'static str, reference: &str, found: Tensor<D>) -> Result<Comparison> {
        let (expected, shape) = self.weights.raw(reference)?;
        ensure!(
            shape == found.dims(),
            "{}: {reference} has shape {shape:?}, the model gives {:?}",
            self.weights.source().display(),
            found.dims()
        );
        Ok(Comparison { name, error: relative_error(&crate::ops::read(&found)?, &expected) })
    }
}

/// max |a - b| / std(b); infinite where either side holds a value that is not finite.
pub fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    if found.iter().chain(expected).any(|v| !v.is_finite()) {
        return f64::INFINITY;
    }
    let n = expected.len() as f64;
    let mean = expected.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let std = (expected.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n).sqrt();
    let worst = found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()).fold(0.0, f64::max);
    if worst == 0.0 { 0.0 } else { worst / std }
}

/// Runs every comparison that the folder and the file allow.
///
/// # Errors
/// When a file is missing or damaged, a shape differs, or nothing can be compared.
pub fn check(model: &Path, file: &Path, compute: &Compute, storage: Storage) -> Result<Vec<Comparison>> {
    ensure!(model.is_dir(), "--model {}: no such folder", model.display());
    let r = Reference { weights: Weights::open_file(file)? };
    let dev = &compute.burn;
    let unet = component(model, "unet", "UNet2DConditionModel").map(|d| UNet::load(&d, dev, storage)).transpose()?;
    let vae = component(model, "vae", "AutoencoderKL").map(|d| Vae::load(&d, dev, storage)).transpose()?;
    let text =
        component(model, "text_encoder", "CLIPTextModel").map(|d| ClipText::load(&d, dev, storage)).transpose()?;
    let mut lines = Vec::new();
    if let (Some(unet), true) = (&unet, r.has("out.prediction")) {
        let x = r.tensor::<4>("in.latents", compute)?;
        let (timesteps, _) = r.weights.raw("in.timestep")?;
        let sequence = r.tensor::<3>("in.encoder_hidden_states", compute)?;
        let rows = x.dims()[0];
        ensure!(
            timesteps.len() == rows
                && sequence.dims()[0] == rows
                && x.dims()[1] == unet.in_channels
                && sequence.dims()[2] == unet.context,
            "{}: in.latents {:?}, in.timestep [{}] and in.encoder_hidden_states {:?} do not fit each other and the UNet ({} channels, context {})",
            file.display(),
            x.dims(),
            timesteps.len(),
            sequence.dims(),
            unet.in_channels,
            unet.context
        );
        let found = unet.forward(x, &timesteps, &Conditioning { sequence }, None);
        lines.push(r.compare("prediction", "out.prediction", found)?);
    }
    if let (Some(text), true) = (&text, r.has("in.input_ids")) {
        let (ids, shape) = r.weights.raw("in.input_ids")?;
        ensure!(
            shape.len() == 2 && shape[1] > 0,
            "{}: in.input_ids has shape {shape:?}, expected [B, T]",
            file.display()
        );
        let ids: Vec<Vec<u32>> = ids.chunks(shape[1]).map(|row| row.iter().map(|&i| i as u32).collect()).collect();
        lines.push(r.compare("encoder_hidden_states", "in.encoder_hidden_states", text.forward(&ids)?)?);
    }
    if r.has("out.latents") {
        if let (Some(unet), Some(text)) = (&unet, &text) {
            let found = whole_run(model, file, compute, unet, text, r.tensor("in.latents", compute)?)?;
            lines.push(r.compare("latents", "out.latents", found)?);
        }
        if let (Some(vae), true) = (&vae, r.has("out.image")) {
            lines.push(r.compare("image", "out.image", vae.decode(r.tensor("out.latents", compute)?))?);
        }
    }
    if let (Some(vae), true) = (&vae, r.has("out.encoded") && r.has("in.image")) {
        lines.push(r.compare("encoded", "out.encoded", vae.encode(r.tensor("in.image", compute)?))?);
    }
    if lines.is_empty() {
        bail!("{}: holds nothing that {} can be checked against", file.display(), model.display());
    }
    Ok(lines)
}

/// The DDIM run that reference.json describes.
fn whole_run(
    model: &Path,
    file: &Path,
    compute: &Compute,
    unet: &UNet,
    text: &ClipText,
    latents: Tensor<4>,
) -> Result<Tensor<4>> {
    let path = file.with_file_name("reference.json");
    let run: Run = crate::files::read_json(&path)?;
    ensure!(
        run.prompts.len() == latents.dims()[0],
        "{}: {} prompts for {} latents",
        path.display(),
        run.prompts.len(),
        latents.dims()[0]
    );
    let tokenizer = Tokenizer::load(&model.join("tokenizer"), text.max_tokens)?;
    let encode = |p: &str| tokenizer.encode(p);
    let rows = run.prompts.iter().map(|p| encode(p)).collect::<Result<Vec<_>>>()?;
    let cond = Conditioning { sequence: text.forward(&rows)? };
    let uncond = Conditioning { sequence: text.forward(&[encode("")?])? }.repeat(rows.len());
    let steps = load_schedule(model)?.steps(run.steps, run.eta)?;
    let denoise =
        Denoise { compute, unet, lora: None, guidance: Guidance::new(run.guidance), cond: &cond, uncond: &uncond };
    Ok(sample(&denoise, latents, &steps, &[], (0, 0), || Ok(()))?.latents)
}
