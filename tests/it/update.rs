//! The gradient of a whole update against PyTorch's: tests/golden/update holds two dumps and what
//! scripts/verify_update.py made of them with diffusers and peft.

use burn::tensor::{Tensor, TensorData};
use pcpo_wgpu::device::Compute;
use pcpo_wgpu::lora_io::load;
use pcpo_wgpu::model::pipeline::load_schedule;
use pcpo_wgpu::model::unet::UNet;
use pcpo_wgpu::model::weights::{Storage, Weights};
use pcpo_wgpu::model::{Conditioning, Denoiser, Family};
use pcpo_wgpu::ops::policy_objective::{GuidanceGradient, Objective, Surrogate};
use pcpo_wgpu::rollout::{Denoise, Guided, Visit};
use pcpo_wgpu::schedule::{Grid, Sampler, Sampling, Step};
use pcpo_wgpu::update::{Batch, batch_gradient};

use crate::support::{cpu, emoji, golden, gpu};

/// Replays a dump and compares every matrix's gradient; returns the largest relative error.
fn replay(compute: &Compute, name: &str, objective: Objective, beta: f32, by_block: bool) -> f64 {
    let dump = Weights::open_file(&golden(&format!("update/{name}.safetensors"))).unwrap();
    let torch = Weights::open_file(&golden(&format!("update/{name}-torch.safetensors"))).unwrap();
    let unet = UNet::load(&emoji().join("unet"), &compute.burn, Storage::F32).unwrap();
    // The dump holds the adapter under `lora.`: rewritten as a file of its own.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("adapter.safetensors");
    let own = |n: &str| {
        let (values, shape) = dump.f32(n).unwrap();
        (n.trim_start_matches("lora.").to_string(), shape, values)
    };
    let tensors: Vec<_> = dump.names().filter(|n| n.starts_with("lora.")).map(own).collect();
    pcpo_wgpu::files::write_tensors(&file, &tensors, &[]).unwrap();
    let adapter = load(&file, &unet.linears()).unwrap();
    let tensor = |name: &str| {
        let (values, shape) = dump.f32(name).unwrap();
        Tensor::<5>::from_data(TensorData::new(values, shape), &compute.burn)
    };
    let sequence = |name: &str| {
        let (values, shape) = dump.f32(name).unwrap();
        Conditioning { sequence: Tensor::from_data(TensorData::new(values, shape), &compute.burn), pooled: None }
    };
    let (latents, old) = (tensor("latents"), tensor("eps_old"));
    let row = |t: &Tensor<5>, s: usize| t.clone().narrow(0, s, 1).squeeze_dim::<4>(0);
    let timesteps = dump.f32("timesteps").unwrap().0;
    let weights = dump.f32("weights").unwrap().0;
    let schedule = load_schedule(&emoji()).unwrap();
    let sampling = Sampling { sampler: Sampler::Ddim, steps: 8, eta: 1.0, grid: Grid::Shifted, shift: None, tokens: 0 };
    let all = schedule.steps(&sampling).unwrap();
    let trained: Vec<(usize, Step)> = timesteps
        .iter()
        .zip(&weights)
        .map(|(&t, &w)| {
            let i = all.iter().position(|s| s.t == f64::from(t)).unwrap();
            (i, Step { weight: f64::from(w), ..all[i] })
        })
        .collect();
    let advantages = dump.f32("advantages").unwrap().0;
    let (cond, uncond) = (sequence("prompt_embeds"), sequence("negative_prompt_embeds"));
    let batch = Batch {
        first: 0,
        // Seed 0, the second update of the first epoch: images 4 to 7.
        first_image: 4,
        visits: (0..trained.len()).map(|s| Visit { x: row(&latents, s), old: row(&old, s) }).collect(),
        cond: cond.clone(),
        uncond: uncond.clone(),
    };
    let surrogate = Surrogate {
        objective,
        xi: 1e-4,
        beta,
        guidance_gradient: GuidanceGradient::Both,
        scale: 1.0 / (advantages.len() * trained.len()) as f32,
    };
    let guidance = Guided::new(&unet, 3.0);
    let policy = Denoise { compute, net: &unet, lora: None, guidance, cond: &cond, uncond: &uncond };
    let how = (&advantages[..], 0, by_block);
    let found = batch_gradient(&policy, &adapter, &batch, &trained, &surrogate, how, || Ok(())).unwrap();
    let mut worst = 0f64;
    let mut gradient = adapter.clone();
    gradient.parameters().into_iter().zip(&found.gradients).for_each(|(p, g)| p.clone_from(g));
    for (key, _, values) in
        pcpo_wgpu::lora_io::tensors(&gradient, pcpo_wgpu::lora_io::Format::Diffusers, Family::StableDiffusion)
    {
        let expected = torch.f32(&key).unwrap().0;
        let scale = expected.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
        assert!(scale > 0.0, "{key} has a gradient");
        let error = values.iter().zip(&expected).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max) / scale;
        worst = worst.max(if error.is_nan() { f64::INFINITY } else { error });
    }
    worst
}

#[test]
fn gradients_of_an_update_are_those_of_pytorch() {
    for compute in [cpu(), gpu()] {
        for (name, objective, beta) in [("ppo", Objective::PpoClip, 0.0), ("hinge", Objective::LogHinge, 0.05)] {
            for by_block in [false, true] {
                let worst = replay(&compute, name, objective, beta, by_block);
                println!("{name} on {}, block by block {by_block}: {worst:.1e}", compute.name);
                assert!(worst < 1e-3, "{name} on {}: off by {worst:e}", compute.name);
            }
        }
    }
}
