//! A whole model folder in diffusers' layout: text encoders, network, VAE and schedule, of any family.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use burn::tensor::Device;
use clap::ValueEnum;
use sha2::Digest;

use super::denoiser::{Conditioning, Denoiser, fits};
use super::flux::Flux;
use super::sd3::Sd3;
use super::text::Text;
use super::unet::UNet;
use super::vae::Vae;
use super::weights::{Storage, Weights};
use crate::schedule::{Schedule, flow::Spacing};

/// The families of models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Family {
    /// Stable Diffusion 1 and 2: a UNet.
    StableDiffusion,
    StableDiffusion3,
    Flux,
}

impl Family {
    /// The family of a model folder, or of the folder of its network alone.
    ///
    /// # Errors
    /// When the folder holds no network of a known class.
    pub fn of(dir: &Path) -> Result<Self> {
        ensure!(dir.is_dir(), "--model {}: no such folder", dir.display());
        if dir.join("unet").is_dir() {
            return Ok(Self::StableDiffusion);
        }
        let path = [dir.join("transformer"), dir.to_path_buf()]
            .into_iter()
            .map(|d| d.join("config.json"))
            .find(|p| p.is_file());
        let Some(path) = path else {
            bail!(
                "--model {}: not a diffusers folder (there is no unet/ and no transformer/ in it); give the folder that holds model_index.json",
                dir.display()
            );
        };
        let config: serde_json::Value = crate::files::read_json(&path)?;
        match config["_class_name"].as_str() {
            Some("SD3Transformer2DModel") => Ok(Self::StableDiffusion3),
            Some("FluxTransformer2DModel") => Ok(Self::Flux),
            Some("UNet2DConditionModel") => Ok(Self::StableDiffusion),
            _ => bail!(
                "{}: _class_name = {} is not supported; UNet2DConditionModel, SD3Transformer2DModel and FluxTransformer2DModel are",
                path.display(),
                config["_class_name"]
            ),
        }
    }

    /// The network's folder in a model folder.
    pub fn network(self) -> &'static str {
        match self {
            Self::StableDiffusion => "unet",
            Self::StableDiffusion3 | Self::Flux => "transformer",
        }
    }

    /// Whether it predicts a velocity.
    pub fn is_flow(self) -> bool {
        self != Self::StableDiffusion
    }

    /// The guidance scale of the family's published trainers.
    pub fn default_guidance(self) -> f64 {
        match self {
            Self::StableDiffusion => 5.0,
            Self::StableDiffusion3 => 4.5,
            Self::Flux => 3.5,
        }
    }

    /// T5 tokens that diffusers' pipeline takes unless told otherwise; 0 without a T5.
    pub fn default_sequence(self) -> usize {
        match self {
            Self::StableDiffusion => 0,
            Self::StableDiffusion3 => 256,
            Self::Flux => 512,
        }
    }

    /// The layers that LoRAs of the family usually adapt: all attention projections.
    pub fn default_targets(self) -> Vec<String> {
        let image = ["to_q", "to_k", "to_v", "to_out.0"];
        let text = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"];
        let text = if self.is_flow() { &text[..] } else { &[] };
        image.iter().chain(text).map(|s| s.to_string()).collect()
    }

    /// Loads the network of a folder, its own or a model's.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, damaged or not supported.
    pub fn load(self, dir: &Path, device: &Device, storage: Storage) -> Result<Box<dyn Denoiser>> {
        let below = dir.join(self.network());
        let dir = if below.is_dir() { &below } else { dir };
        Ok(match self {
            Self::StableDiffusion => Box::new(UNet::load(dir, device, storage)?),
            Self::StableDiffusion3 => Box::new(Sd3::load(dir, device, storage)?),
            Self::Flux => Box::new(Flux::load(dir, device, storage)?),
        })
    }
}

/// Where a pipeline's text embeddings come from.
#[derive(Clone, Copy)]
pub enum TextFrom<'a> {
    /// The folder's encoders, with this many T5 tokens.
    Encoders(usize),
    /// A file that `embed` wrote: no encoder is loaded.
    File(&'a Path),
}

/// A loaded model.
pub struct Pipeline {
    pub dir: PathBuf,
    pub family: Family,
    pub text: Text,
    pub net: Box<dyn Denoiser>,
    pub vae: Vae,
    pub schedule: Schedule,
    pub device: Device,
    /// Height and width of its latents.
    size: [usize; 2],
}

impl Pipeline {
    /// Loads a diffusers folder; `resolution` is the side of its images in pixels, where it is not the model's own.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, damaged or not supported.
    pub fn load(
        dir: &Path,
        device: &Device,
        storage: Storage,
        text: TextFrom,
        resolution: Option<usize>,
    ) -> Result<Self> {
        let family = Family::of(dir)?;
        ensure!(
            dir.join(family.network()).is_dir(),
            "--model {}: is the folder of a network alone; give the folder that holds model_index.json",
            dir.display()
        );
        let net = family.load(dir, device, storage)?;
        let source = match text {
            TextFrom::Encoders(_) => dir.display().to_string(),
            TextFrom::File(path) => format!("--embeddings {}", path.display()),
        };
        let text = match text {
            TextFrom::Encoders(length) => Text::load(dir, family, length, net.context()[0], device, storage)?,
            TextFrom::File(path) => Text::open(path, device)?,
        };
        fits(&*net, text.widths(), &source)?;
        let vae = Vae::load(&dir.join("vae"), device, storage)?;
        let [channels, height, width] = net.latent_shape();
        ensure!(
            vae.latent_channels == channels,
            "{}: the VAE has {} latent channels, the network {channels}; the parts belong to different models",
            dir.display(),
            vae.latent_channels
        );
        let size = match resolution {
            None => [height, width],
            Some(pixels) => {
                ensure!(
                    pixels > 0 && pixels.is_multiple_of(vae.factor),
                    "--resolution {pixels}: must be a positive multiple of {}",
                    vae.factor
                );
                [pixels / vae.factor; 2]
            }
        };
        net.accepts(size).context("--resolution")?;
        Ok(Self {
            schedule: load_schedule(dir)?,
            dir: dir.to_path_buf(),
            family,
            text,
            net,
            vae,
            size,
            device: device.clone(),
        })
    }

    /// Text embeddings of prompts.
    ///
    /// # Errors
    /// As [`Text::encode`].
    pub fn encode<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Conditioning> {
        self.text.encode(prompts)
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

/// Reads the schedule of a model folder.
///
/// # Errors
/// As [`Schedule::from_config`], and when the scheduler is of another family than the network.
pub fn load_schedule(dir: &Path) -> Result<Schedule> {
    let path = dir.join("scheduler").join("scheduler_config.json");
    let config: serde_json::Value = crate::files::read_json(&path)?;
    let mut schedule = Schedule::from_config(&config).with_context(|| path.display().to_string())?;
    let family = Family::of(dir)?;
    ensure!(
        family.is_flow() == matches!(schedule, Schedule::Flow(_)),
        "{}: _class_name = {} does not fit the network, which predicts {}",
        path.display(),
        config["_class_name"],
        if family.is_flow() { "a velocity; FlowMatchEulerDiscreteScheduler does" } else { "noise; DDIMScheduler does" }
    );
    if let (Schedule::Flow(flow), Family::Flux) = (&mut schedule, family) {
        flow.spacing = Spacing::Pipeline;
    }
    Ok(schedule)
}

/// SHA-256 over everything that a run reads of its model, weights and small files alike, or over an embeddings file in place
/// of the text encoders: what a checkpoint is bound to.
///
/// # Errors
/// When a file cannot be read.
pub fn fingerprint(dir: &Path, embeddings: Option<&Path>) -> Result<String> {
    let network = Family::of(dir)?.network();
    let mut hasher = sha2::Sha256::new();
    let mut parts: Vec<PathBuf> = std::fs::read_dir(dir)
        .with_context(|| format!("--model {}: cannot be read", dir.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|part| {
            let name = part.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            let text = name.starts_with("text_encoder") || name.starts_with("tokenizer");
            [network, "vae", "scheduler"].contains(&name) || (text && embeddings.is_none())
        })
        .collect();
    parts.sort();
    for part in &parts {
        let mut files: Vec<PathBuf> = std::fs::read_dir(part)
            .with_context(|| format!("{}: cannot be read", part.display()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|f| f.extension().is_some_and(|e| e == "json" || e == "txt"))
            .collect();
        files.sort();
        for file in files {
            hasher.update(std::fs::read(&file).with_context(|| format!("{}: cannot be read", file.display()))?);
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
