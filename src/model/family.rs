//! The families of models: what is the same for all models of one. Adding a family begins with the
//! enum; the compiler lists the rest.

use std::path::Path;

use anyhow::{Result, bail, ensure};
use burn::tensor::Device;
use clap::ValueEnum;

use super::config::NetworkConfig;
use super::denoiser::Denoiser;
use super::loader::Storage;
use super::text::TextLayout;
use super::transformer::flux::{Flux, FluxConfig};
use super::transformer::sd3::{Sd3, Sd3Config};
use super::unet::{UNet, UNetConfig};
use crate::schedule::flow::Spacing;

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
        let places = [dir.join("transformer"), dir.to_path_buf()];
        let path = places.into_iter().map(|d| d.join("config.json")).find(|p| p.is_file());
        let Some(path) = path else {
            bail!(
                "--model {}: not a diffusers folder (there is no unet/ and no transformer/ in it); \
                 give the folder that holds model_index.json",
                dir.display()
            );
        };
        let config: serde_json::Value = crate::io::read_json(&path)?;
        let class = &config["_class_name"];
        let found = Self::value_variants().iter().find(|f| *class == f.class());
        let classes: Vec<&str> = Self::value_variants().iter().map(|f| f.class()).collect();
        match found {
            Some(family) => Ok(*family),
            None => bail!(
                "{}: _class_name = {class} is not supported; {} are",
                path.display(),
                classes.join(", ")
            ),
        }
    }

    /// The diffusers class of the network.
    pub fn class(self) -> &'static str {
        match self {
            Self::StableDiffusion => "UNet2DConditionModel",
            Self::StableDiffusion3 => "SD3Transformer2DModel",
            Self::Flux => "FluxTransformer2DModel",
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
        match self {
            Self::StableDiffusion => false,
            Self::StableDiffusion3 | Self::Flux => true,
        }
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
        let text: &[&str] = match self {
            Self::StableDiffusion => &[],
            Self::StableDiffusion3 | Self::Flux => {
                &["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
            }
        };
        image.iter().chain(text).map(|s| s.to_string()).collect()
    }

    /// Which text encoders it has, and how they are put together.
    pub fn text(self) -> TextLayout {
        match self {
            Self::StableDiffusion => TextLayout::Clip,
            Self::StableDiffusion3 => TextLayout::TwoClipsAndT5,
            Self::Flux => TextLayout::T5AndPooledClip,
        }
    }

    /// How its pipeline spaces the times of diffusers' grid; diffusion has another grid.
    pub fn spacing(self) -> Spacing {
        match self {
            Self::StableDiffusion | Self::StableDiffusion3 => Spacing::Scheduler,
            Self::Flux => Spacing::Pipeline,
        }
    }

    /// The configuration of the network of a folder, its own or a model's.
    ///
    /// # Errors
    /// Names the file and the field that is missing or not supported.
    pub fn config(self, dir: &Path) -> Result<Box<dyn NetworkConfig>> {
        let dir = &self.network_dir(dir);
        Ok(match self {
            Self::StableDiffusion => Box::new(UNetConfig::read(dir)?),
            Self::StableDiffusion3 => Box::new(Sd3Config::read(dir)?),
            Self::Flux => Box::new(FluxConfig::read(dir)?),
        })
    }

    /// Loads the network of a folder, its own or a model's.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, damaged or not supported.
    pub fn load(self, dir: &Path, device: &Device, storage: Storage) -> Result<Box<dyn Denoiser>> {
        let dir = &self.network_dir(dir);
        Ok(match self {
            Self::StableDiffusion => Box::new(UNet::load(dir, device, storage)?),
            Self::StableDiffusion3 => Box::new(Sd3::load(dir, device, storage)?),
            Self::Flux => Box::new(Flux::load(dir, device, storage)?),
        })
    }

    fn network_dir(self, dir: &Path) -> std::path::PathBuf {
        let below = dir.join(self.network());
        if below.is_dir() { below } else { dir.to_path_buf() }
    }
}
