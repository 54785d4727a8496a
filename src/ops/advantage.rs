//! `advantage`: rewards to advantages, in f64 on the host: an epoch has tens to hundreds of
//! rewards, which come from the host anyway, so a kernel would cost more than it computes.
//!
//! group: (r - mean) / (std + 1e-8) within each prompt's group, population std (DanceGRPO, PCPO).
//! global: the same over the epoch (DDPO without a tracker). per-prompt: mean and std of a running
//! buffer for each prompt (DDPO).

use std::collections::BTreeMap;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// How rewards are normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Advantage {
    Group,
    Global,
    PerPrompt,
}

/// DDPO's running buffers: the last `size` rewards of each prompt.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Tracker {
    pub size: usize,
    pub min_count: usize,
    pub buffers: BTreeMap<String, Rewards>,
}

/// Rewards of one prompt, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rewards(#[serde(with = "crate::io::exact")] Vec<f64>);

fn mean_std(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
    (mean, variance.sqrt())
}

/// Differences at the level of rounding are no signal: a group whose rewards are all equal has
/// advantage 0.
fn normalise(r: f64, (mean, std): (f64, f64), eps: f64) -> f64 {
    if std <= 1e-12 * mean.abs() { 0.0 } else { (r - mean) / (std + eps) }
}

/// Advantages of an epoch's images; `prompts[i]` is the prompt of image i, a group is all images of
/// one prompt. The result is clamped to +-`clamp`.
pub fn advantages(
    kind: Advantage,
    rewards: &[f64],
    prompts: &[&str],
    tracker: &mut Tracker,
    clamp: f64,
) -> Vec<f32> {
    let whole = mean_std(rewards);
    let mut groups: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (r, p) in rewards.iter().zip(prompts) {
        groups.entry(p).or_default().push(*r);
    }
    if kind == Advantage::PerPrompt {
        // The current rewards enter the buffers first, as in DDPO.
        for (prompt, values) in &groups {
            let buffer = &mut tracker.buffers.entry(prompt.to_string()).or_default().0;
            buffer.extend(values);
            buffer.drain(..buffer.len().saturating_sub(tracker.size));
        }
    }
    let advantage = |r: f64, prompt: &str| match kind {
        Advantage::Global => normalise(r, whole, 1e-8),
        Advantage::Group => normalise(r, mean_std(&groups[prompt]), 1e-8),
        Advantage::PerPrompt => match &tracker.buffers[prompt].0 {
            buffer if buffer.len() >= tracker.min_count => normalise(r, mean_std(buffer), 1e-6),
            _ => normalise(r, whole, 1e-6),
        },
    };
    rewards.iter().zip(prompts).map(|(&r, p)| advantage(r, p).clamp(-clamp, clamp) as f32).collect()
}

/// Whether rewards vary within at least one group: without that there is nothing to learn from.
pub fn varies(rewards: &[f64], prompts: &[&str]) -> bool {
    rewards
        .iter()
        .zip(prompts)
        .any(|(r, p)| rewards.iter().zip(prompts).any(|(s, q)| p == q && r != s))
}
