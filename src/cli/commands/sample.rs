//! `sample`: images from prompts.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::cli::args::{DeviceArg, ModelArg, SequenceArg, StepArgs, StorageArg};
use crate::cli::console::Console;
use crate::config::numbers::{self, MOST, Range};
use crate::device::tensor::read;
use crate::io;
use crate::io::tensors::{HostTensor, write_tensors};
use crate::io::weights::Weights;
use crate::lora::formats;
use crate::model::pipeline::{TextFrom, embed};
use crate::model::text::embeddings::PromptEmbeddings;
use crate::model::{Family, Pipeline};
use crate::philox::Stream;
use crate::sampling::Replica;
use crate::sampling::generate::{ImageRequest, InitialLatent, Request, generate};
use crate::sampling::parallel::batches;
use crate::sampling::trajectory::{Noise, decode};
use crate::schedule::{Sampler, Sampling, Step};
use crate::train::{Event, Observer};

#[derive(Args)]
pub struct SampleArgs {
    #[command(flatten)]
    model: ModelArg,
    /// Adapter to use
    #[arg(long, value_name = "FILE")]
    lora: Option<PathBuf>,
    /// Prompt; can be repeated
    #[arg(long, required = true)]
    prompt: Vec<String>,
    #[command(flatten)]
    steps: StepArgs,
    /// Guidance; without a distilled network 1 or less is none [default: 5, for Stable Diffusion 3
    /// 4.5, for FLUX 3.5]
    #[arg(long)]
    guidance: Option<f64>,
    /// Amount of noise: 0 is deterministic, and 1 is DDPM for ddim
    #[arg(long, default_value_t = 0.0)]
    eta: f64,
    /// Seed of the latents and of the steps' noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Side of the images in pixels [default: the model's own]
    #[arg(long, value_name = "PIXELS")]
    resolution: Option<usize>,
    /// Text embeddings that `pcpo-wgpu embed` wrote: no text encoder is loaded
    #[arg(long, value_name = "FILE")]
    embeddings: Option<PathBuf>,
    #[command(flatten)]
    sequence: SequenceArg,
    /// Images of each prompt
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Folder for the images
    #[arg(long, default_value = "samples")]
    out: PathBuf,
    /// Start from the tensor `latents`, `[B,C,H,W]`, of this safetensors file, B = prompts x batch
    #[arg(long, value_name = "FILE")]
    latents: Option<PathBuf>,
    /// Write the final latents to this safetensors file, as the tensor `latents`
    #[arg(long, value_name = "FILE")]
    save_latents: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArg,
    #[command(flatten)]
    storage: StorageArg,
}

impl SampleArgs {
    fn check(&self) -> Result<()> {
        numbers::count("--batch", self.batch, MOST)?;
        numbers::number("--eta", self.eta, Range::NotNegative)?;
        numbers::optional("--guidance", self.guidance, Range::NotNegative)?;
        numbers::resolution(self.resolution)?;
        self.steps.check()
    }

    /// Number of images.
    fn total(&self) -> usize {
        self.prompt.len() * self.batch
    }
}

pub fn run(args: &SampleArgs) -> Result<i32> {
    args.check()?;
    let model = args.model.folder()?;
    let family = Family::of(&model)?;
    let length = args.sequence.length(family)?;
    let compute = args.device.open()?;
    let from = match &args.embeddings {
        Some(file) => TextFrom::File(file),
        None => TextFrom::Encoders(length),
    };
    let prompts = [&[String::new()], &args.prompt[..]].concat();
    let storage = args.storage.storage;
    let embeddings = embed(&model, &prompts, from, &compute.burn, storage)?;
    let pipeline = Pipeline::load(&model, &compute.burn, storage, args.resolution)?;
    let linears = pipeline.net.linears();
    let adapter = args.lora.as_ref().map(|f| formats::load(f, &linears));
    let adapter = adapter.transpose().context("--lora")?;
    let first = first_latents(args, &pipeline, &embeddings)?;
    let steps = steps(args, &pipeline, first.shape)?;
    for path in [&args.out.join("00000.png")].into_iter().chain(&args.save_latents) {
        io::probe(path)?;
    }
    let batches = batches(&compute, args.total(), args.batch);
    let request = Request {
        images: &first.images,
        batches: &batches,
        embeddings: &embeddings,
        uncond: embeddings.row_of("")?,
        adapter: adapter.as_ref(),
        guidance_scale: args.guidance.unwrap_or(family.default_guidance()),
        steps: &steps,
        keep: &[],
        latent: first.shape,
        noise: Noise { seed: args.seed, first_image: 0 },
    };
    let replicas = [Replica { compute, pipeline }];
    let console = Console::new();
    let units = batches.len() * steps.len();
    console.on(Event::PhaseBegins { phase: "sample", units, done: 0 });
    let tick = || {
        console.on(Event::PhaseAdvances);
        Ok(())
    };
    let latents = generate(&replicas, &request, &tick, |replica, drawn| {
        let pictures = decode(&replica.pipeline.vae, &drawn.latents)?;
        for (i, picture) in drawn.images.clone().zip(&pictures) {
            io::write(&picture_path(&args.out, i), &io::png(picture)?)?;
        }
        read(&drawn.latents)
    })?;
    console.on(Event::PhaseEnds);
    for i in 0..args.total() {
        println!("{}: {}", picture_path(&args.out, i).display(), args.prompt[i / args.batch]);
    }
    if let Some(path) = &args.save_latents {
        let [c, h, w] = first.shape;
        let all = HostTensor::new("latents", [args.total(), c, h, w], latents.concat());
        write_tensors(path, &[all], &[])?;
    }
    Ok(0)
}

fn picture_path(out: &Path, i: usize) -> PathBuf {
    out.join(format!("{i:05}.png"))
}

/// Where all images begin, and the shape of a latent, `[C, H, W]`.
struct FirstLatents {
    images: Vec<ImageRequest>,
    shape: [usize; 3],
}

fn first_latents(
    args: &SampleArgs,
    pipeline: &Pipeline,
    embeddings: &PromptEmbeddings,
) -> Result<FirstLatents> {
    let total = args.total();
    let own = pipeline.latent_shape();
    let given = match &args.latents {
        Some(file) => Some(given_latents(file, total, own[0])?),
        None => None,
    };
    let shape = given.as_ref().map_or(own, |t| [t.shape[1], t.shape[2], t.shape[3]]);
    let [_, h, w] = shape;
    pipeline.net.accepts([h, w]).context("--latents")?;
    let size: usize = shape.iter().product();
    let image = |i: usize| {
        let initial = match &given {
            Some(t) => InitialLatent::Values(t.values[i * size..(i + 1) * size].to_vec()),
            None => InitialLatent::Noise(Stream::Evaluation, i as u32),
        };
        let prompt = embeddings.row_of(&args.prompt[i / args.batch])?;
        anyhow::Ok(ImageRequest { prompt, initial })
    };
    Ok(FirstLatents { images: (0..total).map(image).collect::<Result<_>>()?, shape })
}

fn given_latents(file: &Path, total: usize, channels: usize) -> Result<HostTensor> {
    let t = Weights::open_file(file)?.f32("latents")?;
    ensure!(
        t.shape.len() == 4 && t.shape[..2] == [total, channels],
        "--latents {}: latents has shape {:?}, expected [{total}, {channels}, H, W], one for each \
         of {total} images",
        file.display(),
        t.shape
    );
    Ok(t)
}

fn steps(args: &SampleArgs, pipeline: &Pipeline, [_, h, w]: [usize; 3]) -> Result<Vec<Step>> {
    let own = Sampler::of_pipelines(pipeline.family.is_flow());
    let sampler = args.steps.sampler.unwrap_or(own);
    ensure!(
        sampler != Sampler::Ode || args.eta == 0.0,
        "--eta {}: the ode sampler draws no noise; leave it out, or give --sampler flow-grpo, \
         dance or cps",
        args.eta
    );
    pipeline.schedule.steps(&Sampling {
        sampler,
        steps: args.steps.steps.unwrap_or(own.pipeline_steps()),
        eta: args.eta,
        grid: args.steps.grid,
        shift: args.steps.shift,
        tokens: pipeline.net.tokens([h, w]),
    })
}
