//! `bench`: the shaders' times on a device.

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::cli::args::DeviceArg;
use crate::tools::bench::short_table;
use crate::tools::bench_kernels::{SMALL, STABLE_DIFFUSION, kernel_lines};

#[derive(Args)]
pub struct BenchArgs {
    #[command(flatten)]
    device: DeviceArg,
    /// The sizes at which kernels of networks are timed
    #[arg(long, value_enum, default_value_t)]
    sizes: Sizes,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum Sizes {
    /// Small ones: seconds on any device
    #[default]
    Small,
    /// Stable Diffusion 1.5's UNet at 512 pixels: minutes on a CPU
    Sd15,
}

pub fn run(args: &BenchArgs) -> Result<i32> {
    let compute = args.device.open()?;
    let sizes = match args.sizes {
        Sizes::Small => SMALL,
        Sizes::Sd15 => STABLE_DIFFUSION,
    };
    short_table(&compute, |line| say!("{line}"))?;
    kernel_lines(&compute, sizes, |line| say!("{line}"))?;
    Ok(0)
}
