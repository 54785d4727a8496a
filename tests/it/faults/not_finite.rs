//! NaN and infinities, wherever they come from, do not reach a checkpoint: the run goes back, stops
//! with the reason, or never starts.

use std::path::Path;

use pcpo_wgpu::io::tensors::{HostTensor, write_tensors};
use pcpo_wgpu::io::weights::Weights;
use pcpo_wgpu::{Job, Options, Prompt, Reward, RgbImage, Silent, train};

use super::tiny;
use crate::support::{copy, emoji};

fn options() -> Options {
    Options { epochs: Some(3), updates_per_epoch: Some(2), ..tiny() }
}

/// Whether all numbers of all safetensors files below a folder are finite; how many files there
/// are.
fn finite(dir: &Path) -> (bool, usize) {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.fold((true, 0), |(all, files), entry| {
        let path = entry.path();
        if path.is_dir() {
            let (own, n) = finite(&path);
            return (all && own, files + n);
        }
        if path.extension().is_none_or(|e| e != "safetensors") {
            return (all, files);
        }
        let weights = Weights::open_file(&path).unwrap();
        let names: Vec<String> = weights.names().map(String::from).collect();
        let own =
            names.iter().all(|n| weights.raw(n).unwrap().values.iter().all(|v| v.is_finite()));
        (all && own, files + 1)
    })
}

/// What a job ends with, and whether its folder is clean.
fn ends(job: Job, out: &Path) -> (String, usize) {
    let error = format!("{:#}", train(job, &Silent).unwrap_err());
    let (clean, files) = finite(out);
    assert!(clean, "{error}: a number that is not finite is saved");
    (error, files)
}

/// The embedded model with one number of one tensor replaced.
fn damaged(to: &Path, part: &str, tensor: &str, value: f32) {
    copy(&emoji(), to);
    let file = to.join(part).join("diffusion_pytorch_model.safetensors");
    let weights = Weights::open_file(&file).unwrap();
    let names: Vec<String> = weights.names().map(String::from).collect();
    let mut tensors: Vec<HostTensor> = names.iter().map(|n| weights.raw(n).unwrap()).collect();
    let damaged = tensors.iter_mut().find(|t| t.name == tensor).expect(tensor);
    damaged.values[0] = value;
    write_tensors(&file, &tensors, &[]).unwrap();
}

/// A reward that is a number until it is asked the n-th time.
struct Until(usize, f64);

impl Reward for Until {
    fn score(&mut self, images: &[RgbImage], _: &[&Prompt]) -> anyhow::Result<Vec<f64>> {
        self.0 -= 1;
        if self.0 == 0 {
            return Ok(vec![self.1; images.len()]);
        }
        Ok((0..images.len()).map(|i| i as f64).collect())
    }
}

#[test]
fn nothing_that_is_not_finite_reaches_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for (i, value) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38].into_iter().enumerate() {
        // In the network's prediction, and in decoded pictures.
        for (part, tensor) in [("unet", "conv_out.bias"), ("vae", "decoder.conv_in.weight")] {
            let (model, out) = (at(&format!("{part}-{i}")), at(&format!("{part}-run-{i}")));
            damaged(&model, part, tensor, value);
            let settings = Options { model: Some(model), ..options() }.resolve().unwrap();
            let (error, files) = ends(Job::new(settings, &out), &out);
            // What is in a file is named; what overflows is found in the first picture.
            let refused = if value.is_finite() { "finite" } else { "the file is damaged" };
            assert!(error.contains(refused) && files == 0, "{part}, {value}: {error}");
        }
        if value.is_finite() {
            continue;
        }
        // In a reward: before training, in a rollout, and in the evaluation at an epoch's end.
        for asked in [1, 2, 5] {
            let out = at(&format!("reward-{i}-{asked}"));
            let reward = Until(asked, value.into());
            let job = Job::new(options().resolve().unwrap(), &out).with_reward("own", reward);
            let (error, files) = ends(job, &out);
            assert!(error.contains("own") && !error.contains("panic"), "{asked}: {error}");
            assert_eq!(files > 0, asked > 2, "{asked}: {error}");
            if asked > 2 {
                let well = Until(usize::MAX, 0.0);
                let job = Job::resume(&Options::default(), &out).unwrap();
                train(job.with_reward("own", well), &Silent).unwrap();
            }
        }
    }
    // In the gradient: steps that take the adapter out of every range.
    let out = at("gradient");
    let wild = Options { learning_rate: Some(1e30), max_grad_norm: Some(1e30), ..options() };
    let (error, _) = ends(Job::new(wild.resolve().unwrap(), &out), &out);
    assert!(error.contains("--learning-rate"), "{error}");
    // In an adapter's file.
    let out = at("trained");
    train(Job::new(options().resolve().unwrap(), &out), &Silent).unwrap();
    let file = out.join("adapter.safetensors");
    let weights = Weights::open_file(&file).unwrap();
    let about: Vec<(String, String)> = weights.all_metadata().unwrap().into_iter().collect();
    let names: Vec<String> = weights.names().map(String::from).collect();
    let tensors: Vec<HostTensor> = names.iter().map(|n| weights.raw(n).unwrap()).collect();
    for value in [f32::NAN, f32::INFINITY] {
        let mut tensors = tensors.clone();
        tensors[3].values[1] = value;
        let about: Vec<(&str, String)> = about.iter().map(|(k, v)| (&k[..], v.clone())).collect();
        let lora = at("damaged.safetensors");
        write_tensors(&lora, &tensors, &about).unwrap();
        let given = Options { lora: Some(lora.clone()), rank: None, ..options() };
        let error = match given.resolve() {
            Err(e) => format!("{e:#}"),
            Ok(settings) => ends(Job::new(settings, at("never")), &at("never")).0,
        };
        assert!(
            error.contains("damaged.safetensors: tensor") && error.contains("damaged"),
            "{error}"
        );
        // In a checkpoint that something else has damaged.
        let newest = out.join("checkpoints/epoch-00003/adapter.safetensors");
        let kept = std::fs::read(&newest).unwrap();
        std::fs::copy(&lora, &newest).unwrap();
        let more = Options { epochs: Some(4), ..Default::default() };
        let error = match Job::resume(&more, &out) {
            Err(e) => format!("{e:#}"),
            Ok(job) => format!("{:#}", train(job, &Silent).unwrap_err()),
        };
        assert!(error.contains("adapter.safetensors: tensor"), "{error}");
        std::fs::write(&newest, kept).unwrap();
    }
}
