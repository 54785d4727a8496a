//! Rewards to advantages.

use pcpo_wgpu::ops::advantage::{Advantage, Tracker, advantages, varies};

#[test]
fn advantages_are_normalised_as_each_method_does() {
    let prompts = ["a", "b", "a", "b"];
    let rewards = [1.0, 5.0, 3.0, 5.0];
    let mut tracker = Tracker { size: 3, min_count: 3, ..Default::default() };
    let group = advantages(Advantage::Group, &rewards, &prompts, &mut tracker, 5.0);
    assert!((group[0] + 1.0).abs() < 1e-6 && (group[2] - 1.0).abs() < 1e-6);
    assert_eq!((group[1], group[3]), (0.0, 0.0), "equal rewards have advantage 0, never NaN");
    let global = advantages(Advantage::Global, &rewards, &prompts, &mut tracker, 5.0);
    assert!((global[0] + 2.5 / 2.75f32.sqrt()).abs() < 1e-5, "{global:?}");
    let first = advantages(Advantage::PerPrompt, &rewards, &prompts, &mut tracker, 5.0);
    assert!((first[0] - global[0]).abs() < 1e-4, "the batch's statistics below min_count");
    let second = advantages(Advantage::PerPrompt, &rewards, &prompts, &mut tracker, 5.0);
    // Prompt a's buffer is now [3, 1, 3].
    let (mean, std) = (7.0 / 3.0, (8.0f64 / 9.0).sqrt());
    assert!((f64::from(second[0]) - (1.0 - mean) / (std + 1e-6)).abs() < 1e-5);
    let clamped = advantages(Advantage::Group, &rewards, &prompts, &mut tracker, 0.5);
    assert_eq!((clamped[0], clamped[2]), (-0.5, 0.5));
    assert!(varies(&rewards, &prompts) && !varies(&[1.0, 2.0, 1.0, 2.0], &prompts));
}
