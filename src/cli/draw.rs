//! What `sample` and `eval` are told alike: a model, an adapter, and how pictures are drawn.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::cli::args::{DeviceArg, ModelArg, SequenceArg, StepArgs, StorageArg, StreamArg};
use crate::config::numbers::{self, Range};
use crate::device::Compute;
use crate::io;
use crate::io::tensors::{HostTensor, write_tensors};
use crate::lora::formats;
use crate::model::conditioning::MicroConditioning;
use crate::model::pipeline::{TextFrom, Texts, embed};
use crate::model::{Pipeline, Resolution};
use crate::sampling::Replica;
use crate::sampling::fleet::Fleet;
use crate::sampling::policy::Weighted;
use crate::schedule::{Sampler, Sampling, Step};
use crate::tools::draw::{Canvas, given_latents};

#[derive(Args)]
pub struct DrawArgs {
    #[command(flatten)]
    pub model: ModelArg,
    /// Adapter to use; can be repeated, with --reward-guidance
    #[arg(long, value_name = "FILE")]
    pub lora: Vec<PathBuf>,
    /// Strength of the adapters' difference to the model: 1 is the adapter, 0 the model; one number
    /// for all, or one each, separated by commas [default: 1]
    #[arg(
        long,
        value_name = "STRENGTH",
        value_delimiter = ',',
        allow_negative_numbers = true,
        requires = "lora"
    )]
    pub reward_guidance: Vec<f64>,
    #[command(flatten)]
    pub steps: StepArgs,
    /// Guidance; without a distilled network 1 or less is none [default: 5, for Stable Diffusion 3
    /// 4.5, for FLUX 3.5]
    #[arg(long)]
    pub guidance: Option<f64>,
    /// Amount of noise: 0 is deterministic, and 1 is DDPM for ddim
    #[arg(long, default_value_t = 0.0)]
    pub eta: f64,
    /// Seed of the latents and of the steps' noise
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// What guidance leads away from [default: the empty prompt; zeros, where SDXL has them]
    #[arg(long, value_name = "TEXT")]
    pub negative_prompt: Option<String>,
    /// Side of the images in pixels, or HEIGHTxWIDTH [default: the model's own]
    #[arg(long, value_name = "PIXELS")]
    pub resolution: Option<Resolution>,
    /// What SDXL is told of sizes: original height and width, top and left of the crop, height and
    /// width that are wanted [default: the images' own, uncropped]
    #[arg(long, value_name = "H,W,TOP,LEFT,H,W", value_delimiter = ',')]
    pub time_ids: Option<Vec<f64>>,
    /// The same for the negative prompt [default: --time-ids]
    #[arg(long, value_name = "H,W,TOP,LEFT,H,W", value_delimiter = ',')]
    pub negative_time_ids: Option<Vec<f64>>,
    /// Text embeddings that `pcpo-wgpu embed` wrote: no text encoder is loaded
    #[arg(long, value_name = "FILE")]
    pub embeddings: Option<PathBuf>,
    #[command(flatten)]
    pub sequence: SequenceArg,
    /// Start from the tensor `latents`, `[B,C,H,W]`, of this safetensors file, one an image
    #[arg(long, value_name = "FILE")]
    pub latents: Option<PathBuf>,
    /// Write the final latents to this safetensors file, as the tensor `latents`
    #[arg(long, value_name = "FILE")]
    pub save_latents: Option<PathBuf>,
    /// Decode pictures in overlapping tiles, for less memory; they differ a little from whole ones
    #[arg(long)]
    pub vae_tiling: bool,
    #[command(flatten)]
    pub device: DeviceArg,
    #[command(flatten)]
    pub storage: StorageArg,
    #[command(flatten)]
    pub stream: StreamArg,
}

impl DrawArgs {
    /// Checks the numbers.
    pub fn check(&self) -> Result<()> {
        numbers::fits_toml("--seed", self.seed)?;
        numbers::number("--eta", self.eta, Range::NotNegative)?;
        numbers::optional("--guidance", self.guidance, Range::NotNegative)?;
        self.micro()?;
        let (strengths, adapters) = (&self.reward_guidance, self.lora.len());
        for strength in strengths {
            numbers::number("--reward-guidance", *strength, Range::Finite)?;
        }
        ensure!(
            strengths.len() <= 1 || strengths.len() == adapters,
            "--reward-guidance: {} numbers for {adapters} of --lora; give one for all, or one each",
            strengths.len()
        );
        self.steps.check()
    }

    fn micro(&self) -> Result<MicroConditioning> {
        numbers::micro(self.time_ids.as_deref(), self.negative_time_ids.as_deref())
    }

    /// The strength of an adapter.
    fn strength(&self, i: usize) -> f64 {
        match self.reward_guidance[..] {
            [] => 1.0,
            [one] => one,
            _ => self.reward_guidance[i],
        }
    }

    /// Opens the model that draws `per_prompt` pictures of each prompt.
    pub fn open(
        &self,
        compute: Compute,
        prompts: Vec<String>,
        per_prompt: usize,
    ) -> Result<Canvas> {
        let files = self.model.files()?;
        let family = files.family;
        // What the schedule lacks is asked for before the encoders run.
        files.schedule()?;
        let length = self.sequence.length(family)?;
        let from = match &self.embeddings {
            Some(file) => TextFrom::File(file),
            None => TextFrom::Encoders(length),
        };
        let storage = self.storage.storage;
        let texts = Texts { prompts: &prompts, negative: self.negative_prompt.as_deref() };
        let embeddings = embed(&files, texts, from, &compute.burn, storage)?;
        let (device, pixels) = (&compute.burn, self.resolution);
        let stream = self.stream.of(&files, &compute, storage)?;
        let pipeline = Pipeline::load(&files, device, storage, stream, pixels, self.micro()?)?
            .in_tiles(self.vae_tiling);
        let linears = pipeline.net.linears();
        let adapter = |(i, file): (usize, &PathBuf)| {
            let value = formats::load(file, &linears).context("--lora")?;
            anyhow::Ok(Weighted { weight: self.strength(i), value })
        };
        let adapters = self.lora.iter().enumerate().map(adapter).collect::<Result<_>>()?;
        let own = pipeline.latent_shape();
        let latents = match &self.latents {
            Some(file) => Some(given_latents(file, prompts.len() * per_prompt, own[0])?),
            None => None,
        };
        let shape = latents.as_ref().map_or(own, |t| [t.shape[1], t.shape[2], t.shape[3]]);
        pipeline.net.accepts([shape[1], shape[2]]).context("--latents")?;
        if let Some(path) = &self.save_latents {
            io::probe(path)?;
        }
        Ok(Canvas {
            embeddings,
            prompts,
            per_prompt,
            adapters,
            guidance_scale: self.guidance.unwrap_or(family.default_guidance()),
            steps: self.deterministic_steps(&pipeline, shape)?,
            fleet: Fleet::of_one(Replica { compute, pipeline })?,
            seed: self.seed,
            latents,
            shape,
        })
    }

    /// The steps as a user's pipeline takes them; with noise only where `--eta` asks for it.
    fn deterministic_steps(&self, pipeline: &Pipeline, shape: [usize; 3]) -> Result<Vec<Step>> {
        let own = Sampler::of_pipelines(pipeline.family.is_flow());
        let sampler = self.steps.sampler.unwrap_or(own);
        ensure!(
            sampler != Sampler::Ode || self.eta == 0.0,
            "--eta {}: the ode sampler draws no noise; leave it out, or give --sampler flow-grpo, \
             dance or cps",
            self.eta
        );
        let steps = self.steps.steps.unwrap_or(own.pipeline_steps());
        self.steps_of(pipeline, shape, sampler, steps, self.eta)
    }

    /// The steps of the family's trainers, with their noise.
    pub fn noisy_steps(&self, canvas: &Canvas) -> Result<Vec<Step>> {
        let pipeline = &canvas.fleet.first().pipeline;
        let given = self.steps.sampler.filter(|s| *s != Sampler::Ode);
        let sampler = given.unwrap_or(Sampler::of_trainers(pipeline.family.is_flow()));
        let steps = self.steps.steps.unwrap_or(sampler.default_steps());
        let eta = if self.eta > 0.0 { self.eta } else { sampler.default_eta() };
        self.steps_of(pipeline, canvas.shape, sampler, steps, eta)
    }

    fn steps_of(
        &self,
        pipeline: &Pipeline,
        [_, h, w]: [usize; 3],
        sampler: Sampler,
        steps: usize,
        eta: f64,
    ) -> Result<Vec<Step>> {
        let tokens = pipeline.net.config().tokens([h, w]);
        let (grid, shift) = (self.steps.grid, self.steps.shift);
        pipeline.schedule.steps(&Sampling { sampler, steps, eta, grid, shift, tokens })
    }

    /// Writes the final latents of all pictures, where they are asked for.
    pub fn save(&self, canvas: &Canvas, latents: Vec<f32>) -> Result<()> {
        let Some(path) = &self.save_latents else { return Ok(()) };
        let [c, h, w] = canvas.shape;
        let all = HostTensor::new("latents", [canvas.total(), c, h, w], latents);
        write_tensors(path, &[all], &[])
    }
}
