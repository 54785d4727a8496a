//! `check`: 0 when everything is within the tolerance, 1 otherwise.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Args;

use crate::cli::args::{DeviceArg, StorageArg};
use crate::config::numbers::{self, Range};
use crate::tools::check;

#[derive(Args)]
pub struct CheckArgs {
    /// Model folder, or the folder of one component
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
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
}

pub fn run(args: &CheckArgs) -> Result<i32> {
    numbers::number("--tolerance", args.tolerance, Range::NotNegative)?;
    let compute = args.device.open()?;
    let start = Instant::now();
    let lines = check::check(&args.model, &args.reference, &compute, args.storage.storage)?;
    for line in &lines {
        let verdict = if line.error <= args.tolerance { "ok" } else { "FAILED" };
        println!("{:<22} max error / std {:.3e}  {verdict}", line.name, line.error);
    }
    println!("{:.1} s", start.elapsed().as_secs_f64());
    Ok(if lines.iter().all(|l| l.error <= args.tolerance) { 0 } else { 1 })
}
