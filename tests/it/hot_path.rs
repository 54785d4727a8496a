//! Each operation of the hot path: shader against CPU reference, reference against f64, gradient against central
//! differences, repeatability. Kernels by name: philox_noise, ddim_step and flow_step with step_log_prob, log_ratio with
//! log_ratio_finish, policy_objective, credit_reduce, with the preludes common, philox, sampler_step, partials_sum,
//! lanes1 and lanes4 (both widths are among SHAPES).

use burn::tensor::{Tensor, TensorData};
use pcpo_wgpu::bench::{Case, OPERATIONS};
use pcpo_wgpu::check::largest_error;
use pcpo_wgpu::credit::{Credit, apply};
use pcpo_wgpu::device::Compute;
use pcpo_wgpu::ops::credit_reduce::{self, credit_reduce};
use pcpo_wgpu::ops::ddim_step::{self, ddim_step};
use pcpo_wgpu::ops::flow_step::{self, flow_step};
use pcpo_wgpu::ops::group_advantage::{Advantage, Tracker, group_advantage, varies};
use pcpo_wgpu::ops::log_ratio::{self, log_ratio};
use pcpo_wgpu::ops::philox::philox_noise;
use pcpo_wgpu::ops::policy_objective::{self, GuidanceGradient, Objective, Surrogate, policy_objective};
use pcpo_wgpu::ops::{Coefficients, Guidance, NoiseKey, read};
use pcpo_wgpu::philox::{self, Stream, noise};
use pcpo_wgpu::schedule::{Family, Flow, Grid, Sampler, Sampling, Schedule, Step, ddim::Ddim};

use crate::support::gpu;

const KEY: NoiseKey = NoiseKey { seed: 0x0123_4567_89ab_cdef, first_image: 1000, step: 5 };

/// Batches from 1 to 64, and sizes that are no multiple of a workgroup, a quad or a block.
const SHAPES: [[usize; 4]; 6] =
    [[1, 4, 64, 64], [3, 4, 9, 7], [2, 3, 5, 5], [2, 16, 128, 128], [64, 4, 16, 16], [5, 1, 1, 1]];

fn draw(image: u32, n: usize) -> Vec<f32> {
    noise(3, Stream::InitialNoise, image, 0, n)
}

fn tensor(compute: &Compute, values: &[f32], shape: [usize; 4]) -> Tensor<4> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), &compute.burn)
}

fn coefficients(rule: Credit, clip: bool) -> Coefficients {
    let schedule = Ddim::stable_diffusion();
    let native = schedule.steps(50, 1.0).unwrap();
    let steps = apply(rule, &Schedule::Ddim(schedule), native, None).unwrap();
    let c = Coefficients::from(&steps[20]);
    Coefficients { clip: if clip { 1.0 } else { c.clip }, ..c }
}

/// Largest error relative to the largest value.
fn error(found: &[f32], expected: &[f32]) -> f64 {
    let scale = expected.iter().fold(1e-30f64, |m, v| m.max(f64::from(v.abs())));
    assert_eq!(found.len(), expected.len());
    largest_error(found, expected) / scale
}

#[test]
fn philox_gives_the_published_vectors() {
    // Known answers of Salmon et al.'s Random123, philox4x32-10.
    assert_eq!(philox::philox([0, 0], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    assert_eq!(philox::philox([u32::MAX; 2], [u32::MAX; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    let pi = philox::philox([0xa409_3822, 0x299f_31d0], [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]);
    assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
}

#[test]
fn normals_are_within_2e_6_of_f64_and_standard() {
    let mut worst = 0f64;
    for quad in 0..50_000 {
        let w = philox::words(9, Stream::StepNoise, 3, 1, quad);
        for pair in [[w[0], w[1]], [w[2], w[3]]] {
            let u = (f64::from(pair[0] >> 9) + 0.5) / 8_388_608.0;
            let angle = std::f64::consts::TAU * f64::from(pair[1]) / 4_294_967_296.0;
            let radius = (-2.0 * u.ln()).sqrt();
            let [x, y] = philox::box_muller(pair[0], pair[1]);
            worst =
                worst.max((f64::from(x) - radius * angle.cos()).abs()).max((f64::from(y) - radius * angle.sin()).abs());
        }
    }
    assert!(worst < 2e-6, "{worst:e}");
    let z = noise(9, Stream::StepNoise, 3, 1, 400_000);
    let moment = |k: i32| z.iter().map(|&v| f64::from(v).powi(k)).sum::<f64>() / z.len() as f64;
    assert!(moment(1).abs() < 0.01 && (moment(2) - 1.0).abs() < 0.01 && (moment(4) - 3.0).abs() < 0.06);
}

#[test]
fn normals_match_the_committed_vectors() {
    let golden: Vec<f32> = serde_json::from_str(include_str!("../golden/philox.json")).unwrap();
    let found = noise(KEY.seed, Stream::StepNoise, KEY.first_image, KEY.step, golden.len());
    // f64 numbers of tests/golden/make_philox.py, an independent implementation.
    assert!(
        golden.iter().zip(&found).all(|(a, b)| (a - b).abs() < 2e-6),
        "regenerate with tests/golden/make_philox.py?"
    );
}

#[test]
fn philox_noise_on_the_gpu_is_that_of_the_cpu_in_any_batch_layout() {
    let (gpu, cpu) = (gpu(), Compute::cpu());
    for shape in SHAPES {
        let found = read(&philox_noise(&gpu, shape, KEY).unwrap()).unwrap();
        let expected = read(&philox_noise(&cpu, shape, KEY).unwrap()).unwrap();
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 2e-6), "{shape:?}");
        // And of the formula in f64.
        let dim: usize = shape[1..].iter().product();
        for (i, z) in found.iter().enumerate() {
            let (image, element) = ((i / dim) as u32, i % dim);
            let words =
                philox::words(KEY.seed, Stream::StepNoise, KEY.first_image + image, KEY.step, element as u32 / 4);
            let pair = if element % 4 < 2 { [words[0], words[1]] } else { [words[2], words[3]] };
            let radius = (-2.0 * ((f64::from(pair[0] >> 9) + 0.5) / 8_388_608.0).ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * f64::from(pair[1]) / 4_294_967_296.0).sin_cos();
            let exact = radius * if element % 2 == 0 { cos } else { sin };
            assert!((f64::from(*z) - exact).abs() < 2e-6, "{shape:?}: element {i} is {z}, not {exact}");
        }
        assert_eq!(found, read(&philox_noise(&gpu, shape, KEY).unwrap()).unwrap(), "repeats to the bit");
        let last = NoiseKey { first_image: KEY.first_image + shape[0] as u32 - 1, ..KEY };
        let alone = read(&philox_noise(&gpu, [1, shape[1], shape[2], shape[3]], last).unwrap()).unwrap();
        assert_eq!(alone, found[found.len() - alone.len()..], "a batch of one has the same noise");
    }
}

#[test]
fn ddim_step_matches_its_reference() {
    let gpu = gpu();
    for shape in SHAPES {
        let n = shape.iter().product::<usize>();
        for (guidance, clip) in [(Guidance::Off, false), (Guidance::Scale(5.0), false), (Guidance::Scale(2.0), true)] {
            let (x, out) = (draw(0, n), draw(1, n * guidance.rows()));
            let c = coefficients(Credit::Native, clip);
            let (x_prev, prediction, log_prob) = ddim_step::reference(&x, &out, shape[0], guidance, &c, KEY);
            let wide = [shape[0] * guidance.rows(), shape[1], shape[2], shape[3]];
            let found =
                ddim_step(&gpu, &tensor(&gpu, &x, shape), &tensor(&gpu, &out, wide), guidance, &c, KEY).unwrap();
            let z = noise_of(shape[0], n / shape[0]);
            let exact: Vec<f32> = (0..n)
                .map(|i| {
                    let x = f64::from(x[i]);
                    let p = match guidance {
                        Guidance::Off => f64::from(out[i]),
                        Guidance::Scale(g) => {
                            f64::from(out[i]) + f64::from(g) * (f64::from(out[i + n]) - f64::from(out[i]))
                        }
                    };
                    let x0 = f64::from(c.x0_x) * x - f64::from(c.x0_p) * p;
                    let moved = if clip { f64::from(c.root_prev) * (x0.clamp(-1.0, 1.0) - x0) } else { 0.0 };
                    (f64::from(c.a) * x - f64::from(c.b) * p + moved + f64::from(c.sigma) * f64::from(z[i])) as f32
                })
                .collect();
            assert!(error(&read(&found.x_prev).unwrap(), &exact) < 1e-5, "x_prev {shape:?} against f64");
            assert!(error(&read(&found.x_prev).unwrap(), &x_prev) < 1e-5, "x_prev {shape:?}");
            assert!(error(&read(&found.prediction).unwrap(), &prediction) < 1e-5, "prediction {shape:?}");
            assert!(error(&read(&found.log_prob).unwrap(), &log_prob) < 1e-5, "log_prob {shape:?}");
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
    let (found, _, log_prob) = ddim_step::reference(&x, &out, 1, Guidance::Scale(5.0), &c, KEY);
    let z = noise(KEY.seed, Stream::StepNoise, KEY.first_image, KEY.step, n);
    let Family::Diffusion { alpha_bar: bar, alpha_bar_prev: prev, .. } = step.family else { panic!("a DDIM step") };
    let s = step.sigma;
    let mut log_p = 0.0;
    let expected: Vec<f32> = (0..n)
        .map(|i| {
            let (x, u, c) = (f64::from(x[i]), f64::from(out[i]), f64::from(out[i + n]));
            let eps = u + g * (c - u);
            let x0 = (x - (1.0 - bar).sqrt() * eps) / bar.sqrt();
            let mean = prev.sqrt() * x0 + (1.0 - prev - s * s).sqrt() * eps;
            let x_prev = mean + s * f64::from(z[i]);
            log_p += -(x_prev - mean).powi(2) / (2.0 * s * s) - s.ln() - 0.5 * std::f64::consts::TAU.ln();
            x_prev as f32
        })
        .collect();
    assert!(error(&found, &expected) < 1e-5);
    assert!(error(&log_prob, &[(log_p / n as f64) as f32]) < 1e-5);
}

/// A flow's steps at published settings.
fn flow_steps(sampler: Sampler, rule: Credit) -> Vec<Step> {
    let schedule = Schedule::Flow(Flow::shifted(3.0));
    let (steps, eta) = (sampler.default_steps(), sampler.default_eta());
    let sampling = Sampling { sampler, steps, eta, grid: Grid::Shifted, shift: None, tokens: 0 };
    apply(rule, &schedule, schedule.steps(&sampling).unwrap(), None).unwrap()
}

const FLOW_SAMPLERS: [Sampler; 4] = [Sampler::Dance, Sampler::FlowGrpo, Sampler::Cps, Sampler::Ode];

#[test]
fn flow_step_matches_its_reference() {
    let gpu = gpu();
    for shape in SHAPES {
        let n = shape.iter().product::<usize>();
        for sampler in FLOW_SAMPLERS {
            let steps = flow_steps(sampler, Credit::Native);
            for (guidance, step) in [(Guidance::Off, &steps[0]), (Guidance::Scale(4.5), &steps[steps.len() / 2])] {
                let (x, out) = (draw(0, n), draw(1, n * guidance.rows()));
                let c = Coefficients::from(step);
                let (x_prev, prediction, log_prob) = flow_step::reference(&x, &out, shape[0], guidance, &c, KEY);
                let wide = [shape[0] * guidance.rows(), shape[1], shape[2], shape[3]];
                let found =
                    flow_step(&gpu, &tensor(&gpu, &x, shape), &tensor(&gpu, &out, wide), guidance, &c, KEY).unwrap();
                assert!(error(&read(&found.x_prev).unwrap(), &x_prev) < 1e-5, "x_prev {shape:?} {sampler:?}");
                assert!(error(&read(&found.prediction).unwrap(), &prediction) < 1e-5, "prediction {shape:?}");
                // Relative to the larger of 1 and the value: log p passes through 0 as sigma does.
                let log_p = read(&found.log_prob).unwrap();
                let relative =
                    |v: &[f32]| v.iter().zip(&log_prob).map(|(v, b)| v / b.abs().max(1.0)).collect::<Vec<f32>>();
                assert!(
                    largest_error(&relative(&log_p), &relative(&log_prob)) < 1e-5,
                    "log_prob {shape:?} {sampler:?}"
                );
            }
        }
    }
}

#[test]
fn flow_step_reference_is_the_published_formula_in_f64() {
    let n = 4096;
    let (x, out) = (draw(0, n), draw(1, 2 * n));
    let z = noise(KEY.seed, Stream::StepNoise, KEY.first_image, KEY.step, n);
    for sampler in FLOW_SAMPLERS {
        let (steps, eta) = (flow_steps(sampler, Credit::Native), sampler.default_eta());
        for (i, step) in steps.iter().enumerate() {
            let Family::Flow { t, dt } = step.family else { panic!("a flow step") };
            let c = Coefficients::from(step);
            let (found, _, log_prob) = flow_step::reference(&x, &out, 1, Guidance::Scale(4.5), &c, KEY);
            let next = t - dt;
            let mut log_p = 0.0;
            let expected: Vec<f32> = (0..n)
                .map(|k| {
                    let (x, u, c) = (f64::from(x[k]), f64::from(out[k]), f64::from(out[k + n]));
                    let (v, z) = (u + 4.5 * (c - u), f64::from(z[k]));
                    let sde = |s: f64| {
                        let mean = x * (1.0 - s * s * dt / (2.0 * t)) - v * (1.0 + s * s * (1.0 - t) / (2.0 * t)) * dt;
                        (mean, s * dt.sqrt())
                    };
                    let (mean, sigma) = match sampler {
                        Sampler::Dance => sde(eta),
                        Sampler::FlowGrpo => sde(eta * (t / (1.0 - if i == 0 { next } else { t })).sqrt()),
                        Sampler::Cps => {
                            let angle = eta * std::f64::consts::FRAC_PI_2;
                            let (x0, x1) = (x - t * v, x + (1.0 - t) * v);
                            ((1.0 - next) * x0 + next * angle.cos() * x1, next * angle.sin())
                        }
                        _ => (x - v * dt, 0.0),
                    };
                    if sigma > 0.0 {
                        let density = -(sigma * z).powi(2) / (2.0 * sigma * sigma);
                        log_p += density - sigma.ln() - 0.5 * std::f64::consts::TAU.ln();
                    }
                    (mean + sigma * z) as f32
                })
                .collect();
            assert!(error(&found, &expected) < 1e-5, "{sampler:?} step {i}: {:e}", error(&found, &expected));
            let log_p = log_p / n as f64;
            // A deterministic step has no density.
            let off = if c.sigma > 0.0 { (f64::from(log_prob[0]) - log_p).abs() / log_p.abs().max(1.0) } else { 0.0 };
            assert!(off < 1e-5, "{sampler:?} step {i}: log p {} is not {log_p}", log_prob[0]);
        }
    }
}

#[test]
fn log_ratio_of_a_flow_is_the_difference_of_log_densities_and_guard_s_is_its_linear_part() {
    let (n, key) = (4096, KEY);
    let z = noise_of(1, n);
    let (out, old): (Vec<f32>, Vec<f32>) =
        (draw(1, n), draw(1, n).iter().zip(draw(2, n)).map(|(v, d)| v + 0.1 * d).collect());
    for sampler in [Sampler::Dance, Sampler::FlowGrpo, Sampler::Cps] {
        for step in flow_steps(sampler, Credit::Native).iter().filter(|s| s.trainable()) {
            let c = Coefficients::from(step);
            let found = f64::from(log_ratio::reference(&out, &old, None, 1, Guidance::Off, &c, key)[0][0]);
            // x_prev - mean is sigma z under the old policy; the new one's mean is b (v_old - v) away.
            let (mut exact, mut linear, mut scale) = (0.0, 0.0, 0.0);
            for i in 0..n {
                let moved = step.b * (f64::from(out[i]) - f64::from(old[i]));
                let (s, zi) = (step.sigma, f64::from(z[i]));
                exact += ((s * zi).powi(2) - (s * zi + moved).powi(2)) / (2.0 * s * s);
                linear -= moved * zi;
                scale += (moved / s * zi).abs() + 0.5 * (moved / s).powi(2);
            }
            let (exact, linear, scale) = (exact / n as f64, linear / n as f64, scale / n as f64);
            assert!((found - exact).abs() < 1e-5 * scale, "{sampler:?} at {}: {found} is not {exact}", step.t);
            let guard = flow_steps(sampler, Credit::Guard).into_iter().find(|g| g.t == step.t).unwrap();
            let Family::Flow { dt, .. } = guard.family else { panic!("a flow step") };
            assert!((guard.loss_weight - 1.0 / dt).abs() < 1e-12 / dt);
            let c = Coefficients::from(&guard);
            let found = f64::from(log_ratio::reference(&out, &old, None, 1, Guidance::Off, &c, key)[0][0]);
            // verl-omni's form: (log rho + mean(moved^2) / (2 sigma^2)) sigma, with sigma the step's deviation.
            assert!((found - linear).abs() < 1e-5 * scale * step.sigma, "{sampler:?} at {}: guard", step.t);
        }
    }
}

#[test]
fn noise_weighting_is_in_proportion_to_the_step_s_noise_and_has_mean_one() {
    for sampler in [Sampler::Dance, Sampler::FlowGrpo] {
        let (native, weighted) = (flow_steps(sampler, Credit::Native), flow_steps(sampler, Credit::Noise));
        let mean = weighted.iter().map(|s| s.loss_weight).sum::<f64>() / weighted.len() as f64;
        assert!((mean - 1.0).abs() < 1e-12);
        for (n, w) in native.iter().zip(&weighted) {
            assert!((w.loss_weight / weighted[0].loss_weight - n.sigma / native[0].sigma).abs() < 1e-12);
            assert_eq!(w.weight, n.w_native);
        }
    }
}

/// (network output, old prediction `delta` away from it, reference output).
fn policy(n: usize, guidance: Guidance, delta: f32) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let out = draw(1, n * guidance.rows());
    let combined: Vec<f32> = match guidance {
        Guidance::Off => out.clone(),
        Guidance::Scale(g) => (0..n).map(|i| out[i] + g * (out[i + n] - out[i])).collect(),
    };
    let old = combined.iter().zip(draw(2, n)).map(|(p, d)| p + delta * d).collect();
    let reference = out.iter().zip(draw(4, out.len())).map(|(p, d)| p + 0.1 * d).collect();
    (out, old, reference)
}

#[test]
fn log_ratio_keeps_its_accuracy_where_the_difference_of_log_probabilities_has_none() {
    let gpu = gpu();
    let c = coefficients(Credit::Native, false);
    for delta in [1.0f32, 1e-2, 1e-4, 1e-6] {
        for shape in SHAPES {
            let n = shape.iter().product::<usize>();
            let dim = n / shape[0];
            // Predictions near zero, so that f32 can hold the difference itself: it is what is tested.
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
            let found =
                log_ratio(&gpu, &tensor(&gpu, &out, shape), &tensor(&gpu, &old, shape), None, Guidance::Off, &c, KEY)
                    .unwrap();
            let found = read(&found).unwrap();
            let cpu = log_ratio::reference(&out, &old, None, shape[0], Guidance::Off, &c, KEY);
            for b in 0..shape[0] {
                assert!((f64::from(found[2 * b]) - exact[b]).abs() < 1e-5 * scale[b], "shader {shape:?} at {delta:e}");
                assert!((f64::from(cpu[b][0]) - exact[b]).abs() < 1e-5 * scale[b], "reference {shape:?} at {delta:e}");
            }
        }
    }
}

#[test]
fn the_difference_of_two_log_probabilities_loses_everything_at_1e_6() {
    // Why log_ratio has its form: the naive way in f32, at |Delta| = 1e-6, is off by more than the value itself.
    let (n, c) = (4 * 64 * 64, coefficients(Credit::Native, false));
    let z = noise_of(1, n);
    let delta: Vec<f32> = draw(1, n).iter().map(|v| v * 1e-6).collect();
    let naive = |shift: f32| {
        // x_prev - mean, with the mean moved by b Delta; summed in f32 pairs by magnitude-preserving f64 to be fair.
        let sum: f64 = (0..n)
            .map(|i| {
                let d = (c.sigma * z[i]) + shift * c.b * delta[i];
                f64::from(-(d * d) / (2.0 * c.sigma * c.sigma))
            })
            .sum();
        ((sum / n as f64) as f32) - c.log_norm
    };
    let exact = log_ratio::reference(&delta, &vec![0.0; n], None, 1, Guidance::Off, &c, KEY)[0][0];
    let naive = (naive(1.0) - naive(0.0)).exp() - 1.0;
    assert!((naive - exact).abs() > 0.5 * exact.abs(), "naive {naive:e}, exact {exact:e}");
}

fn noise_of(batch: usize, dim: usize) -> Vec<f32> {
    pcpo_wgpu::ops::philox::reference(batch, dim, KEY)
}

fn surrogate(objective: Objective, gradient: GuidanceGradient, beta: f32) -> Surrogate {
    Surrogate { objective, xi: 1e-3, beta, guidance_gradient: gradient, scale: 0.125 }
}

/// Every kind of coefficients that the objective sees: diffusion, a flow, and GRPO-Guard, whose ratio has no quadratic
/// term and whose loss is weighted.
fn objective_coefficients() -> [Coefficients; 3] {
    let guard = flow_steps(Sampler::FlowGrpo, Credit::Guard)[4];
    // Its weight 1 / dt is near 20: within the range of the others, so that one tolerance fits.
    [
        coefficients(Credit::Proportionate, false),
        Coefficients::from(&flow_steps(Sampler::FlowGrpo, Credit::Proportionate)[4]),
        Coefficients::from(&guard),
    ]
}

const OBJECTIVES: [Objective; 3] = [Objective::PpoClip, Objective::LogRatio, Objective::LogHinge];

#[test]
fn policy_objective_matches_its_reference() {
    let gpu = gpu();
    for (shape, c) in SHAPES.into_iter().flat_map(|s| objective_coefficients().map(|c| (s, c))) {
        let n = shape.iter().product::<usize>();
        let advantage: Vec<f32> = (0..shape[0]).map(|i| [1.5, -0.7, 0.0, 2.5, -5.0][i % 5]).collect();
        for objective in OBJECTIVES {
            for (guidance, which, beta) in [
                (Guidance::Off, GuidanceGradient::Both, 0.0),
                (Guidance::Scale(5.0), GuidanceGradient::Both, 0.04),
                (Guidance::Scale(5.0), GuidanceGradient::Conditional, 0.0),
            ] {
                let s = surrogate(objective, which, beta);
                let (out, old, frozen) = policy(n, guidance, 1e-2);
                let wide = [shape[0] * guidance.rows(), shape[1], shape[2], shape[3]];
                let with = (beta > 0.0).then_some(&frozen[..]);
                let rows = log_ratio::reference(&out, &old, with, shape[0], guidance, &c, KEY).concat();
                let (gradient, stats) =
                    policy_objective::reference(&s, &out, &old, with, &rows, &advantage, guidance, &c, KEY);
                let frozen = with.map(|r| tensor(&gpu, r, wide));
                let (g, t) = policy_objective(
                    &gpu,
                    &s,
                    &tensor(&gpu, &out, wide),
                    &tensor(&gpu, &old, shape),
                    frozen.as_ref(),
                    &advantage,
                    guidance,
                    &c,
                    KEY,
                )
                .unwrap();
                assert!(
                    error(&read(&g).unwrap(), &gradient) < 1e-5,
                    "{objective:?} {shape:?}: gradient {:e}",
                    error(&read(&g).unwrap(), &gradient)
                );
                assert!(error(&read(&t).unwrap(), &stats) < 1e-5, "{objective:?} {shape:?}: statistics");
                let exact = gradient_f64(&s, &out, &old, with, &advantage, guidance, &c);
                for (path, found) in [("shader", &read(&g).unwrap()), ("reference", &gradient)] {
                    let off = error(found, &exact);
                    assert!(off < 1e-5, "{path} of {objective:?} {shape:?}: {off:e} off the gradient in f64");
                }
            }
        }
    }
}

#[test]
fn policy_objective_gradient_is_that_of_central_differences() {
    let (batch, n) = (6, 6 * 10);
    // Advantages of both signs against log rho of both signs: free and clipped entries.
    let advantage = [1.0, -1.0, 2.0, -2.0, 0.5, 0.0];
    let mut clipped = 0;
    for (objective, c) in OBJECTIVES.into_iter().flat_map(|o| objective_coefficients().map(|c| (o, c))) {
        for guidance in [Guidance::Off, Guidance::Scale(3.0)] {
            let s = surrogate(objective, GuidanceGradient::Both, 0.05);
            let (out, old, frozen) = policy(n, guidance, 0.02);
            let rows = log_ratio::reference(&out, &old, Some(&frozen), batch, guidance, &c, KEY).concat();
            let (gradient, stats) =
                policy_objective::reference(&s, &out, &old, Some(&frozen), &rows, &advantage, guidance, &c, KEY);
            clipped += stats.chunks(6).filter(|r| r[2] == 1.0).count();
            let loss = |values: &[f64]| loss_f64(&s, values, &old, &frozen, &advantage, guidance, &c);
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
            assert!(error(&gradient, &numeric) < 1e-4, "{objective:?} {guidance:?}: {:e}", error(&gradient, &numeric));
        }
    }
    assert!(clipped > 0, "some entries are clipped");
}

/// The objective written again, from METHOD sections 3, 4 and 8, in f64.
fn loss_f64(
    s: &Surrogate,
    out: &[f64],
    old: &[f32],
    frozen: &[f32],
    advantage: &[f32],
    guidance: Guidance,
    c: &Coefficients,
) -> f64 {
    let n = old.len();
    let dim = n / advantage.len();
    let z = noise_of(advantage.len(), dim);
    let combine = |v: &dyn Fn(usize) -> f64, i: usize| match guidance {
        Guidance::Off => v(i),
        Guidance::Scale(g) => v(i) + f64::from(g) * (v(i + n) - v(i)),
    };
    let (w, wn, xi) = (f64::from(c.w), f64::from(c.w_native), f64::from(s.xi));
    let mut total = 0.0;
    for (b, &a) in advantage.iter().enumerate() {
        let (mut lr, mut kl) = (0.0, 0.0);
        for i in b * dim..(b + 1) * dim {
            let p = combine(&|j| out[j], i);
            let d = p - f64::from(old[i]);
            lr -= (w * d * f64::from(z[i]) + 0.5 * f64::from(c.quadratic) * w * w * d * d) / dim as f64;
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
    out: &[f32],
    old: &[f32],
    frozen: Option<&[f32]>,
    advantage: &[f32],
    guidance: Guidance,
    c: &Coefficients,
) -> Vec<f32> {
    let (n, dim) = (old.len(), old.len() / advantage.len());
    let z = noise_of(advantage.len(), dim);
    let combine = |v: &[f32], i: usize| match guidance {
        Guidance::Off => f64::from(v[i]),
        Guidance::Scale(g) => f64::from(v[i]) + f64::from(g) * (f64::from(v[i + n]) - f64::from(v[i])),
    };
    let (w, wn, xi, q) = (f64::from(c.w), f64::from(c.w_native), f64::from(s.xi), f64::from(c.quadratic));
    let mut gradient = vec![0f32; out.len()];
    for (b, &a) in advantage.iter().enumerate() {
        let rows = b * dim..(b + 1) * dim;
        let wd = |i: usize| w * (combine(out, i) - f64::from(old[i]));
        let sum: f64 = rows.clone().map(|i| wd(i) * f64::from(z[i]) + 0.5 * q * wd(i).powi(2)).sum();
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
            let kl = frozen.map_or(0.0, |f| f64::from(s.beta) * wn * wn * (combine(out, i) - combine(f, i)));
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
    assert_eq!(s.entry(0.5, 0.0), (0.0, 0.0, false));
    assert!(s.entry(2e-3, 1.0).2 && !s.entry(5e-4, 1.0).2 && s.entry(-2e-3, -1.0).2);
}

#[test]
fn credit_reduce_matches_its_reference() {
    let gpu = gpu();
    for (steps, samples) in [(1, 1), (3, 5), (20, 300), (50, 64)] {
        let stats = draw(8, steps * samples * 6);
        let weights = draw(9, steps);
        let tensor = Tensor::<3>::from_data(TensorData::new(stats.clone(), [steps, samples, 6]), &gpu.burn);
        let found = credit_reduce(&gpu, &tensor, &weights).unwrap();
        let expected = credit_reduce::reference(&stats, steps, &weights);
        let flat = |rows: &[credit_reduce::StepStats]| -> Vec<f32> {
            rows.iter()
                .flat_map(|r| [r.log_rho_mean, r.log_rho_std, r.loss, r.clip_frac, r.approx_kl, r.kl, r.contribution])
                .collect()
        };
        assert!(error(&flat(&found), &flat(&expected)) < 1e-5, "{steps} x {samples}");
    }
}

#[test]
fn credit_reduce_reference_is_the_mean_and_deviation() {
    let stats = [1.0, 10.0, 1.0, 0.5, 0.0, 2.0, 3.0, 20.0, 0.0, 4.5, 1.0, 4.0];
    let row = credit_reduce::reference(&stats, 1, &[0.5])[0];
    let expected = credit_reduce::StepStats {
        log_rho_mean: 2.0,
        log_rho_std: 1.0,
        loss: 15.0,
        clip_frac: 0.5,
        approx_kl: 2.5,
        kl: 0.5,
        contribution: 1.5,
    };
    assert_eq!(row, expected);
}

#[test]
fn group_advantage_normalises_as_each_method_does() {
    let prompts = ["a", "b", "a", "b"];
    let rewards = [1.0, 5.0, 3.0, 5.0];
    let mut tracker = Tracker { size: 3, min_count: 3, ..Default::default() };
    let group = group_advantage(Advantage::Group, &rewards, &prompts, &mut tracker, 5.0);
    assert!((group[0] + 1.0).abs() < 1e-6 && (group[2] - 1.0).abs() < 1e-6);
    assert_eq!((group[1], group[3]), (0.0, 0.0), "equal rewards have advantage 0, never NaN");
    let global = group_advantage(Advantage::Global, &rewards, &prompts, &mut tracker, 5.0);
    assert!((global[0] + 2.5 / 2.75f32.sqrt()).abs() < 1e-5, "{global:?}");
    let first = group_advantage(Advantage::PerPrompt, &rewards, &prompts, &mut tracker, 5.0);
    assert!((first[0] - global[0]).abs() < 1e-4, "the batch's statistics below min_count");
    let second = group_advantage(Advantage::PerPrompt, &rewards, &prompts, &mut tracker, 5.0);
    // Prompt a's buffer is now [3, 1, 3].
    let (mean, std) = (7.0 / 3.0, (8.0f64 / 9.0).sqrt());
    assert!((f64::from(second[0]) - (1.0 - mean) / (std + 1e-6)).abs() < 1e-5);
    let clamped = group_advantage(Advantage::Group, &rewards, &prompts, &mut tracker, 0.5);
    assert_eq!((clamped[0], clamped[2]), (-0.5, 0.5));
    assert!(varies(&rewards, &prompts) && !varies(&[1.0, 2.0, 1.0, 2.0], &prompts));
}

#[test]
fn the_three_paths_of_every_benchmark_agree() {
    for compute in [gpu(), Compute::cpu()] {
        for (batch, shape) in [(1, [4, 64, 64]), (3, [4, 9, 7])] {
            let case = Case::new(&compute, batch, shape).unwrap();
            OPERATIONS.iter().for_each(|op| case.verify(op).unwrap());
        }
    }
}
