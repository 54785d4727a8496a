//! `convert`: an adapter in another layout, or a model that is one file as a folder.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use burn::tensor::Device;
use clap::Args;

use crate::cli::args::ModelArg;
use crate::io;
use crate::lora::formats::{self, Format};
use crate::lora::label::{self, Label};
use crate::model::{Storage, Stream, single_file};
use crate::tools::convert::write_folder;

#[derive(Args)]
pub struct ConvertArgs {
    /// Adapter to read, in diffusers', peft's or kohya's layout; or a model that is one file
    input: PathBuf,
    /// File to write, or of a model the folder
    output: PathBuf,
    /// Layout of the adapter to write [default: kohya]
    #[arg(long, value_enum)]
    format: Option<Format>,
    #[command(flatten)]
    model: ModelArg,
}

pub fn run(args: &ConvertArgs) -> Result<i32> {
    if single_file::is_one(&args.input)? { model(args) } else { adapter(args) }
}

fn model(args: &ConvertArgs) -> Result<i32> {
    ensure!(
        args.model.model.is_none() && args.format.is_none(),
        "{}: is a model itself; leave --model and --format out",
        args.input.display()
    );
    let files = args.model.parts.files(args.input.clone())?;
    let parts = write_folder(&files, &args.output)?;
    say!("{}: {}", args.output.display(), parts.join(", "));
    Ok(0)
}

fn adapter(args: &ConvertArgs) -> Result<i32> {
    ensure!(
        !io::same_file(&args.input, &args.output),
        "{}: is what is read; give another file",
        args.output.display()
    );
    let files = args.model.files()?;
    let net = files.load_network(&Device::flex(), Storage::F16, Some(Stream::FromDisk))?;
    let adapter = formats::load(&args.input, &net.linears())?;
    let format = args.format.unwrap_or(Format::Kohya);
    let about = label::about(&args.input)?;
    let label = Label { network: files.family.network(), about };
    formats::save(&adapter, &args.output, format, &label)?;
    say!(
        "{}: rank {}, alpha {}, {} layers",
        args.output.display(),
        adapter.rank,
        adapter.alpha,
        adapter.layers.len()
    );
    Ok(0)
}
