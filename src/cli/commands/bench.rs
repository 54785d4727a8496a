//! `bench`: the shaders' times on a device.

use anyhow::Result;
use clap::Args;

use crate::cli::args::DeviceArg;
use crate::tools::bench::short_table;
use crate::tools::bench_kernels::{SMALL, kernel_lines};

#[derive(Args)]
pub struct BenchArgs {
    #[command(flatten)]
    device: DeviceArg,
}

pub fn run(args: &BenchArgs) -> Result<i32> {
    let compute = args.device.open()?;
    short_table(&compute, |line| say!("{line}"))?;
    kernel_lines(&compute, SMALL, |line| say!("{line}"))?;
    Ok(0)
}
