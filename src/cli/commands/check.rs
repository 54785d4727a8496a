//! `check`: 0 when everything is within the tolerance, 1 otherwise.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Args;

use crate::cli::args::{DeviceArg, PartArgs, StorageArg, StreamArg};
use crate::config::numbers::{self, Range};
use crate::config::prompts::model_folder;
use crate::tools::check;

#[derive(Args)]
pub struct CheckArgs {
    /// Model folder, the folder of one component, or a model that is one file
    #[arg(long, value_name = "DIR|FILE")]
    model: PathBuf,
    #[command(flatten)]
    parts: PartArgs,
    /// Adapter that the prediction is computed with
    #[arg(long, value_name = "FILE")]
    lora: Option<PathBuf>,
    /// File of scripts/reference.py, with reference.json beside it
    #[arg(long, value_name = "FILE")]
    reference: PathBuf,
    /// Largest error relative to the reference's standard deviation
    #[arg(long, default_value_t = 1e-3)]
    tolerance: f64,
    #[command(flatten)]
    device: DeviceArg,
    #[command(flatten)]
    storage: StorageArg,
    #[command(flatten)]
    stream: StreamArg,
}

pub fn run(args: &CheckArgs) -> Result<i32> {
    numbers::number("--tolerance", args.tolerance, Range::NotNegative)?;
    let compute = args.device.open()?;
    let start = Instant::now();
    let subject = check::Asked {
        model: args.parts.spec(model_folder(Some(&args.model))?),
        reference: args.reference.clone(),
        lora: args.lora.clone(),
        storage: args.storage.storage,
        stream: args.stream.stream_blocks,
    };
    let lines = check::check(&subject, &compute)?;
    for line in &lines {
        let verdict = if line.error <= args.tolerance { "ok" } else { "FAILED" };
        say!("{:<22} max error / std {:.3e}  {verdict}", line.name, line.error);
    }
    say!("{:.1} s", start.elapsed().as_secs_f64());
    Ok(if lines.iter().all(|l| l.error <= args.tolerance) { 0 } else { 1 })
}
