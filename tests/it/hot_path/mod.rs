//! Each operation of the hot path: shader against CPU reference, reference against f64, gradient
//! against central differences, repeatability. One file an operation, by the kernels' names:
//! philox_noise, ddim_step and flow_step with step_log_prob, log_ratio with log_ratio_finish,
//! policy_objective, credit_reduce; both widths of elements are among SHAPES.

mod advantage;
mod credit_reduce;
mod ddim_step;
mod flow_step;
mod log_ratio;
mod philox_noise;
mod policy_objective;

use burn::tensor::Tensor;
use pcpo_wgpu::device::Compute;
use pcpo_wgpu::device::tensor::upload;
use pcpo_wgpu::ops::{Coefficients, Guidance, NoiseKey, StepContext};
use pcpo_wgpu::philox::{Stream, noise};
use pcpo_wgpu::schedule::credit::{Credit, apply};
use pcpo_wgpu::schedule::{Ddim, Flow, Grid, Sampler, Sampling, Schedule, Step};
use pcpo_wgpu::tools::bench::{Case, Operation};
use pcpo_wgpu::tools::errors::largest_error;

use crate::support::gpu;

const KEY: NoiseKey = NoiseKey { seed: 0x0123_4567_89ab_cdef, first_image: 1000, step: 5 };

/// Batches from 1 to 64, and sizes that are no multiple of a workgroup, a quad or a block.
const SHAPES: [[usize; 4]; 6] =
    [[1, 4, 64, 64], [3, 4, 9, 7], [2, 3, 5, 5], [2, 16, 128, 128], [64, 4, 16, 16], [5, 1, 1, 1]];

fn draw(image: u32, n: usize) -> Vec<f32> {
    noise(3, Stream::InitialNoise, image, 0, n)
}

fn tensor(compute: &Compute, values: &[f32], shape: [usize; 4]) -> Tensor<4> {
    upload(values, shape, &compute.burn)
}

fn context(compute: &Compute, guidance: Guidance, coefficients: Coefficients) -> StepContext<'_> {
    StepContext { compute, guidance, coefficients, key: KEY }
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

/// A flow's steps at published settings.
fn flow_steps(sampler: Sampler, rule: Credit) -> Vec<Step> {
    let schedule = Schedule::Flow(Flow::shifted(3.0));
    let (steps, eta) = (sampler.default_steps(), sampler.default_eta());
    let sampling = Sampling { sampler, steps, eta, grid: Grid::Shifted, shift: None, tokens: 0 };
    apply(rule, &schedule, schedule.steps(&sampling).unwrap(), None).unwrap()
}

fn noise_of(batch: usize, dim: usize) -> Vec<f32> {
    pcpo_wgpu::ops::philox_noise::reference(batch, dim, KEY)
}

#[test]
fn the_three_paths_of_every_benchmark_agree() {
    for compute in [gpu(), Compute::cpu()] {
        for (batch, shape) in [(1, [4, 64, 64]), (3, [4, 9, 7])] {
            let case = Case::new(&compute, batch, shape).unwrap();
            Operation::ALL.iter().for_each(|op| case.verify(*op).unwrap());
        }
    }
}
