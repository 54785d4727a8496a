//! LoRA files: peft's adapter gives diffusers' prediction here, and what is written here reads back the same.

use burn::tensor::{Tensor, TensorData};
use pcpo_wgpu::check::relative_error;
use pcpo_wgpu::device::Compute;
use pcpo_wgpu::lora::Adapter;
use pcpo_wgpu::lora_io::{Format, load, save, tensors};
use pcpo_wgpu::model::Conditioning;
use pcpo_wgpu::model::unet::UNet;
use pcpo_wgpu::model::weights::{Storage, Weights};

use crate::support::{cpu, golden, gpu};

fn predict(compute: &Compute, unet: &UNet, adapter: &Adapter) -> Vec<f32> {
    let r = Weights::open_file(&golden("lora/reference.safetensors")).unwrap();
    let (x, shape) = r.raw("in.latents").unwrap();
    let x = Tensor::<4>::from_data(TensorData::new(x, shape), &compute.burn);
    let (sequence, shape) = r.raw("in.encoder_hidden_states").unwrap();
    let sequence = Tensor::<3>::from_data(TensorData::new(sequence, shape), &compute.burn);
    let lora = adapter.to_device(&compute.burn, false);
    let timesteps = r.raw("in.timestep").unwrap().0;
    pcpo_wgpu::ops::read(&unet.forward(x, &timesteps, &Conditioning { sequence }, Some(&lora))).unwrap()
}

fn expected() -> Vec<f32> {
    Weights::open_file(&golden("lora/reference.safetensors")).unwrap().raw("out.prediction").unwrap().0
}

#[test]
fn an_adapter_of_peft_gives_the_prediction_of_diffusers() {
    for compute in [cpu(), gpu()] {
        let unet = UNet::load(&golden("simple/unet"), &compute.burn, Storage::F32).unwrap();
        let adapter = load(&golden("lora/peft.safetensors"), &unet.linears()).unwrap();
        assert_eq!((adapter.rank, adapter.alpha), (4, 8.0), "alpha is in the file's metadata");
        let error = relative_error(&predict(&compute, &unet, &adapter), &expected());
        assert!(error < 1e-4, "{error:e}");
        // The adapter matters: without it the prediction is another.
        let mut off = adapter.clone();
        off.parameters().into_iter().for_each(|p| p.fill(0.0));
        assert!(relative_error(&predict(&compute, &unet, &off), &expected()) > 1e-2);
    }
}

#[test]
fn both_layouts_read_back_what_was_written() {
    let compute = cpu();
    let unet = UNet::load(&golden("simple/unet"), &compute.burn, Storage::F32).unwrap();
    let adapter = load(&golden("lora/peft.safetensors"), &unet.linears()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for format in [Format::Diffusers, Format::Kohya] {
        let path = dir.path().join("a.safetensors");
        save(&adapter, &path, format).unwrap();
        assert_eq!(load(&path, &unet.linears()).unwrap(), adapter, "{format:?}");
    }
}

#[test]
fn the_folder_that_peft_itself_saves_keeps_its_alpha() {
    let unet = UNet::load(&golden("simple/unet"), &cpu().burn, Storage::F32).unwrap();
    let adapter = load(&golden("lora/peft.safetensors"), &unet.linears()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter_model.safetensors");
    let rename = |(name, shape, values): (String, Vec<usize>, Vec<f32>)| {
        (name.replace("unet.", "base_model.model."), shape, values)
    };
    let tensors: Vec<_> = tensors(&adapter, Format::Diffusers).into_iter().map(rename).collect();
    pcpo_wgpu::files::write_tensors(&path, &tensors, &[]).unwrap();
    std::fs::write(dir.path().join("adapter_config.json"), r#"{"r": 4, "lora_alpha": 8}"#).unwrap();
    assert_eq!(load(&path, &unet.linears()).unwrap(), adapter);
}

#[test]
fn a_fresh_adapter_changes_nothing_and_targets_what_was_asked() {
    let compute = cpu();
    let unet = UNet::load(&golden("simple/unet"), &compute.burn, Storage::F32).unwrap();
    let targets: Vec<String> = vec!["attn1.to_q".into(), "ff.net.2".into()];
    let adapter = Adapter::new(&unet.linears(), &targets, 4, 4.0, 1).unwrap();
    assert!(adapter.layers.iter().all(|l| l.name.ends_with("attn1.to_q") || l.name.ends_with("ff.net.2")));
    assert!(adapter.layers.iter().any(|l| l.name.ends_with("ff.net.2")));
    let mut off = adapter.clone();
    off.parameters().into_iter().for_each(|p| p.fill(0.0));
    assert_eq!(predict(&compute, &unet, &adapter), predict(&compute, &unet, &off), "B is zero");
    let error = Adapter::new(&unet.linears(), &["to_x".into()], 4, 4.0, 1).unwrap_err();
    assert!(error.to_string().contains("--target-modules to_x"), "{error}");
}

#[test]
fn frozen_weights_in_f16_stay_close_to_f32() {
    let compute = cpu();
    let f16 = UNet::load(&golden("simple/unet"), &compute.burn, Storage::F16).unwrap();
    let adapter = load(&golden("lora/peft.safetensors"), &f16.linears()).unwrap();
    let error = relative_error(&predict(&compute, &f16, &adapter), &expected());
    assert!(error > 1e-6 && error < 2e-2, "{error:e}: weights rounded to f16, and the LoRA in f32");
}
