//! What several commands are told alike.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;

use crate::config::numbers::{self, MOST, Range};
use crate::config::prompts::model_folder;
use crate::config::recipe::Recipe;
use crate::config::{Options, Settings};
use crate::device::chosen::open_one;
use crate::device::{Compute, ComputeType};
use crate::model::{Family, ModelFiles, ModelSpec, Storage, Stream};
use crate::reward::{self, JudgeAnswer, RemoteOptions, RewardSpec};
use crate::schedule::{Grid, PredictionType, Sampler};

/// A job of training.
#[derive(Args)]
pub struct JobArgs {
    #[command(flatten)]
    pub options: Options,
    /// Settings of `pcpo-wgpu recipes`; flags and --config win
    #[arg(long, value_name = "NAME")]
    recipe: Option<String>,
    /// TOML file with the keys of these flags; flags win
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl JobArgs {
    /// Flags over the file over the recipe, filled in and checked.
    pub fn resolve(&self) -> Result<Settings> {
        self.layers()?.resolve()
    }

    /// Flags over the file over the recipe.
    pub fn layers(&self) -> Result<Options> {
        let recipe = self.recipe.as_deref().map(|name| Recipe::find(name)?.options());
        let file = self.config.as_deref().map(Options::from_file);
        let below = file.transpose()?.unwrap_or_default();
        let below = below.over(&recipe.transpose()?.unwrap_or_default())?;
        self.options.over(&below)
    }
}

/// A model folder.
#[derive(Args)]
pub struct ModelArg {
    /// Model: a folder in diffusers' layout, one .safetensors file, or emoji or emoji-flow
    /// [default: emoji]
    #[arg(long, value_name = "DIR|FILE")]
    pub model: Option<PathBuf>,
    #[command(flatten)]
    pub parts: PartArgs,
}

impl ModelArg {
    /// The files that are meant.
    pub fn files(&self) -> Result<ModelFiles> {
        self.parts.files(model_folder(self.model.as_deref())?)
    }
}

/// What supplies or replaces parts of a model.
#[derive(Args)]
pub struct PartArgs {
    /// Configurations in diffusers' layout, for what a model that is one file cannot say
    #[arg(long, value_name = "DIR")]
    pub model_config: Option<PathBuf>,
    /// VAE in place of the model's
    #[arg(long, value_name = "DIR|FILE")]
    pub vae: Option<PathBuf>,
    /// Text encoder in place of the model's; can be repeated, in the order of the model's
    #[arg(long, value_name = "DIR|FILE")]
    pub text_encoder: Vec<PathBuf>,
    /// What a model of diffusion predicts, where its file does not say it
    #[arg(long, value_enum)]
    pub prediction_type: Option<PredictionType>,
}

impl PartArgs {
    /// What these say of a model.
    pub fn spec(&self, model: PathBuf) -> ModelSpec {
        ModelSpec {
            model,
            config: self.model_config.clone(),
            vae: self.vae.clone(),
            text_encoder: self.text_encoder.clone(),
            prediction: self.prediction_type,
        }
    }

    /// The files of a model.
    pub fn files(&self, model: PathBuf) -> Result<ModelFiles> {
        ModelFiles::open(&self.spec(model))
    }
}

/// Where to compute.
#[derive(Args)]
pub struct DeviceArg {
    /// Device: auto, cpu, a number or a part of a name of `pcpo-wgpu devices`
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// What convolutions, linear layers and attention take, added up in f32; f16 on GPUs
    #[arg(long, value_enum, default_value = "f32")]
    pub compute: ComputeType,
}

impl DeviceArg {
    /// Opens the device.
    pub fn quietly(&self) -> Result<Compute> {
        open_one("--device", &self.device, self.compute.into())
    }

    /// Opens the device and prints the line that names it.
    pub fn open(&self) -> Result<Compute> {
        let compute = self.quietly()?;
        say!("device: {}", compute.name);
        Ok(compute)
    }
}

/// How weights are stored.
#[derive(Args)]
pub struct StorageArg {
    /// Type that frozen weights are stored in; computation is f32
    #[arg(long, value_enum, default_value = "f32")]
    pub storage: Storage,
}

/// Whether a network's blocks are held.
#[derive(Args)]
pub struct StreamArg {
    /// Read the network's blocks when their turn comes, for weights larger than the device's memory
    #[arg(
        long,
        value_name = "true|false",
        num_args = 0..=1,
        default_value_t = false,
        default_missing_value = "true",
        action = clap::ArgAction::Set,
    )]
    pub stream_blocks: bool,
}

impl StreamArg {
    /// Where a model's blocks are read from, if they are.
    pub fn of(
        &self,
        files: &ModelFiles,
        compute: &Compute,
        storage: Storage,
    ) -> Result<Option<Stream>> {
        if self.stream_blocks { files.stream(compute, storage).map(Some) } else { Ok(None) }
    }
}

/// How long a prompt is for T5 and Qwen3.
#[derive(Args)]
pub struct SequenceArg {
    /// Tokens of a prompt for T5 and Qwen3 [default: 256 for Stable Diffusion 3, else 512]
    #[arg(long, value_name = "TOKENS")]
    pub max_sequence_length: Option<usize>,
}

impl SequenceArg {
    /// The number for a family, checked.
    pub fn length(&self, family: Family) -> Result<usize> {
        let length = self.max_sequence_length.unwrap_or(family.default_sequence());
        numbers::sequence_length(length)?;
        Ok(length)
    }
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

impl StepArgs {
    /// Checks the numbers.
    pub fn check(&self) -> Result<()> {
        numbers::count("--steps", self.steps.unwrap_or(1), MOST)?;
        numbers::optional("--shift", self.shift, Range::Positive)
    }
}

/// How servers are asked for rewards.
#[derive(Args)]
pub struct RemoteArgs {
    /// Seconds that a reward's server has for an answer
    #[arg(long, value_name = "SECONDS", default_value_t = reward::DEFAULT_TIMEOUT as f64)]
    pub reward_timeout: f64,
    /// What a judge is asked, with {prompt} in its place
    #[arg(long, value_name = "TEXT")]
    pub judge_question: Option<String>,
    /// What a judge's answer is read for [default: number]
    #[arg(long, value_enum)]
    pub judge_answer: Option<JudgeAnswer>,
}

impl RemoteArgs {
    /// Checks them, and gives what rewards are opened with.
    pub fn options(&self, specs: &[RewardSpec]) -> Result<RemoteOptions> {
        numbers::number("--reward-timeout", self.reward_timeout, Range::Below(1e6))?;
        let (question, answer) = (&self.judge_question, self.judge_answer);
        reward::check_judge(specs, question.is_some(), answer.is_some())?;
        Ok(RemoteOptions {
            timeout: Duration::from_secs_f64(self.reward_timeout),
            judge_question: question.clone(),
            judge_answer: answer.unwrap_or_default(),
        })
    }
}

/// The rewards that `--reward` names, each once.
pub fn rewards(given: &[String]) -> Result<Vec<RewardSpec>> {
    let specs: Vec<RewardSpec> =
        given.iter().map(|s| RewardSpec::parse("--reward", s)).collect::<Result<_>>()?;
    for (i, spec) in specs.iter().enumerate() {
        reward::find("--reward", &spec.reward)?;
        ensure!(
            specs[..i].iter().all(|s| s.given != spec.given),
            "--reward {}: stands there twice; give it once",
            spec.shown
        );
    }
    Ok(specs)
}
