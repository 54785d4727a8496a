//! The hot path's mathematics as plain Burn tensor operations: what one would write without
//! shaders. Benchmarks compare against it on the same device. The update is given its noise ready
//! made, as a trainer would have stored it.

use burn::tensor::{Distribution, Tensor};

use super::context::{Coefficients, Guidance};
use super::policy_objective::{Objective, Surrogate};
use super::sampler_step::Stepped;

fn sample_mean(x: Tensor<4>) -> Tensor<1> {
    let b = x.dims()[0];
    x.reshape([b as i32, -1]).mean_dim(1).reshape([b])
}

/// See [`super::sampler_step`]. `z` is ready-made noise; without it Burn draws its own.
pub fn sampler_step(
    x: &Tensor<4>,
    out: &Tensor<4>,
    z: Option<&Tensor<4>>,
    guidance: Guidance,
    c: &Coefficients,
) -> Stepped {
    let p = guidance.prediction(out);
    let mean = x.clone() * c.a - p.clone() * c.b;
    let z = z.cloned().unwrap_or_else(|| x.random_like(Distribution::Normal(0.0, 1.0)));
    let x_prev = mean.clone() + z * c.sigma;
    let squares = (x_prev.clone() - mean).square() / (-2.0 * c.sigma * c.sigma);
    Stepped { x_prev, prediction: p, log_prob: sample_mean(squares) - c.log_norm }
}

/// See [`super::credit_reduce`]: `[S, 7]` of statistics `[S, N, STATS]` and weights `[S]`.
pub fn credit_reduce(stats: &Tensor<3>, weights: &Tensor<1>) -> Tensor<2> {
    let [steps, _, columns] = stats.dims();
    let means = stats.clone().mean_dim(1);
    let first = |t: Tensor<3>| t.narrow(2, 0, 1);
    let spread = (first(stats.clone()) - first(means.clone())).square().mean_dim(1).sqrt();
    let means = means.reshape([steps, columns]);
    let column = |i: usize, n: usize| means.clone().narrow(1, i, n);
    let push = column(5, 1) * weights.clone().reshape([steps, 1]);
    Tensor::cat(vec![column(0, 1), spread.reshape([steps, 1]), column(1, 4), push], 1)
}

/// See [`super::log_ratio`]: log rho `[B]`.
pub fn log_ratio(
    out: &Tensor<4>,
    old: &Tensor<4>,
    z: &Tensor<4>,
    guidance: Guidance,
    c: &Coefficients,
) -> Tensor<1> {
    let wd = (guidance.prediction(out) - old.clone()) * c.w;
    -sample_mean(wd.clone() * z.clone() + wd.square() * 0.5)
}

/// The slope of -A rho in log rho, which is `slope` of the free loss where it is not clipped on its
/// side, and 0 elsewhere.
fn clipped(
    rho: Tensor<1>,
    advantage: &Tensor<1>,
    xi: f32,
    slope: impl Fn(Tensor<1>) -> Tensor<1>,
) -> Tensor<1> {
    let free = -advantage.clone() * rho.clone();
    let bound = -advantage.clone() * rho.clamp(1.0 - xi, 1.0 + xi);
    let active = free.clone().greater_equal(bound).float();
    slope(free) * active
}

/// See [`super::policy_objective`], without KL: the gradient with respect to `out`.
pub fn policy_objective(
    s: &Surrogate,
    out: &Tensor<4>,
    old: &Tensor<4>,
    z: &Tensor<4>,
    advantage: &Tensor<1>,
    guidance: Guidance,
    c: &Coefficients,
) -> Tensor<4> {
    let lr = log_ratio(out, old, z, guidance, c);
    let push = match s.objective {
        Objective::LogHinge => {
            let h = advantage.clone().abs() * s.clip_range - advantage.clone() * lr;
            let active = h.greater_elem(0.0).float();
            -advantage.clone() * active
        }
        Objective::PpoClip => clipped(lr.exp(), advantage, s.clip_range, |free| free),
        Objective::LogRatio => clipped(lr + 1.0, advantage, s.clip_range, |_| -advantage.clone()),
    };
    let dim = old.dims()[1..].iter().product::<usize>() as f32;
    let d = guidance.prediction(out) - old.clone();
    let b = push.dims()[0];
    let g = (z.clone() * c.w + d * (c.w * c.w)) * push.reshape([b, 1, 1, 1]) * (-s.scale / dim);
    guidance.gradient(g, s.guidance_gradient.through_uncond())
}
