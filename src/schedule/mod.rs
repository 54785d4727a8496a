//! Samplers as numbers: host mathematics in f64, made once. Every sampler, of diffusion and of flow
//! models, becomes a list of [`Step`]s, Gaussian policies of one form. The sampler reads `a`, `b`
//! and `sigma`, the objective reads `weight`; neither knows which sampler or credit rule filled
//! them in.

pub mod credit;
pub mod ddim;
mod fields;
pub mod flow;
mod grid;
mod sampler;
mod step;

use anyhow::{Result, bail, ensure};
use serde_json::Value;

pub use self::ddim::Ddim;
pub use self::flow::Flow;
pub use self::grid::Grid;
pub use self::sampler::{Prediction, PredictionType, Sampler, Sampling};
pub use self::step::{Mean, Step, StepKind};
use crate::choice::name;

/// A scheduler folder's numbers.
#[derive(Clone, Debug)]
pub enum Schedule {
    Ddim(Ddim),
    Flow(Flow),
}

impl Schedule {
    /// Reads a `scheduler_config.json` of any diffusers scheduler:
    /// FlowMatchEulerDiscreteScheduler's is a flow, the others give their betas to DDIM.
    ///
    /// # Errors
    /// Names the field whose value is of the wrong type or not supported.
    pub fn from_config(config: &Value) -> Result<Self> {
        let class = config["_class_name"].as_str().unwrap_or("DDIMScheduler");
        match class {
            "FlowMatchEulerDiscreteScheduler" => Ok(Self::Flow(Flow::from_config(config)?)),
            _ if class.starts_with("FlowMatch") => bail!(
                "scheduler_config.json: _class_name = {class:?} is not supported; \
                 FlowMatchEulerDiscreteScheduler is"
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

    /// The steps of a run in sampling order, with native weights.
    ///
    /// # Errors
    /// When the sampler is of the other family, or a number is out of range.
    pub fn steps(&self, s: &Sampling) -> Result<Vec<Step>> {
        use Sampler::{Cps, Dance, FlowGrpo, Ode};
        let steps = match (self, s.sampler) {
            (Self::Ddim(ddim), Sampler::Ddim) => {
                ensure!(
                    s.shift.is_none(),
                    "--shift: is for flow models, and this is a diffusion model; leave it out"
                );
                ddim.steps(s.steps, s.eta)?
            }
            (Self::Flow(flow), FlowGrpo | Dance | Cps | Ode) => flow.steps(s)?,
            (Self::Ddim(_), FlowGrpo | Dance | Cps | Ode) => bail!(
                "--sampler {}: is for flow models, and this is a diffusion model; use {}",
                name(s.sampler),
                Sampler::names(false)
            ),
            (Self::Flow(_), Sampler::Ddim) => bail!(
                "--sampler {}: is for diffusion models, and this is a flow model; use {}",
                name(s.sampler),
                Sampler::names(true)
            ),
        };
        // Kernels compute in f32: an extreme --eta or --shift must not reach them as an infinity.
        let fits = |v: f64| (v as f32).is_finite();
        ensure!(
            steps.iter().all(|s| [s.t, s.a, s.b, s.sigma, s.deterministic.b].into_iter().all(fits)),
            "--eta {}: leads to steps that are not finite with this --shift; use values nearer to \
             the sampler's defaults",
            s.eta
        );
        Ok(steps)
    }
}
