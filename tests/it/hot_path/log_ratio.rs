//! `log_ratio`, with its second pass log_ratio_finish.

use pcpo_wgpu::device::Compute;
use pcpo_wgpu::device::tensor::read;
use pcpo_wgpu::ops::log_ratio::{self, HostPredictions, Predictions, log_ratio};
use pcpo_wgpu::ops::{Coefficients, Guidance};
use pcpo_wgpu::schedule::credit::Credit;
use pcpo_wgpu::schedule::{Sampler, StepKind};

use super::{SHAPES, coefficients, context, draw, flow_steps, noise_of, tensor};
use crate::support::gpu;

#[test]
fn log_ratio_of_a_flow_is_the_difference_of_log_densities_and_guard_s_is_its_linear_part() {
    let (n, cpu) = (4096, Compute::cpu());
    let z = noise_of(1, n);
    let (out, old): (Vec<f32>, Vec<f32>) =
        (draw(1, n), draw(1, n).iter().zip(draw(2, n)).map(|(v, d)| v + 0.1 * d).collect());
    let log_rho = |c: Coefficients| {
        let p = HostPredictions { model_out: &out, old: &old, base: None };
        let rows = log_ratio::reference(&context(&cpu, Guidance::Off, c), &p, &z, 1);
        f64::from(rows[0].log_rho)
    };
    for sampler in [Sampler::Dance, Sampler::FlowGrpo, Sampler::Cps] {
        for step in flow_steps(sampler, Credit::Native).iter().filter(|s| s.trainable()) {
            let c = Coefficients::from(step);
            let found = log_rho(c);
            // x_prev - mean is sigma z under the old policy; the new one's mean is b (v_old - v)
            // away.
            let (mut exact, mut linear, mut scale) = (0.0, 0.0, 0.0);
            for i in 0..n {
                let moved = step.b * (f64::from(out[i]) - f64::from(old[i]));
                let (s, zi) = (step.sigma, f64::from(z[i]));
                exact += ((s * zi).powi(2) - (s * zi + moved).powi(2)) / (2.0 * s * s);
                linear -= moved * zi;
                scale += (moved / s * zi).abs() + 0.5 * (moved / s).powi(2);
            }
            let (exact, linear, scale) = (exact / n as f64, linear / n as f64, scale / n as f64);
            assert!(
                (found - exact).abs() < 1e-5 * scale,
                "{sampler:?} at {}: {found} is not {exact}",
                step.t
            );
            let guard =
                flow_steps(sampler, Credit::Guard).into_iter().find(|g| g.t == step.t).unwrap();
            let StepKind::Flow { dt, .. } = guard.kind else { panic!("a flow step") };
            assert!((guard.loss_weight - 1.0 / dt).abs() < 1e-12 / dt);
            let c = Coefficients::from(&guard);
            let found = log_rho(c);
            // verl-omni's form: (log rho + mean(moved^2) / (2 sigma^2)) sigma, with sigma the
            // step's deviation.
            assert!(
                (found - linear).abs() < 1e-5 * scale * step.sigma,
                "{sampler:?} at {}: guard",
                step.t
            );
        }
    }
}

#[test]
fn log_ratio_keeps_its_accuracy_where_the_difference_of_log_probabilities_has_none() {
    let gpu = gpu();
    let c = coefficients(Credit::Native, false);
    for delta in [1.0f32, 1e-2, 1e-4, 1e-6] {
        for shape in SHAPES {
            let n = shape.iter().product::<usize>();
            let dim = n / shape[0];
            // Predictions near zero, so that f32 can hold the difference itself: it is what is
            // tested.
            let out: Vec<f32> = draw(1, n).iter().map(|v| v * delta).collect();
            let old = vec![0.0; n];
            let z = noise_of(shape[0], dim);
            let w = f64::from(c.w);
            let mut scale = vec![0f64; shape[0]];
            let exact: Vec<f64> = (0..shape[0])
                .map(|b| {
                    let terms = (b * dim..(b + 1) * dim).map(|i| {
                        let wd = w * (f64::from(out[i]) - f64::from(old[i]));
                        wd * f64::from(z[i]) + 0.5 * wd * wd
                    });
                    scale[b] = terms.clone().map(f64::abs).sum::<f64>() / dim as f64;
                    -terms.sum::<f64>() / dim as f64
                })
                .collect();
            let (device_out, device_old) = (tensor(&gpu, &out, shape), tensor(&gpu, &old, shape));
            let s = context(&gpu, Guidance::Off, c);
            let p = Predictions { model_out: &device_out, old: &device_old, base: None };
            let found = log_ratio(&s, &p);
            let found = read(&found).unwrap();
            let p = HostPredictions { model_out: &out, old: &old, base: None };
            let cpu = log_ratio::reference(&s, &p, &z, shape[0]);
            for b in 0..shape[0] {
                assert!(
                    (f64::from(found[2 * b]) - exact[b]).abs() < 1e-5 * scale[b],
                    "shader {shape:?} at {delta:e}"
                );
                assert!(
                    (f64::from(cpu[b].log_rho) - exact[b]).abs() < 1e-5 * scale[b],
                    "reference {shape:?} at {delta:e}"
                );
            }
        }
    }
}

#[test]
fn the_difference_of_two_log_probabilities_loses_everything_at_1e_6() {
    // Why log_ratio has its form: the naive way in f32, at |Delta| = 1e-6, is off by more than the
    // value itself.
    let (n, c) = (4 * 64 * 64, coefficients(Credit::Native, false));
    let z = noise_of(1, n);
    let delta: Vec<f32> = draw(1, n).iter().map(|v| v * 1e-6).collect();
    let naive = |shift: f32| {
        // x_prev - mean, with the mean moved by b Delta; summed in f32 pairs by
        // magnitude-preserving f64 to be fair.
        let sum: f64 = (0..n)
            .map(|i| {
                let d = (c.sigma * z[i]) + shift * c.b * delta[i];
                f64::from(-(d * d) / (2.0 * c.sigma * c.sigma))
            })
            .sum();
        ((sum / n as f64) as f32) - c.log_norm
    };
    let cpu = Compute::cpu();
    let p = HostPredictions { model_out: &delta, old: &vec![0.0; n], base: None };
    let exact = log_ratio::reference(&context(&cpu, Guidance::Off, c), &p, &z, 1)[0].log_rho;
    let naive = (naive(1.0) - naive(0.0)).exp() - 1.0;
    assert!((naive - exact).abs() > 0.5 * exact.abs(), "naive {naive:e}, exact {exact:e}");
}
