//! Inputs changed at random: whatever a file holds, it is read or refused with its name, in time,
//! and nothing panics.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use arbitrary::Unstructured;
use pcpo_wgpu::Options;
use pcpo_wgpu::config::prompts::read_prompts;
use pcpo_wgpu::device::Compute;
use pcpo_wgpu::estimate::shapes::shapes;
use pcpo_wgpu::io::weights::Weights;
use pcpo_wgpu::lora::formats;
use pcpo_wgpu::model::ModelFiles;
use pcpo_wgpu::model::text::chat::ChatTokenizer;
use pcpo_wgpu::model::text::embeddings::PromptEmbeddings;
use pcpo_wgpu::model::text::tokenizer::Tokenizer;
use pcpo_wgpu::schedule::{Grid, Sampler, Sampling};
use pcpo_wgpu::train::checkpoint;
use pcpo_wgpu::train::run_folder::read_record;

use super::mutate::{changed, changed_values};
use super::{Draws, TINY, cases};
use crate::command_line::program;
use crate::support::{copy, error_of, golden};

/// Longer than this and an input hangs.
const PATIENCE: Duration = Duration::from_secs(10);

/// What reads a kind of file.
struct Target<'a> {
    name: &'static str,
    /// Where the changed file goes.
    file: PathBuf,
    originals: Vec<Vec<u8>>,
    read: Box<dyn Fn() -> Result<()> + 'a>,
    /// One of these words is in each refusal.
    named: Vec<String>,
}

impl<'a> Target<'a> {
    /// A file whose refusals name it.
    fn new(
        name: &'static str,
        file: PathBuf,
        originals: &[PathBuf],
        read: impl Fn(&Path) -> Result<()> + 'a,
    ) -> Self {
        let originals = originals.iter().map(|path| std::fs::read(path).unwrap()).collect();
        let named = vec![file.file_name().unwrap().to_str().unwrap().to_string()];
        let own = file.clone();
        Self { name, file, originals, read: Box::new(move || read(&own)), named }
    }

    /// Refusals may name one of these instead.
    fn or_named(mut self, words: &[&str]) -> Self {
        self.named.extend(words.iter().map(|w| w.to_string()));
        self
    }

    /// Reads so many changed files; how many of them were refused.
    fn attack(&self, number: usize) -> usize {
        let mut refused = 0;
        for original in &self.originals {
            // The originals themselves can be read.
            std::fs::write(&self.file, original).unwrap();
            (self.read)().unwrap_or_else(|e| panic!("{}, unchanged: {e:#}", self.name));
        }
        for case in 0..number {
            let original = &self.originals[case % self.originals.len()];
            let mut draws = Draws(case as u64);
            let choices: Vec<u8> = (0..32).flat_map(|_| draws.next().to_le_bytes()).collect();
            let u = &mut Unstructured::new(&choices);
            let values = if case % 3 == 0 { None } else { changed_values(original, u).unwrap() };
            let bytes = values.unwrap_or_else(|| changed(original, u).unwrap());
            std::fs::write(&self.file, &bytes).unwrap();
            let start = Instant::now();
            let end = catch_unwind(AssertUnwindSafe(|| (self.read)()));
            let took = start.elapsed();
            let shown = || {
                let kept = std::env::temp_dir().join(format!("pcpo-{}-{case}", self.name));
                std::fs::write(&kept, &bytes).unwrap();
                format!("{}, case {case}, kept as {}", self.name, kept.display())
            };
            let Ok(end) = end else { panic!("{}: a panic", shown()) };
            assert!(took < PATIENCE, "{}: took {took:?}", shown());
            if let Err(error) = end {
                refused += 1;
                let said = format!("{error:#}");
                assert!(self.named.iter().any(|word| said.contains(word)), "{}: {said}", shown());
            }
        }
        refused
    }
}

/// Everything that is read of a model before its weights are.
fn read_model(dir: &Path) -> Result<()> {
    let options = Options {
        model: Some(dir.to_path_buf()),
        reward: Some(vec!["symmetry".into()]),
        prompt: Some(vec!["a".into()]),
        images_per_epoch: Some(8),
        group_size: Some(8),
        ..Default::default()
    };
    let settings = options.resolve()?;
    shapes(&settings, None)?;
    let files = ModelFiles::folder(dir)?;
    let flow = files.family.is_flow();
    let (sampler, tokens) = (Sampler::of_trainers(flow), 64);
    let sampling =
        Sampling { sampler, steps: 4, eta: 1.0, grid: Grid::Shifted, shift: None, tokens };
    files.schedule()?.steps(&sampling).context("scheduler_config.json")?;
    Ok(())
}

/// All tensors of a safetensors file.
fn read_weights(file: &Path) -> Result<()> {
    let weights = Weights::open_file(file)?;
    weights.all_metadata()?;
    let names: Vec<String> = weights.names().map(String::from).collect();
    for name in names {
        if weights.shape(&name).is_some_and(|shape| shape.iter().product::<usize>() < 1 << 22) {
            weights.f32(&name)?;
        }
    }
    Ok(())
}

#[test]
fn changed_inputs_are_read_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let device = Compute::cpu().burn;
    let mut targets = vec![
        Target::new(
            "safetensors",
            at("weights.safetensors"),
            &[golden("lora/peft.safetensors"), golden("lora/sd3-peft.safetensors")],
            read_weights,
        ),
        Target::new(
            "adapter",
            at("adapter.safetensors"),
            &[golden("lora/peft.safetensors"), golden("lora/flux-peft.safetensors")],
            |file| formats::read(file, &[]).map(drop),
        ),
        Target::new(
            "toml",
            at("job.toml"),
            &[emoji_file("train.toml"), emoji_file("blue.toml")],
            |file| {
                let options = Options::from_file(file)?;
                // What a field means is for the flags of the same names.
                let _ = options.resolve();
                Ok(())
            },
        ),
        Target::new("prompts", at("prompts.txt"), &[emoji_file("prompts.txt")], |file| {
            read_prompts(Some(file), None).map(drop)
        })
        .or_named(&["--prompts", "prompt"]),
    ];
    for (i, name) in ["plain.pt", "legacy.pt", "half.pt"].into_iter().enumerate() {
        let original = golden("reward/pickles").join(name);
        targets.push(Target::new(["pt", "pt-old", "pt-half"][i], at(name), &[original], |file| {
            Weights::open_any(file).map(drop)
        }));
    }
    // Embeddings.
    let embeddings = at("embeddings-original.safetensors");
    embed(&embeddings);
    let read = |file: &Path| {
        let opened = PromptEmbeddings::open(file)?;
        let row = opened.row_of("red apple").unwrap_or(0);
        opened.conditioning(&[row], &device).map(drop)
    };
    targets.push(Target::new("embeddings", at("embeddings.safetensors"), &[embeddings], read));
    // Models: each of their configurations.
    let models = [
        ("simple", &["unet/config.json", "vae/config.json", "text_encoder/config.json"][..]),
        ("sd3", &["transformer/config.json", "text_encoder_3/config.json"]),
        ("flux-dev", &["transformer/config.json", "vae/config.json"]),
        ("sdxl", &["unet/config.json", "text_encoder_2/config.json"]),
        ("sd21", &["unet/diffusion_pytorch_model.safetensors.index.json"]),
        ("z-image", &["transformer/config.json", "text_encoder/config.json"]),
        ("flux2-klein", &["transformer/config.json", "vae/config.json"]),
    ];
    for (model, files) in models {
        let shared = ["model_index.json", "scheduler/scheduler_config.json"];
        for file in files.iter().chain(&shared) {
            let own = at(&format!("{model}-{}", file.replace('/', "-")));
            copy(&golden(model), &own);
            let original = golden(model).join(file);
            let read = {
                let own = own.clone();
                move |_: &Path| read_model(&own)
            };
            let target = Target::new("model", own.join(file), &[original], read);
            // What does not fit may be in the files beside it, and numbers of a run in its flags.
            targets.push(target.or_named(&[own.to_str().unwrap(), "config.json", "--"]));
        }
    }
    // Tokenizers.
    for (name, file) in [("clip-vocab", "vocab.json"), ("clip-merges", "merges.txt")] {
        let own = at(name);
        copy(&golden("sd3/tokenizer"), &own);
        let original = golden("sd3/tokenizer").join(file);
        let read = {
            let own = own.clone();
            move |_: &Path| {
                let tokenizer = Tokenizer::load(&own, 77)?;
                // Words that a vocabulary lacks are an error of the prompt.
                let _ = tokenizer.encode("a red apple, on white");
                Ok(())
            }
        };
        let named = own.to_str().unwrap().to_string();
        targets.push(Target::new(name, own.join(file), &[original], read).or_named(&[&named]));
    }
    let own = at("t5");
    copy(&golden("sd3/tokenizer_3"), &own);
    let original = golden("sd3/tokenizer_3/tokenizer.json");
    let named = own.to_str().unwrap().to_string();
    let read = move |_: &Path| {
        let tokenizer = Tokenizer::load_t5(&own, 64)?;
        let _ = tokenizer.encode("a red apple");
        Ok(())
    };
    let t5 = Target::new("t5-tokenizer", at("t5/tokenizer.json"), &[original], read);
    targets.push(t5.or_named(&[&named]));
    for (name, model, file) in [
        ("qwen-tokenizer", "z-image", "tokenizer.json"),
        ("qwen-config", "z-image", "tokenizer_config.json"),
        ("qwen-template", "flux2-klein", "chat_template.jinja"),
    ] {
        let own = at(name);
        let from = golden(model).join("tokenizer");
        copy(&from, &own);
        let named = own.to_str().unwrap().to_string();
        let read = {
            let own = own.clone();
            move |_: &Path| {
                let tokenizer = ChatTokenizer::load(&own, 48, true)?;
                // What a template or vocabulary refuses may be the prompt's fault.
                let _ = tokenizer.encode("a red apple");
                Ok(())
            }
        };
        let target = Target::new(name, own.join(file), &[from.join(file)], read);
        targets.push(target.or_named(&[&named]));
    }
    // A run that is to go on.
    let run = at("run");
    let output = program(&[&["train", "--out", run.to_str().unwrap()][..], &TINY].concat());
    assert!(output.status.success(), "{}", error_of(&output));
    let newest = run.join("checkpoints/epoch-00004");
    for file in ["state.json", "optimizer.safetensors"] {
        let original = at(file);
        std::fs::copy(newest.join(file), &original).unwrap();
        let state: serde_json::Value =
            serde_json::from_slice(&std::fs::read(newest.join("state.json")).unwrap()).unwrap();
        let model = state["model"].as_str().unwrap().to_string();
        let net = ModelFiles::folder(&crate::support::emoji()).unwrap();
        let net = net.load_network(&device, pcpo_wgpu::model::Storage::F32, None).unwrap();
        let linears = net.linears();
        let read = {
            let run = run.clone();
            move |_: &Path| checkpoint::load(&run, &model, &linears).map(drop)
        };
        let target = Target::new("checkpoint", newest.join(file), &[original], read);
        targets.push(target.or_named(&["--resume"]));
    }
    for (name, file) in [("metrics", "metrics.jsonl"), ("settings", "settings.toml")] {
        let original = at(&format!("original-{file}"));
        std::fs::copy(run.join(file), &original).unwrap();
        let read = {
            let run = run.clone();
            move |file: &Path| {
                if name == "settings" {
                    let _ = Options::from_file(file)?.resumed(&run);
                    return Ok(());
                }
                let text = pcpo_wgpu::io::read_text(file)?;
                let record = |(i, line)| read_record(file, i + 1, line).map(drop);
                text.lines().enumerate().try_for_each(record)
            }
        };
        targets.push(Target::new(name, run.join(file), &[original], read));
    }
    let (mut all, mut refused) = (0, 0);
    let number = cases(200, 1_000_000usize.div_ceil(targets.len()));
    for target in &targets {
        let (start, no) = (Instant::now(), target.attack(number));
        println!(
            "{}: {number} inputs, {no} refused, {:.0?}",
            target.file.display(),
            start.elapsed()
        );
        // Which pipeline a model was saved by is nothing that we ask.
        let unread = target.file.ends_with("model_index.json") || target.name == "qwen-template";
        assert!(unread || no > number / 20, "{}: hardly a change is noticed: {no}", target.name);
        // What comes next reads the original.
        std::fs::write(&target.file, &target.originals[0]).unwrap();
        all += number;
        refused += no;
    }
    println!("{all} inputs of {} kinds, {refused} of them refused", targets.len());
}

fn emoji_file(name: &str) -> PathBuf {
    crate::support::emoji().join(name)
}

/// Embeddings of a prompt by the embedded model.
fn embed(out: &Path) {
    let args = ["embed", "--device", "cpu", "--model", "models/emoji", "--prompt", "red apple"];
    let output = program(&[&args[..], &["--out", out.to_str().unwrap()]].concat());
    assert!(output.status.success(), "{}", error_of(&output));
}

/// Found by the test above: the library panics at a decoder that is cut short.
#[test]
fn a_tokenizer_whose_decoder_is_damaged_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(golden("sd3/tokenizer_3/tokenizer.json")).unwrap();
    let decoder = text.find("\"decoder\"").unwrap();
    let open = decoder + text[decoder..].find('{').unwrap();
    let comma = open + text[open..].find(',').unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), &text[..comma]).unwrap();
    let error = format!("{:#}", Tokenizer::load_t5(dir.path(), 64).map(drop).unwrap_err());
    assert!(error.contains("tokenizer.json: cannot be used"), "{error}");
}
