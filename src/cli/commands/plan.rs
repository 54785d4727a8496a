//! `plan`: the memory that a run needs; exit code 1 where it does not fit.

use anyhow::Result;
use clap::Args;

use crate::cli::args::JobArgs;
use crate::estimate::{self, Target, shapes};

#[derive(Args)]
pub struct PlanArgs {
    #[command(flatten)]
    job: JobArgs,
}

pub fn run(args: &PlanArgs) -> Result<i32> {
    let settings = args.job.resolve()?;
    let shapes = shapes::shapes(&settings, settings.lora.as_deref())?;
    let compute = settings.open_device()?;
    println!("device: {}", compute.name);
    let target = Target::of(&compute).with_limit(settings.memory);
    let found = estimate::estimate(&shapes, &settings, target);
    let largest = estimate::largest_batch(&shapes, &settings, target);
    print!("{}", estimate::text(&found, &settings, largest));
    Ok(if found.offered.is_some_and(|o| found.peak() > o as f64) { 1 } else { 0 })
}
