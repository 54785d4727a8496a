//! The DDIM sampler of diffusion models.
//!
//! Follows diffusers' `DDIMScheduler.from_config`: any scheduler's config gives the betas, absent
//! fields take DDIM's defaults. Formulas: Song et al. 2021, eq. 12 and 16; Lee & Ye 2026,
//! proposition 1.

use anyhow::{Result, bail, ensure};
use serde_json::Value;

use super::fields::{flag, number, whole};
use super::sampler::Prediction;
use super::step::{Mean, Step, StepKind};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Spacing {
    Leading,
    Linspace,
    Trailing,
}

/// A scheduler folder's numbers.
#[derive(Clone, Debug)]
pub struct Ddim {
    /// Cumulative product of 1 - beta for each training timestep.
    pub alpha_bar: Vec<f64>,
    pub prediction: Prediction,
    final_alpha_bar: f64,
    steps_offset: usize,
    spacing: Spacing,
    clip: f64,
}

fn betas(config: &Value, n: usize) -> Result<Vec<f64>> {
    if let Some(list) = config["trained_betas"].as_array() {
        let betas: Vec<f64> = list.iter().filter_map(Value::as_f64).collect();
        ensure!(
            betas.len() == n,
            "scheduler_config.json: trained_betas has {} entries, not {n}",
            betas.len()
        );
        return Ok(betas);
    }
    let (start, end) = (number(config, "beta_start", 0.0001)?, number(config, "beta_end", 0.02)?);
    let ramp = |i: usize| i as f64 / (n - 1).max(1) as f64;
    Ok(match config["beta_schedule"].as_str().unwrap_or("linear") {
        "linear" => (0..n).map(|i| start + (end - start) * ramp(i)).collect(),
        "scaled_linear" => {
            (0..n).map(|i| (start.sqrt() + (end.sqrt() - start.sqrt()) * ramp(i)).powi(2)).collect()
        }
        "squaredcos_cap_v2" => {
            let bar = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
            (0..n)
                .map(|i| {
                    (1.0 - bar((i + 1) as f64 / n as f64) / bar(i as f64 / n as f64)).min(0.999)
                })
                .collect()
        }
        other => bail!(
            "scheduler_config.json: beta_schedule = {other:?} is not supported; \
             linear, scaled_linear and squaredcos_cap_v2 are"
        ),
    })
}

impl Ddim {
    /// Stable Diffusion 1.x: scaled-linear betas 0.00085..0.012 over 1000 steps, leading spacing,
    /// offset 1.
    pub fn stable_diffusion() -> Self {
        let config = serde_json::json!({
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "steps_offset": 1, "set_alpha_to_one": false, "clip_sample": false
        });
        Self::from_config(&config).expect("a constant config is valid")
    }

    /// Reads a `scheduler_config.json` of any diffusers scheduler for diffusion.
    ///
    /// # Errors
    /// Names the field whose value is of the wrong type or not supported.
    pub fn from_config(config: &Value) -> Result<Self> {
        let n = whole(config, "num_train_timesteps", 1000)?;
        ensure!(n > 0, "scheduler_config.json: num_train_timesteps = {n} must be positive");
        let mut product = 1.0;
        let mut alpha_bar: Vec<f64> = betas(config, n)?
            .iter()
            .map(|beta| {
                product *= 1.0 - beta;
                product
            })
            .collect();
        if flag(config, "rescale_betas_zero_snr", false)? {
            let root: Vec<f64> = alpha_bar.iter().map(|a| a.sqrt()).collect();
            let (first, last) = (root[0], root[n - 1]);
            alpha_bar =
                root.iter().map(|r| ((r - last) * first / (first - last)).powi(2)).collect();
        }
        if flag(config, "thresholding", false)? {
            bail!("scheduler_config.json: thresholding = true is not supported; set it to false");
        }
        let prediction = match config["prediction_type"].as_str().unwrap_or("epsilon") {
            "epsilon" => Prediction::Epsilon,
            "v_prediction" => Prediction::V,
            other => bail!(
                "scheduler_config.json: prediction_type = {other:?} is not supported; epsilon and \
                 v_prediction are"
            ),
        };
        let spacing = match config["timestep_spacing"].as_str().unwrap_or("leading") {
            "leading" => Spacing::Leading,
            "linspace" => Spacing::Linspace,
            "trailing" => Spacing::Trailing,
            other => bail!("scheduler_config.json: timestep_spacing = {other:?} is not supported"),
        };
        let clip = if flag(config, "clip_sample", true)? {
            number(config, "clip_sample_range", 1.0)?
        } else {
            f64::INFINITY
        };
        let final_alpha_bar =
            if flag(config, "set_alpha_to_one", true)? { 1.0 } else { alpha_bar[0] };
        let steps_offset = whole(config, "steps_offset", 0)?;
        ensure!(
            alpha_bar.iter().all(|bar| (0.0..=1.0).contains(bar)),
            "scheduler_config.json: beta_start, beta_end and trained_betas must give betas between \
             0 and 1"
        );
        Ok(Self { alpha_bar, prediction, final_alpha_bar, steps_offset, spacing, clip })
    }

    /// The timesteps of an `n`-step run, in sampling order.
    ///
    /// # Errors
    /// When `n` is 0 or larger than the grid allows.
    pub fn timesteps(&self, n: usize) -> Result<Vec<usize>> {
        let train = self.alpha_bar.len();
        ensure!(n >= 1 && n <= train, "--steps {n}: must lie between 1 and {train}");
        let even = |x: f64| x.round_ties_even() as usize;
        let steps: Vec<usize> = match self.spacing {
            Spacing::Leading => (0..n).rev().map(|i| i * (train / n) + self.steps_offset).collect(),
            Spacing::Linspace if n == 1 => vec![0],
            Spacing::Linspace => {
                (0..n).rev().map(|i| even(i as f64 * (train - 1) as f64 / (n - 1) as f64)).collect()
            }
            Spacing::Trailing => (0..n)
                .map(|i| even(train as f64 - i as f64 * train as f64 / n as f64) - 1)
                .collect(),
        };
        ensure!(
            steps[0] < train,
            "--steps {n}: the first timestep {} is past the schedule's {train}; use fewer",
            steps[0]
        );
        Ok(steps)
    }

    /// The `n` steps of a DDIM run at `eta`, with native weights.
    ///
    /// # Errors
    /// When `n` or `eta` is out of range.
    pub fn steps(&self, n: usize, eta: f64) -> Result<Vec<Step>> {
        ensure!(
            (0.0..=1.0).contains(&eta),
            "--eta {eta}: must lie between 0 (deterministic) and 1 (DDPM)"
        );
        let stride = self.alpha_bar.len() / n.max(1);
        let share = 1.0 / n as f64;
        let step = |(index, t)| Step { index, share, ..self.step(t, stride, eta) };
        Ok(self.timesteps(n)?.into_iter().enumerate().map(step).collect())
    }

    fn step(&self, t: usize, stride: usize, eta: f64) -> Step {
        let bar = self.alpha_bar[t];
        let prev = if t >= stride { self.alpha_bar[t - stride] } else { self.final_alpha_bar };
        let variance = (1.0 - prev) / (1.0 - bar) * (1.0 - bar / prev);
        self.with_sigma(t as f64, bar, prev, eta * variance.max(0.0).sqrt())
    }

    /// The step with another deviation, which the mean's coefficients follow; its place is for the
    /// caller to set.
    pub fn with_sigma(&self, t: f64, bar: f64, prev: f64, sigma: f64) -> Step {
        let (c1, c2) = (c1(bar, prev), c2(prev, sigma));
        // In v the mean stays finite where alpha_bar is 0 (zero terminal SNR); in eps it does not.
        let coefficients = |c2: f64| match self.prediction {
            Prediction::V => {
                let (signal, noise) = (bar.sqrt(), (1.0 - bar).sqrt());
                Mean { a: prev.sqrt() * signal + c2 * noise, b: prev.sqrt() * noise - c2 * signal }
            }
            Prediction::Epsilon | Prediction::Velocity => {
                Mean { a: (prev / bar).sqrt(), b: c1 - c2 }
            }
        };
        let (unit, x0_x, x0_p) = match self.prediction {
            Prediction::V => (bar.sqrt(), bar.sqrt(), (1.0 - bar).sqrt()),
            Prediction::Epsilon | Prediction::Velocity => {
                (1.0, 1.0 / bar.sqrt(), ((1.0 - bar) / bar).sqrt())
            }
        };
        let Mean { a, b } = coefficients(c2);
        let w = if sigma > 0.0 { (c1 - c2) / sigma } else { 0.0 };
        Step {
            index: 0,
            t,
            a,
            b,
            sigma,
            deterministic: coefficients(self::c2(prev, 0.0)),
            share: 1.0,
            w_native: w,
            w_total: w,
            weight: w,
            quadratic: 1.0,
            loss_weight: 1.0,
            row_weight: 1.0,
            unit,
            kind: StepKind::Diffusion {
                alpha_bar: bar,
                alpha_bar_prev: prev,
                x0_x,
                x0_p,
                clip: self.clip,
            },
        }
    }
}

/// sqrt(1 - abar) / sqrt(alpha), with the stride in alpha = abar / abar_prev.
pub(crate) fn c1(bar: f64, prev: f64) -> f64 {
    (1.0 - bar).sqrt() * (prev / bar).sqrt()
}

fn c2(prev: f64, sigma: f64) -> f64 {
    (1.0 - prev - sigma * sigma).max(0.0).sqrt()
}
