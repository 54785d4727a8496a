//! The records of a run, one line of metrics.jsonl each: written and read here and nowhere else.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ops::advantage::group_deviations;
use crate::ops::credit_reduce::StepStats;
use crate::schedule::Step;

/// One line of metrics.jsonl.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    /// After each update.
    Update(UpdateRecord),
    /// After each epoch.
    Epoch(EpochRecord),
    /// After each evaluation.
    Evaluation(EvaluationRecord),
    /// At the end of a run that was stopped between two updates.
    Suspended(SuspendedRecord),
}

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
}

/// What one reward gave in a rollout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoreRecord {
    /// Over the images, without the reward's weight.
    pub mean: f64,
    /// Mean over the groups of the population standard deviation within each.
    pub group_std: f64,
    /// Share of the groups whose scores are all equal, 0 to 1.
    pub flat_groups: f64,
}

impl ScoreRecord {
    /// Of the scores of images; `prompts[i]` is the prompt of image i.
    pub fn new(scores: &[f64], prompts: &[&str]) -> Self {
        let deviations = group_deviations(scores, prompts);
        let groups = deviations.len().max(1) as f64;
        Self {
            mean: scores.iter().sum::<f64>() / scores.len().max(1) as f64,
            group_std: deviations.iter().sum::<f64>() / groups,
            flat_groups: deviations.iter().filter(|d| **d == 0.0).count() as f64 / groups,
        }
    }
}

/// A complete epoch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// Counted from 1.
    pub epoch: usize,
    /// Mean reward of the rollout, of several their weighted sum.
    pub reward_mean: f64,
    /// Population standard deviation of the reward.
    pub reward_std: f64,
    /// What each reward gave, trained on or watched, by its name as it was given.
    #[serde(default)]
    pub rewards: BTreeMap<String, ScoreRecord>,
    /// Mean over the updates.
    #[serde(deserialize_with = "or_nan")]
    pub clip_frac: f64,
    /// Mean over the updates.
    #[serde(deserialize_with = "or_nan")]
    pub approx_kl: f64,
    /// Images over `seconds`.
    #[serde(deserialize_with = "or_nan")]
    pub images_per_second: f64,
    /// Sum of the phases below, without the evaluation.
    pub seconds: f64,
    /// Sampling.
    pub rollout_seconds: f64,
    /// Decoding latents.
    pub decode_seconds: f64,
    /// Scoring.
    pub reward_seconds: f64,
    /// Updates.
    pub update_seconds: f64,
    /// Largest resident memory of the process while it sampled, where the system tells.
    pub rollout_peak_mib: Option<u64>,
    /// The same of decoding.
    pub decode_peak_mib: Option<u64>,
    /// The same of the updates.
    pub update_peak_mib: Option<u64>,
    /// Of the whole run.
    pub skipped_updates: usize,
}

/// Fixed prompts and noise after an epoch; epoch 0 is the beginning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluationRecord {
    /// Complete epochs.
    pub epoch: usize,
    /// Mean reward of the pictures, of several their weighted sum.
    pub reward_mean: f64,
    /// The mean of each reward, trained on or watched, by its name as it was given.
    #[serde(default)]
    pub rewards: BTreeMap<String, f64>,
}

/// An epoch that was stopped between two updates: where its time went until then. Dropped when the
/// run goes on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SuspendedRecord {
    /// Counted from 1.
    pub epoch: usize,
    /// In seconds, by phase.
    #[serde(flatten)]
    pub seconds: Seconds,
}

/// Where an epoch's time went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seconds {
    /// Sampling.
    pub rollout: f64,
    /// Decoding latents.
    pub decode: f64,
    /// Scoring.
    pub reward: f64,
    /// Updates.
    pub update: f64,
}

impl Seconds {
    /// Their sum.
    pub fn all(&self) -> f64 {
        self.rollout + self.decode + self.reward + self.update
    }
}

/// Largest memory of an epoch's phases in bytes, where the system keeps it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PeakMemory {
    /// Sampling.
    pub rollout: Option<u64>,
    /// Decoding latents.
    pub decode: Option<u64>,
    /// Updates.
    pub update: Option<u64>,
}

impl UpdateRecord {
    /// Of the update's trained steps with their statistics. A norm that is not finite marks a
    /// skipped update.
    pub fn new(
        epoch: usize,
        update: usize,
        trained: &[Step],
        table: &[StepStats],
        grad_norm: f64,
    ) -> Self {
        let loss = mean(table, |t| t.loss);
        Self {
            epoch,
            update,
            loss,
            clip_frac: mean(table, |t| t.clip_frac),
            approx_kl: mean(table, |t| t.approx_kl),
            kl: mean(table, |t| t.kl),
            log_rho_mean: mean(table, |t| t.log_rho_mean),
            log_rho_std: pooled_std(table),
            grad_norm,
            skipped: !(loss.is_finite() && grad_norm.is_finite()),
            steps: trained.iter().zip(table).map(|(s, t)| StepRecord::new(s, t)).collect(),
        }
    }
}

impl StepRecord {
    fn new(step: &Step, stats: &StepStats) -> Self {
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
        }
    }
}

impl EpochRecord {
    /// Of the epoch's rewards and updates; of a skipped update no statistics count.
    pub fn new(
        epoch: usize,
        rewards: &[f64],
        scores: &BTreeMap<String, ScoreRecord>,
        updates: &[UpdateRecord],
        seconds: Seconds,
        peaks: PeakMemory,
        skipped_updates: usize,
    ) -> Self {
        let over_updates = |f: fn(&UpdateRecord) -> f64| {
            let taken: Vec<f64> = updates.iter().filter(|u| !u.skipped).map(f).collect();
            taken.iter().sum::<f64>() / taken.len().max(1) as f64
        };
        let images = rewards.len() as f64;
        let reward_mean = rewards.iter().sum::<f64>() / images;
        let variance = rewards.iter().map(|r| (r - reward_mean).powi(2)).sum::<f64>() / images;
        let mib = |bytes: Option<u64>| bytes.map(|b| b >> 20);
        Self {
            epoch,
            reward_mean,
            reward_std: variance.sqrt(),
            rewards: scores.clone(),
            clip_frac: over_updates(|u| u.clip_frac),
            approx_kl: over_updates(|u| u.approx_kl),
            images_per_second: images / seconds.all(),
            seconds: seconds.all(),
            rollout_seconds: seconds.rollout,
            decode_seconds: seconds.decode,
            reward_seconds: seconds.reward,
            update_seconds: seconds.update,
            rollout_peak_mib: mib(peaks.rollout),
            decode_peak_mib: mib(peaks.decode),
            update_peak_mib: mib(peaks.update),
            skipped_updates,
        }
    }

    /// The line for people, and one for each of several rewards.
    pub fn text(&self, epochs: usize) -> String {
        let mut text = format!(
            "epoch {}/{epochs}: reward {:.4} +- {:.4}, clipped {:.0}%, approx. KL {:.2e}, {:.1} s",
            self.epoch,
            self.reward_mean,
            self.reward_std,
            100.0 * self.clip_frac,
            self.approx_kl,
            self.seconds
        );
        for (name, r) in self.rewards.iter().filter(|_| self.rewards.len() > 1) {
            text += &format!(
                "\n  {name}: {:.4}, within groups +- {:.4}, {:.0}% of them flat",
                r.mean,
                r.group_std,
                100.0 * r.flat_groups
            );
        }
        text
    }
}

/// Mean over the steps.
fn mean(table: &[StepStats], f: impl Fn(&StepStats) -> f32) -> f64 {
    table.iter().map(|t| f64::from(f(t))).sum::<f64>() / table.len() as f64
}

/// Standard deviation of log rho over all steps and samples.
fn pooled_std(table: &[StepStats]) -> f64 {
    let whole = mean(table, |t| t.log_rho_mean);
    let square = |t: &StepStats| {
        f64::from(t.log_rho_std).powi(2) + (f64::from(t.log_rho_mean) - whole).powi(2)
    };
    (table.iter().map(square).sum::<f64>() / table.len() as f64).sqrt()
}

/// JSON has no NaN: it is written as null.
fn or_nan<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::NAN))
}

fn whole_if_possible<S: Serializer>(t: &f64, to: S) -> Result<S::Ok, S::Error> {
    if t.fract() == 0.0 { to.serialize_u64(*t as u64) } else { to.serialize_f64(*t) }
}

/// Records as lines of text in JSON, as checkpoints hold them.
pub mod lines {
    use serde::de::Error;

    use super::{Deserialize, Deserializer, Record, Serializer, UpdateRecord};

    /// # Errors
    /// The serializer's own.
    pub fn serialize<S: Serializer>(updates: &[UpdateRecord], to: S) -> Result<S::Ok, S::Error> {
        let line = |u: &UpdateRecord| {
            serde_json::to_string(&Record::Update(u.clone())).expect("a record is JSON")
        };
        to.collect_seq(updates.iter().map(line))
    }

    /// # Errors
    /// When a line is not an update's.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<UpdateRecord>, D::Error> {
        let lines = Vec::<String>::deserialize(from)?;
        let update = |line: &String| match serde_json::from_str(line).map_err(D::Error::custom)? {
            Record::Update(update) => Ok(update),
            other => Err(D::Error::custom(format!("{other:?} is not an update"))),
        };
        lines.iter().map(update).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_read_back_to_the_bit_and_nan_is_null() {
        let stats = StepStats { log_rho_mean: 0.1, loss: f32::NAN, ..Default::default() };
        let step = crate::schedule::Ddim::stable_diffusion().steps(7, 1.0).unwrap()[2];
        let update = UpdateRecord::new(1, 2, &[step], &[stats], f64::INFINITY);
        assert!(update.skipped);
        let text = serde_json::to_string(&Record::Update(update.clone())).unwrap();
        assert!(text.contains("\"kind\":\"update\"") && text.contains("\"loss\":null"), "{text}");
        assert!(text.contains(&format!("\"t\":{}", step.t as u64)), "{text}");
        let Record::Update(read) = serde_json::from_str(&text).unwrap() else { panic!("{text}") };
        assert_eq!(serde_json::to_string(&Record::Update(read)).unwrap(), text);
        let seconds = Seconds { rollout: 0.1 + 0.2, ..Default::default() };
        let suspended = Record::Suspended(SuspendedRecord { epoch: 3, seconds });
        let text = serde_json::to_string(&suspended).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), suspended);
    }
}
