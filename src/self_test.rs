//! The self-test of a run's first update.

use anyhow::{Context, Result, ensure};

use crate::ops::policy_objective::STATS;
use crate::settings::Settings;

/// Before the first update rho is 1 and everything is finite: anything else means that training and sampling disagree.
/// Prints the largest |log rho|.
///
/// # Errors
/// As [`first_update`].
pub(crate) fn self_test(s: &Settings, stats: &[f32], gradients: &[Vec<f32>]) -> Result<()> {
    let most = bound(s);
    let worst = first_update(stats, gradients, most).context("self-test")?;
    println!("self-test: rho = 1 before the first update, to {worst:.1e} (at most {most:.0e})");
    Ok(())
}

/// The largest |log rho| that rounding may leave before the first update. With activation checkpointing training runs the
/// very passes that sampling ran; without, attention is computed another way where gradients are tracked. Weights of fewer
/// bits are the same on both sides.
fn bound(s: &Settings) -> f64 {
    if s.activation_checkpointing { 1e-6 } else { 1e-5 }
}

/// The largest |log rho| of the first update's statistics.
///
/// # Errors
/// When it is more than `most`, or a statistic or a gradient is not finite.
fn first_update(stats: &[f32], gradients: &[Vec<f32>], most: f64) -> Result<f32> {
    ensure!(
        stats.iter().chain(gradients.iter().flatten()).all(|v| v.is_finite()),
        "the loss or its gradient is not finite before the first update: the model overflows on this device; use \
         --storage f32 or --device cpu, or check the model with `pcpo-wgpu check`"
    );
    let worst = stats.iter().step_by(STATS).fold(0f32, |m, v| m.max(v.abs()));
    ensure!(
        f64::from(worst) <= most,
        "|log rho| is {worst:e} before the first update, more than {most:e}: sampling and training compute different \
         predictions on this device; use --activation-checkpointing true, or report it with the output of `pcpo-wgpu devices`"
    );
    Ok(worst)
}

#[cfg(test)]
mod tests {
    use super::{STATS, first_update};

    #[test]
    fn the_self_test_refuses_what_is_not_finite_or_not_one() {
        let stats = |log_rho: f32, loss: f32| [log_rho, loss, 0.0, 0.0, 0.0, 1.0].to_vec();
        assert_eq!(stats(0.0, 0.0).len(), STATS);
        let good = vec![vec![1.0, -2.0]];
        assert_eq!(first_update(&[stats(1e-7, 1.0), stats(-5e-7, 1.0)].concat(), &good, 1e-6).unwrap(), 5e-7);
        for (stats, gradients) in [
            (stats(f32::NAN, 1.0), good.clone()),
            (stats(0.0, f32::INFINITY), good.clone()),
            (stats(0.0, 1.0), vec![vec![1.0], vec![f32::NAN]]),
            (stats(2e-6, 1.0), good),
        ] {
            assert!(first_update(&stats, &gradients, 1e-6).is_err(), "{stats:?}");
        }
    }
}
