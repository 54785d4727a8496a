//! Timing the hot path: each operation as shader, as CPU reference and as Burn tensor operations on
//! the same device, with the values compared before anything is timed. `pcpo-wgpu bench` and
//! `cargo bench` share it.

use anyhow::{Result, ensure};
use burn::tensor::{Distribution, Tensor};

use super::errors::largest_error;
use super::timing::{Selection, force, header, medians, row};
use crate::device::Compute;
use crate::device::tensor::{read, upload};
use crate::ops::credit_reduce::{self, StepStats, credit_reduce};
use crate::ops::ddim_step::{self, ddim_step};
use crate::ops::flow_step::{self, flow_step};
use crate::ops::log_ratio::{self, HostPredictions, Predictions, log_ratio};
use crate::ops::philox_noise::{self, philox_noise};
use crate::ops::policy_objective::{
    self, GuidanceGradient, Objective, STATS, SampleStats, Surrogate, policy_objective,
};
use crate::ops::{Coefficients, Guidance, NoiseKey, StepContext, tensor_ops};
use crate::philox::{Stream, noise};
use crate::schedule::credit::{self, Credit};
use crate::schedule::{Ddim, Flow, Grid, Sampler, Sampling, Schedule};

/// The reduction of an update's statistics, which has a row of its own.
const CREDIT_REDUCE: &str = "credit_reduce";

/// The names of the hot path's rows.
pub fn names() -> impl Iterator<Item = &'static str> {
    Operation::ALL.into_iter().map(Operation::name).chain([CREDIT_REDUCE])
}

/// The operations that have all three paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    PhiloxNoise,
    DdimStep,
    FlowStep,
    LogRatio,
    PolicyObjective,
}

impl Operation {
    pub const ALL: [Self; 5] =
        [Self::PhiloxNoise, Self::DdimStep, Self::FlowStep, Self::LogRatio, Self::PolicyObjective];

    /// Its one name.
    pub fn name(self) -> &'static str {
        match self {
            Self::PhiloxNoise => "philox_noise",
            Self::DdimStep => "ddim_step",
            Self::FlowStep => "flow_step",
            Self::LogRatio => "log_ratio",
            Self::PolicyObjective => "policy_objective",
        }
    }

    /// Latents that it must move at least: what it reads and writes once.
    fn latents(self) -> usize {
        match self {
            Self::PhiloxNoise => 1,
            Self::LogRatio => 3,
            Self::DdimStep | Self::FlowStep | Self::PolicyObjective => 5,
        }
    }
}

/// Inputs on the host.
struct HostInputs {
    x: Vec<f32>,
    out: Vec<f32>,
    old: Vec<f32>,
}

/// One operation's inputs at one size, on the host and on the device.
pub struct Case<'a> {
    compute: &'a Compute,
    batch: usize,
    shape: [usize; 4],
    host: HostInputs,
    x: Tensor<4>,
    out: Tensor<4>,
    old: Tensor<4>,
    z: Tensor<4>,
    advantage: Vec<f32>,
    advantage_tensor: Tensor<1>,
    surrogate: Surrogate,
    diffusion: StepContext<'a>,
    /// A Flow-GRPO step's.
    flow: StepContext<'a>,
}

impl<'a> Case<'a> {
    /// Inputs for `batch` latents of `[c, h, w]`, with guidance: latents, network output and old
    /// prediction near it.
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(compute: &'a Compute, batch: usize, [c, h, w]: [usize; 3]) -> Result<Self> {
        let (n, shape) = (batch * c * h * w, [batch, c, h, w]);
        let draw = |image: u32, n: usize| noise(1, Stream::InitialNoise, image, 0, n);
        let (x, out) = (draw(0, n), draw(1, 2 * n));
        let guided = (0..n).map(|i| out[i] + 3.0 * (out[i + n] - out[i]));
        let old: Vec<f32> = guided.zip(draw(2, n)).map(|(p, d)| p + 1e-3 * d).collect();
        let steps = |schedule: Schedule, sampler: Sampler| {
            let (steps, eta) = (sampler.default_steps(), sampler.default_eta());
            let sampling =
                Sampling { sampler, steps, eta, grid: Grid::Shifted, shift: None, tokens: 0 };
            let native = schedule.steps(&sampling)?;
            credit::apply(Credit::Proportionate, &schedule, native, None)
        };
        let diffusion = steps(Schedule::Ddim(Ddim::stable_diffusion()), Sampler::Ddim)?;
        let flow = steps(Schedule::Flow(Flow::shifted(3.0)), Sampler::FlowGrpo)?;
        let key = NoiseKey { seed: 7, first_image: 11, step: 3 };
        let context = |coefficients| StepContext {
            compute,
            guidance: Guidance::Scale(3.0),
            coefficients,
            key,
        };
        let advantage: Vec<f32> = (0..batch).map(|i| [1.0, -0.5][i % 2]).collect();
        let device = &compute.burn;
        Ok(Self {
            batch,
            shape,
            x: upload(&x, shape, device),
            out: upload(&out, [2 * batch, c, h, w], device),
            old: upload(&old, shape, device),
            z: philox_noise(compute, shape, key),
            host: HostInputs { x, out, old },
            advantage_tensor: upload(&advantage, [batch], device),
            advantage,
            surrogate: Surrogate {
                objective: Objective::LogHinge,
                clip_range: 1e-4,
                beta: 0.0,
                guidance_gradient: GuidanceGradient::Both,
                scale: 1.0 / batch as f32,
            },
            diffusion: context(Coefficients::from(&diffusion[25])),
            flow: context(Coefficients::from(&flow[5])),
            compute,
        })
    }

    /// Bytes that the operation must move at least.
    fn bytes(&self, operation: Operation) -> usize {
        operation.latents() * 4 * self.shape.iter().product::<usize>()
    }

    /// The shader (on the CPU device: its reference through tensors). Returns an output to compare.
    pub fn shader(&self, operation: Operation) -> Tensor<1> {
        let (s, flow, x, out) = (&self.diffusion, &self.flow, &self.x, &self.out);
        let p = Predictions { model_out: out, old: &self.old, base: None };
        let image = match operation {
            Operation::PhiloxNoise => philox_noise(self.compute, self.shape, s.key),
            Operation::DdimStep => ddim_step(s, x, out).x_prev,
            Operation::FlowStep => flow_step(flow, x, out).x_prev,
            Operation::LogRatio => return log_ratio(s, &p).reshape([-1]),
            Operation::PolicyObjective => {
                policy_objective(s, &self.surrogate, &p, &self.advantage).gradient
            }
        };
        image.reshape([-1])
    }

    /// The CPU reference on slices.
    pub fn reference(&self, operation: Operation) -> Vec<f32> {
        let HostInputs { x, out, old } = &self.host;
        let (s, batch) = (&self.diffusion, self.batch);
        let noise = || philox_noise::reference(batch, old.len() / batch, s.key);
        let p = HostPredictions { model_out: out, old, base: None };
        match operation {
            Operation::PhiloxNoise => noise(),
            Operation::DdimStep => ddim_step::reference(s, x, out, batch).x_prev,
            Operation::FlowStep => flow_step::reference(&self.flow, x, out, batch).x_prev,
            Operation::LogRatio => {
                let rows = log_ratio::reference(s, &p, &noise(), batch);
                rows.iter().map(|r| r.log_rho).collect()
            }
            Operation::PolicyObjective => {
                let noise = noise();
                let rows = log_ratio::reference(s, &p, &noise, batch);
                let advantage = &self.advantage;
                policy_objective::reference(s, &self.surrogate, &p, &noise, &rows, advantage)
                    .gradient
            }
        }
    }

    /// The same mathematics in Burn tensor operations. A step draws its noise, or is given that of
    /// the shader to compare values; the update's noise is ready made, as a trainer would have
    /// stored it.
    pub fn tensor_operations(&self, operation: Operation, own_noise: bool) -> Tensor<1> {
        let given = (!own_noise).then_some(&self.z);
        let (x, out, old, z) = (&self.x, &self.out, &self.old, &self.z);
        let step = |s: &StepContext| {
            let done = tensor_ops::sampler_step(x, out, given, s.guidance, &s.coefficients);
            self.force(&done.prediction);
            self.force(&done.log_prob);
            done.x_prev.reshape([-1])
        };
        let (g, c) = (self.diffusion.guidance, &self.diffusion.coefficients);
        match operation {
            Operation::PhiloxNoise => {
                let own = || x.random_like(Distribution::Normal(0.0, 1.0));
                given.cloned().unwrap_or_else(own).reshape([-1])
            }
            Operation::DdimStep => step(&self.diffusion),
            Operation::FlowStep => step(&self.flow),
            Operation::LogRatio => tensor_ops::log_ratio(out, old, z, g, c),
            Operation::PolicyObjective => {
                let (s, advantage) = (&self.surrogate, &self.advantage_tensor);
                tensor_ops::policy_objective(s, out, old, z, advantage, g, c).reshape([-1])
            }
        }
    }

    /// Runs [`Self::tensor_operations`] for its time.
    pub fn run_tensor_operations(&self, operation: Operation) {
        self.force(&self.tensor_operations(operation, true));
    }

    fn force<const D: usize>(&self, result: &Tensor<D>) {
        force(self.compute, result);
    }

    /// Compares the three paths.
    ///
    /// # Errors
    /// When one differs by more than 1e-4 of the largest value.
    pub fn verify(&self, operation: Operation) -> Result<()> {
        let expected = self.reference(operation);
        // log rho is a mean of terms that nearly cancel: its scale is that of the terms, w |Delta
        // z|, Delta being 1e-3.
        let scale = match operation {
            Operation::LogRatio => 0.6e-3 * self.diffusion.coefficients.w,
            Operation::PhiloxNoise
            | Operation::DdimStep
            | Operation::FlowStep
            | Operation::PolicyObjective => expected.iter().fold(0f32, |m, v| m.max(v.abs())),
        };
        for (path, found) in
            [("shader", self.shader(operation)), ("Burn", self.tensor_operations(operation, false))]
        {
            let mut found = read(&found)?;
            // The shader's rows are (log rho, KL).
            if found.len() == 2 * expected.len() {
                found = found.into_iter().step_by(2).collect();
            }
            let worst = largest_error(&found, &expected);
            ensure!(
                worst <= f64::from(1e-4 * scale),
                "{}: the {path} path is off by {worst:e} of {scale:e} at {:?}",
                operation.name(),
                self.shape
            );
        }
        Ok(())
    }

    /// Waits for the device.
    fn sync(&self) -> Result<()> {
        self.compute.sync()
    }

    /// Seconds of (shader, CPU reference, Burn operations).
    ///
    /// # Errors
    /// When the device fails.
    pub fn times(&self, operation: Operation) -> Result<[f64; 3]> {
        // The device's two paths take turns; the reference is apart, since the device falls asleep
        // while it computes.
        let [shader, burn] = medians([
            &mut || {
                drop(self.shader(operation));
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

/// A row for `credit_reduce`, its table read back: shader, CPU reference and Burn operations,
/// values checked first.
///
/// # Errors
/// When two disagree or the device fails.
pub fn reduction_row(compute: &Compute, steps: usize, samples: usize) -> Result<String> {
    let stats = noise(1, Stream::InitialNoise, 5, 0, steps * samples * STATS);
    let weights = vec![0.5; steps];
    let tensor = upload(&stats, [steps, samples, STATS], &compute.burn);
    let weight = upload(&weights, [steps], &compute.burn);
    let found = credit_reduce(compute, &tensor, &weights)?;
    let on_host: &[SampleStats] = bytemuck::cast_slice(&stats);
    let expected = credit_reduce::reference(on_host, steps, &weights);
    let deviations = |rows: &[StepStats]| rows.iter().map(|r| r.log_rho_std).collect::<Vec<f32>>();
    let burn: Vec<f32> =
        read(&tensor_ops::credit_reduce(&tensor, &weight))?.chunks(7).map(|row| row[1]).collect();
    for found in [deviations(&found), burn] {
        ensure!(
            largest_error(&found, &deviations(&expected)) <= 1e-4,
            "credit_reduce: shader, reference and Burn disagree at {steps} x {samples}"
        );
    }
    let [shader, burn] =
        medians([&mut || credit_reduce(compute, &tensor, &weights).map(drop), &mut || {
            read(&tensor_ops::credit_reduce(&tensor, &weight)).map(drop)
        }])?;
    let [reference] = medians([&mut || {
        std::hint::black_box(credit_reduce::reference(on_host, steps, &weights));
        Ok(())
    }])?;
    Ok(row(CREDIT_REDUCE, &format!("{steps} x {samples}"), [shader, reference, burn]))
}

/// The hot path's rows of `pcpo-wgpu bench`, with their head, line by line as they are measured.
///
/// # Errors
/// When paths disagree or the device fails.
pub fn short_table(
    compute: &Compute,
    only: &Selection,
    mut line: impl FnMut(String),
) -> Result<()> {
    let sizes = [(8, [4, 16, 16]), (1, [4, 64, 64]), (8, [4, 64, 64]), (8, [16, 128, 128])];
    line(format!("{} {:>7} {:>10}", header(), "GB/s", "of a copy"));
    let operations: Vec<Operation> =
        Operation::ALL.into_iter().filter(|o| only.takes(o.name())).collect();
    for (batch, shape) in sizes.into_iter().filter(|_| !operations.is_empty()) {
        let case = Case::new(compute, batch, shape)?;
        let bytes = |n: usize, seconds: f64| n as f64 / seconds / 1e9;
        let copy = bytes(2 * 4 * case.shape.iter().product::<usize>(), case.copy()?);
        for &operation in &operations {
            case.verify(operation)?;
            let times = case.times(operation)?;
            let rate = bytes(case.bytes(operation), times[0]);
            let size = format!("{batch} x {}x{}x{}", shape[0], shape[1], shape[2]);
            let row = row(operation.name(), &size, times);
            line(format!("{row} {rate:>7.2} {:>9.0}%", 100.0 * rate / copy));
        }
    }
    if only.takes(CREDIT_REDUCE) {
        line(reduction_row(compute, 20, 32)?);
    }
    Ok(())
}
