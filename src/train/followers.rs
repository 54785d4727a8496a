//! Adapters that follow the one that is trained: its running mean, and the policy that an objective
//! of the forward process starts from.

use std::path::Path;

use anyhow::Result;

use crate::config::{OldDecay, Settings};
use crate::lora::Label;
use crate::lora::formats::{self, Format};
use crate::lora::{Adapter, LayerShape};

/// The followers that a run has.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Followers {
    /// The running mean, which is evaluated and given away.
    pub mean: Option<Adapter>,
    /// The old policy: NFT samples by it, AWM is held by it.
    pub old: Option<Adapter>,
}

/// Their files in a checkpoint.
const FILES: [&str; 2] = ["ema.safetensors", "old.safetensors"];

impl Followers {
    /// Those of a run that begins with an adapter.
    pub fn new(s: &Settings, adapter: &Adapter) -> Self {
        let old = s.objective.forward().then(|| adapter.clone());
        Self { mean: s.ema.map(|_| adapter.clone()), old }
    }

    /// Takes the newest values into the running mean, after an optimizer step, counted from 1.
    pub fn after_step(&mut self, s: &Settings, adapter: &Adapter, step: u64) {
        let Some((mean, most)) = self.mean.as_mut().zip(s.ema) else { return };
        if step.is_multiple_of(s.ema_every as u64) {
            mean.approach(adapter, ema_decay(most, step));
        }
    }

    /// Lets the old policy follow, after an epoch; `step` optimizer steps were taken so far.
    pub fn after_epoch(&mut self, s: &Settings, adapter: &Adapter, step: u64) {
        if let Some(old) = &mut self.old {
            old.approach(adapter, old_decay(s.old_decay, step));
        }
    }

    /// Writes their files to a checkpoint's folder.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn save(&self, dir: &Path, label: &Label) -> Result<()> {
        for (follower, name) in [&self.mean, &self.old].into_iter().zip(FILES) {
            if let Some(adapter) = follower {
                formats::save(adapter, &dir.join(name), Format::Diffusers, label)?;
            }
        }
        Ok(())
    }

    /// Reads them from a checkpoint's folder.
    ///
    /// # Errors
    /// Names the file that is damaged.
    pub fn load(dir: &Path, linears: &[LayerShape]) -> Result<Self> {
        let read = |name: &str| {
            let path = dir.join(name);
            path.exists().then(|| formats::load(&path, linears)).transpose()
        };
        Ok(Self { mean: read(FILES[0])?, old: read(FILES[1])? })
    }
}

/// The decay of a running mean at an optimizer step, counted from 1: it grows to `most`, so that
/// the fresh adapter is soon forgotten.
fn ema_decay(most: f64, step: u64) -> f64 {
    (step as f64 / (step + 9) as f64).min(most)
}

/// How much of itself the old policy keeps after an epoch, `step` optimizer steps into the run.
fn old_decay(kind: OldDecay, step: u64) -> f64 {
    let ramp =
        |rate: f64, from: u64, most: f64| (rate * step.saturating_sub(from) as f64).min(most);
    match kind {
        OldDecay::Type0 => 0.0,
        OldDecay::Type1 => ramp(0.001, 0, 0.5),
        OldDecay::Type2 => ramp(0.0075, 75, 0.999),
        OldDecay::Awm => ramp(0.001, 0, 0.3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// METHOD2 9.8.
    #[test]
    fn the_old_policy_follows_by_the_published_schedules() {
        let row =
            |kind, steps: &[u64]| steps.iter().map(|s| old_decay(kind, *s)).collect::<Vec<_>>();
        let close = |found: Vec<f64>, expected: &[f64]| {
            assert!(
                found.iter().zip(expected).all(|(f, e)| (f - e).abs() < 1e-12),
                "{found:?} {expected:?}"
            );
        };
        close(row(OldDecay::Type0, &[0, 1000]), &[0.0, 0.0]);
        close(row(OldDecay::Type1, &[0, 100, 500, 1000]), &[0.0, 0.1, 0.5, 0.5]);
        let steps = [74, 75, 100, 150, 208, 209];
        close(row(OldDecay::Type2, &steps), &[0.0, 0.0, 0.1875, 0.5625, 0.9975, 0.999]);
        close(row(OldDecay::Awm, &[0, 100, 300, 1000]), &[0.0, 0.1, 0.3, 0.3]);
    }

    /// METHOD2 9.9: what the fresh adapter still weighs in the mean.
    #[test]
    fn the_mean_soon_forgets_the_fresh_adapter() {
        let weight = |n: u64| (1..=n).map(|step| ema_decay(0.9, step)).product::<f64>();
        assert!((weight(5) - 1.0 / 2002.0).abs() < 1e-12);
        assert!((weight(10) - 1.0825e-5).abs() < 1e-9);
        assert!(ema_decay(0.9, 80) < 0.9 && ema_decay(0.9, 81) == 0.9);
    }
}
