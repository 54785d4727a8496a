//! The families of models: what is the same for all models of one. Adding a family begins with the
//! enum; the compiler lists the rest.

use anyhow::Result;
use burn::tensor::Device;
use clap::ValueEnum;

use super::component::Component;
use super::config::{Config, NetworkConfig};
use super::denoiser::Denoiser;
use super::loader::{Storage, Stream};
use super::text::layout::TextLayout;
use super::text::qwen3::States;
use super::transformer::flux::Flux;
use super::transformer::flux::config::FluxConfig;
use super::transformer::flux2::Flux2;
use super::transformer::flux2::config::Flux2Config;
use super::transformer::sd3::{Sd3, Sd3Config};
use super::transformer::z_image::ZImage;
use super::transformer::z_image::config::ZImageConfig;
use super::unet::{UNet, UNetConfig};
use crate::schedule::flow::Spacing;

/// The families of models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Family {
    /// Stable Diffusion 1 and 2: a UNet.
    StableDiffusion,
    /// SDXL: a UNet that is told a pooled text and sizes in pixels.
    StableDiffusionXl,
    StableDiffusion3,
    /// FLUX.1.
    Flux,
    /// FLUX.2 klein.
    Flux2,
    ZImage,
}

impl Family {
    /// The family of a network by its configuration.
    ///
    /// # Errors
    /// When it is of no known class.
    pub fn of_network(config: &Config) -> Result<Self> {
        let class = &config.json["_class_name"];
        let found = Self::value_variants().iter().find(|f| *class == f.class());
        // diffusers has one class for both.
        let sdxl = !config.json["addition_embed_type"].is_null();
        match found {
            Some(Self::StableDiffusion) if sdxl => Ok(Self::StableDiffusionXl),
            Some(family) => Ok(*family),
            None => Err(config.bad(
                "_class_name",
                &format!("is not supported; {} are", Self::classes().join(", ")),
            )),
        }
    }

    /// The diffusers classes of networks.
    fn classes() -> Vec<&'static str> {
        let mut classes: Vec<_> = Self::value_variants().iter().map(|f| f.class()).collect();
        classes.dedup();
        classes
    }

    /// The diffusers class of the network.
    pub fn class(self) -> &'static str {
        match self {
            Self::StableDiffusion | Self::StableDiffusionXl => "UNet2DConditionModel",
            Self::StableDiffusion3 => "SD3Transformer2DModel",
            Self::Flux => "FluxTransformer2DModel",
            Self::Flux2 => "Flux2Transformer2DModel",
            Self::ZImage => "ZImageTransformer2DModel",
        }
    }

    /// The network's folder in a model folder.
    pub fn network(self) -> &'static str {
        match self {
            Self::StableDiffusion | Self::StableDiffusionXl => "unet",
            Self::StableDiffusion3 | Self::Flux | Self::Flux2 | Self::ZImage => "transformer",
        }
    }

    /// Whether it predicts a velocity.
    pub fn is_flow(self) -> bool {
        match self {
            Self::StableDiffusion | Self::StableDiffusionXl => false,
            Self::StableDiffusion3 | Self::Flux | Self::Flux2 | Self::ZImage => true,
        }
    }

    /// The guidance scale of the family's published trainers, or else of its pipeline.
    pub fn default_guidance(self) -> f64 {
        match self {
            Self::StableDiffusion | Self::StableDiffusionXl => 5.0,
            Self::StableDiffusion3 => 4.5,
            Self::Flux => 3.5,
            Self::Flux2 => 4.0,
            Self::ZImage => 5.0,
        }
    }

    /// Tokens of T5 or Qwen3 that diffusers' pipeline takes unless told otherwise; 0 without
    /// either.
    pub fn default_sequence(self) -> usize {
        match self {
            Self::StableDiffusion | Self::StableDiffusionXl => 0,
            Self::StableDiffusion3 => 256,
            Self::Flux | Self::Flux2 | Self::ZImage => 512,
        }
    }

    /// The layers that LoRAs of the family usually adapt: all attention projections.
    pub fn default_targets(self) -> Vec<String> {
        let image = ["to_q", "to_k", "to_v", "to_out.0"];
        let text: &[&str] = match self {
            Self::StableDiffusion | Self::StableDiffusionXl | Self::ZImage => &[],
            Self::StableDiffusion3 | Self::Flux | Self::Flux2 => {
                &["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
            }
        };
        // Single blocks have them, and their feed-forward's input, in one layer. Its counterpart
        // `to_out` is left out: in double blocks peft would find a list of that name, and fail.
        let fused: &[&str] = if self == Self::Flux2 { &["to_qkv_mlp_proj"] } else { &[] };
        image.iter().chain(text).chain(fused).map(|s| s.to_string()).collect()
    }

    /// Which text encoders it has, and how they are put together.
    pub fn text(self) -> TextLayout {
        match self {
            Self::StableDiffusion => TextLayout::Clip,
            Self::StableDiffusionXl => TextLayout::TwoClips,
            Self::StableDiffusion3 => TextLayout::TwoClipsAndT5,
            Self::Flux => TextLayout::T5AndPooledClip,
            Self::Flux2 => TextLayout::Qwen3(States::Three),
            Self::ZImage => TextLayout::Qwen3(States::SecondLast),
        }
    }

    /// How its pipeline spaces the times of diffusers' grid; diffusion has another grid.
    pub fn spacing(self) -> Spacing {
        match self {
            Self::StableDiffusion | Self::StableDiffusionXl | Self::StableDiffusion3 => {
                Spacing::Scheduler
            }
            Self::Flux | Self::ZImage => Spacing::Pipeline,
            Self::Flux2 => Spacing::Empirical,
        }
    }

    /// The configuration of a network.
    ///
    /// # Errors
    /// Names the file and the field that is missing or not supported.
    pub fn config(self, config: &Config) -> Result<Box<dyn NetworkConfig>> {
        Ok(match self {
            Self::StableDiffusion | Self::StableDiffusionXl => Box::new(UNetConfig::read(config)?),
            Self::StableDiffusion3 => Box::new(Sd3Config::read(config)?),
            Self::Flux => Box::new(FluxConfig::read(config)?),
            Self::Flux2 => Box::new(Flux2Config::read(config)?),
            Self::ZImage => Box::new(ZImageConfig::read(config)?),
        })
    }

    /// Loads a network, whose blocks are read when their turn comes where `stream` says so.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, damaged or not supported.
    pub fn load(
        self,
        network: &Component,
        device: &Device,
        storage: Storage,
        stream: Option<Stream>,
    ) -> Result<Box<dyn Denoiser>> {
        Ok(match self {
            Self::StableDiffusion | Self::StableDiffusionXl => {
                Box::new(UNet::load(network, device, storage, stream)?)
            }
            Self::StableDiffusion3 => Box::new(Sd3::load(network, device, storage, stream)?),
            Self::Flux => Box::new(Flux::load(network, device, storage, stream)?),
            Self::Flux2 => Box::new(Flux2::load(network, device, storage, stream)?),
            Self::ZImage => Box::new(ZImage::load(network, device, storage, stream)?),
        })
    }
}
