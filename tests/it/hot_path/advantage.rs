//! Rewards to advantages.

use pcpo_wgpu::ops::advantage::{Advantage, Mix, Tracker, Weighted, group_deviations, mixed};

/// By one reward, which every mix leaves alone but for gdpo's second normalisation.
fn advantages(
    kind: Advantage,
    rewards: &[f64],
    prompts: &[&str],
    trackers: &mut Vec<Tracker>,
    clamp: f64,
) -> Vec<f32> {
    let one = [Weighted { weight: 1.0, scores: rewards }];
    mixed(Mix::PerReward, kind, &one, prompts, trackers, clamp)
}

#[test]
fn advantages_are_normalised_as_each_method_does() {
    let prompts = ["a", "b", "a", "b"];
    let rewards = [1.0, 5.0, 3.0, 5.0];
    let mut trackers = vec![Tracker { size: 3, min_count: 3, ..Default::default() }];
    let group = advantages(Advantage::Group, &rewards, &prompts, &mut trackers, 5.0);
    assert!((group[0] + 1.0).abs() < 1e-6 && (group[2] - 1.0).abs() < 1e-6);
    assert_eq!((group[1], group[3]), (0.0, 0.0), "equal rewards have advantage 0, never NaN");
    let global = advantages(Advantage::Global, &rewards, &prompts, &mut trackers, 5.0);
    assert!((global[0] + 2.5 / 2.75f32.sqrt()).abs() < 1e-5, "{global:?}");
    let first = advantages(Advantage::PerPrompt, &rewards, &prompts, &mut trackers, 5.0);
    assert!((first[0] - global[0]).abs() < 1e-4, "the batch's statistics below min_count");
    let second = advantages(Advantage::PerPrompt, &rewards, &prompts, &mut trackers, 5.0);
    // Prompt a's buffer is now [3, 1, 3].
    let (mean, std) = (7.0 / 3.0, (8.0f64 / 9.0).sqrt());
    assert!((f64::from(second[0]) - (1.0 - mean) / (std + 1e-6)).abs() < 1e-5);
    let clamped = advantages(Advantage::Group, &rewards, &prompts, &mut trackers, 0.5);
    assert_eq!((clamped[0], clamped[2]), (-0.5, 0.5));
    assert_eq!(group_deviations(&rewards, &prompts), [1.0, 0.0]);
}

fn group(mix: Mix, rewards: &[(f64, &[f64])], prompts: &[&str]) -> Vec<f32> {
    let rewards: Vec<Weighted> =
        rewards.iter().map(|&(weight, scores)| Weighted { weight, scores }).collect();
    mixed(mix, Advantage::Group, &rewards, prompts, &mut vec![Tracker::default()], 50.0)
}

fn near(found: &[f32], expected: &[f64]) {
    let close = |(f, e): (&f32, &f64)| (f64::from(*f) - e).abs() < 6e-3;
    assert!(found.iter().zip(expected).all(close), "{found:?} is not {expected:?}");
}

/// Two binary rewards of scales 1 and 0.01.
#[test]
fn a_sum_follows_the_largest_spread_and_per_reward_both() {
    let prompts = ["a"; 4];
    let (large, small) = ([0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.01, 0.01]);
    let rewards: [(f64, &[f64]); 2] = [(1.0, &large), (1.0, &small)];
    near(&group(Mix::Sum, &rewards, &prompts), &[-1.01, 0.99, -0.99, 1.01]);
    near(&group(Mix::PerReward, &rewards, &prompts), &[-2.0, 0.0, 0.0, 2.0]);
    // Of the mean 0 and the deviation sqrt(2).
    let half = 2f64.sqrt();
    near(&group(Mix::Gdpo, &rewards, &prompts), &[-half, 0.0, 0.0, half]);
    let weighted: [(f64, &[f64]); 2] = [(0.5, &large), (-1.0, &small)];
    near(&group(Mix::PerReward, &weighted, &prompts), &[0.5, 1.5, -1.5, -0.5]);
}

/// Totals (0, 1), (0, 2) and (1, 2) all give (-1, 1); rewards apart tell them apart.
#[test]
fn totals_hide_what_rewards_apart_show() {
    let pairs: [[f64; 4]; 3] = [[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]];
    let prompts = ["a", "a"];
    let advantages = |mix, [a, b, c, d]: [f64; 4]| {
        let (first, second) = ([a, c], [b, d]);
        group(mix, &[(1.0, &first[..]), (1.0, &second[..])], &prompts)
    };
    for pair in pairs {
        near(&advantages(Mix::Sum, pair), &[-1.0, 1.0]);
    }
    let gap = |pair| {
        let found = advantages(Mix::PerReward, pair);
        found[1] - found[0]
    };
    assert!((gap(pairs[0]) - 2.0).abs() < 1e-3 && (gap(pairs[1]) - 4.0).abs() < 1e-3);
}

/// A saturated reward's noise stays noise: a group's deviation counts for a tenth of the epoch's at
/// least. A single reward is normalised as its method says.
#[test]
fn the_noise_of_a_saturated_reward_is_not_blown_up() {
    let prompts = ["a", "a", "b", "b"];
    let saturated = [0.9999, 1.0001, 0.0, 2.0];
    let other = [0.0, 1.0, 0.0, 1.0];
    let both: [(f64, &[f64]); 2] = [(1.0, &saturated), (1.0, &other)];
    let found = group(Mix::PerReward, &both, &prompts);
    near(&found, &[-1.0, 1.0, -2.0, 2.0]);
    near(&group(Mix::Gdpo, &both, &prompts), &[-1.0, 1.0, -1.0, 1.0]);
    near(&group(Mix::PerReward, &both[..1], &prompts), &[-1.0, 1.0, -1.0, 1.0]);
}

/// Each reward has buffers of its own.
#[test]
fn trackers_are_apart() {
    let prompts = ["a", "a"];
    let (first, second) = ([0.0, 1.0], [5.0, 7.0]);
    let rewards =
        [Weighted { weight: 1.0, scores: &first }, Weighted { weight: 1.0, scores: &second }];
    let mut trackers = vec![Tracker { size: 4, min_count: 1, ..Default::default() }];
    mixed(Mix::PerReward, Advantage::PerPrompt, &rewards, &prompts, &mut trackers, 5.0);
    let kept = serde_json::to_value(&trackers).unwrap();
    assert_eq!(kept[0]["buffers"]["a"], serde_json::json!(["0", "1"]));
    assert_eq!(kept[1]["buffers"]["a"], serde_json::json!(["5", "7"]));
    assert_eq!(kept[1]["size"], 4);
    mixed(Mix::Sum, Advantage::PerPrompt, &rewards, &prompts, &mut trackers, 5.0);
    let kept = serde_json::to_value(&trackers).unwrap();
    assert_eq!(kept[0]["buffers"]["a"], serde_json::json!(["0", "1", "5", "8"]));
}
