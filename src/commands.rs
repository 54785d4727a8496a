//! What the commands do, apart from their own modules: they open, call, print and write.

use anyhow::{Context, Result, ensure};
use burn::tensor::{Device, Tensor, TensorData};

use crate::cli::{BenchArgs, CheckArgs, ConvertArgs, CreditArgs, EmbedArgs, PlanArgs, SampleArgs, TrainArgs};
use crate::inputs::{model_folder, read_prompts};
use crate::model::pipeline::{Family, TextFrom, load_schedule};
use crate::model::text::{Text, write_embeddings};
use crate::model::weights::{Storage, Weights};
use crate::model::{Conditioning, Pipeline, config::Config};
use crate::options::Options;
use crate::philox::{self, Stream};
use crate::rollout::{Denoise, Guided, batches, decode, for_batches, sample as run_sampler};
use crate::schedule::{Flow, Grid, Sampler, Sampling, Schedule, ddim::Ddim};
use crate::{artifacts, device, files, lora_io, plan, progress, shapes, train as training};

/// `train`.
pub fn train(args: TrainArgs) -> Result<i32> {
    let (settings, out) = match &args.resume {
        Some(dir) => {
            let path = dir.join("settings.toml");
            ensure!(
                path.is_file(),
                "--resume {}: there is no settings.toml in it; give the folder of a run",
                dir.display()
            );
            let saved = Options::from_file(&path)?;
            let resumed = args.options.over(&saved)?.resolve()?;
            let free = Options {
                model: args.options.model.clone(),
                epochs: args.options.epochs,
                device: args.options.device.clone(),
                memory: args.options.memory,
                keep_every: args.options.keep_every,
                ..Default::default()
            };
            let same = toml::to_string(&free.over(&saved)?.resolve()?)? == toml::to_string(&resumed)?;
            ensure!(
                same,
                "--resume {}: only --epochs, --device, --memory, --keep-every and --model (the same model elsewhere) can change; start a new run for the rest",
                dir.display()
            );
            (resumed, dir.clone())
        }
        None => {
            let file = args.config.as_deref().map(Options::from_file).transpose()?.unwrap_or_default();
            let settings = args.options.over(&file)?.resolve()?;
            let name = format!("{:?}", settings.preset).to_lowercase();
            (settings, args.out.unwrap_or_else(|| artifacts::default_folder(&name)))
        }
    };
    progress::catch_signals();
    let job = training::Job { settings, out, resume: args.resume.is_some(), dump: args.dump_update };
    let done = training::train(job)?;
    println!(
        "fixed prompts and noise: reward {:.4} before, {:.4} after\nresult: {} (before_after.png, adapter.safetensors, metrics.jsonl)",
        done.before,
        done.after,
        done.out.display()
    );
    Ok(0)
}

/// `plan`.
pub fn plan(args: PlanArgs) -> Result<i32> {
    let file = args.config.as_deref().map(Options::from_file).transpose()?.unwrap_or_default();
    let settings = args.options.over(&file)?.resolve()?;
    let shapes = shapes::shapes(&settings, settings.lora.as_deref())?;
    let target = plan::Target::of(&device::open(&settings.device)?).with_limit(settings.memory);
    let found = plan::plan(&shapes, &settings, target);
    print!("{}", plan::text(&found, &settings, plan::largest_batch(&shapes, &settings, target)));
    Ok(if found.offered.is_some_and(|o| found.peak() > o as f64) { 1 } else { 0 })
}

/// `sample`.
pub fn sample(args: &SampleArgs) -> Result<i32> {
    ensure!(args.batch > 0, "--batch 0: must be at least 1");
    let model = model_folder(args.model.as_deref())?;
    let family = Family::of(&model)?;
    let compute = device::open(&args.device)?;
    let text = match &args.embeddings {
        Some(file) => TextFrom::File(file),
        None => TextFrom::Encoders(args.max_sequence_length.unwrap_or(family.default_sequence())),
    };
    let p = Pipeline::load(&model, &compute.burn, args.storage, text, args.resolution)?;
    let adapter = args.lora.as_ref().map(|f| lora_io::load(f, &p.net.linears())).transpose().context("--lora")?;
    let lora = adapter.map(|a| a.to_device(&compute.burn, false));
    let total = args.prompt.len() * args.batch;
    let [c, h, w] = p.latent_shape();
    let noise = match &args.latents {
        Some(file) => {
            let (values, shape) = Weights::open_file(file)?.f32("latents")?;
            ensure!(
                shape.len() == 4 && shape[..2] == [total, c],
                "--latents {}: latents has shape {shape:?}, expected [{total}, {c}, H, W], one for each of {total} images",
                file.display()
            );
            Tensor::<4>::from_data(TensorData::new(values, shape), &compute.burn)
        }
        None => {
            let one = |i: usize| philox::noise(args.seed, Stream::Evaluation, i as u32, 0, c * h * w);
            let values: Vec<f32> = (0..total).flat_map(one).collect();
            Tensor::from_data(TensorData::new(values, [total, c, h, w]), &compute.burn)
        }
    };
    let [_, _, h, w] = noise.dims();
    p.net.accepts([h, w]).context("--latents")?;
    let (sampler, steps) = if family.is_flow() { (Sampler::Ode, 28) } else { (Sampler::Ddim, 50) };
    let sampler = args.steps.sampler.unwrap_or(sampler);
    ensure!(
        sampler != Sampler::Ode || args.eta == 0.0,
        "--eta {}: the ode sampler draws no noise; leave it out, or give --sampler flow-grpo, dance or cps",
        args.eta
    );
    let steps = p.schedule.steps(&Sampling {
        sampler,
        steps: args.steps.steps.unwrap_or(steps),
        eta: args.eta,
        grid: args.steps.grid,
        shift: args.steps.shift,
        tokens: p.net.tokens([h, w]),
    })?;
    let guidance = Guided::new(&*p.net, args.guidance.unwrap_or(family.default_guidance()));
    for path in [&args.out.join("00000.png")].into_iter().chain(&args.save_latents) {
        files::probe(path)?;
    }
    let (uncond, conds) = (p.encode(&[""])?, p.encode(&args.prompt)?);
    let starts = batches(&compute, total, args.batch);
    let bar = progress::bar("sample", starts.len() * steps.len());
    let drawn = for_batches(&compute, &starts, |&(first, n)| {
        let cond = Conditioning::cat((first..first + n).map(|i| conds.rows(i / args.batch, 1)).collect());
        let uncond = uncond.repeat(n);
        let policy =
            Denoise { compute: &compute, net: &*p.net, lora: lora.as_ref(), guidance, cond: &cond, uncond: &uncond };
        let start = noise.clone().narrow(0, first, n);
        let done = run_sampler(&policy, start, &steps, &[], (args.seed, first as u32), || {
            bar.inc(1);
            Ok(())
        })?;
        for (i, image) in decode(&p.vae, &done.latents)?.iter().enumerate() {
            files::write(&args.out.join(format!("{:05}.png", first + i)), &files::png(image)?)?;
        }
        Ok(done.latents)
    })?;
    bar.finish();
    for i in 0..total {
        println!("{}: {}", args.out.join(format!("{i:05}.png")).display(), args.prompt[i / args.batch]);
    }
    if let Some(path) = &args.save_latents {
        let all = Tensor::cat(drawn, 0);
        let shape = all.dims().to_vec();
        files::write_tensors(path, &[("latents".into(), shape, crate::ops::read(&all)?)], &[])?;
    }
    Ok(0)
}

/// `check`: 0 when everything is within the tolerance, 1 otherwise.
pub fn check(args: &CheckArgs) -> Result<i32> {
    let compute = device::open(&args.device)?;
    let start = std::time::Instant::now();
    let lines = crate::check::check(&args.model, &args.reference, &compute, args.storage)?;
    for line in &lines {
        let verdict = if line.error <= args.tolerance { "ok" } else { "FAILED" };
        println!("{:<22} max error / std {:.3e}  {verdict}", line.name, line.error);
    }
    println!("{:.1} s", start.elapsed().as_secs_f64());
    Ok(if lines.iter().all(|l| l.error <= args.tolerance) { 0 } else { 1 })
}

/// Tokens of a 1024-pixel image in the flow models: what a model's dynamic shifting is shown for.
const DEFAULT_TOKENS: usize = 4096;

/// `credit`.
pub fn credit(args: &CreditArgs) -> Result<i32> {
    let schedule = match &args.model {
        Some(dir) => load_schedule(&model_folder(Some(dir))?)?,
        None if args.sampler == Sampler::Ddim => Schedule::Ddim(Ddim::stable_diffusion()),
        None => Schedule::Flow(Flow::shifted(3.0)),
    };
    let sampling = Sampling {
        sampler: args.sampler,
        steps: args.steps.unwrap_or(args.sampler.default_steps()),
        eta: args.eta.unwrap_or(args.sampler.default_eta()),
        grid: Grid::Shifted,
        shift: args.shift,
        tokens: DEFAULT_TOKENS,
    };
    let table = crate::credit_table::table(&schedule, sampling, args.zeta)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&table.json())?);
    } else {
        print!("{}", table.text());
    }
    if let Some(path) = &args.plot {
        files::write(path, &files::png(&table.plot())?)?;
    }
    Ok(0)
}

/// `embed`.
pub fn embed(args: &EmbedArgs) -> Result<i32> {
    let model = model_folder(args.model.as_deref())?;
    let prompts = read_prompts(args.prompts.as_deref(), args.prompt.as_ref())?;
    let family = Family::of(&model)?;
    let compute = device::open(&args.device)?;
    let length = args.max_sequence_length.unwrap_or(family.default_sequence());
    let config = Config::open(&model.join(family.network()))?;
    let width = config.size("joint_attention_dim", 4096)?;
    let text = Text::load(&model, family, length, width, &compute.burn, args.storage)?;
    write_embeddings(&text, &prompts, &args.out)?;
    println!("{}: {} prompts and the empty one", args.out.display(), prompts.len());
    Ok(0)
}

/// `devices`.
pub fn devices() -> Result<i32> {
    let adapters = device::adapters();
    let auto = device::auto(&adapters);
    for (i, a) in adapters.iter().enumerate() {
        let (limits, features) = (a.adapter.limits(), a.adapter.features());
        let yes = |f: wgpu::Features| if features.contains(f) { "yes" } else { "no" };
        let mib = |n: u64| n >> 20;
        println!("{i}: {}{}", a.label(), if auto == Some(i) { "   <- auto" } else { "" });
        println!(
            "   type {:?}, buffer {} MiB, binding {} MiB, workgroup memory {} KiB, f16 {}, subgroups {}",
            a.info.device_type,
            mib(limits.max_buffer_size),
            mib(limits.max_storage_buffer_binding_size),
            limits.max_compute_workgroup_storage_size >> 10,
            yes(wgpu::Features::SHADER_F16),
            yes(wgpu::Features::SUBGROUP),
        );
    }
    println!(
        "cpu: {}{}",
        device::Compute::cpu().name,
        if auto.is_none() { "   <- auto: there is no hardware GPU" } else { "" }
    );
    Ok(0)
}

/// `convert`.
pub fn convert(args: &ConvertArgs) -> Result<i32> {
    let model = model_folder(args.model.as_deref())?;
    let family = Family::of(&model)?;
    let net = family.load(&model, &Device::flex(), Storage::F16)?;
    let adapter = lora_io::load(&args.input, &net.linears())?;
    lora_io::save(&adapter, &args.output, args.format, family)?;
    println!(
        "{}: rank {}, alpha {}, {} layers",
        args.output.display(),
        adapter.rank,
        adapter.alpha,
        adapter.layers.len()
    );
    Ok(0)
}

/// `bench`.
pub fn bench(args: &BenchArgs) -> Result<i32> {
    crate::bench::short_table(&device::open(&args.device)?)?;
    Ok(0)
}
