//! Timing the hot path: each operation as shader, as CPU reference and as Burn tensor operations on the same device,
//! with the values compared before anything is timed. `pcpo-wgpu bench` and `cargo bench` share it.

use std::time::Instant;

use anyhow::{Result, ensure};
use burn::tensor::{Tensor, TensorData};

use crate::check::largest_error;
use crate::credit::{self, Credit};
use crate::device::Compute;
use crate::ops::credit_reduce::{self, StepStats, credit_reduce};
use crate::ops::ddim_step::{self, ddim_step};
use crate::ops::flow_step::{self, flow_step};
use crate::ops::log_ratio::{self, log_ratio};
use crate::ops::policy_objective::{self, GuidanceGradient, Objective, STATS, Surrogate, policy_objective};
use crate::ops::{Coefficients, Guidance, NoiseKey, philox, read, tensor_ops};
use crate::philox::{Stream, noise};
use crate::schedule::{Flow, Grid, Sampler, Sampling, Schedule, ddim::Ddim};

/// The operations that have all three paths.
pub const OPERATIONS: [&str; 5] = ["philox_noise", "ddim_step", "flow_step", "log_ratio", "policy_objective"];

/// One operation's inputs at one size, on the host and on the device.
pub struct Case<'a> {
    compute: &'a Compute,
    batch: usize,
    shape: [usize; 4],
    host: [Vec<f32>; 3],
    x: Tensor<4>,
    out: Tensor<4>,
    old: Tensor<4>,
    z: Tensor<4>,
    advantage: Vec<f32>,
    advantage_tensor: Tensor<1>,
    guidance: Guidance,
    surrogate: Surrogate,
    c: Coefficients,
    /// A Flow-GRPO step's.
    flow: Coefficients,
    key: NoiseKey,
}

impl<'a> Case<'a> {
    /// Inputs for `batch` latents of `[c, h, w]`, with guidance: latents, network output and old prediction near it.
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(compute: &'a Compute, batch: usize, [c, h, w]: [usize; 3]) -> Result<Self> {
        let (n, shape) = (batch * c * h * w, [batch, c, h, w]);
        let draw = |image: u32, n: usize| noise(1, Stream::InitialNoise, image, 0, n);
        let (x, out) = (draw(0, n), draw(1, 2 * n));
        let guidance = Guidance::Scale(3.0);
        let old: Vec<f32> =
            (0..n).map(|i| out[i] + 3.0 * (out[i + n] - out[i])).zip(draw(2, n)).map(|(p, d)| p + 1e-3 * d).collect();
        let tensor =
            |v: &[f32], shape: [usize; 4]| Tensor::from_data(TensorData::new(v.to_vec(), shape), &compute.burn);
        let steps = |schedule: Schedule, sampler: Sampler| {
            let (steps, eta) = (sampler.default_steps(), sampler.default_eta());
            let sampling = Sampling { sampler, steps, eta, grid: Grid::Shifted, shift: None, tokens: 0 };
            let native = schedule.steps(&sampling).expect("published settings are valid");
            credit::apply(Credit::Proportionate, &schedule, native, None).expect("the rule fits every family")
        };
        let diffusion = steps(Schedule::Ddim(Ddim::stable_diffusion()), Sampler::Ddim);
        let flow = steps(Schedule::Flow(Flow::shifted(3.0)), Sampler::FlowGrpo);
        let key = NoiseKey { seed: 7, first_image: 11, step: 3 };
        let advantage: Vec<f32> = (0..batch).map(|i| if i % 2 == 0 { 1.0 } else { -0.5 }).collect();
        Ok(Self {
            batch,
            shape,
            x: tensor(&x, shape),
            out: tensor(&out, [2 * batch, c, h, w]),
            old: tensor(&old, shape),
            z: philox::philox_noise(compute, shape, key)?,
            host: [x, out, old],
            advantage_tensor: Tensor::from_data(TensorData::new(advantage.clone(), [batch]), &compute.burn),
            advantage,
            guidance,
            surrogate: Surrogate {
                objective: Objective::LogHinge,
                xi: 1e-4,
                beta: 0.0,
                guidance_gradient: GuidanceGradient::Both,
                scale: 1.0 / batch as f32,
            },
            c: Coefficients::from(&diffusion[25]),
            flow: Coefficients::from(&flow[5]),
            key,
            compute,
        })
    }

    /// Bytes that the operation must move at least: what it reads and writes once.
    pub fn bytes(&self, operation: &str) -> usize {
        let latents = match operation {
            "philox_noise" => 1,
            "ddim_step" | "flow_step" => 5,
            "log_ratio" => 3,
            _ => 5,
        };
        latents * 4 * self.shape.iter().product::<usize>()
    }

    /// The shader (on the CPU device: its reference through tensors). Returns an output to compare.
    pub fn shader(&self, operation: &str) -> Result<Tensor<1>> {
        let (compute, x, out, old, g, key) = (self.compute, &self.x, &self.out, &self.old, self.guidance, self.key);
        let image = match operation {
            "philox_noise" => philox::philox_noise(compute, self.shape, key)?,
            "ddim_step" => ddim_step(compute, x, out, g, &self.c, key)?.x_prev,
            "flow_step" => flow_step(compute, x, out, g, &self.flow, key)?.x_prev,
            "log_ratio" => return Ok(log_ratio(compute, out, old, None, g, &self.c, key)?.reshape([-1])),
            _ => policy_objective(compute, &self.surrogate, out, old, None, &self.advantage, g, &self.c, key)?.0,
        };
        Ok(image.reshape([-1]))
    }

    /// The CPU reference on slices.
    pub fn reference(&self, operation: &str) -> Vec<f32> {
        let [x, out, old] = &self.host;
        match operation {
            "philox_noise" => philox::reference(self.batch, old.len() / self.batch, self.key),
            "ddim_step" => ddim_step::reference(x, out, self.batch, self.guidance, &self.c, self.key).0,
            "flow_step" => flow_step::reference(x, out, self.batch, self.guidance, &self.flow, self.key).0,
            "log_ratio" => {
                let rows = log_ratio::reference(out, old, None, self.batch, self.guidance, &self.c, self.key);
                rows.iter().map(|r| r[0]).collect()
            }
            _ => {
                let rows = log_ratio::reference(out, old, None, self.batch, self.guidance, &self.c, self.key).concat();
                let s = &self.surrogate;
                policy_objective::reference(s, out, old, None, &rows, &self.advantage, self.guidance, &self.c, self.key)
                    .0
            }
        }
    }

    /// The same mathematics in Burn tensor operations. A step draws its noise, or is given that of the shader to compare
    /// values; the update's noise is ready made, as a trainer would have stored it.
    pub fn tensor_operations(&self, operation: &str, own_noise: bool) -> Tensor<1> {
        let given = (!own_noise).then_some(&self.z);
        let (g, c) = (self.guidance, &self.c);
        match operation {
            "philox_noise" => {
                let own = || self.x.random_like(burn::tensor::Distribution::Normal(0.0, 1.0));
                given.cloned().unwrap_or_else(own).reshape([-1])
            }
            "ddim_step" | "flow_step" => {
                let c = if operation == "flow_step" { &self.flow } else { c };
                let (x_prev, p, log_prob) = tensor_ops::sampler_step(&self.x, &self.out, given, g, c);
                self.force(&p);
                self.force(&log_prob);
                x_prev.reshape([-1])
            }
            "log_ratio" => tensor_ops::log_ratio(&self.out, &self.old, &self.z, g, c),
            _ => {
                let s = &self.surrogate;
                tensor_ops::policy_objective(s, &self.out, &self.old, &self.z, &self.advantage_tensor, g, c)
                    .0
                    .reshape([-1])
            }
        }
    }

    /// Runs [`Self::tensor_operations`] for its time.
    pub fn run_tensor_operations(&self, operation: &str) {
        self.force(&self.tensor_operations(operation, true));
    }

    /// Makes a result: fusion computes nothing that nobody uses.
    fn force<const D: usize>(&self, result: &Tensor<D>) {
        if self.compute.gpu.is_some() {
            drop(crate::ops::gpu::buffer(result));
        }
    }

    /// Compares the three paths.
    ///
    /// # Errors
    /// When one differs by more than 1e-4 of the largest value.
    pub fn verify(&self, operation: &str) -> Result<()> {
        let expected = self.reference(operation);
        // log rho is a mean of terms that nearly cancel: its scale is that of the terms, w |Delta z|, Delta being 1e-3.
        let scale = match operation {
            "log_ratio" => 0.6e-3 * self.c.w,
            _ => expected.iter().fold(0f32, |m, v| m.max(v.abs())),
        };
        for (path, found) in [("shader", self.shader(operation)?), ("Burn", self.tensor_operations(operation, false))] {
            let mut found = read(&found)?;
            // The shader's rows are (log rho, KL).
            if found.len() == 2 * expected.len() {
                found = found.into_iter().step_by(2).collect();
            }
            let worst = largest_error(&found, &expected);
            ensure!(
                worst <= f64::from(1e-4 * scale),
                "{operation}: the {path} path is off by {worst:e} of {scale:e} at {:?}",
                self.shape
            );
        }
        Ok(())
    }

    /// Waits for everything that was submitted to the device.
    fn sync(&self) -> Result<()> {
        self.compute.sync()?;
        self.poll();
        Ok(())
    }

    /// Waits for our own submissions, which Burn does not know of.
    pub fn poll(&self) {
        if let Some(gpu) = &self.compute.gpu {
            let _ = gpu.device.poll(wgpu::PollType::wait_indefinitely());
        }
    }

    /// Seconds of (shader, CPU reference, Burn operations).
    ///
    /// # Errors
    /// When the device fails.
    pub fn times(&self, operation: &str) -> Result<[f64; 3]> {
        // The device's two paths take turns; the reference is apart, since the device falls asleep while it computes.
        let [shader, burn] = medians([
            &mut || {
                drop(self.shader(operation)?);
                self.sync()
            },
            &mut || {
                self.run_tensor_operations(operation);
                self.sync()
            },
        ])?;
        let [reference] = medians([&mut || {
            drop(std::hint::black_box(self.reference(operation)));
            Ok(())
        }])?;
        Ok([shader, reference, burn])
    }

    /// Seconds of a copy of one latent batch, through Burn.
    fn copy(&self) -> Result<f64> {
        let [seconds] = medians([&mut || {
            self.force(&(self.x.clone() + 1.0));
            self.sync()
        }])?;
        Ok(seconds)
    }
}

/// A row for `credit_reduce`, its table read back: shader, CPU reference and Burn operations, values checked first.
///
/// # Errors
/// When two disagree or the device fails.
pub fn reduction_row(compute: &Compute, steps: usize, samples: usize) -> Result<String> {
    let stats = noise(1, Stream::InitialNoise, 5, 0, steps * samples * STATS);
    let weights = vec![0.5; steps];
    let tensor = Tensor::<3>::from_data(TensorData::new(stats.clone(), [steps, samples, STATS]), &compute.burn);
    let weight = Tensor::<1>::from_data(TensorData::new(weights.clone(), [steps]), &compute.burn);
    let (found, expected) =
        (credit_reduce(compute, &tensor, &weights)?, credit_reduce::reference(&stats, steps, &weights));
    let deviations = |rows: &[StepStats]| rows.iter().map(|r| r.log_rho_std).collect::<Vec<f32>>();
    let burn: Vec<f32> = read(&tensor_ops::credit_reduce(&tensor, &weight))?.chunks(7).map(|row| row[1]).collect();
    for found in [deviations(&found), burn] {
        ensure!(
            largest_error(&found, &deviations(&expected)) <= 1e-4,
            "credit_reduce: shader, reference and Burn disagree at {steps} x {samples}"
        );
    }
    let [shader, burn] = medians([&mut || credit_reduce(compute, &tensor, &weights).map(drop), &mut || {
        read(&tensor_ops::credit_reduce(&tensor, &weight)).map(drop)
    }])?;
    let [reference] = medians([&mut || {
        std::hint::black_box(credit_reduce::reference(&stats, steps, &weights));
        Ok(())
    }])?;
    Ok(row("credit_reduce", &format!("{steps} x {samples}"), [shader, reference, burn]))
}

/// The head of a table of [`row`]s.
pub fn header() -> String {
    format!(
        "{:<18} {:>16} {:>12} {:>14} {:>12} {:>12}",
        "operation", "batch x latent", "shader ms", "reference ms", "Burn ms", "Burn/shader"
    )
}

/// One line of a table: seconds of (shader, CPU reference, Burn operations).
pub fn row(operation: &str, size: &str, [shader, reference, burn]: [f64; 3]) -> String {
    let ratio = burn / shader;
    let [shader, reference, burn] = [shader, reference, burn].map(|seconds| 1e3 * seconds);
    format!("{operation:<18} {size:>16} {shader:>12.3} {reference:>14.3} {burn:>12.3} {ratio:>11.1}x")
}

/// Runs of a path in a row: each is measured warm, as in a loop.
const ROW: usize = 5;

/// Median seconds of each path over at least two rounds and 0.2 s a path. In a round each path runs once for warmth and
/// [`ROW`] times for its time, so that a machine that slows down slows all of them.
fn medians<const N: usize>(mut paths: [&mut dyn FnMut() -> Result<()>; N]) -> Result<[f64; N]> {
    let (mut times, start) = (vec![Vec::new(); N], Instant::now());
    while times[0].len() < 2 * ROW || (start.elapsed().as_secs_f64() < 0.2 * N as f64 && times[0].len() < 40 * ROW) {
        for (path, times) in paths.iter_mut().zip(&mut times) {
            path()?;
            for _ in 0..ROW {
                let one = Instant::now();
                path()?;
                times.push(one.elapsed().as_secs_f64());
            }
        }
    }
    Ok(std::array::from_fn(|path| {
        times[path].sort_by(f64::total_cmp);
        times[path][times[path].len() / 2]
    }))
}

/// The table of `pcpo-wgpu bench`.
///
/// # Errors
/// When paths disagree or the device fails.
pub fn short_table(compute: &Compute) -> Result<()> {
    let sizes = [(8, [4, 16, 16]), (1, [4, 64, 64]), (8, [4, 64, 64]), (8, [16, 128, 128])];
    println!("{} {:>7} {:>10}", header(), "GB/s", "of a copy");
    for (batch, shape) in sizes {
        let case = Case::new(compute, batch, shape)?;
        let bytes = |n: usize, seconds: f64| n as f64 / seconds / 1e9;
        let copy = bytes(2 * 4 * case.shape.iter().product::<usize>(), case.copy()?);
        for operation in OPERATIONS {
            case.verify(operation)?;
            let times = case.times(operation)?;
            let rate = bytes(case.bytes(operation), times[0]);
            let size = format!("{batch} x {}x{}x{}", shape[0], shape[1], shape[2]);
            println!("{} {rate:>7.2} {:>9.0}%", row(operation, &size, times), 100.0 * rate / copy);
        }
    }
    println!("{}", reduction_row(compute, 20, 32)?);
    Ok(())
}
