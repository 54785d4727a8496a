//! A whole Stable-Diffusion folder: tokenizer, text encoder, UNet, VAE and schedule.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use burn::tensor::{Device, Tensor};
use sha2::Digest;

use super::clip::ClipText;
use super::tokenizer::Tokenizer;
use super::unet::UNet;
use super::vae::Vae;
use super::weights::{Storage, Weights};
use crate::schedule::Schedule;

/// What a denoiser is conditioned on. Stable Diffusion has a sequence only; other families add pooled vectors and ids.
#[derive(Clone)]
pub struct Conditioning {
    /// `[B, T, D]`
    pub sequence: Tensor<3>,
}

impl Conditioning {
    /// `n` rows from `start` on.
    pub fn rows(&self, start: usize, n: usize) -> Self {
        Self { sequence: self.sequence.clone().narrow(0, start, n) }
    }

    /// Rows of `self`, then of `other`.
    pub fn then(&self, other: &Self) -> Self {
        Self { sequence: Tensor::cat(vec![self.sequence.clone(), other.sequence.clone()], 0) }
    }

    /// Row `0` repeated.
    pub fn repeat(&self, n: usize) -> Self {
        Self { sequence: self.sequence.clone().repeat_dim(0, n) }
    }
}

/// A loaded model.
pub struct Pipeline {
    pub dir: PathBuf,
    pub tokenizer: Tokenizer,
    pub text: ClipText,
    pub unet: UNet,
    pub vae: Vae,
    pub schedule: Schedule,
    pub device: Device,
}

impl Pipeline {
    /// Loads a diffusers folder.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, damaged or not supported.
    pub fn load(dir: &Path, device: &Device, storage: Storage) -> Result<Self> {
        ensure!(
            dir.join("unet").is_dir(),
            "--model {}: not a diffusers folder (there is no unet/ in it); give the folder that holds model_index.json",
            dir.display()
        );
        let text = ClipText::load(&dir.join("text_encoder"), device, storage)?;
        let unet = UNet::load(&dir.join("unet"), device, storage)?;
        let vae = Vae::load(&dir.join("vae"), device, storage)?;
        ensure!(
            text.width == unet.context,
            "{}: the text encoder is {} wide, the UNet's cross_attention_dim is {}; the parts belong to different models",
            dir.display(),
            text.width,
            unet.context
        );
        ensure!(
            vae.latent_channels == unet.in_channels,
            "{}: the VAE has {} latent channels, the UNet {}; the parts belong to different models",
            dir.display(),
            vae.latent_channels,
            unet.in_channels
        );
        Ok(Self {
            tokenizer: Tokenizer::load(&dir.join("tokenizer"), text.max_tokens)?,
            schedule: load_schedule(dir)?,
            text,
            unet,
            vae,
            device: device.clone(),
            dir: dir.to_path_buf(),
        })
    }

    /// Text embeddings of prompts, `[B, T, D]`.
    ///
    /// # Errors
    /// When a prompt cannot be tokenized.
    pub fn encode<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Conditioning> {
        let ids = prompts.iter().map(|p| self.tokenizer.encode(p.as_ref())).collect::<Result<Vec<_>>>()?;
        Ok(Conditioning { sequence: self.text.forward(&ids)? })
    }

    /// Shape of one latent, [C, H, W].
    pub fn latent_shape(&self) -> [usize; 3] {
        let [h, w] = self.unet.sample_size;
        [self.unet.in_channels, h, w]
    }
}

/// Reads the schedule of a model folder.
///
/// # Errors
/// As [`Schedule::from_config`].
pub fn load_schedule(dir: &Path) -> Result<Schedule> {
    let path = dir.join("scheduler").join("scheduler_config.json");
    Schedule::from_config(&crate::files::read_json(&path)?).with_context(|| path.display().to_string())
}

/// SHA-256 over the UNet's weights: what a checkpoint is bound to.
///
/// # Errors
/// When the weights cannot be opened.
pub fn fingerprint(dir: &Path) -> Result<String> {
    let mut hasher = sha2::Sha256::new();
    Weights::open_dir(&dir.join("unet"))?.add_to_hash(&mut hasher);
    Ok(format!("{:x}", hasher.finalize()))
}
