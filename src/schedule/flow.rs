//! Samplers of flow models (rectified flow): x = (1 - t) x0 + t z, and the network predicts v = z -
//! x0.
//!
//! ```text
//! SDE    mean = x (1 - s^2 dt / 2t) - v (1 + s^2 (1 - t) / 2t) dt,   deviation s sqrt(dt)
//!        DanceGRPO s = eta;   Flow-GRPO s = eta sqrt(t / (1 - t)), and at t = 1 with the next time
//!        in place of t in 1 - t
//! CPS    x' = (1 - t') (x - t v) + t' cos(eta pi/2) (x + (1 - t) v) + t' sin(eta pi/2) z
//!        t' = t - dt
//! ODE    x' = x - v dt
//! ```
//! Sources: Xue et al. 2025 (DanceGRPO), Liu et al. 2025 (Flow-GRPO), Wang & Yu 2025 (Flow-CPS,
//! arXiv 2509.05952). CPS is a Gaussian step with a mean that is linear in v, so its log rho has
//! the exact form of the others with w = b / sigma. Its authors leave the division by sigma^2 out
//! of their log-probability; here it is the density's own.

use std::f64::consts::FRAC_PI_2;

use anyhow::{Result, bail, ensure};
use serde_json::Value;

use super::fields::{flag, number, whole};
use super::grid::Grid;
use super::sampler::{Sampler, Sampling};
use super::step::{Mean, Step, StepKind};

/// Which pipeline's way diffusers' grid is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spacing {
    /// StableDiffusion3Pipeline: equal intervals between the scheduler's own largest and smallest
    /// time.
    Scheduler,
    /// FluxPipeline, ZImagePipeline: they hand the scheduler N times from 1 to 1/N.
    Pipeline,
    /// Flux2KleinPipeline: the same, and a mu of its own that depends on N too.
    Empirical,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Dynamic {
    Exponential,
    Linear,
}

/// A FlowMatchEulerDiscreteScheduler's numbers.
#[derive(Clone, Debug)]
pub struct Flow {
    pub shift: f64,
    train_timesteps: f64,
    /// Shift by the image's size, where the config asks for it.
    dynamic: Option<Dynamic>,
    shifts: [f64; 2],
    lengths: [f64; 2],
    /// Time at which diffusers' grid ends before its jump to 0, where the config gives one.
    terminal: Option<f64>,
    /// Set by the model that the scheduler belongs to.
    pub spacing: Spacing,
}

/// Whether a time is that of pure noise, 1. Times are sums and quotients: one that is off by
/// rounding is the same time.
fn is_start(t: f64) -> bool {
    1.0 - t < 1e-9
}

impl Flow {
    /// A plain shift without a config file, as the trainers use it.
    pub fn shifted(shift: f64) -> Self {
        Self::from_config(&serde_json::json!({ "shift": shift }))
            .expect("a constant config is valid")
    }

    /// Reads a FlowMatchEulerDiscreteScheduler's `scheduler_config.json`.
    ///
    /// # Errors
    /// Names the field whose value is of the wrong type or not supported.
    pub fn from_config(config: &Value) -> Result<Self> {
        for field in [
            "invert_sigmas",
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "stochastic_sampling",
        ] {
            if flag(config, field, false)? {
                bail!("scheduler_config.json: {field} = true is not supported; set it to false");
            }
        }
        let kind = match config["time_shift_type"].as_str().unwrap_or("exponential") {
            "exponential" => Dynamic::Exponential,
            "linear" => Dynamic::Linear,
            other => {
                bail!(
                    "scheduler_config.json: time_shift_type = {other:?} is not supported; \
                     exponential and linear are"
                )
            }
        };
        let shift = number(config, "shift", 1.0)?;
        let train_timesteps = whole(config, "num_train_timesteps", 1000)? as f64;
        ensure!(shift > 0.0, "scheduler_config.json: shift = {shift} must be positive");
        ensure!(
            train_timesteps >= 1.0,
            "scheduler_config.json: num_train_timesteps = {train_timesteps} must be positive"
        );
        let lengths = [
            number(config, "base_image_seq_len", 256.0)?,
            number(config, "max_image_seq_len", 4096.0)?,
        ];
        ensure!(
            lengths[0] != lengths[1],
            "scheduler_config.json: max_image_seq_len = {} must differ from base_image_seq_len",
            lengths[1]
        );
        Ok(Self {
            shift,
            train_timesteps,
            dynamic: flag(config, "use_dynamic_shifting", false)?.then_some(kind),
            shifts: [number(config, "base_shift", 0.5)?, number(config, "max_shift", 1.15)?],
            lengths,
            terminal: Some(number(config, "shift_terminal", 0.0)?).filter(|&t| t > 0.0),
            spacing: Spacing::Scheduler,
        })
    }

    /// mu of dynamic shifting: a straight line through the token counts of the smallest and the
    /// largest image.
    pub fn mu(&self, tokens: usize, steps: usize) -> f64 {
        if self.spacing == Spacing::Empirical {
            return empirical_mu(tokens as f64, steps as f64);
        }
        let slope = (self.shifts[1] - self.shifts[0]) / (self.lengths[1] - self.lengths[0]);
        self.shifts[0] + slope * (tokens as f64 - self.lengths[0])
    }

    /// The shift of a run, of a time in (0, 1].
    fn warp(&self, s: &Sampling, time: f64) -> f64 {
        // The time 1 stays 1 to the bit, which s / (1 + (s - 1)) does not give at every shift.
        let by = |shift: f64| {
            if time == 1.0 { 1.0 } else { shift * time / (1.0 + (shift - 1.0) * time) }
        };
        match (s.shift, self.dynamic) {
            (Some(shift), _) => by(shift),
            (None, None) => by(self.shift),
            // e^mu / (e^mu + 1/t - 1) is a plain shift by e^mu; the linear kind's is by mu itself.
            (None, Some(Dynamic::Exponential)) => by(self.mu(s.tokens, s.steps).exp()),
            (None, Some(Dynamic::Linear)) => by(self.mu(s.tokens, s.steps)),
        }
    }

    /// The N+1 times of a run, from the first to 0.
    ///
    /// # Errors
    /// When the number of steps is 0 or the shift is not positive.
    pub fn times(&self, s: &Sampling) -> Result<Vec<f64>> {
        let n = s.steps;
        ensure!(
            (1..=self.train_timesteps as usize).contains(&n),
            "--steps {n}: must lie between 1 and {}",
            self.train_timesteps
        );
        if let Some(shift) = s.shift {
            ensure!(shift.is_finite() && shift > 0.0, "--shift {shift}: must be a positive number");
        }
        let ramp = |first: f64, last: f64| {
            (0..n).map(move |i| {
                if n == 1 { first } else { first + (last - first) * i as f64 / (n - 1) as f64 }
            })
        };
        let mut times: Vec<f64> = match (s.grid, self.spacing) {
            (Grid::Shifted, _) => (0..n).map(|i| 1.0 - i as f64 / n as f64).collect(),
            (Grid::Diffusers, Spacing::Pipeline | Spacing::Empirical) => {
                ramp(1.0, 1.0 / n as f64).collect()
            }
            (Grid::Diffusers, Spacing::Scheduler) => {
                // The scheduler's own smallest time is shifted already, unless shifting is dynamic.
                let least = 1.0 / self.train_timesteps;
                let shift = s.shift.unwrap_or(self.shift);
                let least = if self.dynamic.is_some() {
                    least
                } else {
                    shift * least / (1.0 + (shift - 1.0) * least)
                };
                ramp(1.0, least).collect()
            }
        };
        times.iter_mut().for_each(|t| *t = self.warp(s, *t));
        if let (Grid::Diffusers, Some(terminal)) = (s.grid, self.terminal) {
            let factor = (1.0 - times[n - 1]) / (1.0 - terminal);
            times.iter_mut().for_each(|t| *t = 1.0 - (1.0 - *t) / factor);
        }
        times.push(0.0);
        Ok(times)
    }

    /// The steps of a run in sampling order, with native weights.
    ///
    /// # Errors
    /// When a number is out of range.
    pub fn steps(&self, s: &Sampling) -> Result<Vec<Step>> {
        let eta = s.eta;
        ensure!(eta.is_finite() && eta >= 0.0, "--eta {eta}: must be zero or positive");
        ensure!(
            s.sampler != Sampler::Cps || eta <= 1.0,
            "--eta {eta}: must lie between 0 and 1 for --sampler cps"
        );
        let times = self.times(s)?;
        let step = |i: usize| -> Step {
            let (t, next) = (times[i], times[i + 1]);
            let dt = t - next;
            let deterministic = Mean { a: 1.0, b: dt };
            let sde = |noise: f64| {
                let half = noise * noise / (2.0 * t);
                let mean = Mean { a: 1.0 - half * dt, b: (1.0 + half * (1.0 - t)) * dt };
                (mean, noise * dt.sqrt())
            };
            let (Mean { a, b }, sigma) = match s.sampler {
                _ if eta == 0.0 => (deterministic, 0.0),
                Sampler::Dance => sde(eta),
                // At t = 1 the noise would be infinite; the published sampler takes the next time
                // inside 1 - t.
                Sampler::FlowGrpo => {
                    sde(eta * (t / (1.0 - if is_start(t) { next } else { t })).sqrt())
                }
                Sampler::Cps => {
                    let (sin, cos) = (eta * FRAC_PI_2).sin_cos();
                    let b = (1.0 - next) * t - next * cos * (1.0 - t);
                    (Mean { a: 1.0 - next + next * cos, b }, next * sin)
                }
                Sampler::Ode | Sampler::Ddim => (deterministic, 0.0),
            };
            let w = if sigma > 0.0 { b / sigma } else { 0.0 };
            Step {
                index: i,
                t: t * self.train_timesteps,
                a,
                b,
                sigma,
                deterministic,
                share: dt,
                w_native: w,
                w_total: w,
                weight: w,
                quadratic: 1.0,
                loss_weight: 1.0,
                row_weight: 1.0,
                unit: 1.0,
                kind: StepKind::Flow { t, dt },
            }
        };
        let mut steps: Vec<Step> = (0..s.steps).map(step).collect();
        // The published zeta counts the second step's weight for the first, whose noise is not the
        // formula's.
        if s.sampler == Sampler::FlowGrpo && steps.len() > 1 && is_start(times[0]) {
            steps[0].w_total = steps[1].w_native;
        }
        Ok(steps)
    }
}

/// mu of FLUX.2's pipeline: measured at 10 and 200 steps as lines over the number of tokens, with a
/// line through both over the number of steps; of large pictures that of 200 steps. Source:
/// diffusers' `compute_empirical_mu`.
fn empirical_mu(tokens: f64, steps: f64) -> f64 {
    let (few, many) = (8.738_095_24e-5 * tokens + 1.898_333_33, 1.6927e-4 * tokens + 0.456_666_66);
    if tokens > 4300.0 {
        return many;
    }
    let slope = (many - few) / 190.0;
    many + slope * (steps - 200.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// s / (1 + (s - 1)) is not 1 to the bit at every shift; the noise of the first step must not
    /// see that.
    #[test]
    fn flow_grpos_first_step_is_that_of_t_1_at_every_shift() {
        for shift in (1..60).map(|i| 0.1 * f64::from(i)) {
            for grid in [Grid::Shifted, Grid::Diffusers] {
                let flow = Flow::shifted(1.0);
                let sampler = Sampler::FlowGrpo;
                let s =
                    Sampling { sampler, steps: 10, eta: 0.7, grid, shift: Some(shift), tokens: 0 };
                let times = flow.times(&s).unwrap();
                let first = flow.steps(&s).unwrap()[0];
                assert_eq!(times[0], 1.0, "shift {shift}");
                let dt = 1.0 - times[1];
                let exact = 0.7 * (1.0 / (1.0 - times[1])).sqrt() * dt.sqrt();
                let off = (first.sigma - exact).abs();
                assert!(off < 1e-12, "shift {shift}: {} is not {exact}", first.sigma);
            }
        }
    }
}
