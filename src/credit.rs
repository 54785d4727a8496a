//! Credit rules: functions from a schedule to a schedule. PCPO = Lee & Ye 2026, section 4.

use anyhow::{Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::schedule::{Schedule, Step};

/// How strongly each step's change of prediction counts in log rho.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Credit {
    /// w(t) of the sampler itself.
    Native,
    /// One constant for every step, the mean of the native weights; the sampler stays DDPM's.
    Proportionate,
    /// The sampler and the constant that PCPO's released code uses; published for 50 steps only.
    Released,
}

/// The published w* of the released sampler, and the number by which its objective divides it.
const RELEASED_W: f64 = 4.5;
const RELEASED_DIVISOR: f64 = 8.705_750_761_81;

/// Mean of the native weights over all steps that have a density, trained or not.
pub fn mean_native(steps: &[Step]) -> f64 {
    let weights: Vec<f64> =
        steps.iter().filter(|s| s.sigma > 0.0 && s.w_native.is_finite()).map(|s| s.w_native).collect();
    weights.iter().sum::<f64>() / weights.len().max(1) as f64
}

/// Applies a rule to the native steps of a schedule.
///
/// # Errors
/// `released` at another number of steps than 50, or where its sampler has no solution.
pub fn apply(rule: Credit, schedule: &Schedule, native: Vec<Step>) -> Result<Vec<Step>> {
    match rule {
        Credit::Native => Ok(native),
        Credit::Proportionate => {
            let mean = mean_native(&native);
            Ok(native.into_iter().map(|s| Step { weight: if s.sigma > 0.0 { mean } else { 0.0 }, ..s }).collect())
        }
        Credit::Released => {
            ensure!(
                native.len() == 50,
                "--credit released: its constants were published for 50 steps, not {}; \
                 use --credit proportionate, which is right at any number of steps",
                native.len()
            );
            native.into_iter().map(|s| released(schedule, s)).collect()
        }
    }
}

/// sigma~ of the released sampler: the larger root of (c1 + c2) / sigma = w*, although its paper states (c1 - c2).
fn released(schedule: &Schedule, s: Step) -> Result<Step> {
    let c1 = (1.0 - s.alpha_bar).sqrt() * (s.alpha_bar_prev / s.alpha_bar).sqrt();
    let w2 = 1.0 + RELEASED_W * RELEASED_W;
    let root = w2 * (1.0 - s.alpha_bar_prev) - c1 * c1;
    ensure!(root >= 0.0, "--credit released: no deviation solves the rule at t = {}; use --credit proportionate", s.t);
    let sigma = (RELEASED_W * c1 + root.sqrt()) / w2;
    let step = schedule.with_sigma(s.t, s.alpha_bar, s.alpha_bar_prev, sigma);
    Ok(Step { weight: RELEASED_W / RELEASED_DIVISOR, ..step })
}
