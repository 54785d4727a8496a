//! `advantage`: rewards to advantages, in f64 on the host: an epoch has tens to hundreds of
//! rewards, which come from the host anyway, so a kernel would cost more than it computes.
//!
//! A = norm(r), of one reward; of several
//! sum: A = norm(sum_k w_k r_k); per-reward: A = sum_k w_k norm(r_k), where each deviation is at
//! least a tenth of the reward's over the whole epoch, so that a saturated reward's noise is not
//! blown up; gdpo: the same sum without that floor, normalised once more over the epoch (arXiv
//! 2601.05242).
//!
//! group: (r - mean) / (std + 1e-8) within each prompt's group, population std (DanceGRPO, PCPO).
//! global-std: the group's mean, and the std over the epoch with 1e-4 (Flow-GRPO, DiffusionNFT).
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
    /// The group's mean, and the deviation over the epoch (Flow-GRPO's global_std, DiffusionNFT).
    GlobalStd,
    Global,
    PerPrompt,
}

/// How several rewards become one advantage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mix {
    /// The weighted sum of the rewards, normalised: the reward of largest spread takes all.
    Sum,
    /// Each reward normalised, then weighted.
    PerReward,
    /// Each reward normalised and weighted, and their sum normalised over the epoch.
    Gdpo,
}

/// Scores of one reward, with its weight.
#[derive(Clone, Copy, Debug)]
pub struct Weighted<'a> {
    pub weight: f64,
    /// One for each image.
    pub scores: &'a [f64],
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

/// Differences at the level of rounding are no signal.
fn is_flat((mean, std): (f64, f64)) -> bool {
    std <= 1e-12 * mean.abs()
}

/// A group whose rewards are all equal has advantage 0.
fn normalise(r: f64, statistics @ (mean, std): (f64, f64), floor: f64, eps: f64) -> f64 {
    if is_flat(statistics) { 0.0 } else { (r - mean) / (std.max(floor) + eps) }
}

/// The rewards of each prompt.
fn groups<'a>(rewards: &[f64], prompts: &[&'a str]) -> BTreeMap<&'a str, Vec<f64>> {
    let mut groups: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (r, p) in rewards.iter().zip(prompts) {
        groups.entry(p).or_default().push(*r);
    }
    groups
}

/// The part of its deviation over the epoch that a reward's deviation in a group counts for at
/// least, where there are several rewards.
const FLOOR: f64 = 0.1;

/// Advantages of an epoch's images by one reward or several; `prompts[i]` is the prompt of image i,
/// a group is all images of one prompt. Each reward that is normalised on its own has a tracker of
/// its own; missing ones are made like the first. The result is clamped to +-`clamp`.
pub fn mixed(
    mix: Mix,
    kind: Advantage,
    rewards: &[Weighted],
    prompts: &[&str],
    trackers: &mut Vec<Tracker>,
    clamp: f64,
) -> Vec<f32> {
    let images = prompts.len();
    let several = rewards.len() > 1;
    let add = |sum: &mut Vec<f64>, weight: f64, of: &[f64]| {
        sum.iter_mut().zip(of).for_each(|(sum, v)| *sum += weight * v);
    };
    let mut total = vec![0.0; images];
    match mix {
        Mix::Sum => {
            rewards.iter().for_each(|r| add(&mut total, r.weight, r.scores));
            total = normalised(kind, &total, prompts, &mut trackers[0], 0.0);
        }
        Mix::PerReward | Mix::Gdpo => {
            while trackers.len() < rewards.len() {
                let Tracker { size, min_count, .. } = trackers[0];
                trackers.push(Tracker { size, min_count, ..Default::default() });
            }
            let floor = if several && mix == Mix::PerReward { FLOOR } else { 0.0 };
            for (r, tracker) in rewards.iter().zip(trackers) {
                let own = normalised(kind, r.scores, prompts, tracker, floor);
                add(&mut total, r.weight, &own);
            }
            if mix == Mix::Gdpo {
                let whole = mean_std(&total);
                total.iter_mut().for_each(|a| *a = normalise(*a, whole, 0.0, 1e-8));
            }
        }
    }
    total.into_iter().map(|a| a.clamp(-clamp, clamp) as f32).collect()
}

/// Rewards normalised, not clamped; a deviation is at least `floor` times that over the epoch.
fn normalised(
    kind: Advantage,
    rewards: &[f64],
    prompts: &[&str],
    tracker: &mut Tracker,
    floor: f64,
) -> Vec<f64> {
    let whole = mean_std(rewards);
    let least = floor * whole.1;
    let groups = groups(rewards, prompts);
    if kind == Advantage::PerPrompt {
        // The current rewards enter the buffers first, as in DDPO.
        for (prompt, values) in &groups {
            let buffer = &mut tracker.buffers.entry(prompt.to_string()).or_default().0;
            buffer.extend(values);
            buffer.drain(..buffer.len().saturating_sub(tracker.size));
        }
    }
    let advantage = |r: f64, prompt: &str| match kind {
        Advantage::Global => normalise(r, whole, 0.0, 1e-8),
        Advantage::Group => normalise(r, mean_std(&groups[prompt]), least, 1e-8),
        Advantage::GlobalStd => normalise(r, (mean_std(&groups[prompt]).0, whole.1), 0.0, 1e-4),
        Advantage::PerPrompt => match &tracker.buffers[prompt].0 {
            buffer if buffer.len() >= tracker.min_count => {
                normalise(r, mean_std(buffer), least, 1e-6)
            }
            _ => normalise(r, whole, 0.0, 1e-6),
        },
    };
    rewards.iter().zip(prompts).map(|(&r, p)| advantage(r, p)).collect()
}

/// Deviations of the rewards within each group of more than one image.
pub fn group_deviations(rewards: &[f64], prompts: &[&str]) -> Vec<f64> {
    let deviation = |values: &Vec<f64>| match mean_std(values) {
        statistics if is_flat(statistics) => 0.0,
        (_, std) => std,
    };
    groups(rewards, prompts).values().filter(|values| values.len() > 1).map(deviation).collect()
}
