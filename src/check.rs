//! `pcpo-wgpu check`: compares a model folder with a reference file that PyTorch and diffusers wrote
//! (`scripts/reference.py`). Format: README, "Check a model".

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use burn::tensor::{Tensor, TensorData};
use serde::Deserialize;

use crate::device::Compute;
use crate::model::clip::ClipText;
use crate::model::flux::Flux;
use crate::model::pipeline::{Family, load_schedule};
use crate::model::text::Text;
use crate::model::vae::Vae;
use crate::model::weights::{Storage, Weights};
use crate::model::{Conditioning, Denoiser, Inputs};
use crate::rollout::{Denoise, Guided, sample};
use crate::schedule::{Grid, Sampler, Sampling};

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
    /// T5 tokens of a flow model's prompts.
    #[serde(default)]
    max_sequence_length: usize,
}

/// A component's folder: below the model folder, or the folder itself.
fn component(dir: &Path, name: &str, classes: &[&str]) -> Option<PathBuf> {
    let below = dir.join(name);
    if below.join("config.json").is_file() {
        return Some(below);
    }
    let json: serde_json::Value = crate::files::read_json(&dir.join("config.json")).ok()?;
    let own = |class: &&str| json["_class_name"] == **class || json["architectures"][0] == **class;
    classes.iter().any(own).then(|| dir.to_path_buf())
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

/// max |a - b|; infinite where a value is not finite, which a maximum alone would pass over, or one side is longer.
pub fn largest_error(found: &[f32], expected: &[f32]) -> f64 {
    if found.len() != expected.len() || found.iter().chain(expected).any(|v| !v.is_finite()) {
        return f64::INFINITY;
    }
    found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()).fold(0.0, f64::max)
}

/// max |a - b| / std(b); infinite where either side holds a value that is not finite.
pub fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    let n = expected.len() as f64;
    let mean = expected.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let std = (expected.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n).sqrt();
    match largest_error(found, expected) {
        worst if worst.is_finite() && worst > 0.0 => worst / std,
        worst => worst,
    }
}

/// What a folder's files are compared with.
struct Subject<'a> {
    model: &'a Path,
    family: Family,
    compute: &'a Compute,
    storage: Storage,
    reference: Reference,
}

/// Runs every comparison that the folder and the file allow.
///
/// # Errors
/// When a file is missing or damaged, a shape differs, or nothing can be compared.
pub fn check(model: &Path, file: &Path, compute: &Compute, storage: Storage) -> Result<Vec<Comparison>> {
    ensure!(model.is_dir(), "--model {}: no such folder", model.display());
    let reference = Reference { weights: Weights::open_file(file)? };
    let network = component(model, "transformer", &["SD3Transformer2DModel", "FluxTransformer2DModel"])
        .or_else(|| component(model, "unet", &["UNet2DConditionModel"]));
    let family = if network.is_some() { Family::of(model)? } else { Family::StableDiffusion };
    let s = Subject { model, family, compute, storage, reference };
    let r = &s.reference;
    let vae = component(model, "vae", &["AutoencoderKL"]).map(|d| Vae::load(&d, &compute.burn, storage)).transpose()?;
    let mut lines = Vec::new();
    let (alone, whole) = (network.is_some() && r.has("out.prediction"), r.has("out.latents") && s.is_whole());
    let net = if alone || whole { Some(Network::load(&s)?) } else { None };
    if let (Some(net), true) = (&net, alone) {
        lines.push(s.prediction(net)?);
    }
    if let (Some(dir), true) = (component(model, "text_encoder", &["CLIPTextModel"]), r.has("in.input_ids")) {
        lines.push(s.text_encoder(&dir)?);
    }
    if let (Some(net), true) = (&net, whole) {
        lines.extend(s.whole_run(net.get())?);
    }
    if let (Some(vae), true) = (&vae, r.has("out.image")) {
        lines.push(r.compare("image", "out.image", vae.decode(r.tensor("out.latents", compute)?))?);
    }
    if let (Some(vae), true) = (&vae, r.has("out.encoded") && r.has("in.image")) {
        lines.push(r.compare("encoded", "out.encoded", vae.encode(r.tensor("in.image", compute)?))?);
    }
    if lines.is_empty() {
        bail!("{}: holds nothing that {} can be checked against", file.display(), model.display());
    }
    Ok(lines)
}

/// The network of a folder; FLUX's forward takes more than the others'.
enum Network {
    Flux(Box<Flux>),
    Other(Box<dyn Denoiser>),
}

impl Network {
    fn load(s: &Subject) -> Result<Self> {
        if s.family != Family::Flux {
            return Ok(Self::Other(s.family.load(s.model, &s.compute.burn, s.storage)?));
        }
        let below = s.model.join("transformer");
        let dir = if below.is_dir() { &below } else { s.model };
        Ok(Self::Flux(Box::new(Flux::load(dir, &s.compute.burn, s.storage)?)))
    }

    fn get(&self) -> &dyn Denoiser {
        match self {
            Self::Flux(net) => &**net,
            Self::Other(net) => &**net,
        }
    }
}

impl Subject<'_> {
    fn is_whole(&self) -> bool {
        let has = |part: &str| self.model.join(part).is_dir();
        has(self.family.network()) && has("text_encoder") && has("tokenizer") && has("scheduler")
    }

    /// The network alone, in the terms of its class's forward.
    fn prediction(&self, net: &Network) -> Result<Comparison> {
        let r = &self.reference;
        let (timesteps, _) = r.weights.raw("in.timestep")?;
        let sequence = r.tensor::<3>("in.encoder_hidden_states", self.compute)?;
        let pooled =
            if self.family.is_flow() { Some(r.tensor::<2>("in.pooled_projections", self.compute)?) } else { None };
        let (rows, width) = (sequence.dims()[0], sequence.dims()[2]);
        let pooled_width = pooled.as_ref().map_or(0, |p| p.dims()[1]);
        let cond = Conditioning { sequence, pooled };
        let net = match net {
            Network::Flux(net) => return self.flux(net, &timesteps, &cond),
            Network::Other(net) => net,
        };
        // A flow's forward calls its latents hidden states.
        let name = if self.family.is_flow() { "in.hidden_states" } else { "in.latents" };
        let x = r.tensor::<4>(name, self.compute)?;
        let [channels, ..] = net.latent_shape();
        ensure!(
            x.dims()[..2] == [rows, channels] && timesteps.len() == rows && net.context() == [width, pooled_width],
            "{}: {name} {:?}, in.timestep [{}] and embeddings {width} and {pooled_width} wide do not fit a network of {channels} channels and context {:?}",
            r.weights.source().display(),
            x.dims(),
            timesteps.len(),
            net.context()
        );
        let [_, _, h, w] = x.dims();
        net.accepts([h, w]).with_context(|| format!("{}: {name}", r.weights.source().display()))?;
        let inputs = Inputs { timesteps: &timesteps, cond: &cond, guidance: &[] };
        r.compare("prediction", "out.prediction", net.forward(x, inputs, None))
    }

    /// FLUX's forward takes packed tokens, their positions, and times from 0 to 1.
    fn flux(&self, net: &Flux, timesteps: &[f32], cond: &Conditioning) -> Result<Comparison> {
        let r = &self.reference;
        let packed = r.tensor::<3>("in.hidden_states", self.compute)?;
        let [rows, n, channels] = packed.dims();
        let ids = |name: &str, count: usize| -> Result<Vec<[f32; 3]>> {
            let (values, shape) = r.weights.raw(name)?;
            ensure!(
                shape == [count, 3],
                "{}: {name} has shape {shape:?}, expected [{count}, 3]",
                r.weights.source().display()
            );
            Ok(values.chunks_exact(3).map(|c| [c[0], c[1], c[2]]).collect())
        };
        let (image_ids, text_ids) = (ids("in.img_ids", n)?, ids("in.txt_ids", cond.sequence.dims()[1])?);
        let guidance = if r.has("in.guidance") { r.weights.raw("in.guidance")?.0 } else { vec![1.0; rows] };
        let widths = [cond.sequence.dims()[2], cond.pooled.as_ref().map_or(0, |p| p.dims()[1])];
        ensure!(
            cond.len() == rows
                && timesteps.len() == rows
                && guidance.len() == rows
                && channels == 4 * net.latent_shape()[0]
                && widths == net.context(),
            "{}: in.hidden_states {:?}, in.timestep [{}] and embeddings {widths:?} wide do not fit a network of {} channels and context {:?}",
            r.weights.source().display(),
            [rows, n, channels],
            timesteps.len(),
            4 * net.latent_shape()[0],
            net.context()
        );
        let timesteps: Vec<f32> = timesteps.iter().map(|t| t * 1000.0).collect();
        let inputs = Inputs { timesteps: &timesteps, cond, guidance: &guidance };
        let state = net.start_tokens(packed, &image_ids, &text_ids, [0, 0], inputs);
        let state = (0..net.blocks()).fold(state, |state, i| net.block(i, state, None));
        r.compare("prediction", "out.prediction", net.finish_tokens(state, n))
    }

    /// CLIP's last hidden state against the sequence of a diffusion model.
    fn text_encoder(&self, dir: &Path) -> Result<Comparison> {
        let r = &self.reference;
        let text = ClipText::load(dir, &self.compute.burn, self.storage)?;
        let (ids, shape) = r.weights.raw("in.input_ids")?;
        ensure!(
            shape.len() == 2 && shape[1] > 0,
            "{}: in.input_ids has shape {shape:?}, expected [B, T]",
            r.weights.source().display()
        );
        let ids: Vec<Vec<u32>> = ids.chunks(shape[1]).map(|row| row.iter().map(|&i| i as u32).collect()).collect();
        r.compare("encoder_hidden_states", "in.encoder_hidden_states", text.forward(&ids)?.last)
    }

    /// The run that reference.json describes: the prompts' embeddings where the file holds them, and the final latents.
    fn whole_run(&self, net: &dyn Denoiser) -> Result<Vec<Comparison>> {
        let r = &self.reference;
        let latents = r.tensor::<4>("in.latents", self.compute)?;
        let path = r.weights.source().with_file_name("reference.json");
        let run: Run = crate::files::read_json(&path)?;
        let [rows, channels, h, w] = latents.dims();
        ensure!(
            run.prompts.len() == rows && rows > 0,
            "{}: {} prompts for {rows} latents",
            path.display(),
            run.prompts.len()
        );
        ensure!(
            run.eta == 0.0,
            "{}: eta = {}: a run with noise cannot be compared, its noise is another program's; use 0",
            path.display(),
            run.eta
        );
        ensure!(
            channels == net.latent_shape()[0],
            "{}: in.latents has {channels} channels, the network {}",
            r.weights.source().display(),
            net.latent_shape()[0]
        );
        net.accepts([h, w]).with_context(|| format!("{}: in.latents", r.weights.source().display()))?;
        let width = net.context()[0];
        let (dev, length) = (&self.compute.burn, run.max_sequence_length);
        let text = Text::load(self.model, self.family, length, width, dev, self.storage)?;
        let cond = text.encode(&run.prompts)?;
        let uncond = text.encode(&[""])?;
        let mut lines = Vec::new();
        for (name, reference, found) in [
            ("prompt_embeds", "out.prompt_embeds", &cond),
            ("negative_prompt_embeds", "out.negative_prompt_embeds", &uncond),
        ] {
            if r.has(reference) {
                lines.push(r.compare(name, reference, found.sequence.clone())?);
            }
        }
        for (name, reference, found) in [
            ("pooled_prompt_embeds", "out.pooled_prompt_embeds", &cond),
            ("negative_pooled_embeds", "out.negative_pooled_prompt_embeds", &uncond),
        ] {
            if let (Some(pooled), true) = (&found.pooled, r.has(reference)) {
                lines.push(r.compare(name, reference, pooled.clone())?);
            }
        }
        let sampler = if self.family.is_flow() { Sampler::Ode } else { Sampler::Ddim };
        let (steps, eta, tokens) = (run.steps, run.eta, net.tokens([h, w]));
        let sampling = Sampling { sampler, steps, eta, grid: Grid::Diffusers, shift: None, tokens };
        let steps = load_schedule(self.model)?.steps(&sampling)?;
        let guidance = Guided::new(net, run.guidance);
        let uncond = uncond.repeat(rows);
        let policy = Denoise { compute: self.compute, net, lora: None, guidance, cond: &cond, uncond: &uncond };
        let found = sample(&policy, latents, &steps, &[], (0, 0), || Ok(()))?.latents;
        lines.push(r.compare("latents", "out.latents", found)?);
        Ok(lines)
    }
}
