//! The networks against diffusers 0.42.1 (tests/golden/make_golden.py), on the CPU device and on
//! the GPU.

use std::path::Path;

use pcpo_wgpu::device::Compute;
use pcpo_wgpu::model::Storage;
use pcpo_wgpu::tools::check::{Asked, check};

use crate::support::{copy, cpu, golden, gpu};

/// Folders, and how many comparisons each allows: a diffusion model's prediction, text, latents,
/// image and encode; of a flow four embeddings (two for FLUX, which has no negative prompt); a lone
/// transformer's prediction.
const DIFFUSION: [(&str, usize); 5] =
    [("sd15", 5), ("sd21", 5), ("odd", 5), ("nomid", 5), ("simple", 5)];
const SD3: [(&str, usize); 4] = [("sd3", 8), ("sd35m", 8), ("sd35l", 1), ("sd3odd", 1)];
const FLUX: [(&str, usize); 4] =
    [("flux-dev", 6), ("flux-schnell", 6), ("flux-rope", 1), ("flux-wide", 1)];

/// Of Qwen3's work by token numbers, by prompts and of no prompt, and of what a flow has besides; a
/// lone transformer's prediction.
const QWEN: [(&str, usize); 3] = [("z-image", 7), ("flux2-klein", 7), ("flux2-guided", 1)];

/// SDXL's: the prediction, both encoders' work twice, by token numbers and by prompts, that of no
/// prompt, latents, image and encode.
const SDXL: [(&str, usize); 2] = [("sdxl", 10), ("sdxl-v", 10)];

fn asked(dir: &Path, storage: Storage) -> Asked {
    let reference = dir.join("reference.safetensors");
    Asked { model: dir.into(), reference, lora: None, storage, stream: false }
}

fn parity(compute: &Compute, folders: &[(&str, usize)]) {
    for &(folder, comparisons) in folders {
        let dir = golden(folder);
        let lines = check(&asked(&dir, Storage::F32), compute).unwrap();
        assert_eq!(lines.len(), comparisons, "{folder}: everything is compared");
        for line in lines {
            println!("{folder} {} {:.2e}", line.name, line.error);
            assert!(
                line.error < 1e-4,
                "{folder}: {} is off by {:.2e}; regenerate with tests/golden/make_golden.py, \
                 make_flow_golden.py or make_qwen_golden.py?",
                line.name,
                line.error
            );
        }
    }
}

#[test]
fn five_diffusion_configurations_match_diffusers_on_the_cpu() {
    parity(&cpu(), &DIFFUSION);
}

#[test]
fn five_diffusion_configurations_match_diffusers_on_the_gpu() {
    parity(&gpu(), &DIFFUSION);
}

#[test]
fn two_configurations_of_sdxl_match_diffusers_on_the_cpu() {
    parity(&cpu(), &SDXL);
}

#[test]
fn two_configurations_of_sdxl_match_diffusers_on_the_gpu() {
    parity(&gpu(), &SDXL);
}

#[test]
fn four_configurations_of_stable_diffusion_3_and_of_flux_match_diffusers_on_the_cpu() {
    parity(&cpu(), &SD3);
    parity(&cpu(), &FLUX);
}

#[test]
fn four_configurations_of_stable_diffusion_3_and_of_flux_match_diffusers_on_the_gpu() {
    parity(&gpu(), &SD3);
    parity(&gpu(), &FLUX);
}

#[test]
fn z_image_and_two_configurations_of_flux_2_match_diffusers_on_the_cpu() {
    parity(&cpu(), &QWEN);
}

#[test]
fn z_image_and_two_configurations_of_flux_2_match_diffusers_on_the_gpu() {
    parity(&gpu(), &QWEN);
}

/// Of a folder with a transformer and a text encoder alone, both are compared; and a text encoder
/// alone is told by its own configuration.
#[test]
fn a_transformer_and_its_text_encoder_need_nothing_else() {
    for (folder, names) in [
        ("z-image", ["prediction", "prompt_embeds"]),
        ("flux2-klein", ["prediction", "prompt_embeds"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        for part in ["transformer", "text_encoder"] {
            copy(&golden(folder).join(part), &dir.path().join(part));
        }
        let reference = golden(folder).join("reference.safetensors");
        let both = Asked { reference, ..asked(dir.path(), Storage::F32) };
        let lines = check(&both, &cpu()).unwrap();
        assert_eq!(lines.iter().map(|l| l.name).collect::<Vec<_>>(), names, "{folder}");
        assert!(lines.iter().all(|l| l.error < 1e-4), "{folder}");
        let encoder = dir.path().join("text_encoder");
        let lines = check(&Asked { model: encoder.as_path().into(), ..both }, &cpu()).unwrap();
        assert_eq!((lines.len(), lines[0].name), (1, "prompt_embeds"), "{folder}");
        assert!(lines[0].error < 1e-4, "{folder}");
    }
}

/// Weights in 8 and 4 bits: off by what rounding costs, and no more.
#[test]
fn quantised_weights_stay_close_to_f32() {
    for compute in [cpu(), gpu()] {
        for (storage, least, most) in [(Storage::Q8, 1e-4, 0.05), (Storage::Q4, 1e-2, 0.8)] {
            let dir = golden("sd3");
            let lines = check(&asked(&dir, storage), &compute).unwrap();
            let error = lines.iter().find(|l| l.name == "prediction").unwrap().error;
            println!("{storage:?} on {}: {error:.2e}", compute.name);
            assert!((least..most).contains(&error), "{storage:?}: {error:e}");
        }
    }
}
