//! LoRA files: peft's adapter gives diffusers' prediction here, and what is written here reads back
//! the same.

use pcpo_wgpu::device::Compute;
use pcpo_wgpu::io::tensors::{HostTensor, write_tensors};
use pcpo_wgpu::io::weights::Weights;
use pcpo_wgpu::lora::Label;
use pcpo_wgpu::lora::adapter::{Adapter, Layer};
use pcpo_wgpu::lora::formats::{Format, load, save, tensors};
use pcpo_wgpu::model::Denoiser;
use pcpo_wgpu::model::Storage;
use pcpo_wgpu::model::reference::ReferenceTensors;
use pcpo_wgpu::model::transformer::flux::Flux;
use pcpo_wgpu::model::transformer::sd3::Sd3;
use pcpo_wgpu::model::unet::UNet;
use pcpo_wgpu::tools::errors::relative_error;

use crate::support::{cpu, files, golden, gpu, part};

/// The prediction of a reference file's inputs with an adapter.
fn predict_on(
    compute: &Compute,
    net: &dyn Denoiser,
    adapter: &Adapter,
    reference: &str,
) -> Vec<f32> {
    let inputs = ReferenceTensors::open(&golden(reference), &compute.burn).unwrap();
    let lora = adapter.to_device(&compute.burn);
    net.forward_reference(&inputs, Some(&lora)).unwrap().values
}

fn predict(compute: &Compute, unet: &UNet, adapter: &Adapter) -> Vec<f32> {
    predict_on(compute, unet, adapter, "lora/reference.safetensors")
}

fn expected() -> Vec<f32> {
    Weights::open_file(&golden("lora/reference.safetensors"))
        .unwrap()
        .raw("out.prediction")
        .unwrap()
        .values
}

#[test]
fn an_adapter_of_peft_gives_the_prediction_of_diffusers() {
    for compute in [cpu(), gpu()] {
        let unet =
            UNet::load(&part(golden("simple/unet")), &compute.burn, Storage::F32, None).unwrap();
        let adapter = load(&golden("lora/peft.safetensors"), &unet.linears()).unwrap();
        assert_eq!((adapter.rank, adapter.alpha), (4, 8.0), "alpha is in the file's metadata");
        let error = relative_error(&predict(&compute, &unet, &adapter), &expected());
        assert!(error < 1e-4, "{error:e}");
        // The adapter matters: without it the prediction is another.
        let mut off = adapter.clone();
        off.parameters_mut().for_each(|p| p.fill(0.0));
        assert!(relative_error(&predict(&compute, &unet, &off), &expected()) > 1e-2);
    }
}

#[test]
fn both_layouts_read_back_what_was_written() {
    let compute = cpu();
    let unet = UNet::load(&part(golden("simple/unet")), &compute.burn, Storage::F32, None).unwrap();
    let adapter = load(&golden("lora/peft.safetensors"), &unet.linears()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for format in [Format::Diffusers, Format::Kohya] {
        let path = dir.path().join("a.safetensors");
        save(&adapter, &path, format, &Label::plain("unet")).unwrap();
        assert_eq!(load(&path, &unet.linears()).unwrap(), adapter, "{format:?}");
    }
}

#[test]
fn the_folder_that_peft_itself_saves_keeps_its_alpha() {
    let unet = UNet::load(&part(golden("simple/unet")), &cpu().burn, Storage::F32, None).unwrap();
    let adapter = load(&golden("lora/peft.safetensors"), &unet.linears()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter_model.safetensors");
    let rename =
        |t: HostTensor| HostTensor { name: t.name.replace("unet.", "base_model.model."), ..t };
    let tensors: Vec<_> =
        tensors(&adapter, Format::Diffusers, "unet").into_iter().map(rename).collect();
    write_tensors(&path, &tensors, &[]).unwrap();
    std::fs::write(dir.path().join("adapter_config.json"), r#"{"r": 4, "lora_alpha": 8}"#).unwrap();
    assert_eq!(load(&path, &unet.linears()).unwrap(), adapter);
}

#[test]
fn adapters_of_peft_on_transformers_give_the_prediction_of_diffusers_and_read_back() {
    for compute in [cpu(), gpu()] {
        let sd3 = Sd3::load(&part(golden("sd3odd/transformer")), &compute.burn, Storage::F32, None)
            .unwrap();
        let adapter = load(&golden("lora/sd3-peft.safetensors"), &sd3.linears()).unwrap();
        assert_eq!((adapter.rank, adapter.alpha), (4, 8.0), "alpha is in the file's metadata");
        let expected = Weights::open_file(&golden("lora/sd3-reference.safetensors")).unwrap();
        let expected = expected.raw("out.prediction").unwrap().values;
        let error = relative_error(
            &predict_on(&compute, &sd3, &adapter, "lora/sd3-reference.safetensors"),
            &expected,
        );
        assert!(error < 1e-4, "{error:e}");
        let mut off = adapter.clone();
        off.parameters_mut().for_each(|p| p.fill(0.0));
        let without = predict_on(&compute, &sd3, &off, "lora/sd3-reference.safetensors");
        assert!(relative_error(&without, &expected) > 1e-2, "the adapter matters");
        let dir = tempfile::tempdir().unwrap();
        for format in [Format::Diffusers, Format::Kohya] {
            let path = dir.path().join("a.safetensors");
            save(&adapter, &path, format, &Label::plain("transformer")).unwrap();
            assert_eq!(load(&path, &sd3.linears()).unwrap(), adapter, "{format:?}");
        }
        let keys = tensors(&adapter, Format::Diffusers, "transformer");
        assert!(keys.iter().all(|t| t.name.starts_with("transformer.transformer_blocks.")));
    }
}

#[test]
fn an_adapter_of_peft_on_flux_gives_the_prediction_of_diffusers() {
    let reference = "lora/flux-reference.safetensors";
    let expected = Weights::open_file(&golden(reference)).unwrap().raw("out.prediction").unwrap();
    for compute in [cpu(), gpu()] {
        let dir = golden("flux-wide/transformer");
        let flux = Flux::load(&part(&dir), &compute.burn, Storage::F32, None).unwrap();
        let adapter = load(&golden("lora/flux-peft.safetensors"), &flux.linears()).unwrap();
        let found = predict_on(&compute, &flux, &adapter, reference);
        let error = relative_error(&found, &expected.values);
        assert!(error < 1e-4, "{error:e}");
        let single = |l: &&Layer| l.name.starts_with("single_transformer_blocks.");
        let single = adapter.layers.iter().filter(single).count();
        assert!(single > 0 && single < adapter.layers.len(), "both kinds of blocks are adapted");
    }
}

/// Adapters of peft and diffusers, and adapters that were trained here, which diffusers loaded: its
/// prediction is ours.
#[test]
fn adapters_of_z_image_and_flux_2_give_the_prediction_of_diffusers_both_ways() {
    for (name, folder) in [("z-image", "z-image"), ("flux2", "flux2-klein")] {
        for compute in [cpu(), gpu()] {
            let net = files(&golden(folder)).load_network(&compute.burn, Storage::F32, None);
            let net = net.unwrap();
            for origin in ["peft", "ours"] {
                let reference = match origin {
                    "peft" => format!("lora/{name}-reference.safetensors"),
                    _ => format!("lora/{name}-ours-reference.safetensors"),
                };
                let file = golden(&format!("lora/{name}-{origin}.safetensors"));
                let adapter = load(&file, &net.linears()).unwrap();
                let expected = Weights::open_file(&golden(&reference)).unwrap();
                let expected = expected.raw("out.prediction").unwrap().values;
                let found = predict_on(&compute, &*net, &adapter, &reference);
                let error = relative_error(&found, &expected);
                println!("{name} {origin} on {}: {error:.1e}", compute.name);
                assert!(error < 1e-4, "{name} {origin}: {error:e}");
                let mut off = adapter.clone();
                off.parameters_mut().for_each(|p| p.fill(0.0));
                let without = predict_on(&compute, &*net, &off, &reference);
                assert!(relative_error(&without, &expected) > 1e-2, "{name}: it matters");
            }
        }
    }
}

#[test]
fn a_fresh_adapter_changes_nothing_and_targets_what_was_asked() {
    let compute = cpu();
    let unet = UNet::load(&part(golden("simple/unet")), &compute.burn, Storage::F32, None).unwrap();
    let targets: Vec<String> = vec!["attn1.to_q".into(), "ff.net.2".into()];
    let adapter = Adapter::new(&unet.linears(), &targets, 4, 4.0, 1).unwrap();
    assert!(
        adapter
            .layers
            .iter()
            .all(|l| l.name.ends_with("attn1.to_q") || l.name.ends_with("ff.net.2"))
    );
    assert!(adapter.layers.iter().any(|l| l.name.ends_with("ff.net.2")));
    let mut off = adapter.clone();
    off.parameters_mut().for_each(|p| p.fill(0.0));
    assert_eq!(predict(&compute, &unet, &adapter), predict(&compute, &unet, &off), "B is zero");
    let error = Adapter::new(&unet.linears(), &["to_x".into()], 4, 4.0, 1).unwrap_err();
    assert!(error.to_string().contains("--target-modules to_x"), "{error}");
}

#[test]
fn frozen_weights_in_f16_stay_close_to_f32() {
    let compute = cpu();
    let f16 = UNet::load(&part(golden("simple/unet")), &compute.burn, Storage::F16, None).unwrap();
    let adapter = load(&golden("lora/peft.safetensors"), &f16.linears()).unwrap();
    let error = relative_error(&predict(&compute, &f16, &adapter), &expected());
    assert!(error > 1e-6 && error < 2e-2, "{error:e}: weights rounded to f16, and the LoRA in f32");
}

/// What would change an adapter's scale or form is refused wherever a file says it.
#[test]
fn rslora_and_patterns_are_refused_in_both_files() {
    let unet = UNet::load(&part(golden("simple/unet")), &cpu().burn, Storage::F32, None).unwrap();
    let adapter = load(&golden("lora/peft.safetensors"), &unet.linears()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for (field, value) in [
        ("use_rslora", "true"),
        ("use_dora", "true"),
        ("alpha_pattern", r#"{"to_q": 2}"#),
        ("lora_alpha", r#""high""#),
    ] {
        let refused = |path: &std::path::Path, words: &[&str]| {
            let error = format!("{:#}", load(path, &unet.linears()).unwrap_err());
            assert!(words.iter().all(|w| error.contains(w)), "{words:?}: {error}");
        };
        let path = dir.path().join("a.safetensors");
        let own = tensors(&adapter, Format::Diffusers, "unet");
        let text = format!(r#"{{"unet.{field}": {value}}}"#);
        write_tensors(&path, &own, &[("lora_adapter_metadata", text)]).unwrap();
        refused(&path, &["a.safetensors", field]);
        let rename =
            |t: HostTensor| HostTensor { name: t.name.replace("unet.", "base_model.model."), ..t };
        let own: Vec<HostTensor> = own.into_iter().map(rename).collect();
        write_tensors(&path, &own, &[]).unwrap();
        let config = format!(r#"{{"r": 4, "{field}": {value}}}"#);
        std::fs::write(dir.path().join("adapter_config.json"), config).unwrap();
        refused(&path, &["adapter_config.json", field]);
        std::fs::remove_file(dir.path().join("adapter_config.json")).unwrap();
    }
}
