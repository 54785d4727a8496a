//! `eval`: what a model's pictures, or pictures that exist, are like.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::cli::args::{RemoteArgs, rewards};
use crate::cli::commands::sample::picture_path;
use crate::cli::console::{Console, in_phase};
use crate::cli::draw::DrawArgs;
use crate::config::numbers::{self, MOST};
use crate::config::prompts::{lines, read_prompts};
use crate::device::{self, Compute};
use crate::io;
use crate::measure::features::{FeatureModel, clip_path};
use crate::model::picture::open_rgb;
use crate::reward::{self, Prompt, RemoteOptions, RewardContext, RewardSpec};
use crate::sampling::policy::Weighted;
use crate::tools::draw::{Canvas, Drawing};
use crate::tools::eval::{
    Drawn, Evaluation, PictureSet, Reference, folder_features, kl, picture_files, pictures,
    prompt_numbers, scores, too_few,
};
use crate::train::{Observer, Silent};

/// Images of a batch.
const AT_ONCE: usize = 8;

/// What says how pictures are drawn, and means nothing where they exist.
const DRAWN: [&str; 25] = [
    "model",
    "model_config",
    "vae",
    "text_encoder",
    "prediction_type",
    "lora",
    "reward_guidance",
    "sampler",
    "steps",
    "grid",
    "shift",
    "guidance",
    "eta",
    "resolution",
    "time_ids",
    "negative_time_ids",
    "negative_prompt",
    "embeddings",
    "max_sequence_length",
    "latents",
    "vae_tiling",
    "stream_blocks",
    "save_latents",
    "images",
    "out",
];

#[derive(Args)]
pub struct EvalArgs {
    /// Text file of prompts, one a line: text, or JSON {"prompt": TEXT, ..} with metadata
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompts: Option<PathBuf>,
    /// One prompt; can be repeated instead of a file
    #[arg(long, value_name = "TEXT")]
    prompt: Option<Vec<String>>,
    /// Images of each prompt
    #[arg(long, visible_alias = "batch", value_name = "N", default_value_t = 4)]
    images: usize,
    /// Take the pictures of this folder, PNG or JPEG, in place of a model's
    #[arg(long, value_name = "DIR", conflicts_with_all = DRAWN)]
    images_from: Option<PathBuf>,
    /// What pictures are scored by
    #[arg(
        long,
        value_name = "SPEC",
        allow_hyphen_values = true,
        help = format!(
            "Reward; can be repeated; a weight in front multiplies its scores: {}",
            reward::list()
        )
    )]
    reward: Vec<String>,
    /// What pictures are compared by, for distances and diversity: clip:PATH
    #[arg(long, value_name = "clip:PATH")]
    features: Option<String>,
    /// Folder of pictures that distances are to [default: the model's own without --lora]
    #[arg(long, value_name = "DIR", requires = "features")]
    reference: Option<PathBuf>,
    /// Keep the pictures in this folder
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    draw: DrawArgs,
    #[command(flatten)]
    remote: RemoteArgs,
}

/// What is measured besides the pictures themselves.
struct Measuring {
    specs: Vec<RewardSpec>,
    remote: RemoteOptions,
}

pub fn run(args: &EvalArgs) -> Result<i32> {
    numbers::count("--images", args.images, MOST)?;
    args.draw.check()?;
    let specs = rewards(&args.reward)?;
    let remote = args.remote.options(&specs)?;
    if let Some(features) = &args.features {
        clip_path(features)?;
    }
    if let Some(dir) = &args.reference {
        picture_files("--reference", dir)?;
    }
    let measuring = Measuring { specs, remote };
    let found = match &args.images_from {
        Some(dir) => of_folder(args, dir, measuring)?,
        None => of_model(args, measuring)?,
    };
    print(args, &found)?;
    Ok(0)
}

/// Opens the device, and says which one where people read it.
fn open(args: &EvalArgs) -> Result<Compute> {
    if args.json { args.draw.device.quietly() } else { args.draw.device.open() }
}

/// Of pictures that exist.
fn of_folder(args: &EvalArgs, dir: &Path, measuring: Measuring) -> Result<Evaluation> {
    let files = picture_files("--images-from", dir)?;
    let given = match (&args.prompts, &args.prompt) {
        (None, None) => Vec::new(),
        (file, list) => lines(file.as_deref(), list.as_ref())?.0,
    };
    if given.is_empty() {
        for spec in &measuring.specs {
            ensure!(
                !reward::reads_prompt(spec)?,
                "--reward {}: compares pictures with their prompts; give --prompts FILE or \
                 --prompt TEXT",
                spec.shown
            );
        }
    }
    let none = Prompt::default();
    let of = prompt_numbers(files.len(), given.len().max(1))?;
    let prompts: Vec<Prompt> = of.iter().map(|i| given.get(*i).unwrap_or(&none).clone()).collect();
    let images = files.iter().map(|f| open_rgb(f)).collect::<Result<_>>()?;
    // A folder is one prompt's, unless it is known to hold several pictures of each.
    let several = given.len() < files.len();
    let prompt_of = if several { of } else { vec![0; files.len()] };
    let set = PictureSet { images, prompt_of };
    let compute = open(args)?;
    measure(args, measuring, &set, &prompts, &compute, |model| match &args.reference {
        Some(dir) => folder(model, dir, &set).map(Some),
        None => Ok(None),
    })
}

/// A folder that pictures are compared with.
fn folder(model: &FeatureModel, dir: &Path, set: &PictureSet) -> Result<Reference> {
    Ok(Reference::of_set(folder_features(model, "--reference", dir)?, set.images.len()))
}

/// Of a model's pictures, drawn as its users would.
fn of_model(args: &EvalArgs, measuring: Measuring) -> Result<Evaluation> {
    let prompts = read_prompts(args.prompts.as_deref(), args.prompt.as_ref())?;
    args.draw.model.files()?;
    if let Some(dir) = &args.out {
        io::probe(&picture_path(dir, 0))?;
    }
    let compute = open(args)?;
    let texts = prompts.iter().map(|p| p.text.clone()).collect();
    let canvas = args.draw.open(compute.clone(), texts, args.images)?;
    let policies = canvas.policies();
    let drawing = Drawing {
        policies: &policies,
        steps: &canvas.steps,
        first: 0,
        at_once: args.images.min(AT_ONCE),
    };
    let drawn = draw(args, &canvas, &drawing, "sample")?;
    args.draw.save(&canvas, drawn.latents)?;
    if let Some(dir) = &args.out {
        for (i, image) in drawn.images.iter().enumerate() {
            io::write(&picture_path(dir, i), &io::png(image)?)?;
        }
    }
    let prompt_of = prompt_numbers(canvas.total(), prompts.len())?;
    let of_pictures: Vec<Prompt> = prompt_of.iter().map(|i| prompts[*i].clone()).collect();
    let set = PictureSet { images: drawn.images, prompt_of };
    let reference = |model: &FeatureModel| reference(args, &canvas, &drawing, &set, model);
    let mut found = measure(args, measuring, &set, &of_pictures, &compute, reference)?;
    let steps = args.draw.noisy_steps(&canvas)?;
    let units = canvas.units(&Drawing { steps: &steps, ..drawing });
    let measured =
        in_phase(&*observer(args), "kl", units, |tick| kl(&canvas, &steps, drawing.at_once, tick));
    found.kl = Some(measured?);
    Ok(found)
}

/// Bars, but where the output is read by a program.
fn observer(args: &EvalArgs) -> Box<dyn Observer> {
    if args.json { Box::new(Silent) } else { Box::new(Console::new()) }
}

fn draw(args: &EvalArgs, canvas: &Canvas, drawing: &Drawing, phase: &'static str) -> Result<Drawn> {
    let units = canvas.units(drawing);
    in_phase(&*observer(args), phase, units, |tick| pictures(canvas, drawing, tick))
}

/// What a model's pictures are compared with: a folder, or the model's own without its adapter.
/// Those have other noise than the pictures, since two sets of one noise are closer than chance;
/// as many again, with the noise of the pictures, tell how far apart two sets of the base are.
fn reference(
    args: &EvalArgs,
    canvas: &Canvas,
    drawing: &Drawing,
    set: &PictureSet,
    model: &FeatureModel,
) -> Result<Option<Reference>> {
    if let Some(dir) = &args.reference {
        return folder(model, dir, set).map(Some);
    }
    let policies = [Weighted::whole(None)];
    let base = Drawing { policies: &policies, ..*drawing };
    let same = if drawing.policies == policies {
        model.of(&set.images)?
    } else {
        model.of(&draw(args, canvas, &base, "base")?.images)?
    };
    let other = Drawing { first: canvas.total(), ..base };
    let whole = model.of(&draw(args, canvas, &other, "base")?.images)?;
    Ok(Some(Reference { halves: [same, whole.clone()], whole }))
}

/// Rewards, features and what the pixels say.
fn measure(
    args: &EvalArgs,
    measuring: Measuring,
    set: &PictureSet,
    prompts: &[Prompt],
    compute: &Compute,
    reference: impl FnOnce(&FeatureModel) -> Result<Option<Reference>>,
) -> Result<Evaluation> {
    let (storage, seed) = (args.draw.storage.storage, args.draw.seed);
    let mut found = Evaluation::of(set);
    let Measuring { specs, remote } = measuring;
    let context = RewardContext { compute: compute.clone(), storage, remote };
    let columns = scores(&specs, &context, &set.images, prompts)?;
    for (spec, column) in specs.iter().zip(&columns) {
        found.add_reward(&spec.shown, column, &set.prompt_of, seed);
    }
    if let Some(given) = &args.features {
        let model = FeatureModel::open(given, compute, storage)?;
        let features = device::guard(|| model.of(&set.images))?;
        let reference = device::guard(|| reference(&model))?;
        if reference.is_some() {
            let width = features.first().map_or(0, Vec::len);
            let fewest = reference.iter().map(|r| r.whole.len()).chain([features.len()]).min();
            if let Some(few) = too_few(fewest.unwrap_or(0), width) {
                complain!("warning: {few}");
            }
        }
        found.add_features(&features, &set.prompt_of, reference.as_ref(), seed);
    }
    Ok(found)
}

fn print(args: &EvalArgs, found: &Evaluation) -> Result<()> {
    let json = serde_json::to_value(found).context("the numbers cannot be written as JSON")?;
    if args.json {
        say!("{}", serde_json::to_string_pretty(&json)?);
        return Ok(());
    }
    say!("{} pictures of {} prompts", found.pictures, found.prompts);
    for (name, mean) in &found.rewards {
        let (low, high) = (found.rewards_low[name], found.rewards_high[name]);
        match (low, high) {
            (Some(low), Some(high)) => say!("{name}: {mean:.4}, 95% [{low:.4}, {high:.4}]"),
            (None, _) | (_, None) => say!("{name}: {mean:.4}"),
        }
    }
    let Some(fields) = json.as_object() else { bail!("the numbers are not an object") };
    for (name, value) in fields.iter().filter(|(_, v)| v.is_f64()) {
        say!("{name}: {:.5}", value.as_f64().unwrap_or(f64::NAN));
    }
    Ok(())
}
