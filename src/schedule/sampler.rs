//! What the network predicts, how steps are drawn, and what a run asks of its schedule.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::grid::Grid;
use crate::choice::name;

/// What the network predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prediction {
    Epsilon,
    V,
    /// dx/dt of a flow model: noise minus image.
    Velocity,
}

/// What a network of diffusion predicts, in the words of diffusers' files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum PredictionType {
    Epsilon,
    VPrediction,
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
    /// What the published trainers of a family draw with.
    pub fn of_trainers(flow: bool) -> Self {
        if flow { Self::FlowGrpo } else { Self::Ddim }
    }

    /// What the pipelines of a family draw with.
    pub fn of_pipelines(flow: bool) -> Self {
        if flow { Self::Ode } else { Self::Ddim }
    }

    /// Those of flows, or of diffusion, in words.
    pub fn names(flow: bool) -> String {
        let own = Self::value_variants().iter().filter(|s| s.is_flow() == flow);
        own.map(|s| name(*s)).collect::<Vec<_>>().join(", ")
    }

    /// Steps of a pipeline that draws with it.
    pub fn pipeline_steps(self) -> usize {
        match self {
            Self::Ode => 28,
            Self::Ddim | Self::Dance | Self::FlowGrpo | Self::Cps => self.default_steps(),
        }
    }

    /// Whether it draws a flow's steps.
    pub fn is_flow(self) -> bool {
        match self {
            Self::Ddim => false,
            Self::Dance | Self::FlowGrpo | Self::Cps | Self::Ode => true,
        }
    }

    /// Whether its source writes the noise of a step per root of time, as SDEs have it.
    pub fn is_sde(self) -> bool {
        match self {
            Self::Dance | Self::FlowGrpo | Self::Ode => true,
            Self::Ddim | Self::Cps => false,
        }
    }

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
