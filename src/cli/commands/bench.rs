//! `bench`: the shaders' times on a device.

use anyhow::Result;
use clap::Args;

use crate::cli::args::DeviceArg;
use crate::tools::bench::short_table;

#[derive(Args)]
pub struct BenchArgs {
    #[command(flatten)]
    device: DeviceArg,
}

pub fn run(args: &BenchArgs) -> Result<i32> {
    short_table(&args.device.open()?, |line| println!("{line}"))?;
    Ok(0)
}
