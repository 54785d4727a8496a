//! What is kept of a run: enough for every table and plot, in a file of its own, so that a
//! comparison goes on where it stopped and is drawn again without its runs.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::io;
use crate::measure::{mean, squared_deviations};
use crate::train::metrics::{EvaluationRecord, Record, StepRecord, UpdateRecord};

/// A run of a method, complete or diverged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    pub method: String,
    pub seed: u64,
    /// What was tuned, as it was set.
    pub tuned: BTreeMap<String, String>,
    /// Everything that the run was told, as its settings.toml.
    pub settings: String,
    /// Why it ended before its last epoch, where it did.
    pub diverged: Option<String>,
    pub epochs: Vec<EpochPoint>,
    pub evaluations: Vec<EvaluationRecord>,
    pub steps: Vec<StepSummary>,
}

/// What an epoch cost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochPoint {
    pub epoch: usize,
    pub reward_mean: f64,
    pub images: usize,
    pub calls: usize,
    /// Without evaluations.
    pub seconds: f64,
    pub clip_frac: Option<f64>,
}

/// A timestep over all updates.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepSummary {
    pub t: f64,
    pub updates: usize,
    pub clip_frac: f64,
    /// How much the step adds to the gradient at the network's output: mean over updates, and their
    /// variance.
    pub gradient_mean: f64,
    pub gradient_variance: f64,
    /// Norm of what it adds to the adapter's gradient, likewise; none in records that did not
    /// measure it.
    #[serde(default)]
    pub grad_norm_mean: Option<f64>,
    #[serde(default)]
    pub grad_norm_variance: Option<f64>,
    /// Mean of log rho^2 / 2, by which 1 + log rho is below rho.
    pub log_ratio_error: f64,
}

impl RunRecord {
    /// Of a run's records; `images` is how many an epoch has.
    pub fn new(run: RunName, settings: String, images: usize, records: &[Record]) -> Self {
        let (mut epochs, mut evaluations, mut updates) = (Vec::new(), Vec::new(), Vec::new());
        for record in records {
            match record {
                Record::Epoch(e) => epochs.push(EpochPoint {
                    epoch: e.epoch,
                    reward_mean: e.reward_mean,
                    images,
                    calls: e.rollout_calls + e.update_calls,
                    seconds: e.seconds,
                    clip_frac: Some(e.clip_frac).filter(|c| c.is_finite()),
                }),
                Record::Evaluation(e) => evaluations.push(e.clone()),
                Record::Update(u) => updates.push(u),
                Record::Suspended(_) => {}
            }
        }
        let RunName { method, seed, tuned } = run;
        let steps = steps(&updates);
        Self { method, seed, tuned, settings, diverged: None, epochs, evaluations, steps }
    }

    /// Reads a record.
    ///
    /// # Errors
    /// Names the file that is damaged.
    pub fn read(path: &Path) -> Result<Self> {
        let value = io::read_json(path)?;
        serde_json::from_value(value).with_context(|| format!("{}: is damaged", path.display()))
    }

    /// Whether it is of a run with these settings.
    ///
    /// # Errors
    /// Names the file and what to do.
    pub fn check(&self, path: &Path, settings: &str) -> Result<()> {
        ensure!(
            self.settings == settings,
            "{}: is the record of a run with other settings; give another --out, or remove it",
            path.display()
        );
        Ok(())
    }

    /// Whether its last pictures have collapsed: a signal of the watch stands beyond the bound that
    /// stops, twice in a row.
    pub fn collapsed(&self) -> bool {
        self.evaluations.last().is_some_and(|e| e.reason_to_stop().is_some())
    }

    /// The last evaluation's reward.
    pub fn final_reward(&self) -> Option<f64> {
        self.diverged.is_none().then(|| self.evaluations.last().map(|e| e.reward_mean)).flatten()
    }
}

/// The place of a timestep among others: in thousandths, the noisiest first.
pub fn place(t: f64) -> i64 {
    -(t * 1000.0).round() as i64
}

/// Which run of a comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct RunName {
    pub method: String,
    pub seed: u64,
    pub tuned: BTreeMap<String, String>,
}

/// Each timestep over all updates that were taken.
fn steps(updates: &[&UpdateRecord]) -> Vec<StepSummary> {
    let mut all: BTreeMap<i64, Vec<&StepRecord>> = BTreeMap::new();
    for step in updates.iter().filter(|u| !u.skipped).flat_map(|u| &u.steps) {
        all.entry(place(step.t)).or_default().push(step);
    }
    let summary = |steps: Vec<&StepRecord>| {
        let of = |f: fn(&StepRecord) -> f64| -> Vec<f64> { steps.iter().map(|s| f(s)).collect() };
        // Where it was measured.
        let measured = |f| -> Vec<f64> { of(f).into_iter().filter(|v| v.is_finite()).collect() };
        let (contributions, norms) = (measured(|s| s.contribution), measured(|s| s.grad_norm));
        let variance = |values: &[f64]| squared_deviations(values) / values.len() as f64;
        StepSummary {
            t: steps[0].t,
            updates: steps.len(),
            clip_frac: mean(&of(|s| s.clip_frac)),
            gradient_mean: mean(&contributions),
            gradient_variance: variance(&contributions),
            grad_norm_mean: (!norms.is_empty()).then(|| mean(&norms)),
            grad_norm_variance: (!norms.is_empty()).then(|| variance(&norms)),
            log_ratio_error: mean(&of(|s| s.approx_kl)),
        }
    };
    all.into_values().map(summary).collect()
}
