//! The command line: what can be said, and who does it.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use crate::commands;
use crate::dump;
use crate::lora_io::Format;
use crate::model::weights::Storage;
use crate::options::Options;
use crate::schedule::{Grid, Sampler};

/// Aligns text-to-image models with a reward by policy gradients (PCPO), on any GPU, without CUDA.
#[derive(Parser)]
#[command(version, about, args_override_self = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Train a LoRA towards a reward; without arguments, the embedded model's job
    #[command(allow_negative_numbers = true)]
    Train(Box<TrainArgs>),
    /// Estimate the memory that a run needs, from shapes alone; takes the flags of train
    #[command(allow_negative_numbers = true)]
    Plan(Box<PlanArgs>),
    /// Draw images from prompts
    Sample(SampleArgs),
    /// Compare a model folder with a reference file of diffusers
    Check(CheckArgs),
    /// Print the credit weights of a schedule
    Credit(CreditArgs),
    /// Encode prompts once, so that training needs no text encoder
    Embed(EmbedArgs),
    /// List the devices and what `auto` takes
    Devices,
    /// Rewrite an adapter in another layout
    Convert(ConvertArgs),
    /// Time the shaders on a device
    Bench(BenchArgs),
}

#[derive(Args)]
pub struct TrainArgs {
    #[command(flatten)]
    pub options: Options,
    /// TOML file with the keys of these flags; flags win
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Folder of the run [default: runs/PRESET-N]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Continue the run in this folder; only --epochs, --device, --memory, --keep-every and --model's place can change
    #[arg(long, value_name = "DIR", conflicts_with_all = ["config", "out"])]
    pub resume: Option<PathBuf>,
    /// Write update K (counted from 1) whole, for scripts/verify_update.py
    #[arg(long, value_name = "FILE[:K]")]
    pub dump_update: Option<dump::Request>,
}

#[derive(Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub options: Options,
    /// TOML file with the keys of these flags; flags win
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Args)]
pub struct SampleArgs {
    /// Model folder, or emoji or emoji-flow [default: emoji]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Adapter to use
    #[arg(long, value_name = "FILE")]
    pub lora: Option<PathBuf>,
    /// Prompt; can be repeated
    #[arg(long, required = true)]
    pub prompt: Vec<String>,
    #[command(flatten)]
    pub steps: StepArgs,
    /// Guidance; without a distilled network 1 or less is none [default: 5, for Stable Diffusion 3 4.5, for FLUX 3.5]
    #[arg(long)]
    pub guidance: Option<f64>,
    /// Amount of noise: 0 is deterministic, and 1 is DDPM for ddim
    #[arg(long, default_value_t = 0.0)]
    pub eta: f64,
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Side of the images in pixels [default: the model's own]
    #[arg(long, value_name = "PIXELS")]
    pub resolution: Option<usize>,
    /// Text embeddings that `pcpo-wgpu embed` wrote: no text encoder is loaded
    #[arg(long, value_name = "FILE")]
    pub embeddings: Option<PathBuf>,
    /// T5 tokens of a prompt [default: 256 for Stable Diffusion 3, 512 for FLUX]
    #[arg(long, value_name = "TOKENS")]
    pub max_sequence_length: Option<usize>,
    /// Images of each prompt
    #[arg(long, default_value_t = 1)]
    pub batch: usize,
    /// Folder for the images
    #[arg(long, default_value = "samples")]
    pub out: PathBuf,
    /// Start from the tensor `latents`, `[B,C,H,W]`, of this safetensors file, B = prompts x batch
    #[arg(long, value_name = "FILE")]
    pub latents: Option<PathBuf>,
    /// Write the final latents to this safetensors file, as the tensor `latents`
    #[arg(long, value_name = "FILE")]
    pub save_latents: Option<PathBuf>,
    #[arg(long, default_value = "auto")]
    pub device: String,
    #[arg(long, value_enum, default_value = "f32")]
    pub storage: Storage,
}

/// Which steps a sampler takes.
#[derive(Args)]
pub struct StepArgs {
    /// Sampler [default: ddim for diffusion, ode for flow models]
    #[arg(long, value_enum)]
    pub sampler: Option<Sampler>,
    /// Number of steps [default: 50 for diffusion, 28 for flow models]
    #[arg(long)]
    pub steps: Option<usize>,
    /// Spacing of a flow's times
    #[arg(long, value_enum, default_value = "diffusers")]
    pub grid: Grid,
    /// Shift of a flow's times [default: the model's scheduler's]
    #[arg(long)]
    pub shift: Option<f64>,
}

#[derive(Args)]
pub struct CheckArgs {
    /// Model folder, or the folder of one component
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// File of scripts/reference.py, with reference.json beside it
    #[arg(long, value_name = "FILE")]
    pub reference: PathBuf,
    /// Largest error relative to the reference's standard deviation
    #[arg(long, default_value_t = 1e-3)]
    pub tolerance: f64,
    #[arg(long, default_value = "auto")]
    pub device: String,
    #[arg(long, value_enum, default_value = "f32")]
    pub storage: Storage,
}

#[derive(Args)]
pub struct CreditArgs {
    #[arg(long, value_enum, default_value = "ddim")]
    pub sampler: Sampler,
    /// Number of steps [default: 50 for ddim, 16 for dance, 10 for flow-grpo and cps]
    #[arg(long)]
    pub steps: Option<usize>,
    /// Amount of noise [default: 1 for ddim, 0.3 for dance, 0.7 for flow-grpo and cps]
    #[arg(long)]
    pub eta: Option<f64>,
    /// Shift of a flow's times [default: 3, or the model's scheduler's]
    #[arg(long)]
    pub shift: Option<f64>,
    /// Published total of a flow's credit, in place of the grid's own
    #[arg(long)]
    pub zeta: Option<f64>,
    /// Model folder whose scheduler is used [default: Stable Diffusion's for ddim, a plain shift for flows]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Write a plot (PNG)
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
}

#[derive(Args)]
pub struct EmbedArgs {
    /// Model folder, or emoji or emoji-flow [default: emoji]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Text file of prompts, one a line
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub prompts: Option<PathBuf>,
    /// One prompt; can be repeated instead of a file
    #[arg(long = "prompt", value_name = "TEXT")]
    pub prompt: Option<Vec<String>>,
    /// File to write
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// T5 tokens of a prompt [default: 256 for Stable Diffusion 3, 512 for FLUX]
    #[arg(long, value_name = "TOKENS")]
    pub max_sequence_length: Option<usize>,
    #[arg(long, default_value = "auto")]
    pub device: String,
    #[arg(long, value_enum, default_value = "f32")]
    pub storage: Storage,
}

#[derive(Args)]
pub struct ConvertArgs {
    /// Adapter to read: diffusers', peft's or kohya's layout
    pub input: PathBuf,
    /// File to write
    pub output: PathBuf,
    #[arg(long, value_enum, default_value = "kohya")]
    pub format: Format,
    /// Model folder that the adapter belongs to, or emoji or emoji-flow [default: emoji]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
}

#[derive(Args)]
pub struct BenchArgs {
    #[arg(long, default_value = "auto")]
    pub device: String,
}

/// Runs a command; the number is the exit code.
///
/// # Errors
/// Anything that keeps the command from its end; `main` prints it and exits with 2.
pub fn run(cli: Cli) -> Result<i32> {
    match cli.command {
        Command::Train(args) => commands::train(*args),
        Command::Plan(args) => commands::plan(*args),
        Command::Sample(args) => commands::sample(&args),
        Command::Check(args) => commands::check(&args),
        Command::Credit(args) => commands::credit(&args),
        Command::Embed(args) => commands::embed(&args),
        Command::Devices => commands::devices(),
        Command::Convert(args) => commands::convert(&args),
        Command::Bench(args) => commands::bench(&args),
    }
}
