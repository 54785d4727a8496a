//! From settings to a run that can start: the device, the model, the steps, and the state, new or from a checkpoint.

use anyhow::{Context, Result, ensure};

use crate::adamw;
use crate::artifacts::RunFolder;
use crate::checkpoint::{self, State};
use crate::choice::name;
use crate::credit;
use crate::device;
use crate::evaluation::GRID_COLUMNS;
use crate::files;
use crate::lora::Adapter;
use crate::lora_io;
use crate::memory;
use crate::model::pipeline::{Pipeline, TextFrom, fingerprint};
use crate::ops::group_advantage::Tracker;
use crate::plan;
use crate::reward;
use crate::shapes;
use crate::train::{Job, Run};

/// Checks everything that can be checked and opens what the run needs.
///
/// # Errors
/// Names the flag, file or field, before anything is written.
pub(crate) fn prepare(job: &Job) -> Result<Run<'_>> {
    let s = &job.settings;
    let new_folder = if job.resume { None } else { Some(RunFolder::new(&job.out)?) };
    let reward = reward::parse(&s.reward)?;
    let compute = device::open(&s.device)?;
    // A resumed run has its adapter in its folder; the file that it began with may be gone.
    let own = job.resume.then(|| job.out.join("adapter.safetensors"));
    let shapes = shapes::shapes(s, s.lora.as_deref().map(|file| own.as_deref().unwrap_or(file)))?;
    let plan = plan::check(&shapes, s, plan::Target::of(&compute).with_limit(s.memory))?;
    let text = match &s.embeddings {
        Some(file) => TextFrom::File(file),
        None => TextFrom::Encoders(s.max_sequence_length),
    };
    let pipeline = Pipeline::load(&s.model, &compute.burn, s.storage, text, s.resolution)?;
    let native = pipeline.schedule.steps(&s.sampling(pipeline.tokens()))?;
    ensure!(
        !native[0].clips(),
        "{}: scheduler_config.json: clip_sample = true (DDIM's default where the field is absent) cannot be trained, a \
         clipped mean is not linear; write \"clip_sample\": false there",
        s.model.display()
    );
    let steps = credit::apply(s.credit, &pipeline.schedule, native, s.zeta)?;
    let last = steps.len() - 1;
    let trainable: Vec<usize> =
        (0..steps.len()).filter(|&i| steps[i].trainable() && (i != last || s.train_last_step)).collect();
    ensure!(!trainable.is_empty(), "--steps {}: leaves no step to train; use more, or --train-last-step true", s.steps);
    if let Some(k) = s.train_steps {
        ensure!(k <= trainable.len(), "--train-steps {k}: only {} steps can be trained; lower it", trainable.len());
    }
    let linears = pipeline.net.linears();
    let model = fingerprint(&s.model, s.embeddings.as_deref())?;
    let tracker = Tracker { size: s.tracker_size, min_count: s.tracker_min_count, ..Default::default() };
    let (state, adapter, optimizer, folder) = if job.resume {
        let mut folder = RunFolder::resume(&job.out)?;
        let (state, adapter, optimizer) = checkpoint::load(&job.out, &model, &linears)?;
        let begun = state.epoch + usize::from(state.unfinished.is_some());
        ensure!(
            begun <= s.epochs,
            "--epochs {}: the run has completed {} already{}; give at least {begun}",
            s.epochs,
            state.epoch,
            if begun > state.epoch { " and begun the next" } else { "" }
        );
        folder.keep_lines(state.metrics_lines);
        println!("resuming {} after epoch {}", job.out.display(), state.epoch);
        (state, adapter, optimizer, folder)
    } else {
        let adapter = match &s.lora {
            Some(file) => lora_io::load(file, &linears).context("--lora")?,
            None => Adapter::new(&linears, &s.target_modules, s.rank, s.alpha, s.seed)?,
        };
        ensure!(
            (adapter.rank, adapter.alpha) == (s.rank, s.alpha),
            "--lora: rank {} and alpha {}, not --rank {} and --alpha {}",
            adapter.rank,
            adapter.alpha,
            s.rank,
            s.alpha
        );
        let optimizer = adamw::State::new(adapter.layers.iter().flat_map(|l| [l.a.len(), l.b.len()]));
        (State::new(model, tracker), adapter, optimizer, new_folder.expect("a new run has a new folder"))
    };
    println!(
        "model: {}, LoRA of rank {} on {} layers, {} values",
        s.model.display(),
        adapter.rank,
        adapter.layers.len(),
        adapter.len()
    );
    println!("run: {}", s.summary(device::rows_at_a_time(compute.threads(), s.images_per_update(), s.batch)));
    println!(
        "method: {} with {} credit over {} of {} {} steps, reward {}",
        name(s.objective),
        name(s.credit),
        s.train_steps.unwrap_or(trainable.len()),
        steps.len(),
        name(s.sampler),
        s.reward
    );
    println!(
        "memory: about {} at most, {} of it for weights; a rollout keeps {} for the update",
        memory::text(plan.peak() as u64),
        memory::text(plan.weights as u64),
        memory::text(plan.kept as u64)
    );
    let uncond = pipeline.encode(&[""])?;
    let fixed = pipeline.encode(&s.prompt[..s.groups().min(GRID_COLUMNS)])?;
    if let Some(dump) = &job.dump {
        let (done, last) = (state.updates, s.epochs * s.updates_per_epoch * s.inner_epochs);
        ensure!(
            dump.update > done && dump.update <= last,
            "--dump-update {}: the run does updates {} to {last}",
            dump.update,
            done + 1
        );
        files::probe(&dump.file).context("--dump-update")?;
    }
    let kept = job.resume.then(|| format!("{} complete epochs and what followed", state.epoch));
    Ok(Run {
        s,
        compute,
        reward,
        steps,
        rows_at_once: plan::rows_at_once(&shapes),
        trainable,
        uncond,
        fixed,
        state,
        adapter,
        optimizer,
        folder,
        pipeline,
        dump: job.dump.clone(),
        skipped_in_a_row: 0,
        last_good: None,
        kept,
    })
}
