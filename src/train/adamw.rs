//! AdamW (Loshchilov & Hutter 2019) on the host, as in PyTorch. The adapter is a few million values
//! and lives on the host between updates, where its state saves and resumes to the bit; Burn's
//! optimizers work on its modules only.

/// Optimizer settings; PyTorch's names and defaults, but for the decay.
#[derive(Clone, Copy, Debug)]
pub struct AdamWConfig {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

impl AdamWConfig {
    /// With PyTorch's betas and eps, which all four trainers keep.
    pub fn new(lr: f64, weight_decay: f64) -> Self {
        Self { lr, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay }
    }
}

/// First and second moments of every parameter, and the number of steps taken.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdamWState {
    pub step: u64,
    pub m: Vec<Vec<f32>>,
    pub v: Vec<Vec<f32>>,
}

impl AdamWState {
    /// Before the first step, for parameters of these sizes.
    pub fn new(sizes: impl Iterator<Item = usize>) -> Self {
        let m: Vec<Vec<f32>> = sizes.map(|n| vec![0.0; n]).collect();
        Self { step: 0, v: m.clone(), m }
    }

    /// One step over all parameters; `gradients` are already clipped.
    pub fn update<'a>(
        &mut self,
        c: &AdamWConfig,
        parameters: impl Iterator<Item = &'a mut Vec<f32>>,
        gradients: &[Vec<f32>],
    ) {
        self.step += 1;
        let steps = self.step as f64;
        let (c1, c2) = (1.0 - c.beta1.powf(steps), 1.0 - c.beta2.powf(steps));
        for (i, p) in parameters.enumerate() {
            for (j, p) in p.iter_mut().enumerate() {
                let g = f64::from(gradients[i][j]);
                let m = c.beta1 * f64::from(self.m[i][j]) + (1.0 - c.beta1) * g;
                let v = c.beta2 * f64::from(self.v[i][j]) + (1.0 - c.beta2) * g * g;
                (self.m[i][j], self.v[i][j]) = (m as f32, v as f32);
                let decayed = f64::from(*p) * (1.0 - c.lr * c.weight_decay);
                *p = (decayed - c.lr * (m / c1) / ((v / c2).sqrt() + c.eps)) as f32;
            }
        }
    }
}

/// Scales gradients to a norm of at most `max`; returns the norm before.
pub fn clip_norm(gradients: &mut [Vec<f32>], max: f64) -> f64 {
    let norm = gradients.iter().flatten().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
    if norm > max {
        let factor = (max / (norm + 1e-6)) as f32;
        gradients.iter_mut().flatten().for_each(|g| *g *= factor);
    }
    norm
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Case {
        lr: f64,
        weight_decay: f64,
        max_norm: f64,
        parameters: Vec<Vec<f32>>,
        /// Of each step, before clipping.
        gradients: Vec<Vec<Vec<f32>>>,
        norms: Vec<f64>,
        /// The parameters after each step, in f64.
        after: Vec<Vec<Vec<f64>>>,
    }

    #[test]
    fn adamw_and_the_norm_clip_are_pytorchs() {
        let golden = include_str!("../../tests/golden/adamw.json");
        let cases: Vec<Case> = serde_json::from_str(golden).unwrap();
        assert!(cases.len() >= 4, "regenerate with tests/golden/make_adamw.py?");
        let (mut moved, mut clipped) = (0, 0);
        for (n, case) in cases.into_iter().enumerate() {
            let Case { lr, weight_decay, max_norm, mut parameters, .. } = case;
            let config = AdamWConfig::new(lr, weight_decay);
            let mut state = AdamWState::new(parameters.iter().map(Vec::len));
            let start = parameters.clone();
            for (step, mut gradients) in case.gradients.into_iter().enumerate() {
                let norm = clip_norm(&mut gradients, max_norm);
                assert!((norm - case.norms[step]).abs() <= 1e-12 * norm, "case {n}: norm {norm}");
                clipped += usize::from(norm > max_norm);
                state.update(&config, parameters.iter_mut(), &gradients);
                let expected = case.after[step].iter().flatten();
                for (found, expected) in parameters.iter().flatten().zip(expected) {
                    let off = (f64::from(*found) - expected).abs();
                    assert!(off < 2e-6, "case {n}, step {step}: {found} is not {expected}");
                }
            }
            let far = |(a, b): (&f32, &f32)| (a - b).abs() > 1e-4;
            moved +=
                parameters.iter().flatten().zip(start.iter().flatten()).filter(|p| far(*p)).count();
        }
        assert!(moved > 10 && clipped > 0, "parameters move, and some norms are clipped");
    }
}
