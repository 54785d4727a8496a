//! Models that are one file in the layout of their authors. tests/golden/make_single_file.py says
//! how the golden folders would be such files, and has shown that diffusers' own conversion gives
//! the folders' tensors back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pcpo_wgpu::device::Compute;
use pcpo_wgpu::io::tensors::{HostTensor, write_tensors};
use pcpo_wgpu::io::weights::Weights;
use pcpo_wgpu::model::text::clip::ClipText;
use pcpo_wgpu::model::vae::Vae;
use pcpo_wgpu::model::{ModelFiles, ModelSpec, Storage};
use pcpo_wgpu::philox::{Stream, noise};
use pcpo_wgpu::tools::check::{Asked, check};
use serde_json::Value;

use crate::command_line::program;
use crate::support::{cpu, error_of, golden, gpu};

const NAMES: [&str; 7] = ["sd15", "sd21", "sdxl", "sd3", "sd35m", "flux-dev", "flux-schnell"];

/// The tensors of a golden folder's file: the part and the tensors that each is made of.
fn recipe(name: &str) -> BTreeMap<String, Vec<Value>> {
    let path = golden("single").join(format!("{name}.json"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// A golden folder as the tensors of one file.
fn tensors(name: &str) -> Vec<HostTensor> {
    let mut parts: BTreeMap<String, Weights> = BTreeMap::new();
    let mut tensors = Vec::new();
    for (theirs, how) in recipe(name) {
        let part = how[0].as_str().unwrap();
        let weights = parts
            .entry(part.into())
            .or_insert_with(|| Weights::open_dir(&golden(name).join(part)).unwrap());
        let of = how[1].as_str().unwrap().split(' ').map(|name| weights.f32(name).unwrap());
        let own = of.reduce(|mut all, more| {
            all.values.extend(more.values);
            all.shape[0] += more.shape[0];
            all
        });
        let mut own = own.unwrap();
        let said = how.get(2).cloned().unwrap_or_default();
        if said["swap"] == true {
            let half = own.values.len() / 2;
            own.values.rotate_left(half);
        }
        if said["transpose"] == true {
            let [rows, columns] = [own.shape[0], own.shape[1]];
            let at = |i: usize| own.values[(i % rows) * columns + i / rows];
            own.values = (0..rows * columns).map(at).collect();
            own.shape = vec![columns, rows];
        }
        if let Some(shape) = said["shape"].as_array() {
            own.shape = shape.iter().map(|n| n.as_u64().unwrap() as usize).collect();
        }
        tensors.push(HostTensor { name: theirs, ..own });
    }
    tensors
}

/// The file, in a folder of its own, with what files have besides.
fn file(dir: &Path, name: &str) -> PathBuf {
    let mut all = tensors(name);
    for other in ["betas", "model_ema.num_updates", "cond_stage_model.logit_scale"] {
        all.push(HostTensor::new(other, [1], vec![1.0]));
    }
    let path = dir.join(format!("{name}.safetensors"));
    write_tensors(&path, &all, &[]).unwrap();
    path
}

fn spec(model: &Path, config: &str) -> ModelSpec {
    ModelSpec { config: Some(golden(config)), ..model.into() }
}

/// Every tensor of every part is that of the folder, to the bit.
#[test]
fn the_parts_of_a_file_are_those_of_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    for name in NAMES {
        let files = ModelFiles::open(&spec(&file(dir.path(), name), name)).unwrap();
        let folder = ModelFiles::folder(&golden(name)).unwrap();
        assert_eq!(files.family, folder.family, "{name}");
        let mut compared = 0;
        let parts: Vec<&str> = files.file().unwrap().parts().collect();
        assert!(parts.len() >= 3, "{name}: {parts:?}");
        for part in parts {
            let own = files.component(part).unwrap().weights().unwrap();
            let expected = folder.component(part).unwrap().weights().unwrap();
            for theirs in expected.names().filter(|n| !n.ends_with("position_ids")) {
                let ours = match part {
                    // Two ages of names, and transformers' with and without its prefix.
                    "vae" => old_attention(theirs),
                    _ if part.starts_with("text") && own.has(&format!("text_model.{theirs}")) => {
                        format!("text_model.{theirs}")
                    }
                    _ => theirs.to_string(),
                };
                let (found, wanted) = (own.f32(&ours).unwrap(), expected.f32(theirs).unwrap());
                assert_eq!(found.values, wanted.values, "{name} {part} {theirs}");
                compared += 1;
            }
            let extra = own.names().count();
            let all = expected.names().filter(|n| !n.ends_with("position_ids")).count();
            assert_eq!(extra, all, "{name} {part}: nothing else is there");
        }
        println!("{name}: {compared} tensors");
    }
}

/// The VAE's attention of files from before diffusers 0.18 under today's names.
fn old_attention(name: &str) -> String {
    let pairs = [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")];
    pairs.iter().fold(name.to_string(), |name, (old, new)| {
        name.replace(&format!("attentions.0.{old}."), &format!("attentions.0.{new}."))
    })
}

/// With the folder's configurations a file gives what diffusers made of the folder.
fn parity(compute: &Compute) {
    let dir = tempfile::tempdir().unwrap();
    for name in NAMES {
        let asked = Asked {
            model: spec(&file(dir.path(), name), name),
            reference: golden(name).join("reference.safetensors"),
            lora: None,
            storage: Storage::F32,
            stream: false,
        };
        let lines = check(&asked, compute).unwrap();
        let names: Vec<&str> = lines.iter().map(|l| l.name).collect();
        assert!(names.contains(&"prediction") && names.contains(&"latents"), "{name}: {names:?}");
        assert!(names.contains(&"image"), "{name}: {names:?}");
        for line in lines {
            assert!(line.error < 1e-4, "{name}: {} is off by {:.2e}", line.name, line.error);
        }
    }
}

#[test]
fn files_match_diffusers_on_the_cpu() {
    parity(&cpu());
}

#[test]
fn files_match_diffusers_on_the_gpu() {
    parity(&gpu());
}

/// What tensors show of a model is read off them, and what they do not is the family's.
#[test]
fn sizes_come_from_the_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let shown = |name: &str, part: &str, fields: &[&str]| {
        let path = file(dir.path(), name);
        let files = ModelFiles::open(&path.as_path().into());
        let error = |e| format!("{name}: {e:#}");
        let files = files.map_err(error).unwrap();
        let found = files.component(part).unwrap().config.json;
        let text = std::fs::read_to_string(golden(name).join(part).join("config.json")).unwrap();
        let own: Value = serde_json::from_str(&text).unwrap();
        for field in fields {
            assert_eq!(found[*field], own[*field], "{name} {part} {field}");
        }
        found
    };
    let unet = [
        "block_out_channels",
        "cross_attention_dim",
        "down_block_types",
        "in_channels",
        "layers_per_block",
        "up_block_types",
    ];
    let vae = ["block_out_channels", "latent_channels", "layers_per_block"];
    let text = ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"];
    for name in ["sd15", "sd21", "sdxl"] {
        let found = shown(name, "unet", &unet);
        assert_eq!(found["use_linear_projection"], name != "sd15");
        assert_eq!(found["norm_num_groups"], 32);
        shown(name, "vae", if name == "sd15" { &vae } else { &vae[..1] });
        shown(name, "text_encoder", &text);
    }
    let xl = ["transformer_layers_per_block", "projection_class_embeddings_input_dim"];
    let found = shown("sdxl", "unet", &[&xl[..], &["addition_time_embed_dim"]].concat());
    assert_eq!(found["addition_embed_type"], "text_time");
    shown("sdxl", "text_encoder_2", &[&text[..], &["projection_dim", "hidden_act"]].concat());
    assert_eq!(shown("sdxl", "vae", &vae[..1])["scaling_factor"], 0.13025);
    assert_eq!(shown("sd15", "vae", &vae)["scaling_factor"], 0.18215);
    assert_eq!(shown("sd15", "text_encoder", &text)["hidden_act"], "quick_gelu");
    assert_eq!(shown("sd21", "text_encoder", &text)["hidden_act"], "gelu");
    let sd3 = ["num_layers", "in_channels", "joint_attention_dim", "pooled_projection_dim"];
    shown("sd3", "transformer", &sd3);
    let own = ["dual_attention_layers", "qk_norm", "attention_head_dim", "num_attention_heads"];
    shown("sd35m", "transformer", &[&sd3[..], &own].concat());
    let t5 = ["d_model", "d_ff", "d_kv", "num_heads", "num_layers", "feed_forward_proj"];
    shown("sd3", "text_encoder_3", &t5);
    let guided = ["guidance_embeds", "attention_head_dim", "num_single_layers", "num_layers"];
    shown("flux-dev", "transformer", &guided);
    shown("flux-schnell", "transformer", &guided[1..]);
}

/// What a file does not say is asked for, and what is wrong with it is named.
#[test]
fn files_that_lack_something_are_refused_with_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let shown = |path: &Path| path.to_str().unwrap().to_string();
    let whole = tensors("sd21");
    let save = |name: &str, keep: &dyn Fn(&str) -> bool, more: &[HostTensor]| {
        let kept = whole.iter().filter(|t| keep(&t.name)).cloned();
        let path = dir.path().join(name);
        write_tensors(&path, &kept.chain(more.iter().cloned()).collect::<Vec<_>>(), &[]).unwrap();
        shown(&path)
    };
    let all = save("all.safetensors", &|_| true, &[]);
    let no_vae = save("no-vae.safetensors", &|n| !n.starts_with("first_stage"), &[]);
    let no_text = save("no-text.safetensors", &|n| !n.starts_with("cond_stage"), &[]);
    let scale = HostTensor::new("model.diffusion_model.out.2.scale_weight", [], vec![1.0]);
    let scaled = save("scaled.safetensors", &|_| true, &[scale]);
    let nothing = save("nothing.safetensors", &|n| n.starts_with("first_stage"), &[]);
    let config = shown(&golden("sd21"));
    let other = shown(&golden("sdxl"));
    let prompt = ["--prompt", "a", "--steps", "2", "--device", "cpu"];
    let out = shown(&dir.path().join("out"));
    let unet =
        shown(&golden("sd21").join("unet/diffusion_pytorch_model-00001-of-00002.safetensors"));
    let with = ["--model-config", &config];
    for (model, flags, message) in [
        (&all, &[][..], "--prediction-type"),
        (&no_vae, &with[..], "--vae DIR|FILE"),
        (&no_text, &with, "--text-encoder DIR|FILE"),
        (&scaled, &with, "scale_weight"),
        (&nothing, &with, "holds no network"),
        (&all, &["--model-config", &other], "--model-config"),
        (&all, &["--model-config", &config, "--vae", &no_vae], "holds no VAE"),
        (&unet, &[], "diffusers' layout"),
        (&all, &["--model-config", "nowhere"], "--model-config nowhere: no such folder"),
        (&config, &with, "one file"),
    ] {
        let args = [&["sample", "--out", &out, "--model", model], flags, &prompt].concat();
        let output = program(&args);
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
        assert!(error.contains(message) && !error.contains("panicked"), "{args:?}: {error}");
        assert!(!dir.path().join("out").exists(), "{args:?}");
    }
    // What is missing can be given, and then it draws.
    let vae = ["--vae", &nothing];
    let args = [&["sample", "--out", &out, "--model", &no_vae], &with[..], &vae, &prompt].concat();
    let output = program(&args);
    assert!(output.status.success(), "{}", error_of(&output));
    assert!(dir.path().join("out/00000.png").is_file());
}

/// `convert` writes a folder whose parts are those that the file was made of, and which draws the
/// same; its file of an adapter goes on being one.
#[test]
fn a_file_becomes_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["sd15", "sdxl", "flux-schnell"] {
        let path = file(dir.path(), name);
        let out = dir.path().join(format!("{name}-folder"));
        let config = golden(name);
        let shown = |path: &Path| path.to_str().unwrap().to_string();
        let (input, folder, config) = (shown(&path), shown(&out), shown(&config));
        let args = ["convert", &input, &folder, "--model-config", &config];
        let output = program(&args);
        assert!(output.status.success(), "{name}: {}", error_of(&output));
        let asked = Asked {
            model: out.as_path().into(),
            reference: golden(name).join("reference.safetensors"),
            lora: None,
            storage: Storage::F32,
            stream: false,
        };
        for line in check(&asked, &cpu()).unwrap() {
            assert!(line.error < 1e-4, "{name}: {} is off by {:.2e}", line.name, line.error);
        }
        let again = program(&args);
        assert_eq!(again.status.code(), Some(2), "it is there already");
        let left = std::fs::read_dir(dir.path()).unwrap().flatten();
        let left: Vec<_> =
            left.filter(|e| e.file_name().to_string_lossy().starts_with(".tmp")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// A run on a file has the bits of one on the folder: the gradients of the folders' runs are held
/// to PyTorch's in `update`.
#[test]
fn a_run_on_a_file_is_that_on_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["sd15", "sd21", "sdxl", "sd3", "flux-schnell"] {
        let path = file(dir.path(), name);
        let train = |model: &Path, flags: &[&str]| {
            let out = dir.path().join(format!("{name}-{}", flags.len()));
            let paths = [model, &out].map(|path| path.to_str().unwrap().to_string());
            let base = ["train", "--model", &paths[0], "--out", &paths[1], "--device", "cpu"];
            let job = ["--reward", "color:blue", "--prompt", "a red apple", "--preset", "pcpo"];
            let sizes = ["--images-per-epoch", "4", "--group-size", "4", "--epochs", "1"];
            let small = ["--steps", "4", "--train-steps", "2", "--rank", "2", "--resolution", "32"];
            let t5 = ["--max-sequence-length", if name.starts_with("sd3") { "12" } else { "0" }];
            let t5 = if name == "flux-schnell" { ["--max-sequence-length", "12"] } else { t5 };
            let output = program(&[&base[..], &job, &sizes, &small, &t5, flags].concat());
            assert!(output.status.success(), "{name}: {}", error_of(&output));
            std::fs::read(out.join("adapter.safetensors")).unwrap()
        };
        let config = golden(name).to_str().unwrap().to_string();
        let of_file = train(&path, &["--model-config", &config]);
        assert!(of_file == train(&golden(name), &[]), "{name}");
    }
}

/// Files with tensors that are missing or of other shapes are errors or models, never a panic.
#[test]
fn damaged_files_are_refused_without_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("damaged.safetensors");
    let mut refused = 0;
    for (seed, name) in NAMES.iter().enumerate() {
        let whole = tensors(name);
        // What sizes are read off comes first here.
        let mut draws = noise(seed as u64, Stream::Evaluation, 0, 0, 4096).into_iter();
        let mut draw = |below: usize| {
            let value = draws.next().unwrap().abs() * 1e4;
            value as usize % below
        };
        for _ in 0..25 {
            let mut damaged = whole.clone();
            for _ in 0..1 + draw(3) {
                let at = draw(damaged.len());
                let tensor = &mut damaged[at];
                match draw(4) {
                    0 => drop(damaged.swap_remove(at)),
                    1 => tensor.shape = vec![tensor.values.len()],
                    2 => (tensor.shape, tensor.values) = (vec![0, 3], Vec::new()),
                    _ => (tensor.shape, tensor.values) = (vec![1; 5], vec![1.0]),
                }
            }
            write_tensors(&path, &damaged, &[]).unwrap();
            let open = || {
                let files = ModelFiles::open(&spec(&path, name))?;
                files.load_network(&cpu().burn, Storage::F32, None)?;
                Vae::load(&files.component("vae")?, &cpu().burn, Storage::F32)?;
                ModelFiles::open(&path.as_path().into())?;
                ClipText::load(&files.component("text_encoder")?, &cpu().burn, Storage::F32)
            };
            if let Err(error) = open() {
                refused += 1;
                let text = format!("{error:#}");
                assert!(text.contains("damaged.safetensors"), "{name}: {text}");
            }
        }
    }
    assert!(refused > 60, "{refused} of 175 were refused");
}

/// Encoders and VAE from files of their own, in either layout, take the places that a file lacks.
#[test]
fn parts_from_other_files_take_their_places() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["sd21", "sdxl", "sd35m"] {
        let whole = tensors(name);
        let save = |file: &str, prefix: &str, below: bool| {
            let kept = whole.iter().filter(|t| t.name.starts_with(prefix)).cloned();
            let short = |t: HostTensor| HostTensor {
                name: if below { t.name[prefix.len()..].to_string() } else { t.name },
                ..t
            };
            let path = dir.path().join(format!("{name}-{file}.safetensors"));
            write_tensors(&path, &kept.map(short).collect::<Vec<_>>(), &[]).unwrap();
            path
        };
        let encoders: &[&str] = match name {
            "sd21" => &["cond_stage_model.model."],
            "sdxl" => &["conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."],
            _ => &["text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."],
        };
        let files = encoders.iter().enumerate();
        let spec = ModelSpec {
            text_encoder: files.map(|(i, at)| save(&format!("te{i}"), at, true)).collect(),
            vae: Some(save("vae", "first_stage_model.", true)),
            ..spec(&save("net", "model.diffusion_model.", false), name)
        };
        let reference = golden(name).join("reference.safetensors");
        let asked =
            Asked { model: spec, reference, lora: None, storage: Storage::F32, stream: false };
        let lines = check(&asked, &cpu()).unwrap();
        let names: Vec<&str> = lines.iter().map(|l| l.name).collect();
        assert!(names.contains(&"latents") && names.contains(&"image"), "{name}: {names:?}");
        for line in lines {
            assert!(line.error < 1e-4, "{name}: {} is off by {:.2e}", line.name, line.error);
        }
    }
}
