//! `plan`: the memory that a run needs; exit code 1 where it does not fit.

use anyhow::Result;
use clap::Args;

use crate::cli::args::JobArgs;
use crate::device::chosen::OnHost;
use crate::estimate::{self, Target, shapes, streaming, table};
use crate::train::check;

#[derive(Args)]
pub struct PlanArgs {
    #[command(flatten)]
    job: JobArgs,
}

pub fn run(args: &PlanArgs) -> Result<i32> {
    let settings = args.job.resolve()?;
    check(&settings)?;
    let shapes = shapes::shapes(&settings, settings.lora.as_deref())?;
    let computes = settings.open_devices(OnHost::ALONE)?;
    settings.open_reward_device()?;
    let targets = Target::of_all(&computes, computes[0].threads(), settings.memory);
    let mut fits = true;
    for (compute, target) in computes.iter().zip(targets) {
        say!("device: {}", compute.name);
        let found = estimate::estimate(&shapes, &settings, target);
        let largest = estimate::largest_batch(&shapes, &settings, target);
        let rate = match found.streaming {
            Some(_) => Some(streaming::read_rate(&settings.files()?, &settings, compute)?),
            None => None,
        };
        say!("{}", table::text(&found, &settings, largest, rate).trim_end());
        fits &= found.offered.is_none_or(|offered| found.peak() <= offered as f64);
    }
    Ok(if fits { 0 } else { 1 })
}
