//! `train`: runs a job, new or resumed.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::cli::args::JobArgs;
use crate::cli::console::{catch_signals, exit_code, failed};
use crate::cli::listeners::Listeners;
use crate::config::Options;
use crate::sampling::mpi;
use crate::train::run_folder::default_folder;
use crate::train::{self, DumpRequest, Job, Silent};

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
    let world = mpi::world()?;
    catch_signals();
    let job = world.agree(job(&args)).map(|job| job.with_world(world.clone()));
    let done = match world.is_first() {
        true => job.and_then(train_and_tell),
        false => job.and_then(|job| train::train(job, &Silent)).map(drop),
    };
    let Err(error) = done else { return Ok(0) };
    if world.size() == 1 {
        return Err(error);
    }
    // The first of several processes says what all of them end with, before any of them has ended:
    // the others are killed when one has.
    Ok(if world.is_first() { failed(&error) } else { exit_code() })
}

fn train_and_tell(job: Job) -> Result<()> {
    let listeners = Listeners::new(job.settings().tensorboard);
    let done = train::train(job, &listeners)?;
    if let Some(reason) = &done.stopped {
        say!("stopped: the pictures have collapsed: {reason}");
    }
    say!("fixed prompts and noise: reward {:.4} before, {:.4} after", done.before, done.after);
    if let Some(epoch) = done.best_epoch {
        say!("best: adapter-best.safetensors, after epoch {epoch}");
    }
    say!(
        "result: {} (report.html, before_after.png, adapter.safetensors, metrics.jsonl)",
        done.out.display()
    );
    Ok(())
}

/// What is asked for, new or resumed.
fn job(args: &TrainArgs) -> Result<Job> {
    let job = match &args.resume {
        Some(dir) => Job::resume(&args.job.options, dir)?,
        None => {
            let settings = args.job.resolve()?;
            let name = crate::choice::name(settings.preset);
            let out = args.out.clone();
            Job::new(settings, out.unwrap_or_else(|| default_folder(&name)))
        }
    };
    Ok(job.with_dump(args.dump_update.clone()))
}
