//! SDXL: its adapters by everybody's names, what it is told of sizes, its negative prompt, and a
//! run.

use std::path::Path;

use pcpo_wgpu::device::tensor::{read, upload};
use pcpo_wgpu::io::weights::Weights;
use pcpo_wgpu::lora::Label;
use pcpo_wgpu::lora::formats::{Format, load, save};
use pcpo_wgpu::model::Storage;
use pcpo_wgpu::model::vae::Vae;
use pcpo_wgpu::tools::check::{Asked, check};
use pcpo_wgpu::tools::errors::relative_error;

use crate::command_line::program;
use crate::support::{cpu, error_of, files, golden, gpu, part};

fn shown(path: &Path) -> String {
    path.to_str().unwrap().to_string()
}

/// Trains the golden model for an epoch into a folder.
fn train(out: &Path, flags: &[&str]) {
    let (model, out) = (shown(&golden("sdxl")), shown(out));
    let base = ["train", "--model", &model, "--out", &out, "--device", "cpu", "--epochs", "1"];
    let job = ["--prompt", "a red apple", "--reward", "color:blue", "--group-size", "4"];
    let output = program(&[&base[..], &job, &["--rank", "2"], flags].concat());
    assert!(output.status.success(), "{}", error_of(&output));
}

fn latents(path: &Path) -> Vec<f32> {
    Weights::open_file(path).unwrap().f32("latents").unwrap().values
}

/// Adapters that peft made, of attention and of convolutions, under diffusers' and sd-scripts'
/// names, give diffusers' prediction.
#[test]
fn an_adapter_by_either_names_gives_the_prediction_of_diffusers() {
    for compute in [cpu(), gpu()] {
        for (layers, names) in [("sdxl", "peft"), ("sdxl", "kohya"), ("sdxl-conv", "peft")]
            .into_iter()
            .chain([("sdxl-conv", "kohya")])
        {
            let asked = Asked {
                model: golden("sdxl").as_path().into(),
                reference: golden(&format!("lora/{layers}-reference.safetensors")),
                lora: Some(golden(&format!("lora/{layers}-{names}.safetensors"))),
                storage: Storage::F32,
                stream: false,
            };
            let lines = check(&asked, &compute).unwrap();
            assert_eq!((lines.len(), lines[0].name), (1, "prediction"));
            assert!(lines[0].error < 1e-4, "{layers} {names}: {:e}", lines[0].error);
            // Without the adapter it is another.
            let without = Asked { lora: None, ..asked };
            assert!(check(&without, &compute).unwrap()[0].error > 1e-2);
        }
    }
}

/// Layers of convolutions are written as they were read, and have the shapes that LoCon files have.
#[test]
fn adapters_of_convolutions_are_written_as_they_were_read() {
    let dir = tempfile::tempdir().unwrap();
    let linears =
        files(&golden("sdxl")).load_network(&cpu().burn, Storage::F32, None).unwrap().linears();
    let given = Weights::open_file(&golden("lora/sdxl-conv-kohya.safetensors")).unwrap();
    let adapter = load(&golden("lora/sdxl-conv-peft.safetensors"), &linears).unwrap();
    let path = dir.path().join("k.safetensors");
    save(&adapter, &path, Format::Kohya, &Label::plain("unet")).unwrap();
    let written = Weights::open_file(&path).unwrap();
    assert!(written.names().eq(given.names()));
    for name in given.names() {
        assert_eq!(written.f32(name).unwrap(), given.f32(name).unwrap(), "{name}");
    }
    let down = "lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight";
    assert_eq!(written.shape(down).unwrap(), [4, 8, 3, 3]);
}

#[test]
fn adapters_are_written_by_the_names_that_each_program_reads() {
    let dir = tempfile::tempdir().unwrap();
    let linears =
        files(&golden("sdxl")).load_network(&cpu().burn, Storage::F32, None).unwrap().linears();
    let given = golden("lora/sdxl-peft.safetensors");
    let adapter = load(&given, &linears).unwrap();
    for (format, key) in [
        ("kohya", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight"),
        (
            "kohya-diffusers",
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
        ),
        (
            "diffusers",
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
        ),
    ] {
        let out = dir.path().join(format!("{format}.safetensors"));
        let model = shown(&golden("sdxl"));
        let args = ["convert", &shown(&given), &shown(&out), "--format", format, "--model", &model];
        let output = program(&args);
        assert!(output.status.success(), "{}", error_of(&output));
        assert!(Weights::open_file(&out).unwrap().has(key), "{format}: {key}");
        assert_eq!(load(&out, &linears).unwrap(), adapter, "{format}");
    }
    // sd-scripts' names are all of them, as the golden file has them.
    let ours = Weights::open_file(&dir.path().join("kohya.safetensors")).unwrap();
    let theirs = Weights::open_file(&golden("lora/sdxl-kohya.safetensors")).unwrap();
    assert!(ours.names().eq(theirs.names()));
}

#[test]
fn sizes_and_the_negative_prompt_reach_the_network() {
    let dir = tempfile::tempdir().unwrap();
    let model = shown(&golden("sdxl"));
    let draw = |name: &str, flags: &[&str]| {
        let file = dir.path().join(format!("{name}.safetensors"));
        let (out, latents_out) = (shown(&dir.path().join(name)), shown(&file));
        let base = ["sample", "--model", &model, "--prompt", "a red apple", "--steps", "2"];
        let more = ["--device", "cpu", "--out", &out, "--save-latents", &latents_out];
        let output = program(&[&base[..], &more, flags].concat());
        assert!(output.status.success(), "{name}: {}", error_of(&output));
        latents(&file)
    };
    let size = ["--resolution", "32x48"];
    let plain = draw("plain", &size);
    assert_eq!(plain.len(), 4 * 8 * 12, "height before width, at 4 pixels a latent pixel");
    // What it is told where nothing is said.
    let told = ["--time-ids", "32,48,0,0,32,48"];
    assert_eq!(draw("told", &[&size[..], &told].concat()), plain);
    let cropped = ["--time-ids", "64,64,8,0,32,48"];
    assert_ne!(draw("cropped", &[&size[..], &cropped].concat()), plain);
    let negative = ["--negative-time-ids", "16,16,0,0,32,48"];
    assert_ne!(draw("negative", &[&size[..], &negative].concat()), plain);
    // No negative prompt is zeros, and an empty one is a text.
    assert_ne!(draw("empty", &[&size[..], &["--negative-prompt", ""]].concat()), plain);
    // Embeddings that were made before are the same.
    let embeddings = shown(&dir.path().join("e.safetensors"));
    let prompt = ["--prompt", "a red apple", "--device", "cpu", "--negative-prompt", "blur"];
    let args = [&["embed", "--model", &model, "--out", &embeddings], &prompt[..]].concat();
    assert!(program(&args).status.success());
    let from = [&size[..], &["--embeddings", &embeddings]].concat();
    assert_eq!(draw("embedded", &from), plain);
    let blur = ["--negative-prompt", "blur"];
    let with = draw("blur", &[&size[..], &blur].concat());
    assert_eq!(draw("embedded-blur", &[&from[..], &blur].concat()), with);
    assert_ne!(with, plain);
}

#[test]
fn what_is_not_for_sdxl_or_not_six_numbers_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (xl, old) = (shown(&golden("sdxl")), shown(&golden("sd15")));
    let out = shown(&dir.path().join("out"));
    for (model, flags, message) in [
        (&xl, &["--time-ids", "1,2,3"][..], "--time-ids: 3 numbers"),
        (&xl, &["--time-ids", "1,2,3,4,5,nan"], "--time-ids NaN"),
        (&xl, &["--negative-time-ids", "1,2,3,4,5,6,7"], "--negative-time-ids: 7 numbers"),
        (&old, &["--time-ids", "64,64,0,0,64,64"], "is for SDXL"),
        (&xl, &["--resolution", "30"], "--resolution 30"),
        (&xl, &["--resolution", "32x"], "--resolution"),
        (&xl, &["--resolution", "0x32"], "--resolution"),
    ] {
        for command in ["sample", "train"] {
            let reward: &[&str] =
                if command == "train" { &["--reward", "color:blue"] } else { &[] };
            let base = [command, "--model", model, "--prompt", "a", "--out", &out];
            let output = program(&[&base[..], flags, reward, &["--device", "cpu"]].concat());
            let error = error_of(&output);
            assert_eq!(output.status.code(), Some(2), "{command} {flags:?}: {error}");
            assert!(error.contains(message), "{command} {flags:?}: {error}");
            assert!(!dir.path().join("out").exists());
        }
    }
    // A text encoder's part of an adapter is not left out in silence; other kinds are named.
    let (linear, adapter) =
        ("lora_unet_input_blocks_4_1_proj_in", dir.path().join("a.safetensors"));
    for (key, message) in [
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight".into(), "text encoder"),
        (format!("{linear}.dora_scale"), "DoRA"),
        (format!("{linear}.hada_w1_a"), "LoHa"),
    ] {
        let tensor = pcpo_wgpu::io::tensors::HostTensor::new(key, [1, 1], vec![1.0]);
        pcpo_wgpu::io::tensors::write_tensors(&adapter, &[tensor], &[]).unwrap();
        let args = ["sample", "--model", &xl, "--prompt", "a", "--out", &out, "--device", "cpu"];
        let output = program(&[&args[..], &["--lora", &shown(&adapter)]].concat());
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(message), "{error}");
    }
}

/// Tiles are blended as diffusers blends them; where one holds the picture nothing changes.
#[test]
fn pictures_decoded_in_tiles_are_those_of_diffusers() {
    let file = Weights::open_file(&golden("sdxl/tiled.safetensors")).unwrap();
    let [latents, image] = ["latents", "image"].map(|name| file.f32(name).unwrap());
    for compute in [cpu(), gpu()] {
        let mut vae = Vae::load(&part(golden("sdxl/vae")), &compute.burn, Storage::F32).unwrap();
        let shape: [usize; 4] = latents.shape.clone().try_into().unwrap();
        let decode = |vae: &Vae| {
            let x = upload(&latents.values, shape, &compute.burn);
            let image = vae.decode(x);
            (image.dims(), read(&image).unwrap())
        };
        let (_, whole) = decode(&vae);
        vae.tile = Some(8);
        let (dims, tiled) = decode(&vae);
        assert_eq!(dims.to_vec(), image.shape);
        let error = relative_error(&tiled, &image.values);
        assert!(error < 1e-4, "{error:e}");
        assert!(relative_error(&tiled, &whole) > 1e-3, "tiles are not the whole");
        vae.tile = Some(32);
        assert_eq!(decode(&vae).1, whole);
    }
}

/// One epoch by PCPO, not square, on both devices; the adapter moves.
#[test]
fn a_run_trains_and_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let images = ["--images-per-epoch", "8", "--steps", "4", "--batch", "4"];
    let more = ["--prompt", "a blue cat", "--resolution", "32x48", "--learning-rate", "1e-2"];
    train(&out, &[&images[..], &more].concat());
    let settings = std::fs::read_to_string(out.join("settings.toml")).unwrap();
    assert!(settings.contains("resolution = [32, 48]"), "{settings}");
    let grid = image::open(out.join("grids/epoch-00001.png")).unwrap();
    // Two prompts side by side, and four pictures of each, two pixels apart.
    assert_eq!((grid.width(), grid.height()), (2 * 48 + 2, 4 * 32 + 3 * 2));
    let moved = Weights::open_file(&out.join("adapter.safetensors")).unwrap();
    let b = moved.names().find(|n| n.ends_with("lora_B.weight")).unwrap().to_string();
    assert!(moved.f32(&b).unwrap().values.iter().any(|v| *v != 0.0));
    let output = program(&["train", "--resume", &shown(&out), "--epochs", "2"]);
    assert!(output.status.success(), "{}", error_of(&output));
}

/// Equal runs write equal adapters, which say what they are and neither where nor when.
#[test]
fn adapters_say_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let model = shown(&golden("sdxl"));
    let small = ["--images-per-epoch", "4", "--steps", "2", "--seed", "3"];
    let adapter = |name: &str| {
        let out = dir.path().join(name);
        train(&out, &small);
        out.join("adapter.safetensors")
    };
    let (one, other) = (adapter("one"), adapter("other"));
    assert_eq!(std::fs::read(&one).unwrap(), std::fs::read(&other).unwrap());
    let kohya = dir.path().join("k.safetensors");
    let args = ["convert", &shown(&one), &shown(&kohya), "--model", &model];
    assert!(program(&args).status.success());
    let onto_itself = program(&["convert", &shown(&one), &shown(&one), "--model", &model]);
    assert_eq!(onto_itself.status.code(), Some(2));
    assert_eq!(std::fs::read(&one).unwrap(), std::fs::read(&other).unwrap());
    for file in [one, kohya] {
        let said = Weights::open_file(&file).unwrap().all_metadata().unwrap();
        for (key, value) in [
            ("modelspec.sai_model_spec", "1.0.0"),
            ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora"),
            ("modelspec.resolution", "32x32"),
            ("modelspec.trigger_phrase", "a red apple"),
            ("ss_network_dim", "2"),
            ("ss_network_alpha", "2"),
            ("pcpo.reward", "color:blue"),
            ("pcpo.method", "pcpo"),
            ("pcpo.epochs", "1"),
            ("pcpo.seed", "3"),
        ] {
            assert_eq!(said.get(key).map(String::as_str), Some(value), "{key}");
        }
        assert!(said["modelspec.hash_sha256"].starts_with("0x"));
        let all = serde_json::to_string(&said).unwrap();
        assert!(!all.contains(dir.path().to_str().unwrap()) && !all.contains("cpu"), "{all}");
    }
}
