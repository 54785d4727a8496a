//! `compare`: methods side by side, with matched seeds, prompts and initial noise, each at its own
//! best of what is tuned.
//!
//! A folder holds `runs/METHOD/..`, the runs' folders, and `records/METHOD/..json`, what is kept of
//! each: the page and the table are made of the records alone.

mod page;
mod plan;
mod record;
mod summary;
mod table;

use std::path::Path;

use anyhow::{Context, Result, ensure};

use self::plan::{Choice, PlannedRun};
pub use self::plan::{Comparison, MOST_SEEDS, Method, Tuned};
use self::record::RunRecord;
use self::summary::{Found, Summary};
use crate::config::{Options, Settings};
use crate::io;
use crate::sampling::trajectory::NotFinite;
use crate::stop;
use crate::tools::report;
use crate::train::metrics::Record;
use crate::train::run_folder::{METRICS, SETTINGS};
use crate::train::{Job, Observer, train};

/// What a comparison leaves.
pub struct Compared {
    /// The table in Markdown.
    pub table: String,
    /// Runs that failed, with why: a later call tries them again.
    pub failed: Vec<String>,
}

/// The files of the result in the comparison's folder.
pub const PAGE: &str = "report.html";
/// The same table in Markdown.
pub const TABLE: &str = "report.md";

/// Does what is left to do of a comparison, and writes its page and table. `tell` hears what
/// begins; `observer` makes a listener for a run.
///
/// # Errors
/// When settings do not fit, a record is of other settings, or the user wishes to stop. A run that
/// fails does not end the others.
pub fn compare(
    comparison: &Comparison,
    target: Option<f64>,
    out: &Path,
    observer: &dyn Observer,
    tell: &dyn Fn(&str),
) -> Result<Compared> {
    comparison.check()?;
    check_place(out)?;
    let (mut found, mut failed) = (Vec::new(), Vec::new());
    for method in &comparison.methods {
        let mut own = Found { method: method.name.clone(), ..Default::default() };
        let mut trials = Vec::new();
        for run in comparison.tuning(method)? {
            trials.extend(once(&run, out, observer, tell, &mut failed)?);
        }
        let best = best(&trials);
        let untuned = !comparison.tune.is_empty() && best.is_none();
        own.tuned = best.unwrap_or_default();
        own.trials = trials;
        if untuned {
            failed.push(format!("{}: no trial of the tuning came to its end", method.name));
        } else {
            for run in comparison.runs(method, &own.tuned)? {
                own.runs.extend(once(&run, out, observer, tell, &mut failed)?);
            }
        }
        found.push(own);
        // As it stands: a long comparison is read before its end.
        write(&Summary::new(&found, target), out)?;
    }
    Ok(Compared { table: table::markdown(&Summary::new(&found, target)), failed })
}

/// Checks that a folder is free, or that of a comparison.
fn check_place(out: &Path) -> Result<()> {
    ensure!(
        !out.exists() || out.is_dir(),
        "--out {}: is no folder; give another place",
        out.display()
    );
    let mut inside = out.read_dir().into_iter().flatten();
    ensure!(
        inside.next().is_none() || ["records", "runs"].iter().any(|part| out.join(part).is_dir()),
        "--out {}: is not empty, and no comparison; give another folder",
        out.display()
    );
    Ok(())
}

/// The choice whose trials end with the largest mean reward; one of whose pictures have collapsed,
/// or which has diverged, only where all have: a reward is no gain that the pictures paid for.
fn best(trials: &[RunRecord]) -> Option<Choice> {
    let mut choices: Vec<&Choice> = trials.iter().map(|trial| &trial.tuned).collect();
    choices.dedup();
    let worth = |choice: &&Choice| {
        let own: Vec<&RunRecord> = trials.iter().filter(|t| t.tuned == **choice).collect();
        let rewards: Vec<f64> = own.iter().filter_map(|t| t.final_reward()).collect();
        let whole = rewards.len() == own.len() && own.iter().all(|t| !t.collapsed());
        let mean = rewards.iter().sum::<f64>() / rewards.len() as f64;
        (!rewards.is_empty()).then_some((whole, mean))
    };
    let known = choices.iter().filter_map(|choice| Some((worth(choice)?, *choice)));
    let order = |a: &(bool, f64), b: &(bool, f64)| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1));
    known.max_by(|(a, _), (b, _)| order(a, b)).map(|(_, choice)| choice.clone())
}

fn write(summary: &Summary, out: &Path) -> Result<()> {
    io::write(&out.join(TABLE), table::markdown(summary).as_bytes())?;
    io::write(&out.join(PAGE), page::page(summary).as_bytes())
}

/// The record of a run: as it was kept, or after it is run, begun anew or continued. None where it
/// failed, which `failed` then says.
fn once(
    run: &PlannedRun,
    out: &Path,
    observer: &dyn Observer,
    tell: &dyn Fn(&str),
    failed: &mut Vec<String>,
) -> Result<Option<RunRecord>> {
    let place = run.place.display();
    let file = out.join("records").join(format!("{place}.json"));
    let settings = toml::to_string(&run.settings).context("settings")?;
    if file.exists() {
        let kept = RunRecord::read(&file)?;
        kept.check(&file, &settings)?;
        return Ok(Some(kept));
    }
    stop::check()?;
    tell(&format!("{place}"));
    let dir = out.join("runs").join(&run.place);
    let ended = train_in(&dir, &run.settings, observer);
    // A run that has never saved anything has no records.
    let metrics = dir.join(METRICS);
    let records = if metrics.exists() { report::records(&metrics)? } else { Vec::new() };
    let learnt = records.iter().any(|record| matches!(record, Record::Update(_)));
    let diverged = match ended {
        Ok(()) => None,
        // Before anything was learnt it is the device or the model that overflows.
        Err(e) if e.is::<NotFinite>() && learnt => {
            tell(&format!("{place}: {e:#}"));
            Some(format!("{e:#}"))
        }
        Err(e) if stop::requested() => return Err(e),
        Err(e) => {
            failed.push(format!("{place}: {e:#}"));
            return Ok(None);
        }
    };
    let images = run.settings.images_per_epoch();
    let record =
        RunRecord { diverged, ..RunRecord::new(run.name.clone(), settings, images, &records) };
    io::write(&file, serde_json::to_string(&record)?.as_bytes())?;
    Ok(Some(record))
}

/// Begins or continues a run in its folder.
fn train_in(dir: &Path, settings: &Settings, observer: &dyn Observer) -> Result<()> {
    let saved = dir.join(SETTINGS);
    let job = if saved.exists() {
        let own = Options::read(&saved, "--out")?.resolve()?;
        // What was chosen by the device's memory is saved with the run.
        let planned = Settings {
            activation_checkpointing: own.activation_checkpointing,
            vae_tiling: own.vae_tiling,
            stream_blocks: own.stream_blocks,
            ..settings.clone()
        };
        ensure!(
            toml::to_string(&own)? == toml::to_string(&planned)?,
            "{}: is a run with other settings; give another --out, or remove it",
            dir.display()
        );
        Job::resume(&Options::default(), dir)?
    } else {
        Job::new(settings.clone(), dir)
    };
    train(job, observer).map(drop)
}
