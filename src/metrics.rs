//! The lines of metrics.jsonl: one object an update and one an epoch.

use serde_json::{Value, json};

use crate::checkpoint::Seconds;
use crate::ops::credit_reduce::StepStats;
use crate::schedule::Step;
use crate::work::Work;

/// An update's line, with the statistics of each trained step. A norm that is not finite marks a skipped update.
pub(crate) fn update(
    epoch: usize,
    update: usize,
    trained: &[(usize, Step)],
    table: &[StepStats],
    grad_norm: f64,
) -> Value {
    let steps: Vec<Value> = trained
        .iter()
        .zip(table)
        .map(|((_, step), stats)| {
            let mut line = serde_json::to_value(stats).expect("statistics are numbers");
            // A timestep of diffusion is a whole number.
            line["weight"] = json!(step.weight);
            line["w_native"] = json!(step.w_native);
            line["t"] = if step.t.fract() == 0.0 { json!(step.t as u64) } else { json!(step.t) };
            line
        })
        .collect();
    let loss = mean(table, |t| t.loss);
    json!({
        "kind": "update", "epoch": epoch, "update": update, "loss": loss,
        "clip_frac": mean(table, |t| t.clip_frac), "approx_kl": mean(table, |t| t.approx_kl),
        "kl": mean(table, |t| t.kl), "log_rho_mean": mean(table, |t| t.log_rho_mean),
        "log_rho_std": pooled_std(table), "grad_norm": grad_norm,
        "skipped": !(loss.is_finite() && grad_norm.is_finite()), "steps": steps,
    })
}

/// An epoch's numbers.
pub(crate) struct Epoch {
    epoch: usize,
    reward_mean: f64,
    reward_std: f64,
    clip_frac: f64,
    approx_kl: f64,
    images: usize,
    seconds: Seconds,
    /// Largest memory of rollout, decode and update, in bytes.
    peaks: [Option<u64>; 3],
}

impl Epoch {
    pub fn new(epoch: usize, work: &Work) -> Self {
        let updates: Vec<Value> = work.lines.iter().filter_map(|l| serde_json::from_str(l).ok()).collect();
        // An update that was skipped has none.
        let over_updates = |field: &str| {
            let values: Vec<f64> = updates.iter().filter_map(|l| l[field].as_f64()).collect();
            values.iter().sum::<f64>() / values.len().max(1) as f64
        };
        let images = work.rewards.len();
        let reward_mean = work.rewards.iter().sum::<f64>() / images as f64;
        let variance = work.rewards.iter().map(|r| (r - reward_mean).powi(2)).sum::<f64>() / images as f64;
        Self {
            epoch,
            reward_mean,
            reward_std: variance.sqrt(),
            clip_frac: over_updates("clip_frac"),
            approx_kl: over_updates("approx_kl"),
            images,
            seconds: work.seconds,
            peaks: work.peaks,
        }
    }

    /// The line of metrics.jsonl.
    pub fn line(&self, skipped_updates: usize) -> Value {
        let t = self.seconds;
        let [rollout_peak, decode_peak, update_peak] = self.peaks.map(|p| p.map(|bytes| bytes >> 20));
        json!({
            "kind": "epoch", "epoch": self.epoch, "reward_mean": self.reward_mean, "reward_std": self.reward_std,
            "clip_frac": self.clip_frac, "approx_kl": self.approx_kl,
            "images_per_second": self.images as f64 / t.all(), "seconds": t.all(), "rollout_seconds": t.rollout,
            "decode_seconds": t.decode, "reward_seconds": t.reward, "update_seconds": t.update, "rollout_peak_mib": rollout_peak,
            "decode_peak_mib": decode_peak, "update_peak_mib": update_peak, "skipped_updates": skipped_updates,
        })
    }

    /// The line for people.
    pub fn text(&self, epochs: usize) -> String {
        format!(
            "epoch {}/{epochs}: reward {:.4} +- {:.4}, clipped {:.0}%, approx. KL {:.2e}, {:.1} s",
            self.epoch,
            self.reward_mean,
            self.reward_std,
            100.0 * self.clip_frac,
            self.approx_kl,
            self.seconds.all()
        )
    }
}

/// Mean over the steps.
pub(crate) fn mean(table: &[StepStats], f: impl Fn(&StepStats) -> f32) -> f64 {
    table.iter().map(|t| f64::from(f(t))).sum::<f64>() / table.len() as f64
}

/// Standard deviation of log rho over all steps and samples.
fn pooled_std(table: &[StepStats]) -> f64 {
    let whole = mean(table, |t| t.log_rho_mean);
    let square = |t: &StepStats| f64::from(t.log_rho_std).powi(2) + (f64::from(t.log_rho_mean) - whole).powi(2);
    (table.iter().map(square).sum::<f64>() / table.len() as f64).sqrt()
}
