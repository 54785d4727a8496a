//! What an update leaves in metrics.jsonl.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ops::credit_reduce::StepStats;
use crate::schedule::Step;

/// An optimizer step, taken or skipped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UpdateRecord {
    /// Counted from 1.
    pub epoch: usize,
    /// Counted from 1 over the run.
    pub update: usize,
    /// Mean over images, with the part of the KL.
    #[serde(deserialize_with = "or_nan")]
    pub loss: f64,
    /// Share of the entries that are clipped, 0 to 1.
    #[serde(deserialize_with = "or_nan")]
    pub clip_frac: f64,
    /// 1/2 mean(log rho^2).
    #[serde(deserialize_with = "or_nan")]
    pub approx_kl: f64,
    /// Exact KL to the model without its adapter; 0 where it is not asked for.
    #[serde(deserialize_with = "or_nan")]
    pub kl: f64,
    /// Mean of the log-ratio.
    #[serde(deserialize_with = "or_nan")]
    pub log_rho_mean: f64,
    /// Population standard deviation of the log-ratio.
    #[serde(deserialize_with = "or_nan")]
    pub log_rho_std: f64,
    /// Norm of the gradient before it is cut.
    #[serde(deserialize_with = "or_nan")]
    pub grad_norm: f64,
    /// AdamW's.
    #[serde(default)]
    pub learning_rate: f64,
    /// Rows that the policy's network has computed; guidance's are not counted twice.
    #[serde(default)]
    pub calls: usize,
    /// Whether loss or gradient was not finite.
    pub skipped: bool,
    /// One for each trained step, in sampling order.
    pub steps: Vec<StepRecord>,
}

/// A trained step's part of an update.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// The timestep, 0..1000: a whole number for diffusion.
    #[serde(serialize_with = "whole_if_possible")]
    pub t: f64,
    /// The step's credit weight.
    #[serde(deserialize_with = "or_nan")]
    pub weight: f64,
    /// The sampler's own weight, b / sigma.
    #[serde(deserialize_with = "or_nan")]
    pub w_native: f64,
    /// Mean of the log-ratio.
    #[serde(deserialize_with = "or_nan")]
    pub log_rho_mean: f64,
    /// Population standard deviation of the log-ratio.
    #[serde(deserialize_with = "or_nan")]
    pub log_rho_std: f64,
    /// Mean over images, with the part of the KL.
    #[serde(deserialize_with = "or_nan")]
    pub loss: f64,
    /// Share of the entries that are clipped, 0 to 1.
    #[serde(deserialize_with = "or_nan")]
    pub clip_frac: f64,
    /// 1/2 mean(log rho^2).
    #[serde(deserialize_with = "or_nan")]
    pub approx_kl: f64,
    /// Exact KL to the model without its adapter; 0 where it is not asked for.
    #[serde(deserialize_with = "or_nan")]
    pub kl: f64,
    /// How much the step adds to the gradient: mean |d loss / d log rho| times the weight.
    #[serde(deserialize_with = "or_nan")]
    pub contribution: f64,
    /// Norm of what the step adds to the adapter's gradient, added up over the update's batches:
    /// the norm of its gradient where that is one batch. NaN where an older run did not measure it.
    #[serde(default = "nan", deserialize_with = "or_nan")]
    pub grad_norm: f64,
}

/// A trained step of an update.
#[derive(Clone, Copy, Debug)]
pub struct TrainedStep {
    pub step: Step,
    pub stats: StepStats,
    /// Norm of what it adds to the adapter's gradient, added up over batches.
    pub grad_norm: f64,
}

/// What an update was done with and cost, beside its steps' statistics.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    /// AdamW's.
    pub learning_rate: f64,
    /// Norm of the gradient before it is cut.
    pub grad_norm: f64,
    /// Rows that the policy's network has computed.
    pub calls: usize,
}

impl UpdateRecord {
    /// Of the update's trained steps with their statistics. A norm that is not finite marks a
    /// skipped update.
    pub fn new(
        epoch: usize,
        update: usize,
        table: &[TrainedStep],
        Took { learning_rate, grad_norm, calls }: Took,
    ) -> Self {
        let loss = mean(table, |t| t.stats.loss);
        Self {
            epoch,
            update,
            loss,
            clip_frac: mean(table, |t| t.stats.clip_frac),
            approx_kl: mean(table, |t| t.stats.approx_kl),
            kl: mean(table, |t| t.stats.kl),
            log_rho_mean: mean(table, |t| t.stats.log_rho_mean),
            log_rho_std: pooled_std(table),
            grad_norm,
            learning_rate,
            calls,
            skipped: !(loss.is_finite() && grad_norm.is_finite()),
            steps: table.iter().map(StepRecord::new).collect(),
        }
    }
}

impl StepRecord {
    fn new(TrainedStep { step, stats, grad_norm }: &TrainedStep) -> Self {
        Self {
            t: step.t,
            weight: step.weight,
            w_native: step.w_native,
            log_rho_mean: stats.log_rho_mean.into(),
            log_rho_std: stats.log_rho_std.into(),
            loss: stats.loss.into(),
            clip_frac: stats.clip_frac.into(),
            approx_kl: stats.approx_kl.into(),
            kl: stats.kl.into(),
            contribution: stats.contribution.into(),
            grad_norm: *grad_norm,
        }
    }
}

/// Mean over the steps.
fn mean(table: &[TrainedStep], f: impl Fn(&TrainedStep) -> f32) -> f64 {
    table.iter().map(|t| f64::from(f(t))).sum::<f64>() / table.len() as f64
}

/// Standard deviation of log rho over all steps and samples.
fn pooled_std(table: &[TrainedStep]) -> f64 {
    let whole = mean(table, |t| t.stats.log_rho_mean);
    let square = |StepStats { log_rho_mean, log_rho_std, .. }: &StepStats| {
        f64::from(*log_rho_std).powi(2) + (f64::from(*log_rho_mean) - whole).powi(2)
    };
    (table.iter().map(|t| square(&t.stats)).sum::<f64>() / table.len() as f64).sqrt()
}

/// What was not measured.
fn nan() -> f64 {
    f64::NAN
}

/// JSON has no NaN: it is written as null.
pub(super) fn or_nan<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::NAN))
}

fn whole_if_possible<S: Serializer>(t: &f64, to: S) -> Result<S::Ok, S::Error> {
    if t.fract() == 0.0 { to.serialize_u64(*t as u64) } else { to.serialize_f64(*t) }
}
