//! A whole model folder in diffusers' layout: network, VAE and schedule, of any family. Text
//! encoders are apart: they run once, and need not stay.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use burn::tensor::Device;
use sha2::Digest;

use super::denoiser::Denoiser;
use super::family::Family;
use super::loader::Storage;
use super::text::TextEncoders;
use super::text::embeddings::{PromptEmbeddings, fits};
use super::vae::Vae;
use crate::io::weights::Weights;
use crate::schedule::Schedule;

/// Where a model's text embeddings come from.
#[derive(Clone, Copy)]
pub enum TextFrom<'a> {
    /// The folder's encoders, with this many T5 tokens.
    Encoders(usize),
    /// A file that `embed` wrote: no encoder is loaded.
    File(&'a Path),
}

/// The text embeddings of prompts for a model: the encoders are loaded, run once, and dropped.
///
/// # Errors
/// Names the file and the field or tensor that is missing, damaged, not supported, or of another
/// model.
pub fn embed(
    dir: &Path,
    prompts: &[String],
    from: TextFrom,
    device: &Device,
    storage: Storage,
) -> Result<PromptEmbeddings> {
    let family = Family::of(dir)?;
    let context = family.config(dir)?.context();
    match from {
        TextFrom::File(path) => {
            let embeddings = PromptEmbeddings::open(path)?;
            let source = format!("--embeddings {}", path.display());
            fits(context, embeddings.widths(), &source)?;
            // A prompt that is missing is missed now, not in the middle of a run.
            prompts.iter().try_for_each(|p| embeddings.row_of(p).map(drop))?;
            Ok(embeddings)
        }
        TextFrom::Encoders(length) => {
            let layout = family.text();
            let encoders = TextEncoders::load(dir, layout, length, context[0], device, storage)?;
            fits(context, encoders.widths(), &dir.display().to_string())?;
            encoders.encode(prompts)
        }
    }
}

/// A loaded model.
pub struct Pipeline {
    pub dir: PathBuf,
    pub family: Family,
    pub net: Box<dyn Denoiser>,
    pub vae: Vae,
    pub schedule: Schedule,
    /// Height and width of its latents.
    size: [usize; 2],
}

impl Pipeline {
    /// Loads a diffusers folder; `resolution` is the side of its images in pixels, where it is not
    /// the model's own.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, damaged or not supported.
    pub fn load(
        dir: &Path,
        device: &Device,
        storage: Storage,
        resolution: Option<usize>,
    ) -> Result<Self> {
        let family = Family::of(dir)?;
        ensure!(
            dir.join(family.network()).is_dir(),
            "--model {}: is the folder of a network alone; give the folder that holds \
             model_index.json",
            dir.display()
        );
        let schedule = load_schedule(dir)?;
        let net = family.load(dir, device, storage)?;
        let vae = Vae::load(&dir.join("vae"), device, storage)?;
        let [channels, height, width] = net.latent_shape();
        ensure!(
            vae.latent_channels == channels,
            "{}: the VAE has {} latent channels, the network {channels}; the parts belong to \
             different models",
            dir.display(),
            vae.latent_channels
        );
        let size = match resolution {
            None => [height, width],
            Some(pixels) => latent_size(pixels, vae.factor)?,
        };
        net.accepts(size).context("--resolution")?;
        Ok(Self { schedule, dir: dir.to_path_buf(), family, net, vae, size })
    }

    /// Shape of one latent, [C, H, W].
    pub fn latent_shape(&self) -> [usize; 3] {
        let [h, w] = self.size;
        [self.vae.latent_channels, h, w]
    }

    /// Tokens that the network makes of one latent.
    pub fn tokens(&self) -> usize {
        self.net.tokens(self.size)
    }
}

/// Height and width of the latents of images of a side in pixels.
///
/// # Errors
/// When it is no multiple of `factor`, the VAE's pixels a latent pixel.
pub fn latent_size(pixels: usize, factor: usize) -> Result<[usize; 2]> {
    ensure!(
        pixels > 0 && pixels.is_multiple_of(factor),
        "--resolution {pixels}: must be a positive multiple of {factor}"
    );
    Ok([pixels / factor; 2])
}

/// Reads the schedule of a model folder.
///
/// # Errors
/// As [`Schedule::from_config`], and when the scheduler is of another family than the network.
pub fn load_schedule(dir: &Path) -> Result<Schedule> {
    let path = dir.join("scheduler").join("scheduler_config.json");
    let config: serde_json::Value = crate::io::read_json(&path)?;
    let mut schedule =
        Schedule::from_config(&config).with_context(|| path.display().to_string())?;
    let family = Family::of(dir)?;
    let predicts = if family.is_flow() {
        "a velocity; FlowMatchEulerDiscreteScheduler does"
    } else {
        "noise; DDIMScheduler does"
    };
    ensure!(
        family.is_flow() == matches!(schedule, Schedule::Flow(_)),
        "{}: _class_name = {} does not fit the network, which predicts {predicts}",
        path.display(),
        config["_class_name"]
    );
    if let Schedule::Flow(flow) = &mut schedule {
        flow.spacing = family.spacing();
    }
    Ok(schedule)
}

/// SHA-256 over everything that a run reads of its model, weights and small files alike, or over an
/// embeddings file in place of the text encoders: what a checkpoint is bound to.
///
/// # Errors
/// When a file cannot be read.
pub fn fingerprint(dir: &Path, embeddings: Option<&Path>) -> Result<String> {
    let network = Family::of(dir)?.network();
    let mut hasher = sha2::Sha256::new();
    let mut parts = listed(dir, "--model ")?;
    parts.retain(|part| {
        let name = part.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let text = name.starts_with("text_encoder") || name.starts_with("tokenizer");
        [network, "vae", "scheduler"].contains(&name) || (text && embeddings.is_none())
    });
    for part in &parts {
        let mut files = listed(part, "")?;
        files.retain(|f| f.extension().is_some_and(|e| e == "json" || e == "txt") && f.is_file());
        for file in files {
            let bytes = std::fs::read(&file);
            hasher.update(bytes.with_context(|| format!("{}: cannot be read", file.display()))?);
        }
        if part.join("config.json").is_file() {
            Weights::open_dir(part)?.add_to_hash(&mut hasher);
        }
    }
    if let Some(file) = embeddings {
        Weights::open_file(file)?.add_to_hash(&mut hasher);
    }
    Ok(format!("{:x}", hasher.finalize()))
}

/// What a folder holds, in the order of the names.
fn listed(dir: &Path, flag: &str) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir)
        .with_context(|| format!("{flag}{}: cannot be read", dir.display()))?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    Ok(paths)
}
