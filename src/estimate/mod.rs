//! The memory that a run will need, from shapes alone: nothing is loaded but configurations and the
//! headers of weight files. `pcpo-wgpu plan` prints it, `train` refuses what cannot fit.
//!
//! Weights, adapters and what a rollout keeps are exact. What a network's blocks hold while they
//! run is counted in the sizes of their tensors, with factors that say how many of a kind are alive
//! at once. The factors were measured (docs/MEASURED.md), and the test
//! `memory_estimates_are_within_20_percent_of_the_measured_peak` holds them to it.

pub mod shapes;
pub mod streaming;
pub mod table;
pub mod target;

use anyhow::{Result, bail};

pub use self::shapes::Shapes;
use self::streaming::Streaming;
pub use self::target::Target;
use crate::config::{Rollout, Settings, Switch};
use crate::device::rows_at_a_time;
use crate::device::system::memory_text;
use crate::model::Storage;
use crate::model::config::{BlockShape, rows_at_once};
use crate::ops::Guidance;

/// How many tensors of each kind are alive at once in a block.
#[derive(Clone, Copy)]
struct Factors {
    stream: f64,
    wide: f64,
}

/// Without gradients.
const INFERENCE: Factors = Factors { stream: 3.0, wide: 1.0 };
/// What autodiff holds of a block between the passes: of a UNet's, whose resnets keep what their
/// norms take and whose transformer layers eleven tensors of the stream and the feed-forward's
/// widest, eight times as wide; and of a transformer's with its modulations.
const SAVED_UNET: Factors = Factors { stream: 2.0, wide: 2.4 };
const SAVED_TRANSFORMER: Factors = Factors { stream: 7.0, wide: 1.5 };
/// What the backward pass of a block holds besides.
const BACKWARD: Factors = Factors { stream: 4.5, wide: 1.2 };
/// What several threads of the CPU take beside what they hold, where all blocks of a UNet are
/// tracked at once: its tensors of many sizes leave holes in the heaps.
const HEAPS: f64 = 1.2;
/// A decoder's, of its largest level.
const DECODER: Factors = Factors { stream: 2.75, wide: 0.0 };
/// The program itself and its threads; on a GPU the driver's part, and on software Vulkan the
/// kernels that it compiles into the program's memory, those of the backward pass among them.
const PROGRAM: f64 = 45e6;
const PROGRAM_GPU: f64 = 250e6;
const PROGRAM_SOFTWARE: f64 = 260e6;

impl Factors {
    fn bytes(&self, b: &BlockShape, rows: f64) -> f64 {
        4.0 * rows * (self.stream * b.stream + self.wide * b.wide)
    }

    /// What is held of all transformer layers of a block.
    fn bytes_of_all(&self, b: &BlockShape, rows: f64) -> f64 {
        let more = (b.depth - 1.0).max(0.0);
        self.bytes(b, rows) + 4.0 * rows * more * (b.stream + self.wide * b.wide)
    }
}

/// The estimate of a run, in bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// Frozen weights on the device: network and VAE.
    pub weights: f64,
    /// Weights of reward models on the same device.
    pub reward: f64,
    /// The program, and the largest weight in f32 where weights are stored smaller.
    pub program: f64,
    /// The adapter with its gradients and the optimizer's moments.
    pub adapter: f64,
    /// Latents and predictions that a rollout keeps for the update, and the prompts' embeddings.
    pub kept: f64,
    /// Whether these are in another memory than the device's.
    pub on_host: bool,
    /// Text encoders with what they compute; they are dropped before the network is loaded.
    pub encode: f64,
    /// Activations of each phase.
    pub rollout: f64,
    pub update: f64,
    pub decode: f64,
    /// Bytes that the device offers, where it says so.
    pub offered: Option<u64>,
    /// Whether an update holds the activations of one block at a time.
    pub checkpointing: bool,
    /// Whether pictures are decoded in tiles.
    pub tiling: bool,
    /// Where blocks are read when their turn comes, what is read.
    pub streaming: Option<Streaming>,
}

impl Estimate {
    /// What stays through all phases of an epoch.
    pub fn resident(&self) -> f64 {
        self.weights
            + self.reward
            + self.program
            + self.adapter
            + if self.on_host { 0.0 } else { self.kept }
    }

    /// The most that is held at once.
    pub fn peak(&self) -> f64 {
        let epoch = self.resident() + self.rollout.max(self.update).max(self.decode);
        epoch.max(self.program + self.reward + self.encode)
    }
}

/// What a run's batches are like on a device.
struct Batches {
    /// Rows of the network in a batch of an update, guidance's second among them.
    rows: f64,
    /// The same of a rollout.
    drawn: f64,
    /// Images in a batch.
    images: f64,
    /// Batches that a rollout and an update run at once.
    sampling: f64,
    updating: f64,
    /// Batches of an epoch.
    per_epoch: usize,
}

impl Batches {
    fn of(shapes: &Shapes, s: &Settings, target: Target) -> Self {
        let guided = !shapes.distilled && Guidance::new(shapes.guidance) != Guidance::Off;
        // Branches of a root are one row of the network in an update.
        let batch = rows_at_a_time(target.layout, s.trajectories_per_update(), s.batch);
        let drawn = match &s.rollout {
            Rollout::Plain(_) => batch,
            // Branches end as images of their own.
            Rollout::Branching(b) => {
                let most = b.branch.iter().max().map_or(1, |k| k * s.trajectories());
                rows_at_a_time(target.layout, most, s.batch).max(batch)
            }
        };
        // An update runs its own share of the batches, a rollout all of them.
        let per_update = s.trajectories_per_update().div_ceil(batch);
        let at_once = |batches: usize| target.threads.min(batches).max(1) as f64;
        Self {
            rows: (batch * if guided { 2 } else { 1 }) as f64,
            drawn: (drawn * if guided { 2 } else { 1 }) as f64,
            images: batch as f64,
            sampling: at_once(per_update * s.updates_per_epoch),
            updating: at_once(per_update),
            per_epoch: per_update * s.updates_per_epoch,
        }
    }
}

/// Share of a device's memory that a run may be estimated to need without activation checkpointing
/// for it to be left off: estimates are within 20%.
const ROOM: f64 = 0.8;

/// Estimates a run. Where nothing is said of streaming, blocks are streamed where the device has no
/// room for all of them at any size of a batch.
pub fn estimate(shapes: &Shapes, s: &Settings, target: Target) -> Estimate {
    let streamed = || estimate_streamed(shapes, s, target);
    match s.stream_blocks {
        Switch::True => streamed(),
        Switch::False => estimate_held(shapes, s, target),
        Switch::Auto => {
            let held = estimate_held(shapes, s, target);
            let least = || estimate_held(shapes, &Settings { batch: 1, ..s.clone() }, target);
            let fits = |e: &Estimate| target.offered.is_none_or(|most| e.peak() <= most as f64);
            let forbidden = s.activation_checkpointing == Switch::False;
            if forbidden || fits(&held) || fits(&least()) {
                return held;
            }
            let streamed = streamed();
            if streamed.peak() < held.peak() { streamed } else { held }
        }
    }
}

/// A run whose blocks are read when their turn comes: of the weights a block for each batch that
/// runs at once is held.
fn estimate_streamed(shapes: &Shapes, s: &Settings, target: Target) -> Estimate {
    let whole = estimate_with(shapes, s, target, true);
    let batches = Batches::of(shapes, s, target);
    let at_once = batches.sampling.max(batches.updating);
    let streamed = (shapes.largest_block * at_once).min(shapes.block_weights);
    Estimate {
        weights: whole.weights - shapes.block_weights + streamed,
        streaming: Some(Streaming::of(shapes, s, batches.per_epoch)),
        ..whole
    }
}

/// A run that holds all weights. Where nothing is said of activation checkpointing it is left off
/// where that leaves room; a device that does not say what it offers may have none.
fn estimate_held(shapes: &Shapes, s: &Settings, target: Target) -> Estimate {
    match s.activation_checkpointing {
        Switch::True => estimate_with(shapes, s, target, true),
        Switch::False => estimate_with(shapes, s, target, false),
        Switch::Auto => {
            let without = estimate_with(shapes, s, target, false);
            let room = target.offered.map_or(0.0, |offered| ROOM * offered as f64);
            if without.peak() <= room { without } else { estimate_with(shapes, s, target, true) }
        }
    }
}

/// With tiles where they are asked for, or where decoding is what leaves no room.
fn estimate_with(shapes: &Shapes, s: &Settings, target: Target, checkpointing: bool) -> Estimate {
    let drawn = |levels| estimate_drawn(shapes, s, target, checkpointing, levels);
    let (whole, tiled) = (drawn(&shapes.decoder), drawn(&shapes.tile));
    let tiling = match s.vae_tiling {
        Switch::True => true,
        Switch::False => false,
        Switch::Auto => {
            let most =
                whole.decode > whole.rollout.max(whole.update) && tiled.decode < whole.decode;
            most && target.offered.is_some_and(|offered| whole.peak() > ROOM * offered as f64)
        }
    };
    Estimate { tiling, ..if tiling { tiled } else { whole } }
}

/// With pictures decoded by these levels: of whole ones, or of a tile.
fn estimate_drawn(
    shapes: &Shapes,
    s: &Settings,
    target: Target,
    checkpointing: bool,
    levels: &[BlockShape],
) -> Estimate {
    let batches = Batches::of(shapes, s, target);
    let Batches { sampling, updating, .. } = batches;
    let parameters: f64 =
        shapes.targets.iter().map(|t| ((t.inputs + t.outputs) * s.rank) as f64).sum();
    let kept = if s.objective.forward() { 1 } else { 2 * s.trained_steps() };
    let transitions = 4.0 * shapes.latent * kept as f64;
    let prompts = s.prompt.len().min(s.epochs.saturating_mul(s.groups())) as f64;
    let program = match (target.gpu, target.software) {
        (false, _) => PROGRAM,
        (true, false) => PROGRAM_GPU,
        (true, true) => PROGRAM_SOFTWARE,
    };
    let cast = match s.storage {
        Storage::F32 => 0.0,
        Storage::F16 | Storage::Q8 | Storage::Q4 => 4.0 * shapes.largest * sampling,
    };
    let on_device = if target.gpu { transitions * batches.images } else { 0.0 };
    let page = if target.gpu { page(levels) } else { 0.0 };
    let text = &shapes.text;
    Estimate {
        weights: shapes.weights,
        reward: if target.first { shapes.reward * s.storage.dtype().size() as f64 } else { 0.0 },
        program: program + cast + page,
        // On the host the values and two moments, now and at the last good epoch, and the sum of
        // gradients; on the device the values once; of each batch its gradient there, that of one
        // of its steps and the host's, and of those that wait their turn the host's. A running
        // mean is on the host, now and then; an old policy on the device as well.
        adapter: 4.0
            * parameters
            * (8.0
                + if s.ema.is_some() { 2.0 } else { 0.0 }
                + if s.objective.forward() { 3.0 } else { 0.0 }
                + 3.0 * updating
                + if updating > 1.0 { updating } else { 0.0 }),
        kept: transitions * s.trajectories() as f64 + 4.0 * text.embedding * prompts,
        // The host keeps all transitions; it is the device's own memory unless the device is a
        // card.
        on_host: target.gpu && !target.software,
        // The host has what each encoder makes of the prompts beside what is put together of it.
        encode: if target.first {
            text.weights + 4.0 * (INFERENCE.stream * text.stream + 2.0 * text.embedding * prompts)
        } else {
            0.0
        },
        rollout: rollout(shapes, &batches) * sampling + on_device,
        update: update(shapes, checkpointing, &batches, target) * updating,
        decode: decode(levels) * sampling,
        offered: target.offered,
        checkpointing,
        tiling: false,
        streaming: None,
    }
}

fn largest(blocks: &[BlockShape], f: impl Fn(&BlockShape) -> f64) -> f64 {
    blocks.iter().map(f).fold(0.0, f64::max)
}

/// Activations of one batch of a rollout.
fn rollout(shapes: &Shapes, batches: &Batches) -> f64 {
    let rows = batches.drawn;
    largest(&shapes.blocks, |b| {
        INFERENCE.bytes(b, rows) + 4.0 * rows * (b.input - b.stream).max(0.0)
    })
}

/// Activations of one batch of an update.
fn update(shapes: &Shapes, checkpointing: bool, batches: &Batches, target: Target) -> f64 {
    let rows = batches.rows;
    let unet = shapes.convolves;
    let tracked = if checkpointing { rows.min(rows_at_once(&shapes.blocks) as f64) } else { rows };
    let factors = if unet { SAVED_UNET } else { SAVED_TRANSFORMER };
    let saved = |b: &BlockShape| factors.bytes_of_all(b, tracked);
    let backward = |b: &BlockShape| BACKWARD.bytes(b, tracked);
    if checkpointing {
        // Blocks share the tensors that only pass through them, so a block's input costs its
        // stream.
        let inputs = shapes.blocks.iter().map(|b| 4.0 * rows * b.stream).sum::<f64>();
        return largest(&shapes.blocks, |b| saved(b) + backward(b)) + inputs;
    }
    let all = shapes.blocks.iter().map(saved).sum::<f64>() + largest(&shapes.blocks, backward);
    let holes = unet && !target.gpu && batches.updating > 1.0;
    all * if holes { HEAPS } else { 1.0 }
}

/// Activations of one picture's decoding.
fn decode(levels: &[BlockShape]) -> f64 {
    largest(levels, |b| DECODER.bytes(b, 1.0))
}

/// A GPU's memory comes in pages of the largest tensor, of which one is about as much as lies free
/// among all of them.
fn page(levels: &[BlockShape]) -> f64 {
    4.0 * largest(levels, |b| b.stream)
}

/// The largest `--batch` whose estimate fits, if any does.
pub fn largest_batch(shapes: &Shapes, s: &Settings, target: Target) -> Option<usize> {
    let offered = target.offered? as f64;
    let fits =
        |batch: usize| estimate(shapes, &Settings { batch, ..s.clone() }, target).peak() <= offered;
    (1..=s.trajectories_per_update()).rev().find(|&b| fits(b))
}

/// Refuses a run that cannot fit.
///
/// # Errors
/// Names the estimate, what the device offers, and the settings to change.
pub fn check(shapes: &Shapes, s: &Settings, target: Target) -> Result<Estimate> {
    let found = estimate(shapes, s, target);
    let Some(offered) = target.offered.filter(|&o| found.peak() > o as f64) else {
        return Ok(found);
    };
    let text = |b: f64| memory_text(b as u64);
    let smaller = match largest_batch(shapes, s, target) {
        Some(batch) => format!("use --batch {batch}"),
        None => way_out(shapes, s, target),
    };
    bail!(
        "--batch {}: the run needs about {}, {} of it for weights, and the device offers {}; \
         {smaller}, or --memory GIB if it offers more",
        s.batch,
        text(found.peak()),
        text(found.weights),
        memory_text(offered)
    )
}

/// What helps where no batch fits.
fn way_out(shapes: &Shapes, s: &Settings, target: Target) -> String {
    if s.activation_checkpointing == Switch::False {
        return "use --activation-checkpointing true and --batch 1".into();
    }
    let streamed = Settings { stream_blocks: Switch::True, batch: 1, ..s.clone() };
    if s.stream_blocks == Switch::False
        && target.offered.is_some_and(|o| estimate(shapes, &streamed, target).peak() <= o as f64)
    {
        return "use --stream-blocks true".into();
    }
    let smaller = match s.storage {
        Storage::F32 => Some("f16"),
        Storage::F16 => Some("q8"),
        Storage::Q8 => Some("q4"),
        Storage::Q4 => None,
    };
    let least = estimate(shapes, &Settings { batch: 1, ..s.clone() }, target);
    let text = least.peak() <= least.program + least.encode;
    let embeddings = if text { ", --embeddings FILE" } else { "" };
    match smaller {
        Some(storage) => format!(
            "even --batch 1 needs {}: use --storage {storage}{embeddings} or a smaller \
             --resolution",
            memory_text(least.peak() as u64)
        ),
        None => format!("use a smaller --resolution{embeddings}"),
    }
}
