//! The gradient of a whole update against PyTorch's: tests/golden/update holds five dumps, three of a UNet, one of an SD3 and
//! one of a FLUX transformer, and what scripts/verify_update.py made of them with diffusers and peft.

use std::path::PathBuf;

use burn::tensor::{Tensor, TensorData};
use pcpo_wgpu::check::largest_error;
use pcpo_wgpu::credit::{Credit, apply};
use pcpo_wgpu::device::Compute;
use pcpo_wgpu::lora_io::load;
use pcpo_wgpu::model::pipeline::load_schedule;
use pcpo_wgpu::model::weights::{Storage, Weights};
use pcpo_wgpu::model::{Conditioning, Family};
use pcpo_wgpu::ops::policy_objective::{GuidanceGradient, Objective, Surrogate};
use pcpo_wgpu::rollout::{Denoise, Guided, Visit};
use pcpo_wgpu::schedule::{Grid, Sampler, Sampling, Step};
use pcpo_wgpu::update::{Batch, batch_gradient};

use crate::support::{cpu, emoji, golden, gpu};

/// A dump, the model that it is of, and the settings that its file does not hold.
struct Case {
    name: &'static str,
    model: PathBuf,
    objective: Objective,
    beta: f32,
    guidance: f64,
    sampling: Sampling,
    credit: Credit,
}

fn cases() -> [Case; 5] {
    let ddim = |name, objective, beta, credit| Case {
        name,
        model: emoji(),
        objective,
        beta,
        guidance: 3.0,
        sampling: Sampling { sampler: Sampler::Ddim, steps: 8, eta: 1.0, grid: Grid::Shifted, shift: None, tokens: 0 },
        credit,
    };
    let flow = |name, model, objective, beta, credit, sampler: Sampler| Case {
        name,
        model: golden(model),
        objective,
        beta,
        guidance: if model == "sd3" { 4.5 } else { 3.5 },
        sampling: Sampling {
            sampler,
            steps: 6,
            eta: sampler.default_eta(),
            grid: Grid::Shifted,
            // FLUX's golden folder shifts by the number of tokens, 64 at 32 pixels.
            shift: None,
            tokens: 16,
        },
        credit,
    };
    [
        ddim("ppo", Objective::PpoClip, 0.0, Credit::Native),
        ddim("hinge", Objective::LogHinge, 0.05, Credit::Proportionate),
        Case { guidance: 1.0, ..ddim("native", Objective::LogHinge, 0.0, Credit::Native) },
        flow("sd3-hinge", "sd3", Objective::LogHinge, 0.05, Credit::Proportionate, Sampler::FlowGrpo),
        flow("flux-guard", "flux-dev", Objective::PpoClip, 0.0, Credit::Guard, Sampler::Dance),
    ]
}

/// A matrix's key and its gradient.
type Gradients = Vec<(String, Vec<f32>)>;

/// Replays a dump in batches of at most `rows` images; returns the gradient of every matrix.
fn replay(compute: &Compute, case: &Case, by_block: Option<usize>, rows: usize) -> Gradients {
    let name = case.name;
    let dump = Weights::open_file(&golden(&format!("update/{name}.safetensors"))).unwrap();
    let family = Family::of(&case.model).unwrap();
    let net = family.load(&case.model, &compute.burn, Storage::F32).unwrap();
    // The dump holds the adapter under `lora.`: rewritten as a file of its own, with its alpha.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("adapter.safetensors");
    let own = |n: &str| {
        let (values, shape) = dump.f32(n).unwrap();
        (n.trim_start_matches("lora.").to_string(), shape, values)
    };
    let tensors: Vec<_> = dump.names().filter(|n| n.starts_with("lora.")).map(own).collect();
    let alpha = format!("{{\"{}.lora_alpha\": {}}}", family.network(), dump.metadata("lora_alpha").unwrap());
    pcpo_wgpu::files::write_tensors(&file, &tensors, &[("lora_adapter_metadata", alpha)]).unwrap();
    let adapter = load(&file, &net.linears()).unwrap();
    let conditioning = |sequence: &str, pooled: &str| {
        let (values, shape) = dump.f32(sequence).unwrap();
        let pooled = dump.has(pooled).then(|| {
            let (values, shape) = dump.f32(pooled).unwrap();
            Tensor::<2>::from_data(TensorData::new(values, shape), &compute.burn)
        });
        Conditioning { sequence: Tensor::from_data(TensorData::new(values, shape), &compute.burn), pooled }
    };
    let ((latents, shape), (old, _)) = (dump.f32("latents").unwrap(), dump.f32("eps_old").unwrap());
    // Images first to first + n of step s.
    let size: usize = shape[2..].iter().product();
    let part = |values: &[f32], s: usize, first: usize, n: usize| {
        let start = (s * shape[1] + first) * size;
        values[start..start + n * size].to_vec()
    };
    let schedule = load_schedule(&case.model).unwrap();
    let all = apply(case.credit, &schedule, schedule.steps(&case.sampling).unwrap(), None).unwrap();
    let timesteps = dump.f32("timesteps").unwrap().0;
    let trained: Vec<(usize, Step)> = timesteps
        .iter()
        .zip(dump.f32("weights").unwrap().0)
        .map(|(&t, weight)| {
            let i = all.iter().position(|s| (s.t - f64::from(t)).abs() < 1e-3).unwrap();
            assert!((all[i].weight - f64::from(weight)).abs() < 1e-6 * all[i].weight, "{name}: the weight at {t}");
            (i, all[i])
        })
        .collect();
    let advantages = dump.f32("advantages").unwrap().0;
    let cond = conditioning("prompt_embeds", "pooled_prompt_embeds");
    let uncond = conditioning("negative_prompt_embeds", "negative_pooled_prompt_embeds");
    let surrogate = Surrogate {
        objective: case.objective,
        xi: dump.metadata("clip_range").unwrap().parse().unwrap(),
        beta: case.beta,
        guidance_gradient: GuidanceGradient::Both,
        scale: 1.0 / (advantages.len() * trained.len()) as f32,
    };
    let guidance = Guided::new(&*net, case.guidance);
    // The second update of the first epoch.
    let first_image: u32 = dump.metadata("first_image").unwrap().parse().unwrap();
    let seed: u64 = dump.metadata("seed").map_or(0, |s| s.parse().unwrap());
    let mut sum: Option<Vec<Vec<f32>>> = None;
    for first in (0..advantages.len()).step_by(rows.min(advantages.len())) {
        let n = rows.min(advantages.len() - first);
        let (cond, uncond) = (cond.rows(first, n), uncond.rows(first, n));
        let visit = |s| Visit { x: part(&latents, s, first, n), old: part(&old, s, first, n) };
        let batch = Batch {
            first,
            first_image: first_image + first as u32,
            shape: [n, shape[2], shape[3], shape[4]],
            visits: (0..trained.len()).map(visit).collect(),
        };
        let policy = Denoise { compute, net: &*net, lora: None, guidance, cond: &cond, uncond: &uncond };
        let how = (&advantages[first..first + n], seed, by_block);
        let found = batch_gradient(&policy, &adapter, &batch, &trained, &surrogate, how, || Ok(())).unwrap().gradients;
        sum = Some(match sum {
            None => found,
            Some(sum) => {
                let add = |(a, b): (Vec<f32>, Vec<f32>)| a.iter().zip(b).map(|(a, b)| a + b).collect();
                sum.into_iter().zip(found).map(add).collect()
            }
        });
    }
    let mut gradient = adapter.clone();
    gradient.parameters().into_iter().zip(sum.unwrap()).for_each(|(p, g)| *p = g);
    let named = pcpo_wgpu::lora_io::tensors(&gradient, pcpo_wgpu::lora_io::Format::Diffusers, family);
    named.into_iter().map(|(key, _, values)| (key, values)).collect()
}

/// The largest error of a matrix, relative to the largest entry of what is expected.
fn worst(name: &str, found: &Gradients, expected: impl Fn(&str) -> Vec<f32>) -> f64 {
    let mut worst = 0f64;
    let mut silent = 0;
    for (key, values) in found {
        let expected = expected(key);
        let scale = expected.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
        if scale == 0.0 {
            // The last block's text queries lead nowhere.
            silent += 1;
            assert!(key.contains("add_q_proj") && values.iter().all(|v| *v == 0.0), "{key} has no gradient");
            continue;
        }
        assert_eq!(values.len(), expected.len(), "{key}");
        worst = worst.max(largest_error(values, &expected) / scale);
    }
    assert!(silent <= 2, "{name}: {silent} matrices without a gradient");
    worst
}

#[test]
fn gradients_of_an_update_are_those_of_pytorch() {
    for compute in [cpu(), gpu()] {
        for case in cases() {
            // At once; block by block with all rows; with three at a time, of eight or four.
            for by_block in [None, Some(64), Some(3)] {
                let torch = Weights::open_file(&golden(&format!("update/{}-torch.safetensors", case.name))).unwrap();
                let found = replay(&compute, &case, by_block, usize::MAX);
                let worst = worst(case.name, &found, |key| torch.f32(key).unwrap().0);
                println!("{} on {}, block by block {by_block:?}: {worst:.1e}", case.name, compute.name);
                assert!(worst < 1e-3, "{} on {}: off by {worst:e}", case.name, compute.name);
            }
        }
    }
}

/// Gradients accumulate over batches: their size changes the order of additions and nothing else.
#[test]
fn the_size_of_a_batch_never_changes_the_update() {
    let compute = cpu();
    for case in cases() {
        let whole = replay(&compute, &case, None, usize::MAX);
        for rows in [1, 3] {
            let parts = replay(&compute, &case, None, rows);
            let of = |key: &str| whole.iter().find(|(k, _)| k == key).unwrap().1.clone();
            let worst = worst(case.name, &parts, of);
            println!("{} in batches of {rows}: {worst:.1e}", case.name);
            assert!(worst < 1e-5, "{} in batches of {rows}: off by {worst:e}", case.name);
        }
    }
}
