//! What can be said of a run, by flag or in a TOML file; [`super::settings`] makes a checked run of
//! it.

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Deserializer, Serialize};

use super::choices::{BranchGroup, InitialNoise, LrScheduler, Objective, OldDecay, Preset, Switch};
use crate::device::ComputeType;
use crate::model::{Resolution, Storage};
use crate::ops::advantage::{Advantage, Mix};
use crate::ops::policy_objective::GuidanceGradient;
use crate::reward::{self, JudgeAnswer};
use crate::schedule::credit::{Credit, Total};
use crate::schedule::{Grid, PredictionType, Sampler};

/// Flags of `train`, and the keys of its TOML file (without the dashes in front).
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Options {
    /// Model: a folder in diffusers' layout, one .safetensors file, or an embedded model with its
    /// job, emoji or emoji-flow [default: emoji]
    #[arg(long, value_name = "DIR|FILE", help_heading = "Model and device")]
    pub model: Option<PathBuf>,
    /// Type that frozen weights are stored in; the LoRA is f32 [default: f32]
    #[arg(long, value_enum, help_heading = "Model and device")]
    pub storage: Option<Storage>,
    /// Configurations in diffusers' layout, for what a model that is one file cannot say
    #[arg(long, value_name = "DIR", help_heading = "Model and device")]
    pub model_config: Option<PathBuf>,
    /// VAE in place of the model's
    #[arg(long, value_name = "DIR|FILE", help_heading = "Model and device")]
    pub vae: Option<PathBuf>,
    /// Text encoder in place of the model's; can be repeated, in the order of the model's
    #[arg(long, value_name = "DIR|FILE", help_heading = "Model and device")]
    pub text_encoder: Option<Vec<PathBuf>>,
    /// What a model of diffusion predicts, where its file does not say it
    #[arg(long, value_enum, help_heading = "Model and device")]
    pub prediction_type: Option<PredictionType>,
    /// Side of the images in pixels, or HEIGHTxWIDTH [default: the model's own]
    #[arg(long, value_name = "PIXELS", help_heading = "Model and device")]
    pub resolution: Option<Resolution>,
    /// What SDXL is told of sizes: original height and width, top and left of the crop, height and
    /// width that are wanted [default: the images' own, uncropped]
    #[arg(long, value_name = "H,W,TOP,LEFT,H,W", value_delimiter = ',', help_heading = "Sampling")]
    pub time_ids: Option<Vec<f64>>,
    /// The same for the negative prompt [default: --time-ids]
    #[arg(long, value_name = "H,W,TOP,LEFT,H,W", value_delimiter = ',', help_heading = "Sampling")]
    pub negative_time_ids: Option<Vec<f64>>,
    /// What guidance leads away from [default: the empty prompt; zeros, where SDXL has them]
    #[arg(long, value_name = "TEXT", help_heading = "Sampling")]
    pub negative_prompt: Option<String>,
    /// Text embeddings that `pcpo-wgpu embed` wrote: no text encoder is loaded
    #[arg(long, value_name = "FILE", help_heading = "Model and device")]
    pub embeddings: Option<PathBuf>,
    /// T5 tokens of a prompt [default: 256 for Stable Diffusion 3, 512 for FLUX]
    #[arg(long, value_name = "TOKENS", help_heading = "Model and device")]
    pub max_sequence_length: Option<usize>,
    /// Device: auto, cpu, a number or a part of a name of `pcpo-wgpu devices`, several of these
    /// with commas between, or all hardware: all [default: auto]
    #[arg(long, help_heading = "Model and device")]
    pub device: Option<String>,
    /// What convolutions, linear layers and attention take, added up in f32; f16 on GPUs [default:
    /// f32]
    #[arg(long, value_enum, help_heading = "Model and device")]
    pub compute: Option<ComputeType>,
    /// Memory of the device in GiB, for the estimate before the run [default: what the device
    /// says]
    #[arg(long, value_name = "GIB", help_heading = "Model and device")]
    pub memory: Option<f64>,
    /// Text file of prompts, one a line: text, or JSON {"prompt": TEXT, ..} with metadata
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "prompt",
        help_heading = "Prompts and reward"
    )]
    pub prompts: Option<PathBuf>,
    /// One prompt; can be repeated instead of a file
    #[arg(long = "prompt", value_name = "TEXT", help_heading = "Prompts and reward")]
    pub prompt: Option<Vec<String>>,
    /// What pictures are scored by, `[WEIGHT*]SPEC`; see [`crate::reward::REWARDS`]
    #[arg(
        long,
        value_name = "[WEIGHT*]SPEC",
        allow_hyphen_values = true,
        help = format!("Reward; can be repeated, with a weight in front: {}", reward::list()),
        help_heading = "Prompts and reward"
    )]
    #[serde(default, deserialize_with = "one_or_several")]
    pub reward: Option<Vec<String>>,
    /// How several rewards become one advantage [default: per-reward]
    #[arg(long, value_enum, help_heading = "Prompts and reward")]
    pub mix: Option<Mix>,
    /// A reward that is scored and recorded, not trained on; can be repeated
    #[arg(long, value_name = "SPEC", help_heading = "Prompts and reward")]
    #[serde(default, deserialize_with = "one_or_several")]
    pub watch: Option<Vec<String>>,
    /// Device of the reward models [default: that of the training]
    #[arg(long, value_name = "DEVICE", help_heading = "Prompts and reward")]
    pub reward_device: Option<String>,
    /// Seconds that a reward's server has for an answer; a program has ten times as long [default:
    /// 60]
    #[arg(long, value_name = "SECONDS", help_heading = "Prompts and reward")]
    pub reward_timeout: Option<f64>,
    /// What a judge is asked, with {prompt} in its place [default: by --judge-answer]
    #[arg(long, value_name = "TEXT", help_heading = "Prompts and reward")]
    pub judge_question: Option<String>,
    /// What a judge's answer is read for [default: number]
    #[arg(long, value_enum, help_heading = "Prompts and reward")]
    pub judge_answer: Option<JudgeAnswer>,
    /// Method whose settings are the defaults [default: pcpo; for flow models branch, unless
    /// numbers of images, trained steps or parts of a method are named]
    #[arg(long, value_enum, help_heading = "Method")]
    pub preset: Option<Preset>,
    /// Surrogate objective
    #[arg(long, value_enum, help_heading = "Method")]
    pub objective: Option<Objective>,
    /// NFT: how far the policy goes for an advantage; larger goes less far [default: 1]
    #[arg(long, help_heading = "Method")]
    pub nft_beta: Option<f64>,
    /// NFT, AWM: how the old policy follows after an epoch [default: type-1 for nft, awm for awm]
    #[arg(long, value_enum, help_heading = "Method")]
    pub old_decay: Option<OldDecay>,
    /// Credit rule over the steps
    #[arg(long, value_enum, help_heading = "Method")]
    pub credit: Option<Credit>,
    /// Total credit of `--credit proportionate`, in place of the grid's own: a flow's zeta
    #[arg(long, help_heading = "Method")]
    pub zeta: Option<f64>,
    /// Steps whose total credit `proportionate` keeps [default: all]
    #[arg(long, value_enum, help_heading = "Method")]
    pub credit_total: Option<Total>,
    /// Normalisation of rewards
    #[arg(long, value_enum, help_heading = "Method")]
    pub advantage: Option<Advantage>,
    /// Bound of the advantages [default: 5]
    #[arg(long, help_heading = "Method")]
    pub advantage_clamp: Option<f64>,
    /// Rewards that the per-prompt tracker keeps [default: 32]
    #[arg(long, help_heading = "Method")]
    pub tracker_size: Option<usize>,
    /// Rewards that the tracker needs before it is used [default: 16]
    #[arg(long, help_heading = "Method")]
    pub tracker_min_count: Option<usize>,
    /// Clip range xi [default: 1e-4, for awm 1]
    #[arg(long, help_heading = "Method")]
    pub clip_range: Option<f64>,
    /// Weight of the KL to the model without adapter; for nft and awm of the mean square distance
    /// [default: 0, for nft 1e-4, for awm 1e-3]
    #[arg(long, help_heading = "Method")]
    pub kl_beta: Option<f64>,
    /// How a step is drawn [default: ddim for diffusion, flow-grpo for flow models]
    #[arg(long, value_enum, help_heading = "Sampling")]
    pub sampler: Option<Sampler>,
    /// Sampler steps [default: 50 for ddim, 16 for dance, 10 for flow-grpo and cps]
    #[arg(long, help_heading = "Sampling")]
    pub steps: Option<usize>,
    /// Amount of noise; 1 is DDPM for ddim [default: 1 for ddim, 0.3 for dance, 0.7 for flow-grpo
    /// and cps]
    #[arg(long, help_heading = "Sampling")]
    pub eta: Option<f64>,
    /// Spacing of a flow's times [default: shifted]
    #[arg(long, value_enum, help_heading = "Sampling")]
    pub grid: Option<Grid>,
    /// Shift of a flow's times [default: the model's scheduler's]
    #[arg(long, help_heading = "Sampling")]
    pub shift: Option<f64>,
    /// Guidance; without a distilled network 1 or less is none [default: 5, for Stable Diffusion 3
    /// 4.5, for FLUX 3.5]
    #[arg(long, help_heading = "Sampling")]
    pub guidance_scale: Option<f64>,
    /// Branches of the guidance that the gradient takes [default: both]
    #[arg(long, value_enum, help_heading = "Sampling")]
    pub guidance_gradient: Option<GuidanceGradient>,
    /// Initial latents: one for a group, or one an image
    #[arg(long, value_enum, help_heading = "Sampling")]
    pub initial_noise: Option<InitialNoise>,
    /// Train only this many steps, drawn each epoch; for nft and awm the times of an image
    /// [default: all, for nft 99% of them, for awm 6]
    #[arg(long, help_heading = "Sampling")]
    pub train_steps: Option<usize>,
    /// Draw the trained steps as one window of neighbours [default: false]
    #[arg(
        long,
        num_args = 0..=1,
        default_missing_value = "true",
        value_name = "BOOL",
        help_heading = "Sampling",
    )]
    pub train_window: Option<bool>,
    /// Train only within this first part of the steps, 0.5 being the first half [default: 1]
    #[arg(long, value_name = "PART", help_heading = "Sampling")]
    pub train_within: Option<f64>,
    /// Train the last sampler step too
    #[arg(
        long,
        num_args = 0..=1,
        default_missing_value = "true",
        value_name = "BOOL",
        help_heading = "Sampling",
    )]
    pub train_last_step: Option<bool>,
    /// Sample with noise only at the steps that are trained [default: false]
    #[arg(
        long,
        num_args = 0..=1,
        default_missing_value = "true",
        value_name = "BOOL",
        help_heading = "Sampling",
    )]
    pub noise_only_trained: Option<bool>,
    /// Branch at the first steps: K1,K2,.. images with noise from one latent at each, and 0 at the
    /// rest; takes the place of --images-per-epoch, --group-size, --train-steps, --train-last-step
    /// and --initial-noise
    #[arg(long, value_name = "K,K,..", value_delimiter = ',', help_heading = "Branching")]
    pub branch: Option<Vec<usize>>,
    /// Roots of each of an epoch's prompts, of which there are up to 4: trajectories without noise
    /// that branch [default: 1]
    #[arg(long, value_name = "N", help_heading = "Branching")]
    pub roots: Option<usize>,
    /// Branches of a step whose rewards are compared: those of a root, or of a prompt [default:
    /// root]
    #[arg(long, value_enum, help_heading = "Branching")]
    pub branch_group: Option<BranchGroup>,
    /// Steps without branches, drawn each epoch, at which --kl-beta holds the roots to the model
    /// without adapter [default: 0]
    #[arg(long, value_name = "N", help_heading = "Branching")]
    pub anchor_steps: Option<usize>,
    /// Epochs: one rollout each [default: 10]
    #[arg(long, help_heading = "Images and updates")]
    pub epochs: Option<usize>,
    /// Images sampled an epoch [default: the group size times the prompts, of which at most 4]
    #[arg(long, help_heading = "Images and updates")]
    pub images_per_epoch: Option<usize>,
    /// Images of one prompt in an epoch [default: 8]
    #[arg(long, help_heading = "Images and updates")]
    pub group_size: Option<usize>,
    /// Optimizer steps an epoch, each over its share of the images [default: 2]
    #[arg(long, help_heading = "Images and updates")]
    pub updates_per_epoch: Option<usize>,
    /// Passes over the images of an epoch [default: 1]
    #[arg(long, help_heading = "Images and updates")]
    pub inner_epochs: Option<usize>,
    /// Images that the network takes at once; gradients accumulate over them [default: 8]
    #[arg(long, help_heading = "Images and updates")]
    pub batch: Option<usize>,
    /// Hold the activations of one block at a time: much less memory for one more forward pass
    /// [default: auto: where memory asks for it]
    #[arg(
        long,
        value_enum,
        num_args = 0..=1,
        default_missing_value = "true",
        help_heading = "Images and updates",
    )]
    pub activation_checkpointing: Option<Switch>,
    /// Pictures decoded in overlapping tiles, which differ a little from whole ones [default: auto:
    /// on where whole ones are what leaves no room]
    #[arg(long, value_enum, help_heading = "Model and device")]
    pub vae_tiling: Option<Switch>,
    /// The network's blocks read when their turn comes, for weights larger than the device's memory
    /// [default: auto: where nothing else fits]
    #[arg(
        long,
        value_enum,
        num_args = 0..=1,
        default_missing_value = "true",
        help_heading = "Model and device",
    )]
    pub stream_blocks: Option<Switch>,
    /// Seed of all noise and all draws [default: 0]
    #[arg(long, help_heading = "Images and updates")]
    pub seed: Option<u64>,
    /// Rank of the LoRA [default: 16, or the rank of --lora]
    #[arg(long, help_heading = "Adapter and optimizer")]
    pub rank: Option<usize>,
    /// Alpha of the LoRA [default: the rank, or the alpha of --lora]
    #[arg(long, help_heading = "Adapter and optimizer")]
    pub alpha: Option<f64>,
    /// Layers with a LoRA, by the end of their names [default: all attention projections]
    #[arg(long, value_delimiter = ',', help_heading = "Adapter and optimizer")]
    pub target_modules: Option<Vec<String>>,
    /// Start from this adapter instead of a fresh one
    #[arg(long, value_name = "FILE", help_heading = "Adapter and optimizer")]
    pub lora: Option<PathBuf>,
    /// AdamW's learning rate [default: 3e-4]
    #[arg(long, help_heading = "Adapter and optimizer")]
    pub learning_rate: Option<f64>,
    /// How the learning rate goes on [default: constant]
    #[arg(long, value_enum, help_heading = "Adapter and optimizer")]
    pub lr_scheduler: Option<LrScheduler>,
    /// Updates over which the learning rate rises to its value [default: 0]
    #[arg(long, value_name = "UPDATES", help_heading = "Adapter and optimizer")]
    pub lr_warmup_steps: Option<usize>,
    /// Decay of a running mean of the adapter, which is evaluated and saved beside it [default:
    /// none]
    #[arg(long, value_name = "DECAY", help_heading = "Adapter and optimizer")]
    pub ema: Option<f64>,
    /// Optimizer steps from one update of the running mean to the next [default: 8]
    #[arg(long, value_name = "STEPS", help_heading = "Adapter and optimizer")]
    pub ema_every: Option<usize>,
    /// AdamW's weight decay [default: 1e-4]
    #[arg(long, help_heading = "Adapter and optimizer")]
    pub weight_decay: Option<f64>,
    /// Largest norm of the gradient [default: 1]
    #[arg(long, help_heading = "Adapter and optimizer")]
    pub max_grad_norm: Option<f64>,
    /// Epochs from one row of pictures, with its reward, to the next; the first and the last epoch
    /// are always evaluated whole [default: 1]
    #[arg(long, value_name = "EPOCHS", help_heading = "Pictures and checkpoints")]
    pub sample_every: Option<usize>,
    /// Epochs from one evaluation to the next: rewards on fixed prompts and noise, diversity, and
    /// what pixels say, against the model at the beginning [default: that of --sample-every]
    #[arg(long, value_name = "EPOCHS", help_heading = "Evaluation and collapse")]
    pub eval_every: Option<usize>,
    /// Text file of held-out prompts to evaluate on [default: up to 4 of the training prompts,
    /// with other noise]
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "eval_prompt",
        help_heading = "Evaluation and collapse"
    )]
    pub eval_prompts: Option<PathBuf>,
    /// One held-out prompt; can be repeated instead of a file
    #[arg(long, value_name = "TEXT", help_heading = "Evaluation and collapse")]
    pub eval_prompt: Option<Vec<String>>,
    /// Images of each prompt in an evaluation [default: 4]
    #[arg(long, value_name = "N", help_heading = "Evaluation and collapse")]
    pub eval_images: Option<usize>,
    /// What the diversity of pictures is measured by: clip:PATH [default: not measured]
    #[arg(long, value_name = "clip:PATH", help_heading = "Evaluation and collapse")]
    pub features: Option<String>,
    /// KL of a trajectory to the model without adapter that the watch allows
    #[arg(long, value_name = "K", help_heading = "Evaluation and collapse")]
    pub kl_budget: Option<f64>,
    /// Bounds of a signal of the watch, SIGNAL=WARN,STOP or SIGNAL=off; can be repeated
    #[arg(long, value_name = "SIGNAL=..", help_heading = "Evaluation and collapse")]
    pub collapse_bound: Option<Vec<String>>,
    /// End the run when its pictures have collapsed, with the best adapter kept [default: false]
    #[arg(
        long,
        num_args = 0..=1,
        default_missing_value = "true",
        value_name = "BOOL",
        help_heading = "Evaluation and collapse",
    )]
    pub stop_on_collapse: Option<bool>,
    /// Write TensorBoard's event files to the folder `tensorboard` of the run [default: false]
    #[arg(
        long,
        num_args = 0..=1,
        default_missing_value = "true",
        value_name = "BOOL",
        help_heading = "Pictures and checkpoints",
    )]
    pub tensorboard: Option<bool>,
    /// Newest checkpoints that are kept, at least 2 [default: 2]
    #[arg(long, value_name = "N", help_heading = "Pictures and checkpoints")]
    pub keep_last: Option<usize>,
    /// Epochs from one kept checkpoint to the next, beside the newest [default: 10]
    #[arg(long, value_name = "EPOCHS", help_heading = "Pictures and checkpoints")]
    pub keep_every: Option<usize>,
}

/// A text or a list of texts.
fn one_or_several<'de, D: Deserializer<'de>>(
    from: D,
) -> std::result::Result<Option<Vec<String>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a text or a list of texts")]
    enum Texts {
        One(String),
        Several(Vec<String>),
    }
    Ok(Option::<Texts>::deserialize(from)?.map(|texts| match texts {
        Texts::One(text) => vec![text],
        Texts::Several(texts) => texts,
    }))
}
