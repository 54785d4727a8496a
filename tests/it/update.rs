//! The gradient of a whole update against PyTorch's: tests/golden/update holds four dumps, two of a UNet, one of an SD3 and
//! one of a FLUX transformer, and what scripts/verify_update.py made of them with diffusers and peft.

use std::path::PathBuf;

use burn::tensor::{Tensor, TensorData};
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

fn cases() -> [Case; 4] {
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
        flow("sd3-hinge", "sd3", Objective::LogHinge, 0.05, Credit::Proportionate, Sampler::FlowGrpo),
        flow("flux-guard", "flux-dev", Objective::PpoClip, 0.0, Credit::Guard, Sampler::Dance),
    ]
}

/// Replays a dump and compares every matrix's gradient; returns the largest relative error.
fn replay(compute: &Compute, case: &Case, by_block: Option<usize>) -> f64 {
    let name = case.name;
    let dump = Weights::open_file(&golden(&format!("update/{name}.safetensors"))).unwrap();
    let torch = Weights::open_file(&golden(&format!("update/{name}-torch.safetensors"))).unwrap();
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
    let row =
        |values: &[f32], s: usize| values[s * values.len() / shape[0]..(s + 1) * values.len() / shape[0]].to_vec();
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
    let batch = Batch {
        first: 0,
        // The second update of the first epoch.
        first_image: dump.metadata("first_image").unwrap().parse().unwrap(),
        shape: shape[1..].try_into().unwrap(),
        visits: (0..trained.len()).map(|s| Visit { x: row(&latents, s), old: row(&old, s) }).collect(),
        cond: cond.clone(),
        uncond: uncond.clone(),
    };
    let surrogate = Surrogate {
        objective: case.objective,
        xi: dump.metadata("clip_range").unwrap().parse().unwrap(),
        beta: case.beta,
        guidance_gradient: GuidanceGradient::Both,
        scale: 1.0 / (advantages.len() * trained.len()) as f32,
    };
    let guidance = Guided::new(&*net, case.guidance);
    let policy = Denoise { compute, net: &*net, lora: None, guidance, cond: &cond, uncond: &uncond };
    let how = (&advantages[..], 0, by_block);
    let found = batch_gradient(&policy, &adapter, &batch, &trained, &surrogate, how, || Ok(())).unwrap();
    let mut worst = 0f64;
    let mut gradient = adapter.clone();
    gradient.parameters().into_iter().zip(&found.gradients).for_each(|(p, g)| p.clone_from(g));
    let mut silent = 0;
    for (key, _, values) in pcpo_wgpu::lora_io::tensors(&gradient, pcpo_wgpu::lora_io::Format::Diffusers, family) {
        let expected = torch.f32(&key).unwrap().0;
        let scale = expected.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
        if scale == 0.0 {
            // The last block's text queries lead nowhere.
            silent += 1;
            assert!(key.contains("add_q_proj") && values.iter().all(|v| *v == 0.0), "{key} has no gradient");
            continue;
        }
        let error = values.iter().zip(&expected).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max) / scale;
        worst = worst.max(if error.is_nan() { f64::INFINITY } else { error });
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
                let worst = replay(&compute, &case, by_block);
                println!("{} on {}, block by block {by_block:?}: {worst:.1e}", case.name, compute.name);
                assert!(worst < 1e-3, "{} on {}: off by {worst:e}", case.name, compute.name);
            }
        }
    }
}
