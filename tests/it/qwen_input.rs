//! Bad input to Z-Image, FLUX.2 and their text encoder: one error that names the file and the
//! field.

use std::path::Path;

use pcpo_wgpu::io::tensors::{HostTensor, write_tensors};
use pcpo_wgpu::io::weights::Weights;
use pcpo_wgpu::model::Storage;
use pcpo_wgpu::tools::check::{Asked, check};
use serde_json::{Value, json};

use crate::command_line::program;
use crate::support::{copy, cpu, error_of, golden};

/// The error of checking a folder against a file.
fn refusal(model: &Path, reference: &Path) -> String {
    let (model, reference) = (model.into(), reference.into());
    let asked = Asked { model, reference, lora: None, storage: Storage::F32, stream: false };
    match check(&asked, &cpu()) {
        Ok(_) => "nothing was refused".into(),
        Err(e) => format!("{e:#}"),
    }
}

/// A folder's reference with other tensors in the place of some.
fn with(folder: &str, file: &Path, others: &[HostTensor]) {
    let own = Weights::open_file(&golden(folder).join("reference.safetensors")).unwrap();
    let given = |name: &str| others.iter().find(|t| t.name == name).cloned();
    let tensors = own.names().map(|name| given(name).unwrap_or_else(|| own.raw(name).unwrap()));
    write_tensors(file, &tensors.collect::<Vec<_>>(), &[]).unwrap();
}

fn zeros(name: &str, shape: &[usize]) -> HostTensor {
    HostTensor::new(name, shape.to_vec(), vec![0.0; shape.iter().product()])
}

#[test]
fn references_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bad.safetensors");
    let cases: [(&str, HostTensor, &[&str]); 9] = [
        ("z-image", zeros("in.cap_mask", &[2, 7]), &["in.cap_mask", "values"]),
        ("z-image", zeros("in.x", &[2, 4, 2, 8, 10]), &["in.x", "2 frames"]),
        ("z-image", zeros("in.x", &[2, 4, 1, 7, 10]), &["in.x", "7x10", "multiples of 2"]),
        ("z-image", zeros("in.x", &[2, 4, 1, 800, 10]), &["in.x", "800x10", "up to"]),
        ("z-image", zeros("in.cap_feats", &[2, 0, 24]), &["in.cap"]),
        ("z-image", zeros("in.attention_mask", &[2, 48]), &["the mask", "out.prompt_embeds"]),
        ("flux2-klein", zeros("in.img_ids", &[24, 3]), &["in.img_ids", "values"]),
        ("flux2-klein", zeros("in.encoder_hidden_states", &[2, 0, 24]), &["is empty"]),
        ("flux2-klein", zeros("in.image", &[2, 3, 18, 22]), &["in.image", "18x22", "multiples"]),
    ];
    for (folder, tensor, words) in cases {
        with(folder, &file, std::slice::from_ref(&tensor));
        let error = refusal(&golden(folder), &file);
        assert!(words.iter().all(|w| error.contains(w)), "{}: {error}", tensor.name);
        assert!(!error.contains("fault of this"), "{error}");
    }
}

/// A folder with a field of a configuration changed.
fn changed(folder: &str, part: &str, field: &str, value: Value, out: &Path) {
    copy(&golden(folder), out);
    let file = out.join(part).join("config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    config[field] = value;
    std::fs::write(&file, config.to_string()).unwrap();
}

#[test]
fn configurations_of_damaged_numbers_are_refused() {
    let (t, e) = ("transformer", "text_encoder");
    let cases = [
        ("z-image", t, "n_heads", json!(0)),
        ("z-image", t, "axes_dims", json!([2, 6, 6])),
        ("z-image", t, "axes_lens", json!([32, 0, 32])),
        ("z-image", t, "all_patch_size", json!([4])),
        ("z-image", t, "siglip_feat_dim", json!(16)),
        ("z-image", t, "norm_eps", json!(-1.0)),
        ("z-image", e, "num_hidden_layers", json!(0)),
        ("z-image", e, "head_dim", json!(0)),
        ("z-image", e, "num_key_value_heads", json!(5)),
        ("z-image", e, "rope_theta", json!("far")),
        ("z-image", e, "rope_scaling", json!({"type": "yarn"})),
        ("z-image", e, "use_sliding_window", json!(true)),
        ("flux2-klein", t, "mlp_ratio", json!(1e300)),
        ("flux2-klein", t, "axes_dims_rope", json!([4, 4, 4])),
        ("flux2-klein", t, "eps", json!(1e-3)),
        ("flux2-klein", e, "num_hidden_layers", json!(20)),
        ("flux2-klein", e, "rope_parameters", json!({"rope_type": "yarn"})),
        ("flux2-klein", "vae", "batch_norm_eps", json!(-1)),
    ];
    for (folder, part, field, value) in cases {
        let dir = tempfile::tempdir().unwrap();
        changed(folder, part, field, value.clone(), dir.path());
        let error = refusal(dir.path(), &golden(folder).join("reference.safetensors"));
        let names = error.contains(field) && error.contains(part) && error.contains("config.json");
        assert!(names && !error.contains("fault of this"), "{field} = {value}: {error}");
    }
}

#[test]
fn templates_that_cannot_be_applied_are_refused() {
    let endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}";
    for (template, words) in [
        (json!(null), ["chat_template", "chat_template.jinja"]),
        (json!("{% for m in messages %}"), ["tokenizer_config.json", "cannot be used"]),
        (json!("{{ raise_exception('no user') }}"), ["cannot be applied", "no user"]),
        (json!(endless), ["cannot be applied", "tokenizer_config.json"]),
        (json!(""), ["prompt", "has no token"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        copy(&golden("z-image"), dir.path());
        let file = dir.path().join("tokenizer/tokenizer_config.json");
        let text = std::fs::read_to_string(&file).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config["chat_template"] = template.clone();
        std::fs::write(&file, config.to_string()).unwrap();
        std::fs::write(dir.path().join("p.txt"), "red apple\n").unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
        let (model, prompts, out) = (path(""), path("p.txt"), path("e.safetensors"));
        let fixed = ["embed", "--device", "cpu", "--model", &model, "--prompts", &prompts];
        let output = program(&[&fixed[..], &["--out", &out]].concat());
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(words.iter().all(|w| error.contains(w)), "{template}: {error}");
        assert!(!dir.path().join("e.safetensors").exists());
    }
}

/// What a caption's length is travels with its embeddings: a run on a file is that on the encoder.
#[test]
fn embeddings_of_z_image_know_their_lengths() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let model = golden("z-image").to_str().unwrap().to_string();
    const LONG: &str = "a cat on a very long and winding road at dawn";
    std::fs::write(path("p.txt"), format!("red apple\n{LONG}\n")).unwrap();
    let length = ["--device", "cpu", "--model", &model, "--max-sequence-length", "48"];
    let list = ["--prompts", &path("p.txt")];
    let made = program(&[&["embed", "--out", &path("e")][..], &length, &list].concat());
    assert!(made.status.success(), "{}", error_of(&made));
    let both = ["--prompt", "red apple", "--prompt", LONG];
    let drawn = [vec![], vec!["--embeddings", "e"]].map(|extra| {
        let out = path(&format!("pictures{}", extra.len()));
        let file = path("e");
        let extra: Vec<&str> =
            extra.iter().map(|a| if *a == "e" { file.as_str() } else { *a }).collect();
        let own = ["--resolution", "16x20", "--steps", "2", "--out", &out];
        let output = program(&[&["sample"][..], &length, &both, &own, &extra].concat());
        assert!(output.status.success(), "{}", error_of(&output));
        ["00000.png", "00001.png"].map(|name| std::fs::read(Path::new(&out).join(name)).unwrap())
    });
    assert!(drawn[0] == drawn[1]);
    // A file without them is another model's.
    let file = Weights::open_file(Path::new(&path("e"))).unwrap();
    let others = ["sequence"].map(|name| file.raw(name).unwrap());
    let prompts = file.required_metadata("prompts").unwrap();
    write_tensors(Path::new(&path("bare")), &others, &[("prompts", prompts)]).unwrap();
    let bare = path("bare");
    let own = ["--resolution", "16x20", "--out", &path("none"), "--embeddings", &bare];
    let output = program(&[&["sample"][..], &length, &both, &own].concat());
    let error = error_of(&output);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("lengths") && error.contains("bare"), "{error}");
}
