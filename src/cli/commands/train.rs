//! `train`: runs a job, new or resumed.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::cli::args::JobArgs;
use crate::cli::console::catch_signals;
use crate::cli::listeners::Listeners;
use crate::config::Options;
use crate::train::run_folder::default_folder;
use crate::train::{self, DumpRequest, Job};

#[derive(Args)]
pub struct TrainArgs {
    #[command(flatten)]
    job: JobArgs,
    /// Folder of the run [default: runs/PRESET-N]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Continue the run in this folder; only what alters none of its numbers can change
    #[arg(
        long,
        value_name = "DIR",
        conflicts_with_all = ["config", "recipe", "out"],
        help = format!("Continue the run in this folder; only {} can \
            change", Options::FREE_ON_RESUME)
    )]
    resume: Option<PathBuf>,
    /// Write update K (counted from 1) whole, for scripts/verify_update.py
    #[arg(long, value_name = "FILE[:K]")]
    dump_update: Option<DumpRequest>,
}

pub fn run(args: TrainArgs) -> Result<i32> {
    let job = match &args.resume {
        Some(dir) => Job::resume(&args.job.options, dir)?,
        None => {
            let settings = args.job.resolve()?;
            let name = crate::choice::name(settings.preset);
            Job::new(settings, args.out.unwrap_or_else(|| default_folder(&name)))
        }
    };
    catch_signals();
    let listeners = Listeners::new(job.settings().tensorboard);
    let done = train::train(job.with_dump(args.dump_update), &listeners)?;
    if let Some(reason) = &done.stopped {
        println!("stopped: the pictures have collapsed: {reason}");
    }
    println!("fixed prompts and noise: reward {:.4} before, {:.4} after", done.before, done.after);
    if let Some(epoch) = done.best_epoch {
        println!("best: adapter-best.safetensors, after epoch {epoch}");
    }
    println!(
        "result: {} (report.html, before_after.png, adapter.safetensors, metrics.jsonl)",
        done.out.display()
    );
    Ok(0)
}
