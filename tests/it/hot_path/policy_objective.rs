//! `policy_objective`: all objectives, with and without guidance and KL.

use clap::ValueEnum;
use pcpo_wgpu::device::Compute;
use pcpo_wgpu::device::tensor::read;
use pcpo_wgpu::ops::log_ratio::{self, HostPredictions, Predictions};
use pcpo_wgpu::ops::policy_objective::{
    self, Entry, GuidanceGradient, Objective, Surrogate, policy_objective,
};
use pcpo_wgpu::ops::{Coefficients, Guidance, StepContext};
use pcpo_wgpu::schedule::Sampler;
use pcpo_wgpu::schedule::credit::Credit;

use super::{SHAPES, coefficients, context, draw, error, flow_steps, noise_of, tensor};
use crate::support::gpu;

fn surrogate(objective: Objective, gradient: GuidanceGradient, beta: f32) -> Surrogate {
    Surrogate { objective, clip_range: 1e-3, beta, guidance_gradient: gradient, scale: 0.125 }
}

/// Every kind of coefficients that the objective sees: diffusion, a flow, and GRPO-Guard, whose
/// ratio has no quadratic term and whose loss is weighted.
fn objective_coefficients() -> [Coefficients; 3] {
    let guard = flow_steps(Sampler::FlowGrpo, Credit::Guard)[4];
    // Its weight 1 / dt is near 20: within the range of the others, so that one tolerance fits.
    [
        coefficients(Credit::Proportionate, false),
        Coefficients::from(&flow_steps(Sampler::FlowGrpo, Credit::Proportionate)[4]),
        Coefficients::from(&guard),
    ]
}

/// What policies say of a batch.
struct Moved {
    out: Vec<f32>,
    old: Vec<f32>,
    base: Vec<f32>,
}

/// A policy that has moved: its output, the old prediction `delta` away from it, the base's output.
fn policy(n: usize, guidance: Guidance, delta: f32) -> Moved {
    let out = draw(1, n * guidance.rows());
    let combined: Vec<f32> = match guidance {
        Guidance::Off => out.clone(),
        Guidance::Scale(g) => (0..n).map(|i| out[i] + g * (out[i + n] - out[i])).collect(),
    };
    let old = combined.iter().zip(draw(2, n)).map(|(p, d)| p + delta * d).collect();
    let base = out.iter().zip(draw(4, out.len())).map(|(p, d)| p + 0.1 * d).collect();
    Moved { out, old, base }
}

#[test]
fn policy_objective_matches_its_reference() {
    let gpu = gpu();
    for (shape, c) in SHAPES.into_iter().flat_map(|s| objective_coefficients().map(|c| (s, c))) {
        let advantage: Vec<f32> =
            (0..shape[0]).map(|i| [1.5, -0.7, 0.0, 2.5, -5.0][i % 5]).collect();
        for &objective in Objective::value_variants() {
            for (guidance, which, beta) in [
                (Guidance::Off, GuidanceGradient::Both, 0.0),
                (Guidance::Scale(5.0), GuidanceGradient::Both, 0.04),
                (Guidance::Scale(5.0), GuidanceGradient::Conditional, 0.0),
            ] {
                let s = surrogate(objective, which, beta);
                matches_its_reference(&context(&gpu, guidance, c), shape, &s, &advantage);
            }
        }
    }
}

/// Shader, CPU reference and f64 at one shape.
fn matches_its_reference(
    s: &StepContext,
    shape: [usize; 4],
    surrogate: &Surrogate,
    advantage: &[f32],
) {
    let (n, what) = (shape.iter().product::<usize>(), surrogate.objective);
    let Moved { out, old, base } = policy(n, s.guidance, 1e-2);
    let noise = noise_of(shape[0], n / shape[0]);
    let with = (surrogate.beta > 0.0).then_some(&base[..]);
    let p = HostPredictions { model_out: &out, old: &old, base: with };
    let rows = log_ratio::reference(s, &p, &noise, shape[0]);
    let expected = policy_objective::reference(s, surrogate, &p, &noise, &rows, advantage);
    let wide = [shape[0] * s.guidance.rows(), shape[1], shape[2], shape[3]];
    let (device_out, device_old) = (tensor(s.compute, &out, wide), tensor(s.compute, &old, shape));
    let base = with.map(|b| tensor(s.compute, b, wide));
    let device = Predictions { model_out: &device_out, old: &device_old, base: base.as_ref() };
    let found = policy_objective(s, surrogate, &device, advantage);
    let (gradient, stats) = (read(&found.gradient).unwrap(), read(&found.stats).unwrap());
    let off = error(&gradient, &expected.gradient);
    assert!(off < 1e-5, "{what:?} {shape:?}: gradient {off:e}");
    let on_host: &[f32] = bytemuck::cast_slice(&expected.stats);
    assert!(error(&stats, on_host) < 1e-5, "{what:?} {shape:?}: statistics");
    let exact = gradient_f64(surrogate, &p, advantage, s.guidance, &s.coefficients);
    for (path, found) in [("shader", &gradient), ("reference", &expected.gradient)] {
        let off = error(found, &exact);
        assert!(off < 1e-5, "{path} of {what:?} {shape:?}: {off:e} off the gradient in f64");
    }
}

/// The step's noise is drawn once and handed on: the gradient follows what it is given.
#[test]
fn the_reference_takes_its_noise() {
    let (n, cpu) = (12, Compute::cpu());
    let c = coefficients(Credit::Native, false);
    let Moved { out, old, .. } = policy(n, Guidance::Off, 0.02);
    let (s, context) = (
        surrogate(Objective::LogHinge, GuidanceGradient::Both, 0.0),
        context(&cpu, Guidance::Off, c),
    );
    let p = HostPredictions { model_out: &out, old: &old, base: None };
    let none = vec![0.0; n];
    let rows = log_ratio::reference(&context, &p, &none, 1);
    let found = policy_objective::reference(&context, &s, &p, &none, &rows, &[-1.0]).gradient;
    let exact: Vec<f32> =
        out.iter().zip(&old).map(|(p, old)| -s.scale * c.w * c.w * (p - old) / n as f32).collect();
    assert!(error(&found, &exact) < 1e-6, "{found:?} is not {exact:?}");
}

#[test]
fn policy_objective_gradient_is_that_of_central_differences() {
    let (batch, n, cpu) = (6, 6 * 10, Compute::cpu());
    // Advantages of both signs against log rho of both signs: free and clipped entries.
    let advantage = [1.0, -1.0, 2.0, -2.0, 0.5, 0.0];
    let mut clipped = 0;
    for (objective, c) in
        Objective::value_variants().iter().flat_map(|&o| objective_coefficients().map(|c| (o, c)))
    {
        for guidance in [Guidance::Off, Guidance::Scale(3.0)] {
            let s = surrogate(objective, GuidanceGradient::Both, 0.05);
            let Moved { out, old, base: frozen } = policy(n, guidance, 0.02);
            let context = context(&cpu, guidance, c);
            let p = HostPredictions { model_out: &out, old: &old, base: Some(&frozen) };
            let noise = noise_of(batch, n / batch);
            let rows = log_ratio::reference(&context, &p, &noise, batch);
            let found = policy_objective::reference(&context, &s, &p, &noise, &rows, &advantage);
            clipped += found.stats.iter().filter(|r| r.clipped == 1.0).count();
            let gradient = found.gradient;
            let loss = |values: &[f64]| loss_f64(&s, values, &p, &advantage, guidance, &c);
            let base: Vec<f64> = out.iter().map(|&v| f64::from(v)).collect();
            let numeric: Vec<f32> = (0..out.len())
                .map(|i| {
                    let h = 1e-6;
                    let at = |d: f64| {
                        let mut moved = base.clone();
                        moved[i] += d;
                        loss(&moved)
                    };
                    ((at(h) - at(-h)) / (2.0 * h)) as f32
                })
                .collect();
            assert!(
                error(&gradient, &numeric) < 1e-4,
                "{objective:?} {guidance:?}: {:e}",
                error(&gradient, &numeric)
            );
        }
    }
    assert!(clipped > 0, "some entries are clipped");
}

/// The objective written again, from docs/METHOD.md, sections 3, 4 and 8, in f64.
fn loss_f64(
    s: &Surrogate,
    out: &[f64],
    p: &HostPredictions,
    advantage: &[f32],
    guidance: Guidance,
    c: &Coefficients,
) -> f64 {
    let (old, n) = (p.old, p.old.len());
    let frozen = p.base.unwrap();
    let dim = n / advantage.len();
    let z = noise_of(advantage.len(), dim);
    let combine = |v: &dyn Fn(usize) -> f64, i: usize| match guidance {
        Guidance::Off => v(i),
        Guidance::Scale(g) => v(i) + f64::from(g) * (v(i + n) - v(i)),
    };
    let (w, wn, xi) = (f64::from(c.w), f64::from(c.w_native), f64::from(s.clip_range));
    let mut total = 0.0;
    for (b, &a) in advantage.iter().enumerate() {
        let (mut lr, mut kl) = (0.0, 0.0);
        for i in b * dim..(b + 1) * dim {
            let p = combine(&|j| out[j], i);
            let d = p - f64::from(old[i]);
            lr -= (w * d * f64::from(z[i]) + 0.5 * f64::from(c.quadratic) * w * w * d * d)
                / dim as f64;
            kl += 0.5 * (wn * (p - combine(&|j| f64::from(frozen[j]), i))).powi(2) / dim as f64;
        }
        let a = f64::from(a);
        let policy = match s.objective {
            Objective::PpoClip => (-a * lr.exp()).max(-a * lr.exp().clamp(1.0 - xi, 1.0 + xi)),
            Objective::LogRatio => (-a * (1.0 + lr)).max(-a * (1.0 + lr).clamp(1.0 - xi, 1.0 + xi)),
            Objective::LogHinge => (xi * a.abs() - a * lr).max(0.0),
        };
        total += f64::from(c.loss_weight) * policy + f64::from(s.beta) * kl;
    }
    total * f64::from(s.scale)
}

/// Its gradient with respect to the network's output, in f64.
fn gradient_f64(
    s: &Surrogate,
    p: &HostPredictions,
    advantage: &[f32],
    guidance: Guidance,
    c: &Coefficients,
) -> Vec<f32> {
    let HostPredictions { model_out: out, old, base: frozen } = *p;
    let (n, dim) = (old.len(), old.len() / advantage.len());
    let z = noise_of(advantage.len(), dim);
    let combine = |v: &[f32], i: usize| match guidance {
        Guidance::Off => f64::from(v[i]),
        Guidance::Scale(g) => {
            f64::from(v[i]) + f64::from(g) * (f64::from(v[i + n]) - f64::from(v[i]))
        }
    };
    let (w, wn, xi, q) =
        (f64::from(c.w), f64::from(c.w_native), f64::from(s.clip_range), f64::from(c.quadratic));
    let mut gradient = vec![0f32; out.len()];
    for (b, &a) in advantage.iter().enumerate() {
        let rows = b * dim..(b + 1) * dim;
        let wd = |i: usize| w * (combine(out, i) - f64::from(old[i]));
        let sum: f64 =
            rows.clone().map(|i| wd(i) * f64::from(z[i]) + 0.5 * q * wd(i).powi(2)).sum();
        let (lr, a) = (-sum / dim as f64, f64::from(a));
        let bounded = |rho: f64| (a > 0.0 && rho > 1.0 + xi) || (a < 0.0 && rho < 1.0 - xi);
        let slope = match s.objective {
            Objective::PpoClip => {
                if bounded(lr.exp()) {
                    0.0
                } else {
                    -a * lr.exp()
                }
            }
            Objective::LogRatio => {
                if bounded(1.0 + lr) {
                    0.0
                } else {
                    -a
                }
            }
            Objective::LogHinge => {
                if xi * a.abs() - a * lr > 0.0 {
                    -a
                } else {
                    0.0
                }
            }
        };
        for i in rows {
            let policy = -slope * f64::from(c.loss_weight) * w * (f64::from(z[i]) + q * wd(i));
            let kl = frozen
                .map_or(0.0, |f| f64::from(s.beta) * wn * wn * (combine(out, i) - combine(f, i)));
            let g = (policy + kl) * f64::from(s.scale) / dim as f64;
            let through = if s.guidance_gradient == GuidanceGradient::Both { 1.0 } else { 0.0 };
            match guidance {
                Guidance::Off => gradient[i] = g as f32,
                Guidance::Scale(scale) => {
                    gradient[i] = (through * (1.0 - f64::from(scale)) * g) as f32;
                    gradient[i + n] = (f64::from(scale) * g) as f32;
                }
            }
        }
    }
    gradient
}

#[test]
fn log_hinge_counts_no_clip_at_zero_advantage() {
    let s = surrogate(Objective::LogHinge, GuidanceGradient::Both, 0.0);
    assert_eq!(s.entry(0.5, 0.0), Entry { loss: 0.0, slope: 0.0, clipped: false });
    assert!(
        s.entry(2e-3, 1.0).clipped && !s.entry(5e-4, 1.0).clipped && s.entry(-2e-3, -1.0).clipped
    );
}
