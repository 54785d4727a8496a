//! Which dumps tests/golden/update holds, and what each is of.

use std::path::PathBuf;

use pcpo_wgpu::ops::policy_objective::{GuidanceGradient, Objective};
use pcpo_wgpu::schedule::credit::Credit;
use pcpo_wgpu::schedule::{Grid, Sampler, Sampling};

use crate::support::{emoji, golden};

/// A dump, the model that it is of, and the settings that its file does not hold.
#[derive(Clone)]
pub struct Case {
    pub name: &'static str,
    pub model: PathBuf,
    pub objective: Objective,
    pub beta: f32,
    pub guidance: f64,
    pub gradient: GuidanceGradient,
    pub sampling: Sampling,
    pub credit: Credit,
}

pub fn cases() -> [Case; 10] {
    let ddim = |name, objective, beta, credit| Case {
        name,
        model: emoji(),
        objective,
        beta,
        guidance: 3.0,
        gradient: GuidanceGradient::Both,
        sampling: Sampling {
            sampler: Sampler::Ddim,
            steps: 8,
            eta: 1.0,
            grid: Grid::Shifted,
            shift: None,
            tokens: 0,
        },
        credit,
    };
    let flow = |name, model, objective, beta, credit, sampler: Sampler| Case {
        name,
        model: golden(model),
        objective,
        beta,
        guidance: match model {
            "sd3" => 4.5,
            "flux-dev" => 3.5,
            "flux2-klein" => 4.0,
            _ => 5.0,
        },
        gradient: GuidanceGradient::Both,
        sampling: Sampling {
            sampler,
            steps: 6,
            eta: sampler.default_eta(),
            grid: Grid::Shifted,
            // FLUX's golden folder shifts by the number of tokens, 64 at 32 pixels.
            shift: None,
            tokens: if model == "flux2-klein" { 24 } else { 16 },
        },
        credit,
    };
    [
        ddim("ppo", Objective::PpoClip, 0.0, Credit::Native),
        ddim("hinge", Objective::LogHinge, 0.05, Credit::Proportionate),
        Case { guidance: 1.0, ..ddim("native", Objective::LogHinge, 0.0, Credit::Native) },
        Case {
            gradient: GuidanceGradient::Conditional,
            ..ddim("conditional", Objective::LogHinge, 0.05, Credit::Proportionate)
        },
        flow(
            "sd3-hinge",
            "sd3",
            Objective::LogHinge,
            0.05,
            Credit::Proportionate,
            Sampler::FlowGrpo,
        ),
        flow("flux-guard", "flux-dev", Objective::PpoClip, 0.0, Credit::Guard, Sampler::Dance),
        Case {
            model: golden("sdxl"),
            ..ddim("sdxl-hinge", Objective::LogHinge, 0.05, Credit::Proportionate).of_steps(6)
        },
        flow(
            "z-image",
            "z-image",
            Objective::LogHinge,
            0.05,
            Credit::Proportionate,
            Sampler::FlowGrpo,
        ),
        flow(
            "flux2",
            "flux2-klein",
            Objective::LogHinge,
            0.05,
            Credit::Proportionate,
            Sampler::FlowGrpo,
        ),
        // An adapter of convolutions.
        Case {
            model: golden("sdxl"),
            ..ddim("sdxl-conv", Objective::LogHinge, 0.05, Credit::Proportionate).of_steps(6)
        },
    ]
}

impl Case {
    fn of_steps(mut self, steps: usize) -> Self {
        self.sampling.steps = steps;
        self
    }
}
