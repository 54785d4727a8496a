//! What an epoch leaves in metrics.jsonl.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::update_record::or_nan;
use crate::ops::advantage::group_deviations;

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
    /// What the pool of a GPU held after the rollout, weights and room of its own among it: the
    /// largest of the process's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout_pool_mib: Option<u64>,
    /// The same after decoding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode_pool_mib: Option<u64>,
    /// The same after the updates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_pool_mib: Option<u64>,
    /// Of the whole run.
    pub skipped_updates: usize,
    /// Calls of the network in the rollout: rows through it, with guidance still one.
    #[serde(default)]
    pub rollout_calls: usize,
    /// The same of the updates, one for each trained step of each image and pass. Self-test,
    /// evaluation, the KL's reference and the second pass of checkpointing are not among them.
    #[serde(default)]
    pub update_calls: usize,
    /// Batches that each device did, in the devices' order: of rollout, decoding and updates.
    #[serde(default, skip_serializing_if = "is_one")]
    pub device_batches: Vec<usize>,
    /// What the user was warned of in the epoch.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
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

/// Whether there is nothing to say of devices.
fn is_one(device_batches: &[usize]) -> bool {
    device_batches.len() <= 1
}

impl EpochRecord {
    /// The line for people, and one for each of several rewards.
    pub fn text(&self, epochs: usize) -> String {
        let mut text = format!(
            "epoch {}/{epochs}: reward {:.4} +- {:.4}, clipped {:.0}%, approx. KL {:.2e}, {} + {} \
             calls, {:.1} s",
            self.epoch,
            self.reward_mean,
            self.reward_std,
            100.0 * self.clip_frac,
            self.approx_kl,
            self.rollout_calls,
            self.update_calls,
            self.seconds
        );
        if !is_one(&self.device_batches) {
            let counts: Vec<String> = self.device_batches.iter().map(usize::to_string).collect();
            text += &format!(", batches by device: {}", counts.join(" + "));
        }
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
