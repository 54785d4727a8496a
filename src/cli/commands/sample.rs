//! `sample`: images from prompts.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;

use crate::cli::console::{Console, in_phase};
use crate::cli::draw::DrawArgs;
use crate::config::numbers::{self, MOST};
use crate::device::tensor::read;
use crate::io;
use crate::sampling::trajectory::decode;
use crate::tools::draw::Drawing;

#[derive(Args)]
pub struct SampleArgs {
    /// Prompt; can be repeated
    #[arg(long, required = true)]
    prompt: Vec<String>,
    /// Images of each prompt
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Folder for the images
    #[arg(long, default_value = "samples")]
    out: PathBuf,
    #[command(flatten)]
    draw: DrawArgs,
}

pub fn run(args: &SampleArgs) -> Result<i32> {
    numbers::count("--batch", args.batch, MOST)?;
    args.draw.check()?;
    // Whether the model is there is known at once, the device takes a moment.
    args.draw.model.files()?;
    let compute = args.draw.device.open()?;
    let canvas = args.draw.open(compute, args.prompt.clone(), args.batch)?;
    io::probe(&picture_path(&args.out, 0))?;
    let (policies, steps) = (&canvas.policies(), &canvas.steps[..]);
    let drawing = Drawing { policies, steps, first: 0, at_once: args.batch };
    let latents = in_phase(&Console::new(), "sample", canvas.units(&drawing), |tick| {
        canvas.draw(&drawing, tick, |replica, drawn| {
            let pictures = decode(&replica.pipeline.vae, &drawn.latents)?;
            for (i, picture) in drawn.images.clone().zip(&pictures) {
                io::write(&picture_path(&args.out, i), &io::png(picture)?)?;
            }
            read(&drawn.latents)
        })
    })?;
    for i in 0..canvas.total() {
        say!("{}: {}", picture_path(&args.out, i).display(), canvas.prompt(i));
    }
    args.draw.save(&canvas, latents.concat())?;
    Ok(0)
}

/// Where a picture of a folder is written.
pub fn picture_path(out: &Path, i: usize) -> PathBuf {
    out.join(format!("{i:05}.png"))
}
