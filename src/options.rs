//! What can be said of a run, by flag or in a TOML file; [`crate::settings`] makes a checked run of it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::credit::{Credit, Total};
use crate::model::weights::Storage;
use crate::ops::group_advantage::Advantage;
use crate::ops::policy_objective::{GuidanceGradient, Objective};
use crate::schedule::{Grid, Sampler};

/// A published method; every part of it can be overridden.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    Ddpo,
    Grpo,
    Pcpo,
}

/// Whether the images of a group start from one latent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InitialNoise {
    Shared,
    Own,
}

/// Flags of `train`, and the keys of its TOML file (without the dashes in front).
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Options {
    /// Model folder in diffusers' layout, or an embedded model with its job: emoji or emoji-flow [default: emoji]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Device: auto, cpu, a number or a part of a name of `pcpo-wgpu devices` [default: auto]
    #[arg(long)]
    pub device: Option<String>,
    /// Memory of the device in GiB, for the estimate before the run [default: what the device says]
    #[arg(long, value_name = "GIB")]
    pub memory: Option<f64>,
    /// Type that frozen weights are stored in; computation and LoRA are f32 [default: f32]
    #[arg(long, value_enum)]
    pub storage: Option<Storage>,
    /// Reward: jpeg-compressibility, jpeg-incompressibility, symmetry, color:NAME or command:PROGRAM
    #[arg(long)]
    pub reward: Option<String>,
    /// Side of the images in pixels [default: the model's own]
    #[arg(long, value_name = "PIXELS")]
    pub resolution: Option<usize>,
    /// Text embeddings that `pcpo-wgpu embed` wrote: no text encoder is loaded
    #[arg(long, value_name = "FILE")]
    pub embeddings: Option<PathBuf>,
    /// T5 tokens of a prompt [default: 256 for Stable Diffusion 3, 512 for FLUX]
    #[arg(long, value_name = "TOKENS")]
    pub max_sequence_length: Option<usize>,
    /// Text file of prompts, one a line
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub prompts: Option<PathBuf>,
    /// One prompt; can be repeated instead of a file
    #[arg(long = "prompt", value_name = "TEXT")]
    pub prompt: Option<Vec<String>>,
    /// Method whose settings are the defaults: pcpo, grpo or ddpo [default: pcpo]
    #[arg(long, value_enum)]
    pub preset: Option<Preset>,
    /// Surrogate objective
    #[arg(long, value_enum)]
    pub objective: Option<Objective>,
    /// Credit rule over the steps
    #[arg(long, value_enum)]
    pub credit: Option<Credit>,
    /// Total credit of `--credit proportionate`, in place of the grid's own: a flow's zeta
    #[arg(long)]
    pub zeta: Option<f64>,
    /// Steps whose total credit `proportionate` keeps [default: all]
    #[arg(long, value_enum)]
    pub credit_total: Option<Total>,
    /// Initial latents: one for a group, or one an image
    #[arg(long, value_enum)]
    pub initial_noise: Option<InitialNoise>,
    /// Normalisation of rewards
    #[arg(long, value_enum)]
    pub advantage: Option<Advantage>,
    /// Whether the last sampler step is trained
    #[arg(long)]
    pub train_last_step: Option<bool>,
    /// Weight of the KL to the model without adapter [default: 0]
    #[arg(long)]
    pub kl_beta: Option<f64>,
    /// Epochs: one rollout each [default: 10]
    #[arg(long)]
    pub epochs: Option<usize>,
    /// Images sampled an epoch [default: the group size times the prompts, of which at most 4]
    #[arg(long)]
    pub images_per_epoch: Option<usize>,
    /// Images of one prompt in an epoch [default: 8]
    #[arg(long)]
    pub group_size: Option<usize>,
    /// Optimizer steps an epoch, each over its share of the images [default: 2]
    #[arg(long)]
    pub updates_per_epoch: Option<usize>,
    /// Passes over the images of an epoch [default: 1]
    #[arg(long)]
    pub inner_epochs: Option<usize>,
    /// Images that the network takes at once; gradients accumulate over them [default: 8]
    #[arg(long)]
    pub batch: Option<usize>,
    /// How a step is drawn [default: ddim for diffusion, flow-grpo for flow models]
    #[arg(long, value_enum)]
    pub sampler: Option<Sampler>,
    /// Sampler steps [default: 50 for ddim, 16 for dance, 10 for flow-grpo and cps]
    #[arg(long)]
    pub steps: Option<usize>,
    /// Amount of noise; 1 is DDPM for ddim [default: 1 for ddim, 0.3 for dance, 0.7 for flow-grpo and cps]
    #[arg(long)]
    pub eta: Option<f64>,
    /// Spacing of a flow's times [default: shifted]
    #[arg(long, value_enum)]
    pub grid: Option<Grid>,
    /// Shift of a flow's times [default: the model's scheduler's]
    #[arg(long)]
    pub shift: Option<f64>,
    /// Guidance; without a distilled network 1 or less is none [default: 5, for Stable Diffusion 3 4.5, for FLUX 3.5]
    #[arg(long)]
    pub guidance_scale: Option<f64>,
    /// Branches of the guidance that the gradient takes [default: both]
    #[arg(long, value_enum)]
    pub guidance_gradient: Option<GuidanceGradient>,
    /// Train only this many steps, drawn each epoch [default: all]
    #[arg(long)]
    pub train_steps: Option<usize>,
    /// Draw the trained steps as one window of neighbours [default: false]
    #[arg(long)]
    pub train_window: Option<bool>,
    /// Sample with noise only at the steps that are trained [default: false]
    #[arg(long)]
    pub noise_only_trained: Option<bool>,
    /// Hold the activations of one block at a time: much less memory for one more forward pass [default: true]
    #[arg(long)]
    pub activation_checkpointing: Option<bool>,
    /// Clip range xi [default: 1e-4]
    #[arg(long)]
    pub clip_range: Option<f64>,
    /// Bound of the advantages [default: 5]
    #[arg(long)]
    pub advantage_clamp: Option<f64>,
    /// Rewards that the per-prompt tracker keeps [default: 32]
    #[arg(long)]
    pub tracker_size: Option<usize>,
    /// Rewards that the tracker needs before it is used [default: 16]
    #[arg(long)]
    pub tracker_min_count: Option<usize>,
    /// AdamW's learning rate [default: 3e-4]
    #[arg(long)]
    pub learning_rate: Option<f64>,
    /// AdamW's weight decay [default: 1e-4]
    #[arg(long)]
    pub weight_decay: Option<f64>,
    /// Largest norm of the gradient [default: 1]
    #[arg(long)]
    pub max_grad_norm: Option<f64>,
    /// Rank of the LoRA [default: 16, or the rank of --lora]
    #[arg(long)]
    pub rank: Option<usize>,
    /// Alpha of the LoRA [default: the rank, or the alpha of --lora]
    #[arg(long)]
    pub alpha: Option<f64>,
    /// Layers with a LoRA, by the end of their names [default: all attention projections]
    #[arg(long, value_delimiter = ',')]
    pub target_modules: Option<Vec<String>>,
    /// Start from this adapter instead of a fresh one
    #[arg(long, value_name = "FILE")]
    pub lora: Option<PathBuf>,
    /// Seed of all noise and all draws [default: 0]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Epochs from one kept checkpoint to the next; the newest is always kept [default: 10]
    #[arg(long)]
    pub keep_every: Option<usize>,
}

impl Options {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// Names the file and the key that is unknown or of the wrong type.
    pub fn from_file(path: &Path) -> Result<Self> {
        toml::from_str(&crate::files::read_text(path)?).with_context(|| format!("--config {}", path.display()))
    }

    /// `self` where it says something, `base` elsewhere.
    ///
    /// # Errors
    /// When a path is not UTF-8 or the seed does not fit TOML's 63 bits.
    pub fn over(&self, base: &Self) -> Result<Self> {
        let table = |o: &Self| {
            toml::Table::try_from(o)
                .context("a path that is not UTF-8, or a --seed of 2^63 or more, cannot be saved with the run")
        };
        let (own, mut merged) = (table(self)?, table(base)?);
        if own.contains_key("prompt") || own.contains_key("prompts") {
            // One word on the prompts replaces both of the other's.
            merged.remove("prompt");
            merged.remove("prompts");
        }
        merged.extend(own);
        Ok(merged.try_into()?)
    }
}
