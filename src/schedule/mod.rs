//! Samplers as numbers: host mathematics in f64, made once. Every sampler, of diffusion and of flow models, becomes a
//! list of [`Step`]s, Gaussian policies of one form. The sampler reads `a`, `b` and `sigma`, the objective reads
//! `weight`; neither knows which sampler or credit rule filled them in.

pub mod ddim;
pub mod flow;

use anyhow::{Result, bail, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::choice::name;

pub use ddim::Ddim;
pub use flow::{Flow, Grid};

/// What the network predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prediction {
    Epsilon,
    V,
    /// dx/dt of a flow model: noise minus image.
    Velocity,
}

/// How a step draws its successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sampler {
    /// Diffusion: DDIM with eta (Song et al. 2021).
    Ddim,
    /// Flow: the SDE with constant noise of DanceGRPO.
    Dance,
    /// Flow: the SDE with noise eta sqrt(t / (1 - t)) of Flow-GRPO.
    FlowGrpo,
    /// Flow: coefficients-preserving sampling, DDIM's way for flows (Flow-CPS).
    Cps,
    /// Flow: Euler's method without noise.
    Ode,
}

impl Sampler {
    /// The published number of steps.
    pub fn default_steps(self) -> usize {
        match self {
            Self::Ddim => 50,
            Self::Dance => 16,
            Self::FlowGrpo | Self::Cps | Self::Ode => 10,
        }
    }

    /// The published amount of noise.
    pub fn default_eta(self) -> f64 {
        match self {
            Self::Ddim => 1.0,
            Self::Dance => 0.3,
            Self::FlowGrpo | Self::Cps => 0.7,
            Self::Ode => 0.0,
        }
    }
}

/// What a run asks of its schedule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    pub sampler: Sampler,
    pub steps: usize,
    pub eta: f64,
    /// Flow: how the times are spaced.
    pub grid: Grid,
    /// Flow: in place of the scheduler's own shift.
    pub shift: Option<f64>,
    /// Tokens that the network makes of one latent: dynamic shifting depends on it.
    pub tokens: usize,
}

/// One sampler step t -> prev as a Gaussian policy over x_prev: mean = a x - b p, deviation sigma, where p is the
/// network's prediction (after guidance), be it eps, v or a velocity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Timestep as the network sees it, 0..1000.
    pub t: f64,
    /// Coefficients of the mean in x and (negated) in the prediction.
    pub a: f64,
    pub b: f64,
    /// Standard deviation of the noise that the step adds; 0 has no density and is never trained.
    pub sigma: f64,
    /// The same step without noise: its `a` and `b`.
    pub quiet: [f64; 2],
    /// Part of the trajectory that the step covers: 1/N in diffusion, dt in flow.
    pub share: f64,
    /// How strongly a change of the prediction moves log rho: METHOD section 3's (c1 - c2) / sigma in eps units for
    /// diffusion, b / sigma for flow.
    pub w_native: f64,
    /// What the step adds to the total credit: `w_native`, but for Flow-GRPO's first step.
    pub w_total: f64,
    /// The credit weight that takes the place of `w_native` in the objective, in the same units.
    pub weight: f64,
    /// Factor of the quadratic term of log rho: 1, and 0 for GRPO-Guard's normalised ratio.
    pub quadratic: f64,
    /// Factor of the step's loss.
    pub loss_weight: f64,
    /// d eps / d prediction: 1, or sqrt(alpha_bar) for v. Turns the weights' units into prediction units.
    pub unit: f64,
    pub family: Family,
}

/// What only one family's steps have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Family {
    Diffusion {
        /// Cumulative alpha at t and at the step's end.
        alpha_bar: f64,
        alpha_bar_prev: f64,
        /// x0 = x0_x x - x0_p p, which `clip_sample` clips to +-`clip`; infinite without clipping.
        x0_x: f64,
        x0_p: f64,
        clip: f64,
    },
    Flow {
        /// Time from 1 (noise) to 0 (image), and the step's length.
        t: f64,
        dt: f64,
    },
}

impl Step {
    /// Whether the step can be trained: it has a density and its mean is linear in the prediction.
    pub fn trainable(&self) -> bool {
        self.sigma > 0.0 && !self.clips()
    }

    /// Whether the scheduler clips x0, which makes the mean non-linear.
    pub fn clips(&self) -> bool {
        matches!(self.family, Family::Diffusion { clip, .. } if clip.is_finite())
    }

    /// The step as the deterministic sampler takes it.
    pub fn without_noise(&self) -> Self {
        let [a, b] = self.quiet;
        Self { a, b, sigma: 0.0, w_native: 0.0, w_total: 0.0, weight: 0.0, ..*self }
    }
}

/// A scheduler folder's numbers.
#[derive(Clone, Debug)]
pub enum Schedule {
    Ddim(Ddim),
    Flow(Flow),
}

impl Schedule {
    /// Reads a `scheduler_config.json` of any diffusers scheduler: FlowMatchEulerDiscreteScheduler's is a flow, the
    /// others give their betas to DDIM.
    ///
    /// # Errors
    /// Names the field whose value is of the wrong type or not supported.
    pub fn from_config(config: &Value) -> Result<Self> {
        let class = config["_class_name"].as_str().unwrap_or("DDIMScheduler");
        match class {
            "FlowMatchEulerDiscreteScheduler" => Ok(Self::Flow(Flow::from_config(config)?)),
            _ if class.starts_with("FlowMatch") => bail!(
                "scheduler_config.json: _class_name = {class:?} is not supported; FlowMatchEulerDiscreteScheduler is"
            ),
            _ => Ok(Self::Ddim(Ddim::from_config(config)?)),
        }
    }

    pub fn prediction(&self) -> Prediction {
        match self {
            Self::Ddim(ddim) => ddim.prediction,
            Self::Flow(_) => Prediction::Velocity,
        }
    }

    /// The sampler of the family's published trainers.
    pub fn default_sampler(&self) -> Sampler {
        match self {
            Self::Ddim(_) => Sampler::Ddim,
            Self::Flow(_) => Sampler::FlowGrpo,
        }
    }

    /// The steps of a run in sampling order, with native weights.
    ///
    /// # Errors
    /// When the sampler is of the other family, or a number is out of range.
    pub fn steps(&self, s: &Sampling) -> Result<Vec<Step>> {
        match self {
            Self::Ddim(ddim) => {
                ensure!(
                    s.sampler == Sampler::Ddim,
                    "--sampler {}: is for flow models, and this is a diffusion model; use ddim",
                    name(s.sampler)
                );
                ensure!(s.shift.is_none(), "--shift: is for flow models, and this is a diffusion model; leave it out");
                ddim.steps(s.steps, s.eta)
            }
            Self::Flow(flow) => {
                ensure!(
                    s.sampler != Sampler::Ddim,
                    "--sampler ddim: is for diffusion models, and this is a flow model; use flow-grpo, dance, cps or ode"
                );
                flow.steps(s)
            }
        }
    }
}

fn number(config: &Value, field: &str, default: f64) -> Result<f64> {
    match &config[field] {
        Value::Null => Ok(default),
        v => v.as_f64().ok_or_else(|| anyhow::anyhow!("scheduler_config.json: {field} = {v} is not a number")),
    }
}

fn flag(config: &Value, field: &str, default: bool) -> Result<bool> {
    match &config[field] {
        Value::Null => Ok(default),
        v => v.as_bool().ok_or_else(|| anyhow::anyhow!("scheduler_config.json: {field} = {v} is not true or false")),
    }
}
