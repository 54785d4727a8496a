//! `flow_step`, with its second pass step_log_prob.

use pcpo_wgpu::device::Compute;
use pcpo_wgpu::device::tensor::read;
use pcpo_wgpu::ops::flow_step::{self, flow_step};
use pcpo_wgpu::ops::{Coefficients, Guidance};
use pcpo_wgpu::philox::{Stream, noise};
use pcpo_wgpu::schedule::credit::Credit;
use pcpo_wgpu::schedule::{Sampler, StepKind};
use pcpo_wgpu::tools::errors::largest_error;

use super::{KEY, SHAPES, context, draw, error, flow_steps, tensor};
use crate::support::gpu;

const FLOW_SAMPLERS: [Sampler; 4] = [Sampler::Dance, Sampler::FlowGrpo, Sampler::Cps, Sampler::Ode];

#[test]
fn flow_step_matches_its_reference() {
    let gpu = gpu();
    for shape in SHAPES {
        let n = shape.iter().product::<usize>();
        for sampler in FLOW_SAMPLERS {
            let steps = flow_steps(sampler, Credit::Native);
            for (guidance, step) in
                [(Guidance::Off, &steps[0]), (Guidance::Scale(4.5), &steps[steps.len() / 2])]
            {
                let (x, out) = (draw(0, n), draw(1, n * guidance.rows()));
                let c = Coefficients::from(step);
                let s = context(&gpu, guidance, c);
                let expected = flow_step::reference(&s, &x, &out, shape[0]);
                let wide = [shape[0] * guidance.rows(), shape[1], shape[2], shape[3]];
                let found = flow_step(&s, &tensor(&gpu, &x, shape), &tensor(&gpu, &out, wide));
                assert!(
                    error(&read(&found.x_prev).unwrap(), &expected.x_prev) < 1e-5,
                    "x_prev {shape:?} {sampler:?}"
                );
                assert!(
                    error(&read(&found.prediction).unwrap(), &expected.prediction) < 1e-5,
                    "prediction {shape:?}"
                );
                // Relative to the larger of 1 and the value: log p passes through 0 as sigma does.
                let log_p = read(&found.log_prob).unwrap();
                let relative = |v: &[f32]| {
                    v.iter()
                        .zip(&expected.log_prob)
                        .map(|(v, b)| v / b.abs().max(1.0))
                        .collect::<Vec<f32>>()
                };
                assert!(
                    largest_error(&relative(&log_p), &relative(&expected.log_prob)) < 1e-5,
                    "log_prob {shape:?} {sampler:?}"
                );
            }
        }
    }
}

#[test]
fn flow_step_reference_is_the_published_formula_in_f64() {
    let (n, cpu) = (4096, Compute::cpu());
    let (x, out) = (draw(0, n), draw(1, 2 * n));
    let z = noise(KEY.seed, Stream::StepNoise, KEY.first_image, KEY.step, n);
    for sampler in FLOW_SAMPLERS {
        let (steps, eta) = (flow_steps(sampler, Credit::Native), sampler.default_eta());
        for (i, step) in steps.iter().enumerate() {
            let StepKind::Flow { t, dt } = step.kind else { panic!("a flow step") };
            let c = Coefficients::from(step);
            let done = flow_step::reference(&context(&cpu, Guidance::Scale(4.5), c), &x, &out, 1);
            let (found, log_prob) = (done.x_prev, done.log_prob);
            let next = t - dt;
            let mut log_p = 0.0;
            let expected: Vec<f32> = (0..n)
                .map(|k| {
                    let (x, u, c) = (f64::from(x[k]), f64::from(out[k]), f64::from(out[k + n]));
                    let (v, z) = (u + 4.5 * (c - u), f64::from(z[k]));
                    let sde = |s: f64| {
                        let mean = x * (1.0 - s * s * dt / (2.0 * t))
                            - v * (1.0 + s * s * (1.0 - t) / (2.0 * t)) * dt;
                        (mean, s * dt.sqrt())
                    };
                    let (mean, sigma) = match sampler {
                        Sampler::Dance => sde(eta),
                        Sampler::FlowGrpo => {
                            sde(eta * (t / (1.0 - if i == 0 { next } else { t })).sqrt())
                        }
                        Sampler::Cps => {
                            let angle = eta * std::f64::consts::FRAC_PI_2;
                            let (x0, x1) = (x - t * v, x + (1.0 - t) * v);
                            ((1.0 - next) * x0 + next * angle.cos() * x1, next * angle.sin())
                        }
                        Sampler::Ode | Sampler::Ddim => (x - v * dt, 0.0),
                    };
                    if sigma > 0.0 {
                        let density = -(sigma * z).powi(2) / (2.0 * sigma * sigma);
                        log_p += density - sigma.ln() - 0.5 * std::f64::consts::TAU.ln();
                    }
                    (mean + sigma * z) as f32
                })
                .collect();
            assert!(
                error(&found, &expected) < 1e-5,
                "{sampler:?} step {i}: {:e}",
                error(&found, &expected)
            );
            let log_p = log_p / n as f64;
            // A deterministic step has no density.
            let off = if c.sigma > 0.0 {
                (f64::from(log_prob[0]) - log_p).abs() / log_p.abs().max(1.0)
            } else {
                0.0
            };
            assert!(off < 1e-5, "{sampler:?} step {i}: log p {} is not {log_p}", log_prob[0]);
        }
    }
}

#[test]
fn noise_weighting_is_in_proportion_to_the_step_s_noise_and_has_mean_one() {
    for sampler in [Sampler::Dance, Sampler::FlowGrpo] {
        let (native, weighted) =
            (flow_steps(sampler, Credit::Native), flow_steps(sampler, Credit::Noise));
        let mean = weighted.iter().map(|s| s.loss_weight).sum::<f64>() / weighted.len() as f64;
        assert!((mean - 1.0).abs() < 1e-12);
        for (n, w) in native.iter().zip(&weighted) {
            assert!(
                (w.loss_weight / weighted[0].loss_weight - n.sigma / native[0].sigma).abs() < 1e-12
            );
            assert_eq!(w.weight, n.w_native);
        }
    }
}
