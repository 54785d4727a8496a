//! `sample --lora .. --reward-guidance ..`: networks with and without adapters, added up.

use std::path::{Path, PathBuf};

use pcpo_wgpu::io::weights::Weights;
use pcpo_wgpu::lora::Label;
use pcpo_wgpu::lora::adapter::Adapter;
use pcpo_wgpu::lora::formats::{Format, save};
use pcpo_wgpu::model::unet::UNet;
use pcpo_wgpu::model::{Denoiser, Storage};

use crate::command_line::program;
use crate::support::{cpu, emoji, error_of, part};

/// An adapter that changes what the emoji model draws.
fn adapter(dir: &Path, seed: u64) -> PathBuf {
    let net = UNet::load(&part(emoji().join("unet")), &cpu().burn, Storage::F32, None).unwrap();
    let targets: Vec<String> = ["to_q", "to_v"].map(String::from).into();
    let mut adapter = Adapter::new(&net.linears(), &targets, 4, 4.0, seed).unwrap();
    for layer in &mut adapter.layers {
        let from = layer.a.iter().cycle();
        layer.b.iter_mut().zip(from).for_each(|(b, a)| *b = *a);
    }
    let path = dir.join(format!("{seed}.safetensors"));
    save(&adapter, &path, Format::Diffusers, &Label::plain("unet")).unwrap();
    path
}

/// The final latents of three pictures of one deterministic step, which is linear in the
/// prediction.
fn latents(dir: &Path, args: &[&str]) -> Vec<f32> {
    let (out, file) = (dir.join("pictures"), dir.join("latents.safetensors"));
    let fixed = ["sample", "--device", "cpu", "--steps", "1", "--prompt", "owl", "--batch", "3"];
    let where_to = ["--out", out.to_str().unwrap(), "--save-latents", file.to_str().unwrap()];
    let output = program(&[&fixed[..], &where_to, args].concat());
    assert!(output.status.success(), "{args:?}: {}", error_of(&output));
    Weights::open_file(&file).unwrap().f32("latents").unwrap().values
}

#[test]
fn strengths_add_up_differences_to_the_base() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (adapter(dir.path(), 1), adapter(dir.path(), 2));
    let (a, b) = (a.to_str().unwrap(), b.to_str().unwrap());
    let drawn = |args: &[&str]| latents(dir.path(), args);
    let (base, of_a, of_b) = (drawn(&[]), drawn(&["--lora", a]), drawn(&["--lora", b]));
    // 1 is the adapter and 0 the base, to the bit.
    assert_eq!(drawn(&["--lora", a, "--reward-guidance", "1"]), of_a);
    assert_eq!(drawn(&["--lora", a, "--reward-guidance", "0"]), base);
    assert_eq!(drawn(&["--lora", a, "--lora", b, "--reward-guidance", "0,1"]), of_b);
    assert_eq!(drawn(&["--lora", a, "--lora", b, "--reward-guidance", "0"]), base);
    let far = base.iter().zip(&of_a).fold(0f32, |m, (x, y)| m.max((x - y).abs()));
    assert!(far > 0.05, "the adapter matters: {far}");
    for (args, [x, y]) in [
        (&["--lora", a, "--reward-guidance", "1.5"][..], [1.5, 0.0]),
        (&["--lora", a, "--reward-guidance", "-0.5"], [-0.5, 0.0]),
        (&["--lora", a, "--lora", b], [1.0, 1.0]),
        (&["--lora", a, "--lora", b, "--reward-guidance", "2"], [2.0, 2.0]),
        (&["--lora", a, "--lora", b, "--reward-guidance", "0.3,0.7"], [0.3, 0.7]),
        (&["--lora", a, "--lora", b, "--reward-guidance=-0.5,1.25"], [-0.5, 1.25]),
    ] {
        let found = drawn(args);
        for (i, found) in found.iter().enumerate() {
            let expected = base[i] + x * (of_a[i] - base[i]) + y * (of_b[i] - base[i]);
            assert!((found - expected).abs() < 1e-4, "{args:?}: {found} is not {expected}");
        }
    }
}

#[test]
fn strengths_that_mean_nothing_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let a = adapter(dir.path(), 1);
    let out = dir.path().join("pictures");
    for command in ["sample", "eval"] {
        for (args, word) in [
            (&["--reward-guidance", "1.5"][..], "--lora"),
            (&["--lora", "A", "--reward-guidance", "1,2"], "--reward-guidance"),
            (&["--lora", "A", "--lora", "A", "--reward-guidance", "1,2,3"], "--reward-guidance"),
            (&["--lora", "A", "--reward-guidance", "nan"], "--reward-guidance NaN"),
            (&["--lora", "A", "--reward-guidance", "inf"], "--reward-guidance inf"),
            (&["--lora", "A", "--reward-guidance", "much"], "--reward-guidance"),
        ] {
            let own = |arg: &&'static str| if *arg == "A" { a.to_str().unwrap() } else { arg };
            let args: Vec<&str> = args.iter().map(own).collect();
            let fixed = [command, "--device", "cpu", "--prompt", "owl", "--out"];
            let output = program(&[&fixed[..], &[out.to_str().unwrap()], &args].concat());
            let error = error_of(&output);
            assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
            assert!(error.contains(word), "{args:?}: {error}");
            assert!(!out.exists(), "{args:?}: nothing is drawn");
        }
    }
}
