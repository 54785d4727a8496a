//! The networks against diffusers 0.42.1 (tests/golden/make_golden.py), on the CPU device and on the GPU.

use pcpo_wgpu::check::check;
use pcpo_wgpu::device::Compute;
use pcpo_wgpu::model::weights::Storage;

use crate::support::{cpu, golden, gpu};

const FOLDERS: [&str; 5] = ["sd15", "sd21", "odd", "nomid", "simple"];

fn parity(compute: &Compute) {
    for folder in FOLDERS {
        let dir = golden(folder);
        let lines = check(&dir, &dir.join("reference.safetensors"), compute, Storage::F32).unwrap();
        assert_eq!(lines.len(), 5, "{folder}: prediction, text, latents, image and encode are all compared");
        for line in lines {
            println!("{folder} {} {:.2e}", line.name, line.error);
            assert!(
                line.error < 1e-4,
                "{folder}: {} is off by {:.2e}; regenerate with tests/golden/make_golden.py?",
                line.name,
                line.error
            );
        }
    }
}

#[test]
fn five_configurations_match_diffusers_on_the_cpu() {
    parity(&cpu());
}

#[test]
fn five_configurations_match_diffusers_on_the_gpu() {
    parity(&gpu());
}
