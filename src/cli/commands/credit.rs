//! `credit`: the credit weights of a schedule.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::config::numbers::{self, MOST, Range};
use crate::config::prompts::model_folder;
use crate::io;
use crate::model::ModelFiles;
use crate::schedule::{Ddim, Flow, Grid, Sampler, Sampling, Schedule};
use crate::tools::credit_table::table;

/// Tokens of a 1024-pixel image in the flow models: what a model's dynamic shifting is shown for.
const DEFAULT_TOKENS: usize = 4096;

#[derive(Args)]
pub struct CreditArgs {
    /// Sampler whose steps are shown
    #[arg(long, value_enum, default_value = "ddim")]
    sampler: Sampler,
    /// Number of steps [default: 50 for ddim, 16 for dance, 10 for flow-grpo and cps]
    #[arg(long)]
    steps: Option<usize>,
    /// Amount of noise [default: 1 for ddim, 0.3 for dance, 0.7 for flow-grpo and cps]
    #[arg(long)]
    eta: Option<f64>,
    /// Shift of a flow's times [default: 3, or the model's scheduler's]
    #[arg(long)]
    shift: Option<f64>,
    /// Published total of a flow's credit, in place of the grid's own
    #[arg(long)]
    zeta: Option<f64>,
    /// Model folder whose scheduler is used [default: Stable Diffusion's for ddim, a plain shift
    /// for flows]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Write a plot (PNG)
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

pub fn run(args: &CreditArgs) -> Result<i32> {
    let sampling = Sampling {
        sampler: args.sampler,
        steps: args.steps.unwrap_or(args.sampler.default_steps()),
        eta: args.eta.unwrap_or(args.sampler.default_eta()),
        grid: Grid::Shifted,
        shift: args.shift,
        tokens: DEFAULT_TOKENS,
    };
    numbers::count("--steps", sampling.steps, MOST)?;
    numbers::number("--eta", sampling.eta, Range::NotNegative)?;
    numbers::optional("--shift", args.shift, Range::Positive)?;
    numbers::optional("--zeta", args.zeta, Range::Positive)?;
    let schedule = match &args.model {
        Some(path) => ModelFiles::open(&model_folder(Some(path))?.as_path().into())?.schedule()?,
        None if !args.sampler.is_flow() => Schedule::Ddim(Ddim::stable_diffusion()),
        None => Schedule::Flow(Flow::shifted(3.0)),
    };
    let table = table(&schedule, sampling, args.zeta)?;
    if args.json {
        say!("{}", serde_json::to_string_pretty(&table.json())?);
    } else {
        say!("{}", table.text().trim_end());
    }
    if let Some(path) = &args.plot {
        io::write(path, &io::png(&table.plot())?)?;
    }
    Ok(0)
}
