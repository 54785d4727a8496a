//! `bench`: the shaders' times on a device.

use anyhow::Result;
use clap::builder::PossibleValuesParser;
use clap::{Args, ValueEnum};

use crate::cli::args::DeviceArg;
use crate::tools::bench::{self, short_table};
use crate::tools::bench_kernels::{self, SMALL, STABLE_DIFFUSION, kernel_lines};
use crate::tools::timing::Selection;

#[derive(Args)]
pub struct BenchArgs {
    #[command(flatten)]
    device: DeviceArg,
    /// The sizes at which kernels of networks are timed
    #[arg(long, value_enum, default_value_t)]
    sizes: Sizes,
    /// Time these alone
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', value_parser = names())]
    only: Vec<String>,
}

/// The rows that there are.
fn names() -> PossibleValuesParser {
    PossibleValuesParser::new(bench::names().chain(bench_kernels::NAMES))
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
    let only = Selection(args.only.clone());
    short_table(&compute, &only, |line| say!("{line}"))?;
    kernel_lines(&compute, sizes, &only, |line| say!("{line}"))?;
    Ok(0)
}
