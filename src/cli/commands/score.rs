//! `score`: rewards of pictures that exist.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use image::RgbImage;
use serde_json::{Map, Value, json};

use crate::cli::args::{DeviceArg, RemoteArgs, StorageArg, rewards};
use crate::config::prompts::lines;
use crate::model::picture::open_rgb;
use crate::reward::{self, Prompt, RewardContext};
use crate::tools::eval::scores;

#[derive(Args)]
pub struct ScoreArgs {
    /// Pictures: PNG or JPEG
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<PathBuf>,
    /// What pictures are scored by
    #[arg(
        long,
        value_name = "SPEC",
        required = true,
        allow_hyphen_values = true,
        help = format!(
            "Reward; can be repeated; a weight in front multiplies its scores: {}",
            reward::list()
        )
    )]
    reward: Vec<String>,
    /// One prompt for all pictures
    #[arg(long, value_name = "TEXT", conflicts_with = "prompts")]
    prompt: Vec<String>,
    /// Text file of prompts, one line a picture
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Print JSON: {"rows": [{"image", "prompt", "scores": {SPEC: number}}]}
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArg,
    #[command(flatten)]
    storage: StorageArg,
    #[command(flatten)]
    remote: RemoteArgs,
}

pub fn run(args: &ScoreArgs) -> Result<i32> {
    let specs = rewards(&args.reward)?;
    let remote = args.remote.options(&specs)?;
    let prompts = prompts(args)?;
    let images: Vec<RgbImage> = args.images.iter().map(|p| open_rgb(p)).collect::<Result<_>>()?;
    let (compute, storage) = (args.device.quietly()?, args.storage.storage);
    let context = RewardContext { compute, storage, remote };
    let columns = scores(&specs, &context, &images, &prompts)?;
    print(args, &context.compute.name, &prompts, &columns)?;
    Ok(0)
}

/// One prompt a picture.
fn prompts(args: &ScoreArgs) -> Result<Vec<Prompt>> {
    let pictures = args.images.len();
    let Some(file) = &args.prompts else {
        ensure!(
            args.prompt.len() < 2,
            "--prompt: stands there {} times; give one for all pictures, or --prompts FILE with a \
             line a picture",
            args.prompt.len()
        );
        let text = args.prompt.first().context(
            "--prompt TEXT or --prompts FILE: there is no prompt; give one for all pictures, or a \
             file with one line a picture",
        )?;
        return Ok(vec![Prompt::parse(text).context("--prompt")?; pictures]);
    };
    let (found, source) = lines(Some(file), None)?;
    ensure!(
        found.len() == pictures,
        "{source}: holds {} prompts for {pictures} pictures; give one line a picture",
        found.len()
    );
    Ok(found)
}

fn print(args: &ScoreArgs, device: &str, prompts: &[Prompt], columns: &[Vec<f64>]) -> Result<()> {
    let image = |i: usize| args.images[i].to_string_lossy();
    if args.json {
        let row = |i: usize| {
            let named = args.reward.iter().zip(columns);
            let scores: Map<String, Value> =
                named.map(|(spec, column)| (spec.clone(), json!(column[i]))).collect();
            json!({ "image": image(i), "prompt": prompts[i].text, "scores": scores })
        };
        let rows: Vec<Value> = (0..args.images.len()).map(row).collect();
        say!("{}", serde_json::to_string_pretty(&json!({ "rows": rows }))?);
        return Ok(());
    }
    say!("device: {device}");
    for i in 0..args.images.len() {
        say!("{}: {}", image(i), prompts[i].text);
        for (spec, column) in args.reward.iter().zip(columns) {
            say!("  {spec}: {:.6}", column[i]);
        }
    }
    Ok(())
}
