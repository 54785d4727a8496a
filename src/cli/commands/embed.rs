//! `embed`: text embeddings made once.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::cli::args::{DeviceArg, ModelArg, SequenceArg, StorageArg};
use crate::config::prompts::read_prompts;
use crate::io;
use crate::model::Family;
use crate::model::pipeline::{TextFrom, embed};

#[derive(Args)]
pub struct EmbedArgs {
    #[command(flatten)]
    model: ModelArg,
    /// Text file of prompts, one a line
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompts: Option<PathBuf>,
    /// One prompt; can be repeated instead of a file
    #[arg(long = "prompt", value_name = "TEXT")]
    prompt: Option<Vec<String>>,
    /// File to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    sequence: SequenceArg,
    #[command(flatten)]
    device: DeviceArg,
    #[command(flatten)]
    storage: StorageArg,
}

pub fn run(args: &EmbedArgs) -> Result<i32> {
    let model = args.model.folder()?;
    let prompts = read_prompts(args.prompts.as_deref(), args.prompt.as_ref())?;
    let prompts: Vec<String> = prompts.into_iter().map(|p| p.text).collect();
    let length = args.sequence.length(Family::of(&model)?)?;
    let compute = args.device.open()?;
    io::probe(&args.out)?;
    // The empty prompt is what guidance needs.
    let all = [&[String::new()], &prompts[..]].concat();
    let from = TextFrom::Encoders(length);
    embed(&model, &all, from, &compute.burn, args.storage.storage)?.write(&args.out)?;
    println!("{}: {} prompts and the empty one", args.out.display(), prompts.len());
    Ok(0)
}
