//! The memory that a run will need, from shapes alone: nothing is loaded but configurations and the headers of weight
//! files. `pcpo-wgpu plan` prints it, `train` refuses what cannot fit.
//!
//! Weights, adapters and what a rollout keeps are exact. What a network's blocks hold while they run is counted in the
//! sizes of their tensors, with factors that say how many of a kind are alive at once. The factors were measured (README,
//! "Memory"); the test `memory::estimates_are_within_20_percent` holds them to it.

use anyhow::{Context, Result, bail};

use crate::model::config::Config;
use crate::model::pipeline::Family;
use crate::model::weights::{QUANTISED_BLOCK, Storage, Weights};
use crate::ops::Guidance;
use crate::settings::Settings;

/// Sizes of one block for one row of its input, in elements.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Block {
    /// Its input with everything that waits beside it (skip connections, text tokens): what checkpointing keeps.
    input: f64,
    /// The stream that it works on.
    stream: f64,
    /// The widest tensor of its feed-forward.
    wide: f64,
    /// Attention scores.
    scores: f64,
}

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
/// A decoder's, of its largest level.
const DECODER: Factors = Factors { stream: 6.0, wide: 0.0, scores: 3.0 };
/// Values under a convolution's kernel: the CPU and software Vulkan lay them out for a matrix product.
const KERNEL: f64 = 9.0;
/// The program itself and its threads; on a GPU the driver's part, and on software Vulkan the kernels that it compiles
/// into the program's memory, those of the backward pass among them.
const PROGRAM: f64 = 50e6;
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
        self.weights + self.program + self.adapter + self.kept
    }

    pub fn peak(&self) -> f64 {
        self.resident() + self.rollout.max(self.update).max(self.decode)
    }
}

/// What a model folder looks like to the estimate.
pub struct Shapes {
    family: Family,
    blocks: Vec<Block>,
    decoder: Vec<Block>,
    /// Bytes of the weights in a storage type.
    weights: f64,
    /// Elements of the largest matrix.
    largest: f64,
    /// Elements of one latent.
    latent: f64,
    /// (inputs, outputs) of the layers that the adapter is on.
    targets: Vec<(usize, usize)>,
    distilled: bool,
}

/// Reads the shapes of a model folder for a run's settings.
///
/// # Errors
/// Names the file that is missing or the field that is not supported.
pub fn shapes(s: &Settings) -> Result<Shapes> {
    let family = Family::of(&s.model)?;
    let net = s.model.join(family.network());
    let c = Config::open(&net)?;
    let vae = Config::open(&s.model.join("vae"))?;
    let channels = vae.size("latent_channels", 4)?;
    let levels = vae.names("down_block_types", &["DownEncoderBlock2D"])?.len();
    let factor = 1 << (levels - 1);
    let default =
        if family == Family::Flux { 128 } else { c.size("sample_size", if family.is_flow() { 128 } else { 64 })? };
    let side = s.resolution.map_or(default, |pixels| pixels / factor);
    let text = text_tokens(s, family)?;
    let blocks = match family {
        Family::StableDiffusion => unet_blocks(&c, side)?,
        Family::StableDiffusion3 => sd3_blocks(&c, side, text)?,
        Family::Flux => flux_blocks(&c, side, text)?,
    };
    let mut weights = 0.0;
    let mut largest = 0f64;
    let mut parts = vec![family.network(), "vae"];
    if s.embeddings.is_none() {
        // T5 is read layer by layer and never held.
        parts.extend(match family {
            Family::StableDiffusion | Family::Flux => &["text_encoder"][..],
            Family::StableDiffusion3 => &["text_encoder", "text_encoder_2"],
        });
    }
    let mut targets = Vec::new();
    for part in parts {
        let files = Weights::open_dir(&s.model.join(part))?;
        for name in files.names() {
            let shape = files.shape(name).expect("a listed tensor has a shape");
            let elements: f64 = shape.iter().product::<usize>() as f64;
            weights += elements * bytes_per_weight(name, shape, s.storage);
            if shape.len() >= 2 && !name.contains("embed") {
                largest = largest.max(elements);
            }
            let module = name.strip_suffix(".weight").unwrap_or_default();
            let targeted = s.target_modules.iter().any(|t| module == t || module.ends_with(&format!(".{t}")));
            if part == family.network() && shape.len() == 2 && targeted && module.contains("block") {
                targets.push((shape[1], shape[0]));
            }
        }
    }
    Ok(Shapes {
        family,
        blocks,
        decoder: decoder_blocks(&vae, side)?,
        weights,
        largest,
        latent: (channels * side * side) as f64,
        targets,
        distilled: family == Family::Flux,
    })
}

/// Bytes of one weight as [`crate::model::nn`] stores it: matrices and kernels in the storage type, the rest in f32.
fn bytes_per_weight(name: &str, shape: &[usize], storage: Storage) -> f64 {
    let quantised = |bits: f64| bits / 8.0 + 4.0 / QUANTISED_BLOCK as f64;
    let table = name.contains("token_embedding") || name.contains("position_embedding") || name.ends_with("pos_embed");
    match (shape.len(), storage) {
        (0 | 1, _) | (_, Storage::F32) => 4.0,
        _ if table => 4.0,
        (2, Storage::Q8) if shape[1].is_multiple_of(QUANTISED_BLOCK) => quantised(8.0),
        (2, Storage::Q4) if shape[1].is_multiple_of(QUANTISED_BLOCK) => quantised(4.0),
        _ => 2.0,
    }
}

/// Text tokens that the network sees.
fn text_tokens(s: &Settings, family: Family) -> Result<usize> {
    if let Some(file) = &s.embeddings {
        let weights = Weights::open_file(file)?;
        let shape =
            weights.shape("sequence").with_context(|| format!("--embeddings {}: not made by embed", file.display()))?;
        return Ok(shape.get(1).copied().unwrap_or(0));
    }
    Ok(match family {
        Family::Flux => s.max_sequence_length,
        _ => {
            let clip = Config::open(&s.model.join("text_encoder"))?.size("max_position_embeddings", 77)?;
            clip + if family.is_flow() { s.max_sequence_length } else { 0 }
        }
    })
}

fn sd3_blocks(c: &Config, side: usize, text: usize) -> Result<Vec<Block>> {
    let (heads, head) = (c.size("num_attention_heads", 18)?, c.size("attention_head_dim", 64)?);
    let patch = c.size("patch_size", 2)?.max(1);
    let image = (side / patch).pow(2);
    let (n, width) = ((image + text) as f64, (heads * head) as f64);
    let dual = c.list("dual_attention_layers")?;
    let block = |i: usize| Block {
        input: n * width,
        stream: if dual.contains(&i) { (n + 0.5 * image as f64) * width } else { n * width },
        wide: 4.0 * n * width,
        scores: heads as f64 * n * n,
    };
    Ok((0..c.size("num_layers", 18)?).map(block).collect())
}

fn flux_blocks(c: &Config, side: usize, text: usize) -> Result<Vec<Block>> {
    let (heads, head) = (c.size("num_attention_heads", 24)?, c.size("attention_head_dim", 128)?);
    let (n, width) = (((side / 2).pow(2) + text) as f64, (heads * head) as f64);
    let block = Block { input: n * width, stream: n * width, wide: 4.0 * n * width, scores: heads as f64 * n * n };
    let single = Block { wide: 5.0 * n * width, ..block };
    let mut blocks = vec![block; c.size("num_layers", 19)?];
    blocks.extend(vec![single; c.size("num_single_layers", 38)?]);
    Ok(blocks)
}

/// The units of a UNet, in the order in which it runs them.
fn unet_blocks(c: &Config, side: usize) -> Result<Vec<Block>> {
    let cross = |names: &[String]| names.iter().map(|n| n.starts_with("CrossAttn")).collect::<Vec<bool>>();
    let down = cross(&c.names(
        "down_block_types",
        &["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    )?);
    let up = cross(
        &c.names("up_block_types", &["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"])?,
    );
    let n = down.len();
    let channels = match c.json["block_out_channels"].is_null() {
        true if n == 4 => vec![320, 640, 1280, 1280],
        _ => c.sizes("block_out_channels", n, 0)?,
    };
    let layers = c.sizes("layers_per_block", n, 2)?;
    let heads = c.sizes("attention_head_dim", n, 8)?;
    let mut blocks = Vec::new();
    let mut skips = Vec::new();
    let pixels = |level: usize| side.div_ceil(1 << level).pow(2) as f64;
    let push = |blocks: &mut Vec<Block>, skips: &[f64], level: usize, width: usize, extra: usize, attention: bool| {
        let area = pixels(level);
        let stream = area * width as f64;
        blocks.push(Block {
            input: stream + skips.iter().sum::<f64>(),
            // A block on the way up takes its skip connection beside its own stream.
            stream: area * (width + extra / 2) as f64,
            wide: if attention { 8.0 * stream } else { 0.0 },
            scores: if attention { heads[level] as f64 * area * area } else { 0.0 },
        });
    };
    skips.push(pixels(0) * channels[0] as f64);
    for i in 0..n {
        for _ in 0..layers[i] {
            push(&mut blocks, &skips, i, channels[i], 0, down[i]);
            skips.push(pixels(i) * channels[i] as f64);
        }
        if i + 1 < n {
            push(&mut blocks, &skips, i, channels[i], 0, false);
            skips.push(pixels(i + 1) * channels[i] as f64);
        }
    }
    if !c.json["mid_block_type"].is_null() || c.json.get("mid_block_type").is_none() {
        push(&mut blocks, &skips, n - 1, channels[n - 1], channels[n - 1], true);
    }
    for (i, &attention) in up.iter().enumerate().take(n) {
        let level = n - 1 - i;
        for _ in 0..layers[level] + 1 {
            let skip = skips.pop().unwrap_or_default();
            push(&mut blocks, &skips, level, channels[level], (skip / pixels(level)) as usize, attention);
        }
        if level > 0 {
            push(&mut blocks, &skips, level - 1, channels[level], 0, false);
        }
    }
    Ok(blocks)
}

/// Levels of a VAE's decoder, for one image.
fn decoder_blocks(c: &Config, side: usize) -> Result<Vec<Block>> {
    let n = c.names("down_block_types", &["DownEncoderBlock2D"])?.len();
    let channels = match c.json["block_out_channels"].is_null() {
        true => vec![64],
        false => c.sizes("block_out_channels", n, 0)?,
    };
    let area = (side * side) as f64;
    let deep = area * channels[n - 1] as f64;
    let attention = c.flag("mid_block_add_attention", true)?;
    let mut blocks =
        vec![Block { stream: deep, scores: if attention { area * area } else { 0.0 }, ..Default::default() }];
    for i in 0..n {
        // The first resnet of a level still has the width of the level before.
        let width = channels[n - 1 - i].max(if i > 0 { channels[n - i] } else { 0 });
        blocks.push(Block { stream: area * 4f64.powi(i as i32) * width as f64, ..Default::default() });
    }
    Ok(blocks)
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
        let threads =
            if compute.gpu.is_some() { 1 } else { std::thread::available_parallelism().map_or(1, |n| n.get()) };
        Self { gpu: compute.gpu.is_some(), software: compute.software, threads, offered: compute.memory }
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
    let batch = s.batch.min(s.images_per_update());
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
    let decode_scores = |b: &Block| if target.gpu { b.scores.min(MAX_SCORES) } else { 0.0 };
    let decode = shapes.decoder.iter().map(|b| DECODER.bytes(b, 1.0, decode_scores(b))).fold(0.0, f64::max);
    let parameters: f64 = shapes.targets.iter().map(|(i, o)| ((i + o) * s.rank) as f64).sum();
    let steps = s.train_steps.unwrap_or(s.steps) as f64;
    let program = match (target.gpu, target.software) {
        (false, _) => PROGRAM,
        (true, false) => PROGRAM_GPU,
        (true, true) => PROGRAM_SOFTWARE,
    };
    let cast = if s.storage == Storage::F32 { 0.0 } else { 4.0 * shapes.largest * sampling };
    Plan {
        weights: shapes.weights,
        program: program + cast,
        // On the host the values, two moments and a sum of gradients; on the device tracked and frozen, and gradients.
        adapter: 4.0 * parameters * (4.0 + 4.0 * updating),
        kept: 2.0 * 4.0 * s.images_per_epoch as f64 * shapes.latent * steps,
        rollout: rollout * sampling,
        update: update * updating,
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
    let mut out = format!("weights ({:?})        {}\n", s.storage, mib(plan.weights)).to_lowercase();
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
