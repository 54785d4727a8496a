//! `forward_objective`: objectives of the forward process. A final latent is noised anew to a time
//! t, and the policy's prediction there is compared with what leads back to it: no trajectory, no
//! log-probability, any sampler.
//!
//! ```text
//! x_t = s x0 + n z;   x0^ = c_x x_t - c_p p;   p* = (c_x x_t - x0) / c_p        flow: c_p = t
//!
//! NFT   p+ = b p + (1-b) p_old,  p- = (1+b) p_old - b p,  e+- = c_x x_t - c_p p+- - x0
//!       n+- = stopgrad max(mean|e+-|, 1e-5),  q = 1/2 + A / (2 c)
//!       L = c/b [q mean(e+^2)/n+ + (1-q) mean(e-^2)/n-] + beta mean (p - p_base)^2
//! AWM   log pi = -[(m + 1e-10)^g - (1e-10)^g] n/g,  m = mean (p - p*)^2,  g = 1/4
//!       L = max(-A rho, -A clip(rho, 1-xi, 1+xi)) + beta mean (p - p_base)^2 + mean (p - p_old)^2
//!       rho = exp(log pi - log pi of the policy that sampled),  A as a part of c
//! ```
//! c bounds the advantages. NFT: DiffusionNFT, arXiv 2509.16117; AWM: arXiv 2509.25050, whose time
//! t is a flow's n. The forms for diffusion are ours: neither is published for it. All is
//! elementwise but for a few means, so it is Burn's operations on every device; the gradient is
//! exact.

use burn::tensor::Tensor;

use super::policy_objective::STATS;
use crate::device::tensor::upload;
use crate::schedule::{Step, StepKind};

/// What is minimised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ForwardObjective {
    /// DiffusionNFT's, with the strength b of its mixture.
    Nft { beta: f32 },
    /// AWM's, with its clip range.
    Awm { clip_range: f32 },
}

/// The settings of the objective.
#[derive(Clone, Copy, Debug)]
pub struct ForwardSurrogate {
    pub objective: ForwardObjective,
    /// c: the bound of the advantages.
    pub clamp: f32,
    /// Weight of the distance to the base policy.
    pub kl_beta: f32,
    /// One over the (image, time) pairs of the update.
    pub scale: f32,
}

/// AWM's exponent.
const GAMMA: f32 = 0.25;
const TINY: f32 = 1e-10;
/// Least size of an error that NFT divides by.
const LEAST: f32 = 1e-5;

/// A time of the forward process, in units of the prediction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ForwardTime {
    /// x_t = signal x0 + noise z.
    pub signal: f32,
    pub noise: f32,
    /// The image that a prediction p means: x0_x x_t - x0_p p.
    pub x0_x: f32,
    pub x0_p: f32,
}

impl From<&Step> for ForwardTime {
    fn from(step: &Step) -> Self {
        match step.kind {
            StepKind::Flow { t, .. } => {
                let noise = t as f32;
                Self { signal: (1.0 - t) as f32, noise, x0_x: 1.0, x0_p: noise }
            }
            StepKind::Diffusion { alpha_bar, x0_x, x0_p, .. } => Self {
                signal: alpha_bar.sqrt() as f32,
                noise: (1.0 - alpha_bar).sqrt() as f32,
                x0_x: x0_x as f32,
                x0_p: x0_p as f32,
            },
        }
    }
}

impl ForwardTime {
    /// Latents at the time, `[B, C, H, W]`.
    pub fn noised(&self, x0: &Tensor<4>, z: &Tensor<4>) -> Tensor<4> {
        x0.clone() * self.signal + z.clone() * self.noise
    }
}

/// Predictions after guidance at a time, `[B, C, H, W]`.
#[derive(Clone, Copy)]
pub struct ForwardPredictions<'a> {
    pub now: &'a Tensor<4>,
    /// NFT: of the policy that samples. AWM: of the adapter's running mean.
    pub old: &'a Tensor<4>,
    /// AWM: of the policy that sampled the epoch, where it is not the one of now.
    pub sampled: Option<&'a Tensor<4>>,
    /// Of the network without its adapter.
    pub base: Option<&'a Tensor<4>>,
}

/// What the operation gives.
pub struct ForwardOutput {
    /// The gradient with respect to the prediction after guidance.
    pub gradient: Tensor<4>,
    /// A [`super::policy_objective::SampleStats`] of each sample, `[B, STATS]`: the log-ratio (of
    /// NFT none), the loss, what is clipped, 1/2 mean (p - p_old)^2, the distance to the base, and
    /// how strongly the sample pushes.
    pub stats: Tensor<2>,
}

/// Loss, statistics and gradient of a batch at a time, of latents `x` that are `x0` noised.
pub fn forward_objective(
    surrogate: &ForwardSurrogate,
    time: &ForwardTime,
    x: &Tensor<4>,
    x0: &Tensor<4>,
    p: &ForwardPredictions,
    advantage: &[f32],
) -> ForwardOutput {
    let shape = x.dims();
    let dim = shape[1..].iter().product::<usize>() as f32;
    let share: Vec<f32> = advantage.iter().map(|a| a / surrogate.clamp).collect();
    let share = upload(&share, [shape[0], 1, 1, 1], &x.device());
    // x_t's part of an image, less the image.
    let rest = x.clone() * time.x0_x - x0.clone();
    let done = match surrogate.objective {
        ForwardObjective::Nft { beta } => nft(surrogate.clamp, beta, time, rest, p, share),
        ForwardObjective::Awm { clip_range } => awm(clip_range, time, rest, p, share),
    };
    let Parts { mut gradient, mut loss, log_rho, clipped, push } = done;
    let away = p.now.clone() - p.old.clone();
    let from_old = mean(away.clone() * away.clone());
    if let ForwardObjective::Awm { .. } = surrogate.objective {
        gradient = gradient + away * 2.0;
        loss = loss + from_old.clone();
    }
    let zero = loss.clone() * 0.0;
    let mut kl = zero;
    if let Some(base) = p.base {
        let away = p.now.clone() - base.clone();
        kl = mean(away.clone() * away.clone());
        gradient = gradient + away * (2.0 * surrogate.kl_beta);
        loss = loss + kl.clone() * surrogate.kl_beta;
    }
    let columns = [log_rho, loss, clipped, from_old * 0.5, kl, push];
    debug_assert_eq!(columns.len(), STATS);
    let columns = columns.map(|column| column.reshape([shape[0], 1])).into();
    ForwardOutput { gradient: gradient * (surrogate.scale / dim), stats: Tensor::cat(columns, 1) }
}

/// An objective's own part, before scale; rows are `[B, 1, 1, 1]`, the gradient is times D.
struct Parts {
    gradient: Tensor<4>,
    loss: Tensor<4>,
    log_rho: Tensor<4>,
    clipped: Tensor<4>,
    push: Tensor<4>,
}

/// Mean of each row, `[B, 1, 1, 1]`.
fn mean(values: Tensor<4>) -> Tensor<4> {
    values.mean_dim(1).mean_dim(2).mean_dim(3)
}

fn nft(
    clamp: f32,
    beta: f32,
    time: &ForwardTime,
    rest: Tensor<4>,
    p: &ForwardPredictions,
    share: Tensor<4>,
) -> Parts {
    let moved = (p.now.clone() - p.old.clone()) * beta;
    // The error of the prediction that goes a part b of the way, and of its mirror image.
    let error = |mixed: Tensor<4>| {
        let e = rest.clone() - mixed * time.x0_p;
        let size = mean(e.clone().abs()).clamp_min(LEAST);
        (e.clone() / size.clone(), mean(e.clone() * e) / size)
    };
    let (toward, toward_loss) = error(p.old.clone() + moved.clone());
    let (away, away_loss) = error(p.old.clone() - moved);
    let q = share.clone() * 0.5 + 0.5;
    let other = share.clone() * -0.5 + 0.5;
    let gradient = (away * other.clone() - toward * q.clone()) * (2.0 * clamp * time.x0_p);
    let loss = (toward_loss * q + away_loss * other) * (clamp / beta);
    let zero = share.clone() * 0.0;
    Parts { gradient, loss, log_rho: zero.clone(), clipped: zero, push: share.abs() * clamp }
}

fn awm(
    clip_range: f32,
    time: &ForwardTime,
    rest: Tensor<4>,
    p: &ForwardPredictions,
    share: Tensor<4>,
) -> Parts {
    let target = rest / time.x0_p;
    let log_prob = |prediction: &Tensor<4>| {
        let off = prediction.clone() - target.clone();
        let m = mean(off.clone() * off.clone()) + TINY;
        let log_prob = (m.clone().powf_scalar(GAMMA) - TINY.powf(GAMMA)) * (-time.noise / GAMMA);
        (log_prob, off, m)
    };
    let (now, off, m) = log_prob(p.now);
    let log_rho = match p.sampled {
        Some(sampled) => now.clone() - log_prob(sampled).0,
        None => now.clone() * 0.0,
    };
    let rho = log_rho.clone().exp();
    let bounded = rho.clone().clamp(1.0 - clip_range, 1.0 + clip_range);
    let (free, held) = (rho.clone() * share.clone() * -1.0, bounded.clone() * share.clone() * -1.0);
    // Where the bounded one is larger it is a constant: beyond the range, on the good side.
    let stopped = held.clone().greater(free.clone());
    let slope = free.clone().mask_fill(stopped.clone(), 0.0);
    let loss = free.max_pair(held);
    let by_m = m.powf_scalar(GAMMA - 1.0) * (-time.noise);
    let gradient = off * (slope.clone() * by_m * 2.0);
    let clipped = bounded.not_equal(rho).float();
    Parts { gradient, loss, log_rho, clipped, push: slope.abs() }
}
