//! The memory that a run will need, from shapes alone: nothing is loaded but configurations and the headers of weight
//! files. `pcpo-wgpu plan` prints it, `train` refuses what cannot fit.
//!
//! Weights, adapters and what a rollout keeps are exact. What a network's blocks hold while they run is counted in the
//! sizes of their tensors, with factors that say how many of a kind are alive at once. The factors were measured (README,
//! "Measured"), and the test `memory_estimates_are_within_20_percent_of_the_measured_peak` holds them to it.

use anyhow::{Result, bail};

use crate::device::rows_at_a_time;
use crate::model::pipeline::Family;
use crate::model::weights::Storage;
use crate::ops::Guidance;
use crate::settings::Settings;
use crate::shapes::{Block, Shapes};

/// How many tensors of each kind are alive at once in a block.
#[derive(Clone, Copy)]
struct Factors {
    stream: f64,
    wide: f64,
    scores: f64,
}

/// Without gradients.
const INFERENCE: Factors = Factors { stream: 3.0, wide: 1.0, scores: 3.0 };
/// What autodiff holds of a block between the passes: of a UNet's, and of a transformer's with its modulations.
const SAVED_UNET: Factors = Factors { stream: 8.0, wide: 2.0, scores: 1.5 };
const SAVED_TRANSFORMER: Factors = Factors { stream: 14.5, wide: 3.0, scores: 1.5 };
/// What the backward pass of a block holds besides.
const BACKWARD: Factors = Factors { stream: 3.0, wide: 1.0, scores: 2.5 };
/// What several threads of the CPU take beside what they hold, where all blocks of a UNet are tracked at once: its tensors
/// of many sizes leave holes in the heaps, 1.4 to 1.9 times by how chance puts the threads on them (1.4 with one heap for
/// all, which costs time).
const HEAPS: f64 = 1.6;
/// A decoder's, of its largest level.
const DECODER: Factors = Factors { stream: 6.0, wide: 0.0, scores: 3.0 };
/// Values under a convolution's kernel: the CPU and software Vulkan lay them out for a matrix product.
const KERNEL: f64 = 9.0;
/// The program itself and its threads; on a GPU the driver's part, and on software Vulkan the kernels that it compiles
/// into the program's memory, those of the backward pass among them.
const PROGRAM: f64 = 45e6;
const PROGRAM_GPU: f64 = 250e6;
const PROGRAM_SOFTWARE: f64 = 370e6;
/// Scores that an attention pass without gradients holds at most on a GPU: it splits beyond.
const MAX_SCORES: f64 = (1 << 24) as f64;

impl Factors {
    fn bytes(&self, b: &Block, rows: f64, scores: f64) -> f64 {
        4.0 * (rows * (self.stream * b.stream + self.wide * b.wide) + self.scores * scores)
    }
}

/// The estimate of a run, in bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Frozen weights on the device: network, VAE and text encoders.
    pub weights: f64,
    /// The program, and the largest weight in f32 where weights are stored smaller.
    pub program: f64,
    /// The adapter with its gradients and the optimizer's moments.
    pub adapter: f64,
    /// Latents and predictions that a rollout keeps for the update.
    pub kept: f64,
    /// Whether these are in another memory than the device's.
    pub on_host: bool,
    /// Activations of each phase.
    pub rollout: f64,
    pub update: f64,
    pub decode: f64,
    /// Bytes that the device offers, where it says so.
    pub offered: Option<u64>,
}

impl Plan {
    /// What stays through all phases.
    pub fn resident(&self) -> f64 {
        self.weights + self.program + self.adapter + if self.on_host { 0.0 } else { self.kept }
    }

    pub fn peak(&self) -> f64 {
        self.resident() + self.rollout.max(self.update).max(self.decode)
    }
}

/// Which device an estimate is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    pub gpu: bool,
    /// A GPU path that computes on the CPU.
    pub software: bool,
    /// Batches that run at once: one a core on the CPU.
    pub threads: usize,
    /// Bytes that it offers, where it says so.
    pub offered: Option<u64>,
}

impl Target {
    pub fn of(compute: &crate::device::Compute) -> Self {
        let gpu = compute.gpu.is_some();
        Self { gpu, software: compute.software, threads: compute.threads(), offered: compute.memory }
    }

    /// With a limit in GiB in place of what the device says.
    pub fn with_limit(self, gib: Option<f64>) -> Self {
        Self { offered: gib.map(|g| (g * f64::from(1 << 30)) as u64).or(self.offered), ..self }
    }
}

/// Attention scores of all rows that a block is differentiated for at a time: 256 MiB a copy.
const SCORES_AT_ONCE: f64 = (1 << 26) as f64;

/// Rows that a block is differentiated for at a time. A function of the shapes alone, so that a run resumes to the bit.
pub fn rows_at_once(shapes: &Shapes) -> usize {
    let most = shapes.blocks.iter().map(|b| b.scores).fold(1.0, f64::max);
    ((SCORES_AT_ONCE / most) as usize).max(1)
}

/// Estimates a run.
pub fn plan(shapes: &Shapes, s: &Settings, target: Target) -> Plan {
    let guided = !shapes.distilled && Guidance::new(s.guidance_scale) != Guidance::Off;
    let batch = rows_at_a_time(target.threads, s.images_per_update(), s.batch);
    // An update runs its own share of the batches, a rollout all of them.
    let per_update = s.images_per_update().div_ceil(batch);
    let at_once = |batches: usize| target.threads.min(batches).max(1) as f64;
    let (sampling, updating) = (at_once(per_update * s.updates_per_epoch), at_once(per_update));
    let rows = (batch * if guided { 2 } else { 1 }) as f64;
    // The CPU's attention without gradients never holds its scores.
    let inference_scores = |b: &Block| if target.gpu { (rows * b.scores).min(MAX_SCORES) } else { 0.0 };
    // A convolution works on one image at a time.
    let unet = shapes.family == Family::StableDiffusion;
    let convolution = |b: &Block| if unet { 4.0 * KERNEL * b.stream } else { 0.0 };
    let inference = |b: &Block| {
        INFERENCE.bytes(b, rows, inference_scores(b)) + 4.0 * rows * (b.input - b.stream).max(0.0) + convolution(b)
    };
    let tracked = if s.activation_checkpointing { rows.min(rows_at_once(shapes) as f64) } else { rows };
    let saved = |b: &Block| if unet { SAVED_UNET } else { SAVED_TRANSFORMER }.bytes(b, tracked, tracked * b.scores);
    let backward = |b: &Block| BACKWARD.bytes(b, tracked, tracked * b.scores) + convolution(b);
    let largest = |f: &dyn Fn(&Block) -> f64| shapes.blocks.iter().map(f).fold(0.0, f64::max);
    let rollout = largest(&inference);
    // Blocks share the tensors that only pass through them, so a block's input costs its stream.
    let update = match s.activation_checkpointing {
        true => largest(&|b| saved(b) + backward(b)) + shapes.blocks.iter().map(|b| 4.0 * rows * b.stream).sum::<f64>(),
        false => shapes.blocks.iter().map(saved).sum::<f64>() + largest(&backward),
    };
    let holes = unet && !target.gpu && updating > 1.0 && !s.activation_checkpointing;
    let heaps = if holes { HEAPS } else { 1.0 };
    let decode_scores = |b: &Block| if target.gpu { b.scores.min(MAX_SCORES) } else { 0.0 };
    let decode = shapes.decoder.iter().map(|b| DECODER.bytes(b, 1.0, decode_scores(b))).fold(0.0, f64::max);
    let parameters: f64 = shapes.targets.iter().map(|(i, o)| ((i + o) * s.rank) as f64).sum();
    let steps = s.train_steps.unwrap_or(s.steps - usize::from(!s.train_last_step)) as f64;
    let visits = 2.0 * 4.0 * shapes.latent * steps;
    // The host keeps all visits; it is the device's own memory unless the device is a card.
    let card = target.gpu && !target.software;
    let program = match (target.gpu, target.software) {
        (false, _) => PROGRAM,
        (true, false) => PROGRAM_GPU,
        (true, true) => PROGRAM_SOFTWARE,
    };
    let cast = if s.storage == Storage::F32 { 0.0 } else { 4.0 * shapes.largest * sampling };
    Plan {
        weights: shapes.weights,
        program: program + cast,
        // On the host the values and two moments, now and before the last step, and a sum of gradients; on the device
        // tracked and frozen, and gradients.
        adapter: 4.0 * parameters * (7.0 + 4.0 * updating),
        kept: visits * s.images_per_epoch as f64,
        on_host: card,
        rollout: rollout * sampling + if target.gpu { visits * batch as f64 } else { 0.0 },
        update: update * updating * heaps,
        decode: decode * sampling,
        offered: target.offered,
    }
}

/// The largest `--batch` whose estimate fits, if any does.
pub fn largest_batch(shapes: &Shapes, s: &Settings, target: Target) -> Option<usize> {
    let offered = target.offered? as f64;
    let fits = |batch: usize| plan(shapes, &Settings { batch, ..s.clone() }, target).peak() <= offered;
    (1..=s.images_per_update()).rev().find(|&b| fits(b))
}

/// Refuses a run that cannot fit.
///
/// # Errors
/// Names the estimate, what the device offers, and the settings to change.
pub fn check(shapes: &Shapes, s: &Settings, target: Target) -> Result<Plan> {
    let plan = plan(shapes, s, target);
    let Some(offered) = target.offered.filter(|&o| plan.peak() > o as f64) else { return Ok(plan) };
    let text = |b: f64| crate::memory::text(b as u64);
    let smaller = match largest_batch(shapes, s, target) {
        Some(batch) => format!("use --batch {batch}"),
        None => way_out(shapes, s, target),
    };
    bail!(
        "--batch {}: the run needs about {}, {} of it for weights, and the device offers {}; {smaller}, or --memory GIB if it offers more",
        s.batch,
        text(plan.peak()),
        text(plan.weights),
        crate::memory::text(offered)
    )
}

/// What helps where no batch fits.
fn way_out(shapes: &Shapes, s: &Settings, target: Target) -> String {
    if !s.activation_checkpointing {
        return "use --activation-checkpointing true and --batch 1".into();
    }
    let smaller = match s.storage {
        Storage::F32 => Some("f16"),
        Storage::F16 => Some("q8"),
        Storage::Q8 => Some("q4"),
        Storage::Q4 => None,
    };
    let embeddings = if s.embeddings.is_none() && shapes.family.is_flow() { ", --embeddings FILE" } else { "" };
    let least = plan(shapes, &Settings { batch: 1, ..s.clone() }, target);
    match smaller {
        Some(storage) => format!(
            "even --batch 1 needs {}: use --storage {storage}{embeddings} or a smaller --resolution",
            crate::memory::text(least.peak() as u64)
        ),
        None => format!("use a smaller --resolution{embeddings}"),
    }
}

/// The table of `pcpo-wgpu plan`.
pub fn text(plan: &Plan, s: &Settings, largest: Option<usize>) -> String {
    let mib = |b: f64| format!("{:>10.0} MiB", b / f64::from(1 << 20));
    let storage = format!("weights ({:?})", s.storage).to_lowercase();
    let mut out = format!("{storage:<20} {}\n", mib(plan.weights));
    for (name, bytes) in [
        ("program and casts", plan.program),
        ("adapter", plan.adapter),
        ("kept by rollout", plan.kept),
        ("rollout", plan.rollout),
        ("update", plan.update),
        ("decode", plan.decode),
    ] {
        out += &format!("{name:<20} {}\n", mib(bytes));
    }
    out += &format!(
        "peak                 {}   weights, program, adapter, kept, and the largest phase\n",
        mib(plan.peak())
    );
    if let Some(offered) = plan.offered {
        out += &format!("the device offers    {}\n", mib(offered as f64));
        out += &match largest {
            Some(batch) => format!("largest --batch      {batch:>10}\n"),
            None => "no --batch fits\n".to_string(),
        };
    }
    out
}
