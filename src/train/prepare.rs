//! From settings to a run that can start: the device, the model, the steps, and the state, new or
//! from a checkpoint.

use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};

use super::adamw::AdamWState;
use super::base_features::load_base;
use super::checkpoint::{self, Loaded, RunState, Snapshot};
use super::fit::fit;
use super::followers::Followers;
use super::job::Job;
use super::observer::{Event, Observer};
use super::plan::drawn_prompts;
use super::rewards::Rewards;
use super::run::Run;
use super::run_folder::{METRICS, RunFolder, SETTINGS};
use super::steps::{check, steps};
use crate::choice::name;
use crate::config::{Rollout, Settings, Switch};
use crate::device::system::memory_text;
use crate::device::{self, Compute, rows_at_a_time};
use crate::estimate::shapes::shapes;
use crate::estimate::{Estimate, Target};
use crate::io;
use crate::io::weights::Weights;
use crate::lora::formats;
use crate::lora::{Adapter, LayerShape};
use crate::measure::features::FeatureModel;
use crate::model::config::rows_at_once;
use crate::model::pipeline::{TextFrom, Texts, embed};
use crate::model::text::embeddings::PromptEmbeddings;
use crate::model::{ModelFiles, Pipeline};
use crate::ops::advantage::Tracker;
use crate::sampling::Replica;
use crate::sampling::fleet::{Fleet, Layout, Roll};
use crate::sampling::world::World;

/// A run, and the tensors of the epoch that it was stopped in.
pub(crate) struct Prepared<'a> {
    pub run: Run<'a>,
    pub transitions: Option<Weights>,
}

/// Checks everything that can be checked and opens what the run needs.
///
/// # Errors
/// Names the flag, file or field, before anything is written; in every process what one of them
/// lacks.
pub(crate) fn prepare<'a>(job: &'a mut Job, observer: &'a dyn Observer) -> Result<Prepared<'a>> {
    let world = job.world.clone();
    world.agree(prepare_here(job, observer))
}

fn prepare_here<'a>(job: &'a mut Job, observer: &'a dyn Observer) -> Result<Prepared<'a>> {
    let (world, reward) = (job.world.clone(), job.reward.take());
    job.settings.check()?;
    // The first process chooses a free name.
    job.out = world.from_first(world.is_first().then(|| Ok(job.out.clone())))?;
    let folder = world.agree(open_folder(job, &world))?;
    let s = &job.settings;
    alike(s, &world)?;
    check(s)?;
    let computes = s.open_devices(world.on_host())?;
    let roll = Roll::call(world, &computes)?;
    roll.names.iter().for_each(|name| observer.on(Event::Device(name)));
    let found = shapes(s, adapter_file(job).as_deref())?;
    let targets = Target::of_all(&computes, roll.layout.threads, s.memory);
    let estimated = fit(&mut job.settings, &found, &targets, &roll)?;
    let (job, s) = (&*job, &job.settings);
    let scoring = s.open_reward_device()?.unwrap_or_else(|| computes[0].clone());
    let rewards = device::guard(|| Rewards::open(s, reward, &scoring))?;
    let features = device::guard(|| features(s, &scoring))?;
    let files = s.files()?;
    let embeddings = device::guard(|| encode(s, &files, &computes[0]))?;
    let replicas: Vec<Replica> =
        computes.into_iter().map(|compute| replica(s, &files, compute)).collect::<Result<_>>()?;
    let pipeline = &replicas[0].pipeline;
    let (steps, trainable) = steps(s, &pipeline.schedule, pipeline.tokens())?;
    let linears = pipeline.net.linears();
    let model = files.fingerprint(s.embeddings.as_deref())?;
    let way_out = "give all processes the same files";
    roll.world.ensure_alike("the model's hash", &model, way_out)?;
    let loaded = match job.resume {
        true => resume(job, &model, &linears, folder.records().len(), observer)?,
        false => begin(s, model, &linears)?,
    };
    let Loaded { snapshot: Snapshot { state, adapter, optimizer, followers }, transitions } =
        loaded;
    check_dump(job, &state)?;
    let counts = StepCounts { all: steps.len(), trainable: trainable.len() };
    let lines = summary(s, roll.layout, &adapter, &estimated, counts);
    observer.on(Event::Ready(&lines));
    let kept = job.resume.then(|| format!("{} complete epochs and what followed", state.epoch));
    let run = Run {
        settings: s,
        observer,
        fleet: Fleet::new(roll, replicas),
        rewards: Mutex::new(rewards),
        embeddings,
        steps,
        trainable,
        rows_at_once: estimated[0].checkpointing.then(|| rows_at_once(&found.blocks)),
        state,
        adapter,
        optimizer,
        followers,
        folder,
        dump: job.dump.clone(),
        skipped_in_a_row: 0,
        tested: false,
        good: None,
        kept,
        features,
        base_features: if job.resume { load_base(&job.out)? } else { None },
        bounds: s.collapse_bounds()?,
        best: None,
        warnings: Vec::new(),
    };
    Ok(Prepared { run, transitions })
}

/// The run's folder, which the first process alone writes to.
fn open_folder(job: &Job, world: &World) -> Result<RunFolder> {
    match (world.is_first(), job.resume) {
        (true, true) => RunFolder::resume(&job.out),
        (true, false) => RunFolder::new(&job.out),
        (false, true) => RunFolder::read(&job.out),
        (false, false) => Ok(RunFolder::elsewhere(&job.out)),
    }
}

/// Checks that all processes run one version with one set of settings, but for their devices.
fn alike(s: &Settings, world: &World) -> Result<()> {
    if world.size() == 1 {
        return Ok(());
    }
    let version = env!("CARGO_PKG_VERSION");
    world.ensure_alike("the program's version", version, "install one version everywhere")?;
    let (device, reward_device, memory) = (String::new(), None, None);
    let text = toml::to_string(&Settings { device, reward_device, memory, ..s.clone() })?;
    world.ensure_alike("a setting", &text, "start all processes with the same flags and files")
}

/// A device with the model on it.
fn replica(s: &Settings, files: &ModelFiles, compute: Compute) -> Result<Replica> {
    let pipeline = device::guard(|| {
        let streamed = s.stream_blocks == Switch::True;
        let stream = streamed.then(|| files.stream(&compute, s.storage)).transpose()?;
        Pipeline::load(files, &compute.burn, s.storage, stream, s.resolution, s.micro()?)
            .map(|pipeline| pipeline.in_tiles(s.vae_tiling == Switch::True))
    })?;
    Ok(Replica { compute, pipeline })
}

/// What the diversity of pictures is measured by, on the device of the reward models.
fn features(s: &Settings, compute: &Compute) -> Result<Option<FeatureModel>> {
    let Some(given) = &s.features else { return Ok(None) };
    FeatureModel::open(given, compute, s.storage).map(Some)
}

/// The file of an adapter that is not a fresh one. A resumed run has its own in its folder; the
/// file that it began with may be gone.
fn adapter_file(job: &Job) -> Option<std::path::PathBuf> {
    let given = job.settings.lora.as_ref()?;
    let own = job.out.join("adapter.safetensors");
    Some(if job.resume && own.exists() { own } else { given.clone() })
}

/// The embeddings of all prompts that the run draws, and of the negative one: each is encoded once.
fn encode(s: &Settings, files: &ModelFiles, compute: &Compute) -> Result<PromptEmbeddings> {
    let mut prompts: Vec<String> = s.evaluation_prompts().iter().map(|p| p.text.clone()).collect();
    prompts.extend(drawn_prompts(s));
    let from = match &s.embeddings {
        Some(file) => TextFrom::File(file),
        None => TextFrom::Encoders(s.max_sequence_length),
    };
    let texts = Texts { prompts: &prompts, negative: s.negative_prompt.as_deref() };
    embed(files, texts, from, &compute.burn, s.storage)
}

/// The state of a new run.
fn begin(s: &Settings, model: String, linears: &[LayerShape]) -> Result<Loaded> {
    let adapter = match &s.lora {
        Some(file) => formats::load(file, linears).context("--lora")?,
        None => Adapter::new(linears, &s.target_modules, s.rank, s.alpha, s.seed)?,
    };
    ensure!(
        (adapter.rank, adapter.alpha) == (s.rank, s.alpha),
        "--lora: rank {} and alpha {}, not --rank {} and --alpha {}",
        adapter.rank,
        adapter.alpha,
        s.rank,
        s.alpha
    );
    let optimizer = AdamWState::new(adapter.parameters().map(Vec::len));
    let (size, min_count) = (s.tracker_size, s.tracker_min_count);
    let tracker = Tracker { size, min_count, ..Default::default() };
    let followers = Followers::new(s, &adapter);
    let snapshot = Snapshot { state: RunState::new(model, tracker), adapter, optimizer, followers };
    Ok(Loaded { snapshot, transitions: None })
}

/// The state of a run that goes on, which has so many lines of metrics.
fn resume(
    job: &Job,
    model: &str,
    linears: &[LayerShape],
    lines: usize,
    observer: &dyn Observer,
) -> Result<Loaded> {
    // A run that was cut short in its first saving begins again.
    let loaded = match checkpoint::load(&job.out, model, linears)? {
        Some(loaded) => loaded,
        None => begin(&job.settings, model.to_string(), linears)?,
    };
    let Snapshot { state, adapter, .. } = &loaded.snapshot;
    let s = &job.settings;
    ensure!(
        (adapter.rank, adapter.alpha) == (s.rank, s.alpha),
        "{}: has rank = {} and alpha = {}, and the run's adapter rank {} and alpha {}; put back \
         the file that the run wrote",
        job.out.join(SETTINGS).display(),
        s.rank,
        s.alpha,
        adapter.rank,
        adapter.alpha
    );
    ensure!(
        lines >= state.metrics_lines,
        "{}: has {lines} lines, and its checkpoint was written after {}: the folder is not whole; \
         copy it again while no run writes there",
        job.out.join(METRICS).display(),
        state.metrics_lines
    );
    let begun = state.epoch + usize::from(state.unfinished.is_some());
    ensure!(
        begun <= job.settings.epochs,
        "--epochs {}: the run has completed {} already{}; give at least {begun}",
        job.settings.epochs,
        state.epoch,
        if begun > state.epoch { " and begun the next" } else { "" }
    );
    observer.on(Event::Resuming { folder: &job.out, epoch: state.epoch });
    Ok(loaded)
}

fn check_dump(job: &Job, state: &RunState) -> Result<()> {
    let Some(dump) = &job.dump else { return Ok(()) };
    ensure!(
        job.world.size() == 1,
        "--dump-update: an update of several processes is whole in none of them; start one"
    );
    let s = &job.settings;
    let (done, last) = (state.updates, s.epochs * s.updates_per_epoch * s.inner_epochs);
    ensure!(
        dump.update > done && dump.update <= last,
        "--dump-update {}: the run does updates {} to {last}",
        dump.update,
        done + 1
    );
    io::probe(Path::new(&dump.file)).context("--dump-update")
}

struct StepCounts {
    all: usize,
    trainable: usize,
}

/// What the run is, in lines for people.
fn summary(
    s: &Settings,
    layout: Layout,
    adapter: &Adapter,
    estimated: &[Estimate],
    steps: StepCounts,
) -> Vec<String> {
    let batch = rows_at_a_time(layout.threads, s.images_per_update(), s.batch);
    let largest = |a: &&Estimate, b: &&Estimate| a.peak().total_cmp(&b.peak());
    let estimated = estimated.iter().max_by(largest).expect("a run has a device");
    let of_each = if layout.devices > 1 { " on a device" } else { "" };
    let given: Vec<&str> = s.reward.iter().map(|r| r.shown.as_str()).collect();
    vec![
        format!(
            "model: {}, LoRA of rank {} on {} layers, {} values",
            s.model.display(),
            adapter.rank,
            adapter.layers.len(),
            adapter.len()
        ),
        format!("run: {}", s.summary(batch)),
        format!(
            "method: {} with {} credit over {} of {} {} steps, reward {}",
            name(s.objective),
            name(s.credit),
            match &s.rollout {
                Rollout::Plain(plain) => s.steps_of(plain, steps.trainable),
                Rollout::Branching(branching) => branching.steps().count(),
            },
            steps.all,
            name(s.sampler),
            given.join(" + ")
        ),
        format!(
            "memory: about {} at most{of_each}, {} of it for weights; a rollout keeps {} for the \
             update; activation checkpointing {}{}",
            memory_text(estimated.peak() as u64),
            memory_text(estimated.weights as u64),
            memory_text(estimated.kept as u64),
            if estimated.checkpointing { "on" } else { "off" },
            if estimated.streaming.is_some() { "; blocks are streamed" } else { "" }
        ),
    ]
}
