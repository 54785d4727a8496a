//! The command line: what can be said, and who does it.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::commands;
use crate::dump;
use crate::lora_io::Format;
use crate::model::weights::Storage;
use crate::settings::Options;

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
    /// Draw images from prompts
    Sample(SampleArgs),
    /// Compare a model folder with a reference file of diffusers
    Check(CheckArgs),
    /// Print the credit weights of a schedule
    Credit(CreditArgs),
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
    /// Continue the run in this folder; only --epochs, --device, --keep-every and --model's place can change
    #[arg(long, value_name = "DIR", conflicts_with_all = ["config", "out"])]
    pub resume: Option<PathBuf>,
    /// Write update K (counted from 1) whole, for scripts/verify_update.py
    #[arg(long, value_name = "FILE[:K]")]
    pub dump_update: Option<dump::Request>,
}

#[derive(Args)]
pub struct SampleArgs {
    /// Model folder [default: the embedded emoji model]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Adapter to use
    #[arg(long, value_name = "FILE")]
    pub lora: Option<PathBuf>,
    /// Prompt; can be repeated
    #[arg(long, required = true)]
    pub prompt: Vec<String>,
    #[arg(long, default_value_t = 50)]
    pub steps: usize,
    /// Classifier-free guidance; 1 or less is none
    #[arg(long, default_value_t = 5.0)]
    pub guidance: f64,
    /// DDIM's eta: 0 is deterministic, 1 is DDPM
    #[arg(long, default_value_t = 0.0)]
    pub eta: f64,
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
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

/// Samplers whose credit can be printed.
#[derive(Clone, Copy, ValueEnum)]
pub enum Sampler {
    Ddim,
}

#[derive(Args)]
pub struct CreditArgs {
    #[arg(long, value_enum, default_value = "ddim")]
    pub sampler: Sampler,
    #[arg(long, default_value_t = 50)]
    pub steps: usize,
    #[arg(long, default_value_t = 1.0)]
    pub eta: f64,
    /// Model folder whose scheduler is used [default: Stable Diffusion's]
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
pub struct ConvertArgs {
    /// Adapter to read: diffusers', peft's or kohya's layout
    pub input: PathBuf,
    /// File to write
    pub output: PathBuf,
    #[arg(long, value_enum, default_value = "kohya")]
    pub format: Format,
    /// Model folder that the adapter belongs to [default: the embedded emoji model]
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
        Command::Sample(args) => commands::sample(&args),
        Command::Check(args) => commands::check(&args),
        Command::Credit(args) => commands::credit(&args),
        Command::Devices => commands::devices(),
        Command::Convert(args) => commands::convert(&args),
        Command::Bench(args) => commands::bench(&args),
    }
}
