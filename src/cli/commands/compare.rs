//! `compare`: methods side by side; exit code 1 where a run failed.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;

use crate::cli::args::JobArgs;
use crate::cli::console::catch_signals;
use crate::cli::listeners::Listeners;
use crate::config::numbers::{self, Range};
use crate::tools::compare::{self, Comparison, MOST_SEEDS, Method, PAGE, TABLE, Tuned};

#[derive(Args)]
pub struct CompareArgs {
    /// Methods: presets, or TOML files of train's keys; the first is what others are held against
    #[arg(long, value_name = "NAME,FILE,..", value_delimiter = ',', required = true)]
    methods: Vec<String>,
    /// Runs of each method, by seeds from --seed on
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// A setting and the values that each method chooses from by a seed of its own; can be repeated
    #[arg(long, value_name = "KEY=V,V,..")]
    tune: Vec<Tuned>,
    /// Seeds by which a method chooses what is tuned
    #[arg(long, default_value_t = 1)]
    tune_seeds: u64,
    /// Reward that methods are compared at [default: the first's median at its end]
    #[arg(long, value_name = "REWARD", allow_negative_numbers = true)]
    target: Option<f64>,
    /// Folder of the comparison; what is there of it is not done again
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    job: JobArgs,
}

pub fn run(args: &CompareArgs) -> Result<i32> {
    let mut methods: Vec<Method> = Vec::new();
    for given in &args.methods {
        let method = Method::parse(given)?;
        ensure!(
            methods.iter().all(|m| m.name != method.name),
            "--methods {given}: a method of that name stands there twice; give it once"
        );
        methods.push(method);
    }
    numbers::count("--seeds", args.seeds as usize, MOST_SEEDS as usize)?;
    numbers::count("--tune-seeds", args.tune_seeds as usize, MOST_SEEDS as usize)?;
    numbers::optional("--target", args.target, Range::Finite)?;
    for (i, tuned) in args.tune.iter().enumerate() {
        ensure!(
            args.tune[..i].iter().all(|t| t.key != tuned.key),
            "--tune {}: stands there twice; give each setting once",
            tuned.key
        );
    }
    ensure!(
        args.job.options.preset.is_none(),
        "--preset: methods are what --methods names; leave it out"
    );
    let options = args.job.layers()?;
    let comparison = Comparison {
        methods,
        seeds: args.seeds,
        tune: args.tune.clone(),
        tune_seeds: args.tune_seeds,
        options,
    };
    catch_signals();
    let listeners = Listeners::new(false);
    let tell = |text: &str| say!("\n== {text}");
    let done = compare::compare(&comparison, args.target, &args.out, &listeners, &tell)?;
    say!("\n{}", done.table);
    let out = args.out.display();
    say!("result: {out} ({PAGE}, {TABLE}, records)");
    for failed in &done.failed {
        complain!("warning: {failed}");
    }
    if !done.failed.is_empty() {
        complain!("warning: the same command tries again what failed");
    }
    Ok(i32::from(!done.failed.is_empty()))
}
