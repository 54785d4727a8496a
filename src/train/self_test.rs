//! The self-test of a process's first update.

use anyhow::{Context, Result, ensure};

use crate::config::{Settings, Switch};
use crate::device::ComputeType;
use crate::ops::policy_objective::SampleStats;
use crate::sampling::trajectory::NotFinite;

/// What the self-test found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SelfTest {
    /// What is to be so, in words.
    pub of: &'static str,
    /// The largest |log rho| where the policy is the one that sampled; of an objective of the
    /// forward process the largest difference of a prediction with gradients to one without.
    pub largest: f32,
    /// What rounding may leave of it.
    pub bound: f64,
}

/// Before anything is learnt rho is 1 and everything is finite: anything else means that training
/// and sampling disagree on this device.
///
/// # Errors
/// When the largest |log rho| is beyond its bound, or a statistic or a gradient is not finite
/// ([`NotFinite`]).
pub(crate) fn self_test(
    s: &Settings,
    stats: &[SampleStats],
    gradients: &[Vec<f32>],
) -> Result<SelfTest> {
    let bound = bound(s);
    let of = if s.objective.forward() {
        "training predicts what sampling does"
    } else {
        "rho = 1 before the first update"
    };
    let largest = largest_log_rho(of, stats, gradients, bound).context("self-test")?;
    Ok(SelfTest { of, largest, bound })
}

/// The largest |log rho| that rounding may leave. With activation checkpointing training runs the
/// very passes that sampling ran; without, attention is computed another way where gradients are
/// tracked. Weights of fewer bits are the same on both sides.
///
/// An objective of the forward process is held to its prediction instead, element by element.
fn bound(s: &Settings) -> f64 {
    let checkpointing = s.activation_checkpointing == Switch::True;
    match (s.objective.forward(), s.compute) {
        (true, ComputeType::F16) => 5e-3,
        (true, ComputeType::F32) => 1e-4,
        (false, _) if checkpointing => 1e-6,
        (false, _) => 1e-5,
    }
}

fn largest_log_rho(
    of: &str,
    stats: &[SampleStats],
    gradients: &[Vec<f32>],
    bound: f64,
) -> Result<f32> {
    let values: &[f32] = bytemuck::cast_slice(stats);
    ensure!(
        values.iter().chain(gradients.iter().flatten()).all(|v| v.is_finite()),
        NotFinite(
            "the loss or its gradient is not finite before the first update: the model overflows \
             on this device; use --storage f32 or --device cpu, or check the model with \
             `pcpo-wgpu check`"
                .into()
        )
    );
    let largest = stats.iter().fold(0f32, |m, s| m.max(s.log_rho.abs()));
    ensure!(
        f64::from(largest) <= bound,
        "{of} only to {largest:e}, not to {bound:e}: sampling and \
         training compute different predictions on this device; use --activation-checkpointing, or \
         report it with the output of `pcpo-wgpu devices`"
    );
    Ok(largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_finite_or_not_one_is_refused() {
        let stats = |log_rho, loss| SampleStats { log_rho, loss, push: 1.0, ..Default::default() };
        let good = vec![vec![1.0, -2.0]];
        let two = [stats(1e-7, 1.0), stats(-5e-7, 1.0)];
        assert_eq!(largest_log_rho("rho = 1", &two, &good, 1e-6).unwrap(), 5e-7);
        for (stats, gradients) in [
            (stats(f32::NAN, 1.0), good.clone()),
            (stats(0.0, f32::INFINITY), good.clone()),
            (stats(0.0, 1.0), vec![vec![1.0], vec![f32::NAN]]),
            (stats(2e-6, 1.0), good),
        ] {
            assert!(largest_log_rho("rho = 1", &[stats], &gradients, 1e-6).is_err(), "{stats:?}");
        }
    }
}
