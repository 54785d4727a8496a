//! LoRA files: peft's adapter gives diffusers' prediction here, and what is written here reads back the same.

use burn::tensor::{Tensor, TensorData};
use pcpo_wgpu::check::relative_error;
use pcpo_wgpu::device::Compute;
use pcpo_wgpu::lora::Adapter;
use pcpo_wgpu::lora_io::{Format, load, save, tensors};
use pcpo_wgpu::model::flux::Flux;
use pcpo_wgpu::model::sd3::Sd3;
use pcpo_wgpu::model::unet::UNet;
use pcpo_wgpu::model::weights::{Storage, Weights};
use pcpo_wgpu::model::{Conditioning, Denoiser, Family, Inputs};

use crate::support::{cpu, golden, gpu};

/// The prediction of a reference file's inputs with an adapter.
fn predict_on(compute: &Compute, net: &dyn Denoiser, adapter: &Adapter, reference: &str) -> Vec<f32> {
    let r = Weights::open_file(&golden(reference)).unwrap();
    let name = if r.has("in.latents") { "in.latents" } else { "in.hidden_states" };
    let (x, shape) = r.raw(name).unwrap();
    let (sequence, text) = r.raw("in.encoder_hidden_states").unwrap();
    let sequence = Tensor::<3>::from_data(TensorData::new(sequence, text), &compute.burn);
    let pooled = r.has("in.pooled_projections").then(|| r.raw("in.pooled_projections").unwrap());
    let pooled = pooled.map(|(values, shape)| Tensor::<2>::from_data(TensorData::new(values, shape), &compute.burn));
    let lora = adapter.to_device(&compute.burn, false);
    let timesteps = r.raw("in.timestep").unwrap().0;
    let cond = Conditioning { sequence, pooled };
    let x = Tensor::<4>::from_data(TensorData::new(x, shape), &compute.burn);
    let inputs = Inputs { timesteps: &timesteps, cond: &cond, guidance: &[] };
    pcpo_wgpu::ops::read(&net.forward(x, inputs, Some(&lora))).unwrap()
}

fn predict(compute: &Compute, unet: &UNet, adapter: &Adapter) -> Vec<f32> {
    predict_on(compute, unet, adapter, "lora/reference.safetensors")
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
        save(&adapter, &path, format, Family::StableDiffusion).unwrap();
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
    let tensors: Vec<_> =
        tensors(&adapter, Format::Diffusers, Family::StableDiffusion).into_iter().map(rename).collect();
    pcpo_wgpu::files::write_tensors(&path, &tensors, &[]).unwrap();
    std::fs::write(dir.path().join("adapter_config.json"), r#"{"r": 4, "lora_alpha": 8}"#).unwrap();
    assert_eq!(load(&path, &unet.linears()).unwrap(), adapter);
}

#[test]
fn adapters_of_peft_on_transformers_give_the_prediction_of_diffusers_and_read_back() {
    for compute in [cpu(), gpu()] {
        let sd3 = Sd3::load(&golden("sd3odd/transformer"), &compute.burn, Storage::F32).unwrap();
        let adapter = load(&golden("lora/sd3-peft.safetensors"), &sd3.linears()).unwrap();
        assert_eq!((adapter.rank, adapter.alpha), (4, 8.0), "alpha is in the file's metadata");
        let expected = Weights::open_file(&golden("lora/sd3-reference.safetensors")).unwrap();
        let expected = expected.raw("out.prediction").unwrap().0;
        let error = relative_error(&predict_on(&compute, &sd3, &adapter, "lora/sd3-reference.safetensors"), &expected);
        assert!(error < 1e-4, "{error:e}");
        let mut off = adapter.clone();
        off.parameters().into_iter().for_each(|p| p.fill(0.0));
        let without = predict_on(&compute, &sd3, &off, "lora/sd3-reference.safetensors");
        assert!(relative_error(&without, &expected) > 1e-2, "the adapter matters");
        let dir = tempfile::tempdir().unwrap();
        for format in [Format::Diffusers, Format::Kohya] {
            let path = dir.path().join("a.safetensors");
            save(&adapter, &path, format, Family::StableDiffusion3).unwrap();
            assert_eq!(load(&path, &sd3.linears()).unwrap(), adapter, "{format:?}");
        }
        let keys = tensors(&adapter, Format::Diffusers, Family::StableDiffusion3);
        assert!(keys.iter().all(|(key, ..)| key.starts_with("transformer.transformer_blocks.")));
    }
}

#[test]
fn an_adapter_of_peft_on_flux_gives_the_prediction_of_diffusers() {
    let r = Weights::open_file(&golden("lora/flux-reference.safetensors")).unwrap();
    for compute in [cpu(), gpu()] {
        let flux = Flux::load(&golden("flux-wide/transformer"), &compute.burn, Storage::F32).unwrap();
        let adapter = load(&golden("lora/flux-peft.safetensors"), &flux.linears()).unwrap();
        let lora = adapter.to_device(&compute.burn, false);
        let tensor = |name: &str| {
            let (values, shape) = r.raw(name).unwrap();
            Tensor::<3>::from_data(TensorData::new(values, shape), &compute.burn)
        };
        let ids = |name: &str| -> Vec<[f32; 3]> {
            r.raw(name).unwrap().0.chunks_exact(3).map(|c| [c[0], c[1], c[2]]).collect()
        };
        let pooled = tensor_2d(&r, "in.pooled_projections", &compute);
        let cond = Conditioning { sequence: tensor("in.encoder_hidden_states"), pooled: Some(pooled) };
        let timesteps: Vec<f32> = r.raw("in.timestep").unwrap().0.iter().map(|t| 1000.0 * t).collect();
        let guidance = r.raw("in.guidance").unwrap().0;
        let inputs = Inputs { timesteps: &timesteps, cond: &cond, guidance: &guidance };
        let (image, text) = (ids("in.img_ids"), ids("in.txt_ids"));
        let state = flux.start_tokens(tensor("in.hidden_states"), &image, &text, [0, 0], inputs);
        let state = (0..flux.blocks()).fold(state, |state, i| flux.block(i, state, Some(&lora)));
        let found = pcpo_wgpu::ops::read(&flux.finish_tokens(state, image.len())).unwrap();
        let error = relative_error(&found, &r.raw("out.prediction").unwrap().0);
        assert!(error < 1e-4, "{error:e}");
        let single = adapter.layers.iter().filter(|l| l.name.starts_with("single_transformer_blocks.")).count();
        assert!(single > 0 && single < adapter.layers.len(), "both kinds of blocks are adapted");
    }
}

fn tensor_2d(r: &Weights, name: &str, compute: &Compute) -> Tensor<2> {
    let (values, shape) = r.raw(name).unwrap();
    Tensor::from_data(TensorData::new(values, shape), &compute.burn)
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
