//! `ddim_step`, with its second pass step_log_prob.

use pcpo_wgpu::device::Compute;
use pcpo_wgpu::device::tensor::read;
use pcpo_wgpu::ops::ddim_step::{self, ddim_step};
use pcpo_wgpu::ops::{Coefficients, Guidance};
use pcpo_wgpu::philox::{Stream, noise};
use pcpo_wgpu::schedule::credit::Credit;
use pcpo_wgpu::schedule::{Ddim, StepKind};

use super::{KEY, SHAPES, coefficients, context, draw, error, noise_of, tensor};
use crate::support::gpu;

#[test]
fn ddim_step_matches_its_reference() {
    let gpu = gpu();
    for shape in SHAPES {
        let n = shape.iter().product::<usize>();
        for (guidance, clip) in
            [(Guidance::Off, false), (Guidance::Scale(5.0), false), (Guidance::Scale(2.0), true)]
        {
            let (x, out) = (draw(0, n), draw(1, n * guidance.rows()));
            let c = coefficients(Credit::Native, clip);
            let s = context(&gpu, guidance, c);
            let expected = ddim_step::reference(&s, &x, &out, shape[0]);
            let wide = [shape[0] * guidance.rows(), shape[1], shape[2], shape[3]];
            let found = ddim_step(&s, &tensor(&gpu, &x, shape), &tensor(&gpu, &out, wide));
            let z = noise_of(shape[0], n / shape[0]);
            let exact: Vec<f32> = (0..n)
                .map(|i| {
                    let x = f64::from(x[i]);
                    let p = match guidance {
                        Guidance::Off => f64::from(out[i]),
                        Guidance::Scale(g) => {
                            f64::from(out[i])
                                + f64::from(g) * (f64::from(out[i + n]) - f64::from(out[i]))
                        }
                    };
                    let x0 = f64::from(c.x0_x) * x - f64::from(c.x0_p) * p;
                    let moved = if clip {
                        f64::from(c.root_prev) * (x0.clamp(-1.0, 1.0) - x0)
                    } else {
                        0.0
                    };
                    (f64::from(c.a) * x - f64::from(c.b) * p
                        + moved
                        + f64::from(c.sigma) * f64::from(z[i])) as f32
                })
                .collect();
            assert!(
                error(&read(&found.x_prev).unwrap(), &exact) < 1e-5,
                "x_prev {shape:?} against f64"
            );
            assert!(
                error(&read(&found.x_prev).unwrap(), &expected.x_prev) < 1e-5,
                "x_prev {shape:?}"
            );
            assert!(
                error(&read(&found.prediction).unwrap(), &expected.prediction) < 1e-5,
                "prediction {shape:?}"
            );
            assert!(
                error(&read(&found.log_prob).unwrap(), &expected.log_prob) < 1e-5,
                "log_prob {shape:?}"
            );
        }
    }
}

#[test]
fn ddim_step_reference_is_the_textbook_formula_in_f64() {
    let schedule = Ddim::stable_diffusion();
    let step = schedule.steps(50, 1.0).unwrap()[20];
    let (n, g) = (4096, 5.0f64);
    let (x, out) = (draw(0, n), draw(1, 2 * n));
    let c = Coefficients::from(&step);
    let cpu = Compute::cpu();
    let found = ddim_step::reference(&context(&cpu, Guidance::Scale(5.0), c), &x, &out, 1);
    let z = noise(KEY.seed, Stream::StepNoise, KEY.first_image, KEY.step, n);
    let StepKind::Diffusion { alpha_bar: bar, alpha_bar_prev: prev, .. } = step.kind else {
        panic!("a DDIM step")
    };
    let s = step.sigma;
    let mut log_p = 0.0;
    let expected: Vec<f32> = (0..n)
        .map(|i| {
            let (x, u, c) = (f64::from(x[i]), f64::from(out[i]), f64::from(out[i + n]));
            let eps = u + g * (c - u);
            let x0 = (x - (1.0 - bar).sqrt() * eps) / bar.sqrt();
            let mean = prev.sqrt() * x0 + (1.0 - prev - s * s).sqrt() * eps;
            let x_prev = mean + s * f64::from(z[i]);
            log_p += -(x_prev - mean).powi(2) / (2.0 * s * s)
                - s.ln()
                - 0.5 * std::f64::consts::TAU.ln();
            x_prev as f32
        })
        .collect();
    assert!(error(&found.x_prev, &expected) < 1e-5);
    assert!(error(&found.log_prob, &[(log_p / n as f64) as f32]) < 1e-5);
}
