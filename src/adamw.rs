//! AdamW (Loshchilov & Hutter 2019) on the host, as in PyTorch. The adapter is a few million values and lives on the
//! host between updates, where its state saves and resumes to the bit; Burn's optimizers work on its modules only.

/// Optimizer settings; PyTorch's names and defaults, but for the decay.
#[derive(Clone, Copy, Debug)]
pub struct Hyper {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

/// First and second moments of every parameter, and the number of steps taken.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    pub step: u64,
    pub m: Vec<Vec<f32>>,
    pub v: Vec<Vec<f32>>,
}

impl State {
    pub fn new(sizes: impl Iterator<Item = usize> + Clone) -> Self {
        Self { step: 0, m: sizes.clone().map(|n| vec![0.0; n]).collect(), v: sizes.map(|n| vec![0.0; n]).collect() }
    }

    /// One step over all parameters; `gradients` are already clipped.
    pub fn update(&mut self, h: &Hyper, parameters: Vec<&mut Vec<f32>>, gradients: &[Vec<f32>]) {
        self.step += 1;
        let (c1, c2) = (1.0 - h.beta1.powf(self.step as f64), 1.0 - h.beta2.powf(self.step as f64));
        for (i, p) in parameters.into_iter().enumerate() {
            for (j, p) in p.iter_mut().enumerate() {
                let g = f64::from(gradients[i][j]);
                let m = h.beta1 * f64::from(self.m[i][j]) + (1.0 - h.beta1) * g;
                let v = h.beta2 * f64::from(self.v[i][j]) + (1.0 - h.beta2) * g * g;
                (self.m[i][j], self.v[i][j]) = (m as f32, v as f32);
                let decayed = f64::from(*p) * (1.0 - h.lr * h.weight_decay);
                *p = (decayed - h.lr * (m / c1) / ((v / c2).sqrt() + h.eps)) as f32;
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
