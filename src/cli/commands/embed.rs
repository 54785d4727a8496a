//! `embed`: text embeddings made once.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;

use crate::cli::args::{DeviceArg, ModelArg, SequenceArg, StorageArg};
use crate::config::prompts::read_prompts;
use crate::io;
use crate::model::pipeline::{TextFrom, Texts, embed};

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
    /// What guidance leads away from, to be encoded as well [default: the empty prompt]
    #[arg(long, value_name = "TEXT")]
    negative_prompt: Option<String>,
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
    let files = args.model.files()?;
    ensure!(
        !args.prompts.as_ref().is_some_and(|file| io::same_file(file, &args.out)),
        "--out {}: is the file of --prompts; give another place",
        args.out.display()
    );
    let prompts = read_prompts(args.prompts.as_deref(), args.prompt.as_ref())?;
    let prompts: Vec<String> = prompts.into_iter().map(|p| p.text).collect();
    let length = args.sequence.length(files.family)?;
    let compute = args.device.open()?;
    io::probe(&args.out)?;
    // The empty prompt is what guidance leads away from, unless another is given.
    let negative = args.negative_prompt.as_deref().unwrap_or_default();
    let texts = Texts { prompts: &prompts, negative: Some(negative) };
    let from = TextFrom::Encoders(length);
    embed(&files, texts, from, &compute.burn, args.storage.storage)?.write(&args.out)?;
    let named = if negative.is_empty() { "empty" } else { "negative" };
    say!("{}: {} prompts and the {named} one", args.out.display(), prompts.len());
    Ok(0)
}
