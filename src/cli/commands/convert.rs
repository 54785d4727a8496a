//! `convert`: an adapter in another layout.

use std::path::PathBuf;

use anyhow::Result;
use burn::tensor::Device;
use clap::Args;

use crate::cli::args::ModelArg;
use crate::lora::formats::{self, Format};
use crate::model::Storage;

#[derive(Args)]
pub struct ConvertArgs {
    /// Adapter to read: diffusers', peft's or kohya's layout
    input: PathBuf,
    /// File to write
    output: PathBuf,
    /// Layout to write
    #[arg(long, value_enum, default_value = "kohya")]
    format: Format,
    #[command(flatten)]
    model: ModelArg,
}

pub fn run(args: &ConvertArgs) -> Result<i32> {
    let files = args.model.files()?;
    let family = files.family;
    let net = files.load_network(&Device::flex(), Storage::F16)?;
    let adapter = formats::load(&args.input, &net.linears())?;
    formats::save(&adapter, &args.output, args.format, family.network())?;
    println!(
        "{}: rank {}, alpha {}, {} layers",
        args.output.display(),
        adapter.rank,
        adapter.alpha,
        adapter.layers.len()
    );
    Ok(0)
}
