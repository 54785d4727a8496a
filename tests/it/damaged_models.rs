//! Model folders that are damaged or hostile: one clear error in every command that opens one,
//! never a panic, never a hang.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::command_line::start;
use crate::support::{copy, emoji, golden};

/// Which commands open a part of the model.
const ALL: [&str; 5] = ["train", "plan", "sample", "check", "convert"];
/// `check` takes the VAE alone: on a whole model it would begin with the network.
const OF_VAE: [&str; 4] = ["train", "plan", "sample", "check vae"];

/// A command on a damaged folder: it ends within a while, with one error that holds all words.
fn refused(command: &str, model: &Path, words: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let part = if command == "check vae" { model.join("vae") } else { model.to_path_buf() };
    let (model, out_path) = (part.to_str().unwrap(), out.to_str().unwrap());
    let reference = golden("simple/reference.safetensors");
    let job = ["--reward", "symmetry", "--prompt", "a", "--images-per-epoch", "8"];
    let lora = golden("lora/peft.safetensors");
    let args: Vec<&str> = match command {
        "train" => [&["train", "--device", "cpu", "--out", out_path], &job[..]].concat(),
        "plan" => [&["plan", "--device", "cpu"], &job[..]].concat(),
        "sample" => {
            vec!["sample", "--device", "cpu", "--prompt", "a", "--steps", "1", "--out", out_path]
        }
        "check" | "check vae" => {
            vec!["check", "--device", "cpu", "--reference", reference.to_str().unwrap()]
        }
        "convert" => vec!["convert", lora.to_str().unwrap(), out_path],
        "embed" => vec!["embed", "--device", "cpu", "--prompt", "a", "--out", out_path],
        "credit" => vec!["credit"],
        other => panic!("{other}"),
    };
    let mut child = start(&[&args[..], &["--model", model]].concat());
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("{command} hangs: {words:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().unwrap();
    let error = crate::support::error_of(&output);
    assert_eq!(output.status.code(), Some(2), "{command} {words:?}: {error}");
    let lines = error.lines().filter(|l| l.starts_with("error: ")).count();
    assert_eq!(lines, 1, "{command} {words:?}: {error}");
    let internal = ["panicked", "backtrace", "an operation of the device failed"];
    assert!(!internal.iter().any(|w| error.contains(w)), "{command} {words:?}: {error}");
    words.iter().for_each(|w| assert!(error.contains(w), "{command}: {w:?} is not in {error}"));
    assert!(!out.exists(), "{command} {words:?}: something is left");
}

/// The embedded model with one change, in each of the commands.
fn damaged(commands: &[&str], change: impl Fn(&Path), words: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    copy(&emoji(), &model);
    change(&model);
    commands.iter().for_each(|command| refused(command, &model, words));
}

/// Replaces a field of a JSON file.
fn set(path: &Path, field: &str, value: &str) {
    let text = std::fs::read_to_string(path).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json[field] = serde_json::from_str(value).unwrap();
    std::fs::write(path, json.to_string()).unwrap();
}

/// Replaces a tensor's shape and place in a safetensors header.
fn reshape(path: &Path, name: &str, shape: &str, values: usize) {
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let mut data = bytes[8 + length..].to_vec();
    // The tensor's own bytes are taken out, and those of the new shape put at the end.
    let own = header[name]["data_offsets"].clone();
    let (from, to) = (own[0].as_u64().unwrap() as usize, own[1].as_u64().unwrap() as usize);
    data.drain(from..to);
    for (_, entry) in header.as_object_mut().unwrap().iter_mut() {
        let Some(offsets) = entry["data_offsets"].as_array().cloned() else { continue };
        let moved = |v: &serde_json::Value| {
            let at = v.as_u64().unwrap() as usize;
            if at >= to { at - (to - from) } else { at }
        };
        entry["data_offsets"] = serde_json::json!([moved(&offsets[0]), moved(&offsets[1])]);
    }
    let end = data.len() + 2 * values;
    header[name]["data_offsets"] = serde_json::json!([data.len(), end]);
    header[name]["shape"] = serde_json::from_str(shape).unwrap();
    data.resize(end, 0);
    let header = header.to_string();
    let length = (header.len() as u64).to_le_bytes();
    std::fs::write(path, [&length, header.as_bytes(), &data[..]].concat()).unwrap();
}

const UNET: &str = "unet/config.json";
const VAE: &str = "vae/config.json";
const WEIGHTS: &str = "unet/diffusion_pytorch_model.safetensors";

#[test]
fn files_that_are_missing_or_cut() {
    let weights = |m: &Path| m.join(WEIGHTS);
    damaged(&ALL, |m| std::fs::remove_file(weights(m)).unwrap(), &["unet", "no weights"]);
    damaged(
        &ALL,
        |m| {
            let bytes = std::fs::read(weights(m)).unwrap();
            std::fs::write(weights(m), &bytes[..bytes.len() / 2]).unwrap();
        },
        &["diffusion_pytorch_model.safetensors", "not a valid safetensors"],
    );
    damaged(
        &ALL,
        |m| std::fs::write(weights(m), [0xff; 64]).unwrap(),
        &["diffusion_pytorch_model.safetensors"],
    );
    let nan = |m: &Path| {
        let mut bytes = std::fs::read(weights(m)).unwrap();
        let last = bytes.len() - 2;
        bytes[last..].copy_from_slice(&half::f16::NAN.to_le_bytes());
        std::fs::write(weights(m), bytes).unwrap();
    };
    // An estimate reads no values.
    damaged(&["train", "sample", "check", "convert"], nan, &["NaN", "damaged"]);
    damaged(&OF_VAE, |m| std::fs::write(m.join(VAE), "{").unwrap(), &["vae", "JSON"]);
    damaged(
        &["train", "plan", "sample"],
        |m| std::fs::write(m.join(VAE), "[]").unwrap(),
        &["vae", "not a JSON object"],
    );
    let text = ["train", "sample", "embed"];
    damaged(&text, |m| std::fs::remove_dir_all(m.join("tokenizer")).unwrap(), &["tokenizer"]);
}

#[test]
fn fields_that_are_not_supported() {
    let with = |path: &'static str, field: &'static str, value: &'static str| {
        move |m: &Path| set(&m.join(path), field, value)
    };
    damaged(&ALL, with(UNET, "norm_num_groups", "5"), &["norm_num_groups = 5"]);
    damaged(&ALL, with(UNET, "class_embed_type", r#""timestep""#), &["class_embed_type"]);
    damaged(
        &ALL,
        with(UNET, "down_block_types", r#"["CrossAttnDownBlock2D", "AttnDownBlock2D"]"#),
        &["down_block_types", "AttnDownBlock2D"],
    );
    damaged(
        &["train", "sample", "convert", "check"],
        with(UNET, "block_out_channels", "[32, 64, 64]"),
        &["shape", "[64"],
    );
    let scheduler = "scheduler/scheduler_config.json";
    for (field, value, word) in [
        ("beta_schedule", r#""sigmoid""#, "sigmoid"),
        ("num_train_timesteps", "1e15", "num_train_timesteps"),
        ("num_train_timesteps", "0", "num_train_timesteps"),
        ("beta_end", "1e3", "beta_end"),
        ("steps_offset", "-1", "steps_offset"),
    ] {
        damaged(&["train", "sample", "credit"], with(scheduler, field, value), &[word]);
    }
    damaged(&["train"], with(scheduler, "clip_sample", "true"), &["clip_sample"]);
}

/// Tried: empty lists panicked.
#[test]
fn lists_without_a_block() {
    for fields in [
        &["down_block_types", "up_block_types", "block_out_channels"][..],
        &["down_block_types"],
        &["up_block_types"],
        &["block_out_channels"],
    ] {
        for (path, commands) in [(UNET, &ALL[..]), (VAE, &OF_VAE)] {
            let empty = |m: &Path| fields.iter().for_each(|f| set(&m.join(path), f, "[]"));
            damaged(commands, empty, &["config.json", "block"]);
        }
    }
}

/// Tried: counts without a bound hung.
#[test]
fn numbers_beyond_any_network() {
    let huge = "1000000000000000";
    for field in ["layers_per_block", "transformer_layers_per_block", "attention_head_dim"] {
        damaged(&ALL, |m| set(&m.join(UNET), field, huge), &[field, huge]);
    }
    for field in ["cross_attention_dim", "sample_size", "in_channels"] {
        damaged(&ALL, |m| set(&m.join(UNET), field, huge), &[field]);
        damaged(&ALL, |m| set(&m.join(UNET), field, "-1"), &[field]);
        damaged(&ALL, |m| set(&m.join(UNET), field, "0"), &[field]);
    }
    for field in ["layers_per_block", "latent_channels", "norm_num_groups"] {
        damaged(&OF_VAE, |m| set(&m.join(VAE), field, huge), &[field]);
        damaged(&OF_VAE, |m| set(&m.join(VAE), field, "0"), &[field]);
    }
    damaged(&["sample"], |m| set(&m.join(VAE), "scaling_factor", "0"), &["scaling_factor"]);
    let text = "text_encoder/config.json";
    for (field, value) in [("num_hidden_layers", huge), ("hidden_size", "0")] {
        let commands = ["train", "plan", "sample", "embed"];
        damaged(&commands, |m| set(&m.join(text), field, value), &[field]);
    }
}

/// Tried: a tensor of shape [] panicked.
#[test]
fn tensors_of_another_shape() {
    let norm = "conv_norm_out.weight";
    for (shape, values) in [("[]", 1), ("[0]", 0), ("[1]", 1), ("[32, 2]", 64)] {
        let change = |m: &Path| reshape(&m.join(WEIGHTS), norm, shape, values);
        damaged(&["train", "sample", "check", "convert"], change, &[norm, "shape"]);
    }
}

/// Read: an index was followed wherever it led.
#[test]
fn an_index_that_leads_elsewhere() {
    for name in ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", ""] {
        let change = |m: &Path| {
            std::fs::remove_file(m.join(WEIGHTS)).unwrap();
            let index = serde_json::json!({ "weight_map": { "conv_in.weight": name } });
            let path = m.join("unet/diffusion_pytorch_model.safetensors.index.json");
            std::fs::write(path, index.to_string()).unwrap();
        };
        damaged(&ALL, change, &["index.json", "weight_map", "beside the index"]);
    }
}

/// A pipe in the place of a file would be waited for without end.
#[cfg(unix)]
#[test]
fn a_pipe_in_the_place_of_a_file() {
    for path in [UNET, VAE] {
        let change = |m: &Path| {
            std::fs::remove_file(m.join(path)).unwrap();
            let made = std::process::Command::new("mkfifo").arg(m.join(path)).status().unwrap();
            assert!(made.success());
        };
        damaged(&["train", "sample"], change, &["config.json"]);
    }
}

/// The transformers' and T5's configurations, which the embedded UNet does not have.
#[test]
fn fields_of_transformers() {
    for (model, path, field, value) in [
        ("sd3", "transformer/config.json", "num_layers", "1000000000000000"),
        ("sd3", "transformer/config.json", "num_attention_heads", "0"),
        ("sd3", "transformer/config.json", "patch_size", "0"),
        ("sd3", "transformer/config.json", "pos_embed_max_size", "100000"),
        ("sd3", "text_encoder_3/config.json", "relative_attention_num_buckets", "1"),
        ("sd3", "text_encoder_3/config.json", "num_layers", "1000000000000000"),
        ("sd3", "tokenizer_2/tokenizer_config.json", "model_max_length", "7"),
        ("flux-dev", "transformer/config.json", "num_layers", "1000000000000000"),
        ("flux-dev", "transformer/config.json", "axes_dims_rope", "[]"),
        ("flux-dev", "transformer/config.json", "in_channels", "3"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let copied = dir.path().join("model");
        copy(&golden(model), &copied);
        set(&copied.join(path), field, value);
        ["train", "sample"].iter().for_each(|command| refused(command, &copied, &[field]));
    }
}
