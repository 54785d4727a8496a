//! `credit_reduce`.

use pcpo_wgpu::device::Compute;
use pcpo_wgpu::device::tensor::upload;
use pcpo_wgpu::ops::credit_reduce::{self, StepStats, credit_reduce};
use pcpo_wgpu::ops::policy_objective::{STATS, SampleStats};

use super::{draw, error};
use crate::support::gpu;

fn on_device(
    compute: &Compute,
    stats: &[SampleStats],
    steps: usize,
    weights: &[f32],
) -> Vec<StepStats> {
    let shape = [steps, stats.len() / steps, STATS];
    let tensor = upload(bytemuck::cast_slice(stats), shape, &compute.burn);
    credit_reduce(compute, &tensor, weights).unwrap()
}

fn flat(rows: &[StepStats]) -> &[f32] {
    bytemuck::cast_slice(rows)
}

#[test]
fn credit_reduce_matches_its_reference() {
    let gpu = gpu();
    for (steps, samples) in [(1, 1), (3, 5), (20, 300), (50, 64)] {
        let stats: Vec<SampleStats> =
            bytemuck::cast_slice(&draw(8, steps * samples * STATS)).to_vec();
        let weights = draw(9, steps);
        let found = on_device(&gpu, &stats, steps, &weights);
        let expected = credit_reduce::reference(&stats, steps, &weights);
        assert!(error(flat(&found), flat(&expected)) < 1e-5, "{steps} x {samples}");
    }
}

#[test]
fn credit_reduce_reference_is_the_mean_and_deviation() {
    let a =
        SampleStats { log_rho: 1.0, loss: 10.0, clipped: 1.0, approx_kl: 0.5, kl: 0.0, push: 2.0 };
    let b =
        SampleStats { log_rho: 3.0, loss: 20.0, clipped: 0.0, approx_kl: 4.5, kl: 1.0, push: 4.0 };
    let row = credit_reduce::reference(&[a, b], 1, &[0.5])[0];
    let expected = StepStats {
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

/// What an update is like: log rho near 1e-4, spread by a tenth of it. A variance by mean of
/// squares minus square of mean has no digit left in f32 there.
#[test]
fn the_deviation_of_small_ratios_around_a_larger_mean_is_right() {
    let (samples, mean, spread) = (256, 1e-4f32, 1e-5f32);
    let log_rhos: Vec<f32> = draw(10, samples).iter().map(|z| mean + spread * z).collect();
    let stats: Vec<SampleStats> = log_rhos
        .iter()
        .map(|&log_rho| SampleStats {
            log_rho,
            approx_kl: 0.5 * log_rho * log_rho,
            ..Default::default()
        })
        .collect();
    let n = samples as f64;
    let exact_mean = log_rhos.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let variance = log_rhos.iter().map(|&v| (f64::from(v) - exact_mean).powi(2)).sum::<f64>() / n;
    let approx_kl = log_rhos.iter().map(|&v| 0.5 * f64::from(v).powi(2)).sum::<f64>() / n;
    assert!((0.5e-5..2e-5).contains(&variance.sqrt()) && approx_kl > 1e-9);
    let reference = credit_reduce::reference(&stats, 1, &[1.0]);
    for row in [on_device(&gpu(), &stats, 1, &[1.0])[0], reference[0]] {
        let close = |found: f32, exact: f64| (f64::from(found) - exact).abs() < 1e-4 * exact;
        assert!(close(row.log_rho_mean, exact_mean), "{row:?}");
        assert!(close(row.log_rho_std, variance.sqrt()), "{row:?} is not {:e}", variance.sqrt());
        assert!(close(row.approx_kl, approx_kl), "{row:?} is not {approx_kl:e}");
    }
}
