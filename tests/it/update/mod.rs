//! The gradient of a whole update against PyTorch's: tests/golden/update holds ten dumps, six of
//! UNets and one of each kind of transformer, and what scripts/verify_update.py made of them with
//! diffusers and peft.

mod cases;
pub mod dump;

use std::path::Path;

use burn::tensor::Device;
use pcpo_wgpu::device::Compute;
use pcpo_wgpu::io::tensors::{HostTensor, write_tensors};
use pcpo_wgpu::io::weights::Weights;
use pcpo_wgpu::kernels::frozen_weight::FrozenWeight;
use pcpo_wgpu::lora::formats::{Format, tensors};
use pcpo_wgpu::model::Storage;
use pcpo_wgpu::ops::policy_objective::Surrogate;
use pcpo_wgpu::sampling::fleet::Batch;
use pcpo_wgpu::sampling::policy::{GuidanceMode, Policy, PromptPair};
use pcpo_wgpu::sampling::trajectory::{Noise, Transition};
use pcpo_wgpu::schedule::Step;
use pcpo_wgpu::schedule::credit::apply;
use pcpo_wgpu::tools::errors::largest_error;
use pcpo_wgpu::train::plan::Part;
use pcpo_wgpu::train::update::{GradientOptions, TrajectoryBatch, batch_gradient};
use pcpo_wgpu::train::update_gradient::UpdateGradient;

use self::cases::{Case, cases};
use self::dump::{Dump, Gradients};
use crate::support::{cpu, files, gpu};

/// How a dump is replayed.
#[derive(Clone, Copy)]
struct Replay<'a> {
    compute: &'a Compute,
    storage: Storage,
    /// Rows that a block is differentiated for at a time, where it is block by block.
    rows_at_once: Option<usize>,
    /// Images of a batch at most.
    batch: usize,
}

impl<'a> Replay<'a> {
    fn on(compute: &'a Compute) -> Self {
        Self { compute, storage: Storage::F32, rows_at_once: None, batch: usize::MAX }
    }
}

impl Dump {
    /// The trained steps, which have to have the dump's weights.
    fn trained(&self, case: &Case) -> Vec<Step> {
        let schedule = files(&case.model).schedule().unwrap();
        let native = schedule.steps(&case.sampling).unwrap();
        let all = apply(case.credit, &schedule, native, None).unwrap();
        let steps = self.values("timesteps").into_iter().zip(self.values("weights"));
        steps
            .map(|(t, weight)| {
                let step = all.iter().find(|s| (s.t - f64::from(t)).abs() < 1e-3).unwrap();
                let off = (step.weight - f64::from(weight)).abs();
                assert!(off < 1e-6 * step.weight, "{}: the weight at {t}", case.name);
                *step
            })
            .collect()
    }
}

/// Replays a dump.
fn replay(case: &Case, how: Replay) -> Gradients {
    let compute = how.compute;
    let dump = Dump::open(case.name);
    let model = files(&case.model);
    let family = model.family;
    let net = model.load_network(&compute.burn, how.storage, None).unwrap();
    let adapter = dump.adapter("lora.", family.network(), &net.linears());
    let lora = adapter.to_device(&compute.burn);
    let trained = dump.trained(case);
    let shape = dump.file.shape("latents").unwrap().to_vec();
    let [c, h, w] = [shape[2], shape[3], shape[4]];
    let (latents, old) = (dump.values("latents"), dump.values("eps_old"));
    // Images first to first + n of step s.
    let part = |values: &[f32], s: usize, first: usize, n: usize| {
        let start = (s * shape[1] + first) * c * h * w;
        values[start..start + n * c * h * w].to_vec()
    };
    let advantages = dump.values("advantages");
    let surrogate = Surrogate {
        objective: case.objective,
        clip_range: dump.metadata("clip_range").parse().unwrap(),
        beta: case.beta,
        guidance_gradient: case.gradient,
        scale: 1.0 / (advantages.len() * trained.len()) as f32,
    };
    let first_image: u32 = dump.metadata("first_image").parse().unwrap();
    let seed: u64 = dump.file.metadata("seed").unwrap().map_or(0, |s| s.parse().unwrap());
    let mut sum = UpdateGradient::default();
    for first in (0..advantages.len()).step_by(how.batch.min(advantages.len())) {
        let n = how.batch.min(advantages.len() - first);
        let prompts = PromptPair {
            cond: dump.conditioning(compute, "", first, n),
            uncond: dump.conditioning(compute, "negative_", first, n),
        };
        let transition = |s| Transition {
            x: part(&latents, s, first, n),
            old_prediction: part(&old, s, first, n),
        };
        let batch = TrajectoryBatch {
            part: Part::of_images(0, Batch { rows: first..first + n, device: 0 }, trained.len()),
            noise: Noise { seed, first_image: first_image + first as u32 },
            latent: [c, h, w],
            transitions: (0..trained.len()).map(transition).collect(),
            ends: Vec::new(),
        };
        let guidance = GuidanceMode::new(&*net, case.guidance);
        let policy = Policy { compute, net: &*net, lora: Some(&lora), guidance, prompts: &prompts };
        let options = GradientOptions {
            surrogate: &surrogate,
            advantage: &advantages[first..first + n],
            rows_at_once: how.rows_at_once,
        };
        sum.add(batch_gradient(&policy, &adapter, &batch, &trained, &options, &|| {}).unwrap());
    }
    let mut gradient = adapter.clone();
    gradient.parameters_mut().zip(sum.gradients).for_each(|(p, g)| *p = g);
    tensors(&gradient, Format::Diffusers, family.network())
}

/// The largest error of a matrix, relative to the largest entry of what is expected.
pub fn worst(name: &str, found: &Gradients, expected: impl Fn(&str) -> Vec<f32>) -> f64 {
    let mut worst = 0f64;
    let mut silent = 0;
    for HostTensor { name: key, values, .. } in found {
        let expected = expected(key);
        let scale = expected.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
        if scale == 0.0 {
            // The last block's text queries lead nowhere.
            silent += 1;
            assert!(
                key.contains("add_q_proj") && values.iter().all(|v| *v == 0.0),
                "{key} has no gradient"
            );
            continue;
        }
        assert_eq!(values.len(), expected.len(), "{key}");
        worst = worst.max(largest_error(values, &expected) / scale);
    }
    assert!(silent <= 2, "{name}: {silent} matrices without a gradient");
    worst
}

pub fn torch(name: &str) -> impl Fn(&str) -> Vec<f32> {
    let dump = Dump::open(&format!("{name}-torch"));
    move |key| dump.values(key)
}

/// Another replay's gradients.
fn those_of(gradients: &Gradients) -> impl Fn(&str) -> Vec<f32> {
    |key| gradients.iter().find(|t| t.name == key).unwrap().values.clone()
}

#[test]
fn gradients_of_an_update_are_those_of_pytorch() {
    for compute in [cpu(), gpu()] {
        for case in cases() {
            // At once; block by block with all rows; with three at a time, of eight or four.
            // Software Vulkan is slow: how rows are split, which weights the steps have and a
            // second objective are the host's work, or that of kernels with tests of their own.
            let ways: &[Option<usize>] = match (compute.software, case.name) {
                (false, _) => &[None, Some(64), Some(3)],
                (true, "hinge" | "native" | "sdxl-hinge") => &[],
                (true, "ppo") => &[None],
                (true, _) => &[Some(3)],
            };
            for &rows_at_once in ways {
                let found = replay(&case, Replay { rows_at_once, ..Replay::on(&compute) });
                let worst = worst(case.name, &found, torch(case.name));
                let what = format!("{} on {}, {rows_at_once:?} rows", case.name, compute.name);
                println!("{what}: {worst:.1e}");
                assert!(worst < 1e-3, "{what}: off by {worst:e}");
            }
        }
    }
}

/// Gradients accumulate over batches: their size changes the order of additions and nothing else.
#[test]
fn the_size_of_a_batch_never_changes_the_update() {
    let compute = cpu();
    for case in cases() {
        let whole = replay(&case, Replay::on(&compute));
        for batch in [1, 3] {
            let parts = replay(&case, Replay { batch, ..Replay::on(&compute) });
            let worst = worst(case.name, &parts, those_of(&whole));
            println!("{} in batches of {batch}: {worst:.1e}", case.name);
            assert!(worst < 1e-5, "{} in batches of {batch}: off by {worst:e}", case.name);
        }
    }
}

/// The embedded model's weights are f16 on disk: stored as f16 they are the same, and so is the
/// gradient that flows through them.
#[test]
fn gradients_through_f16_weights_are_those_of_pytorch() {
    for compute in [cpu(), gpu()] {
        let case = &cases()[1];
        let found = replay(case, Replay { storage: Storage::F16, ..Replay::on(&compute) });
        let worst = worst(case.name, &found, torch(case.name));
        assert!(worst < 1e-3, "off by {worst:e} on {}", compute.name);
    }
}

/// A model folder whose network has the weights that a storage type leaves of another's.
fn rounded(model: &Path, storage: Storage, out: &Path) {
    let (from, to) = (model.join("unet"), out.join("unet"));
    std::fs::create_dir_all(&to).unwrap();
    std::fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
    let schedule = "scheduler/scheduler_config.json";
    std::fs::create_dir_all(out.join("scheduler")).unwrap();
    std::fs::copy(model.join(schedule), out.join(schedule)).unwrap();
    let weights = Weights::open_dir(&from).unwrap();
    let round = |name: &str| {
        let t = weights.f32(name).unwrap();
        let [rows, columns] = match t.shape[..] {
            [rows, columns] if columns % 32 == 0 => [rows, columns],
            _ => return t,
        };
        let turned = |values: &[f32], [rows, columns]: [usize; 2]| -> Vec<f32> {
            (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect()
        };
        let own = turned(&t.values, [rows, columns]);
        let weight = FrozenWeight::new(own, [columns, rows], storage, &Device::flex());
        let mut rounded = vec![0.0; rows * columns];
        weight.on_host().read(0, rows, &mut rounded);
        HostTensor { values: turned(&rounded, [columns, rows]), ..t }
    };
    let tensors: Vec<HostTensor> = weights.names().map(round).collect();
    write_tensors(&to.join("diffusion_pytorch_model.safetensors"), &tensors, &[]).unwrap();
}

/// The gradient through weights in 8 and 4 bits is that through what these bits leave of them.
#[test]
fn gradients_through_quantised_weights_are_those_of_the_rounded_weights() {
    for compute in [cpu(), gpu()] {
        for storage in [Storage::Q8, Storage::Q4] {
            let case = &cases()[1];
            let dir = tempfile::tempdir().unwrap();
            rounded(&case.model, storage, dir.path());
            let in_f32 = Case { model: dir.path().to_path_buf(), ..cases()[1].clone() };
            let expected = replay(&in_f32, Replay::on(&cpu()));
            let found = replay(case, Replay { storage, ..Replay::on(&compute) });
            let off = worst(case.name, &found, those_of(&expected));
            println!("{storage:?} on {}: {off:.1e}", compute.name);
            assert!(off < 1e-3, "{storage:?} on {}: off by {off:e}", compute.name);
            let untouched = worst(case.name, &found, torch(case.name));
            assert!(untouched > 1e-3, "{storage:?}: rounding changes the gradient ({untouched:e})");
        }
    }
}
