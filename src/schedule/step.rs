//! One step of a sampler as a Gaussian policy, whatever the sampler.

/// One sampler step t -> prev as a Gaussian policy over x_prev: mean = a x - b p, deviation sigma,
/// where p is the network's prediction (after guidance), be it eps, v or a velocity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Its place in the schedule, which its noise is keyed by.
    pub index: usize,
    /// Timestep as the network sees it, 0..1000.
    pub t: f64,
    /// Coefficients of the mean in x and (negated) in the prediction.
    pub a: f64,
    pub b: f64,
    /// Standard deviation of the noise that the step adds; 0 has no density and is never trained.
    pub sigma: f64,
    /// The mean of the same step without noise.
    pub deterministic: Mean,
    /// Part of the trajectory that the step covers: 1/N in diffusion, dt in flow.
    pub share: f64,
    /// How strongly a change of the prediction moves log rho: docs/METHOD.md section 3's
    /// (c1 - c2) / sigma in eps units for diffusion, b / sigma for flow.
    pub w_native: f64,
    /// What the step adds to the total credit: `w_native`, but for Flow-GRPO's first step.
    pub w_total: f64,
    /// The credit weight that takes the place of `w_native` in the objective, in the same units.
    pub weight: f64,
    /// Factor of the quadratic term of log rho: 1, 0 for GRPO-Guard's normalised ratio, and 1 / f
    /// where log rho is multiplied by f.
    pub quadratic: f64,
    /// Factor of the step's loss.
    pub loss_weight: f64,
    /// Factor of all that a row of the step adds to an update, its KL too: 1, but where steps have
    /// different numbers of rows.
    pub row_weight: f64,
    /// d eps / d prediction: 1, or sqrt(alpha_bar) for v. Turns the weights' units into prediction
    /// units.
    pub unit: f64,
    pub kind: StepKind,
}

/// A mean that is linear in the latent and the prediction: a x - b p.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mean {
    pub a: f64,
    pub b: f64,
}

/// What only diffusion's or only a flow's steps have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum StepKind {
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

    /// Whether an image can be noised to the step's time and found again from a prediction there.
    pub fn can_be_noised_to(&self) -> bool {
        match self.kind {
            StepKind::Diffusion { alpha_bar, x0_x, x0_p, .. } => {
                alpha_bar < 1.0 && (x0_x as f32).is_finite() && (x0_p as f32).is_finite()
            }
            StepKind::Flow { t, .. } => t > 0.0,
        }
    }

    /// The step as an objective of the forward process takes it: without noise, weighing as much as
    /// its prediction moves the image that is found.
    pub fn of_forward_process(&self) -> Self {
        let weight = match self.kind {
            StepKind::Diffusion { x0_p, .. } => x0_p,
            StepKind::Flow { t, .. } => t,
        };
        Self { weight, w_native: weight, ..self.without_noise() }
    }

    /// Whether the scheduler clips x0, which makes the mean non-linear.
    pub fn clips(&self) -> bool {
        matches!(self.kind, StepKind::Diffusion { clip, .. } if clip.is_finite())
    }

    /// Puts `factor` log rho, of the native weight, in the place of log rho: the quadratic term
    /// grows with the weight's square, and is held back.
    pub(super) fn scale_ratio(&mut self, factor: f64) {
        (self.weight, self.quadratic) = (factor * self.w_native, 1.0 / factor);
    }

    /// The step as the deterministic sampler takes it.
    pub fn without_noise(&self) -> Self {
        let Mean { a, b } = self.deterministic;
        Self { a, b, sigma: 0.0, w_native: 0.0, w_total: 0.0, weight: 0.0, ..*self }
    }
}
