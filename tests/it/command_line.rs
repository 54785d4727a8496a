//! The program itself: what its commands print and write.

use std::process::{Child, Command, Output, Stdio};

use pcpo_wgpu::io::tensors::{HostTensor, write_tensors};
use pcpo_wgpu::io::weights::Weights;

use crate::support::{emoji, golden};

/// Starts the program beside the test. A run that names neither model nor job is the small one of
/// `models/emoji/blue.toml`.
pub fn start(args: &[&str]) -> Child {
    let names = ["--model", "--config", "--resume"];
    let own = !["train", "plan"].contains(&args[0]) || args.iter().any(|a| names.contains(a));
    let job = if own { &[][..] } else { &["--config", "models/emoji/blue.toml"] };
    Command::new(env!("CARGO_BIN_EXE_pcpo-wgpu"))
        .args(args)
        .args(job)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Runs the program to its end.
pub fn program(args: &[&str]) -> Output {
    start(args).wait_with_output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn credit_prints_the_promised_json() {
    let output = program(&["credit", "--sampler", "ddim", "--steps", "50", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&text(&output)).unwrap();
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../golden/credit_weights.json")).unwrap();
    assert_eq!(
        (json["sampler"].as_str(), json["steps"].as_u64(), json["eta"].as_f64()),
        (Some("ddim"), Some(50), Some(1.0))
    );
    let rows = json["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 50);
    for (row, g) in rows.iter().zip(golden[0]["rows"].as_array().unwrap()) {
        let close =
            |a: &str, b: &str| (row[a].as_f64().unwrap() - g[b].as_f64().unwrap()).abs() < 1e-9;
        assert_eq!(row["t"], g["t"]);
        assert!(
            close("sigma", "sigma_ddpm")
                && close("w_native", "w_native")
                && close("sigma_released", "sigma_released")
        );
        assert!((row["w_proportionate"].as_f64().unwrap() - 0.516_900_2).abs() < 1e-6);
        assert!((row["w_released"].as_f64().unwrap() - 0.516_899_7).abs() < 1e-6);
    }
    // A schedule that the released sampler does not fit has its table all the same.
    let other = golden_folder("nomid");
    let other: serde_json::Value =
        serde_json::from_str(&text(&program(&["credit", "--model", &other, "--json"]))).unwrap();
    assert!(
        other["rows"][0]["w_proportionate"].is_number() && other["rows"][0]["w_released"].is_null()
    );
    assert!(text(&program(&["credit", "--eta", "0"])).contains("no step has noise"));
    let few = program(&["credit", "--steps", "10", "--json"]);
    assert!(!text(&few).contains("released"));
}

#[test]
fn credit_of_a_flow_prints_the_promised_json() {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../golden/credit_weights.json")).unwrap();
    for (sampler, kind) in [("dance", "flow-dance"), ("flow-grpo", "flow-flow-grpo")] {
        let table = golden.as_array().unwrap().iter().find(|g| g["kind"] == kind).unwrap();
        let text_of = |name: &str| table[name].to_string();
        let (steps, eta, shift) = (text_of("steps"), text_of("eta"), text_of("shift"));
        let args = [
            "credit",
            "--sampler",
            sampler,
            "--steps",
            &steps,
            "--eta",
            &eta,
            "--shift",
            &shift,
            "--json",
        ];
        let json: serde_json::Value = serde_json::from_str(&text(&program(&args))).unwrap();
        assert_eq!(json["sampler"], sampler);
        let close = |a: &serde_json::Value, b: &serde_json::Value| {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            (a - b).abs() < 1e-10 * b.abs().max(1e-3)
        };
        assert!(close(&json["zeta"], &table["zeta"]) && close(&json["shift"], &table["shift"]));
        let rows = json["rows"].as_array().unwrap();
        assert_eq!(rows.len() as u64, json["steps"].as_u64().unwrap());
        for (row, g) in rows.iter().zip(table["rows"].as_array().unwrap()) {
            for field in ["t", "dt", "sigma", "w_native", "w_proportionate"] {
                assert!(
                    close(&row[field], &g[field]),
                    "{sampler}: {field} {} is not {}",
                    row[field],
                    g[field]
                );
            }
        }
    }
    let published = program(&["credit", "--sampler", "dance", "--zeta", "13.343", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&text(&published)).unwrap();
    assert_eq!((json["zeta"].as_f64(), json["steps"].as_u64()), (Some(13.343), Some(16)));
}

fn golden_folder(name: &str) -> String {
    golden(name).to_str().unwrap().to_string()
}

/// Whatever a model folder looks like, its memory can be estimated.
#[test]
fn plan_reads_every_kind_of_folder() {
    let names = std::fs::read_dir(golden("")).unwrap().map(|e| e.unwrap().path());
    let models: Vec<_> = names.filter(|m| m.join("model_index.json").is_file()).collect();
    assert!(models.len() >= 9, "{models:?}");
    for model in models {
        let small = ["--resolution", "32"];
        let flux = model.file_name().unwrap().to_str().unwrap().starts_with("flux");
        let args = [
            "plan",
            "--device",
            "cpu",
            "--reward",
            "symmetry",
            "--prompt",
            "a",
            "--model",
            model.to_str().unwrap(),
        ];
        let output = program(&[&args[..], if flux { &small } else { &[] }].concat());
        assert!(text(&output).contains("peak "), "{}: {output:?}", model.display());
    }
}

#[test]
fn credit_draws_a_plot() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("plot.png");
    assert!(
        program(&["credit", "--steps", "20", "--plot", path.to_str().unwrap()]).status.success()
    );
    let image = image::open(path).unwrap().to_rgb8();
    assert!(
        image.pixels().any(|p| p.0 == [120, 150, 200])
            && image.pixels().any(|p| p.0 == [200, 60, 40])
    );
}

#[test]
fn check_exits_with_1_past_the_tolerance_and_at_values_that_are_not_finite() {
    let dir = golden("simple");
    let reference = dir.join("reference.safetensors");
    let run = |file: &std::path::Path, tolerance: &str| {
        program(&[
            "check",
            "--device",
            "cpu",
            "--model",
            dir.to_str().unwrap(),
            "--reference",
            file.to_str().unwrap(),
            "--tolerance",
            tolerance,
        ])
    };
    let good = run(&reference, "1e-3");
    assert_eq!(good.status.code(), Some(0));
    for name in ["prediction", "encoder_hidden_states", "latents", "image"] {
        assert!(text(&good).lines().any(|l| l.starts_with(name)), "{name} has a line");
    }
    assert_eq!(run(&reference, "1e-12").status.code(), Some(1));
    let spoiled = tempfile::tempdir().unwrap();
    let path = spoiled.path().join("reference.safetensors");
    std::fs::copy(dir.join("reference.json"), spoiled.path().join("reference.json")).unwrap();
    let weights = Weights::open_file(&reference).unwrap();
    let tensors: Vec<_> = weights
        .names()
        .map(|n| {
            let mut tensor = weights.raw(n).unwrap();
            if n == "out.prediction" {
                tensor.values[0] = f32::NAN;
            }
            tensor
        })
        .collect();
    write_tensors(&path, &tensors, &[]).unwrap();
    assert_eq!(run(&path, "1e-3").status.code(), Some(1));
}

/// f16 in products: within 5e-3 of a prediction's spread, and not as exact as f32.
#[test]
fn check_holds_f16_to_its_bound() {
    let device = crate::support::gpu_name();
    let (model, reference) = (golden("simple"), golden("simple/reference.safetensors"));
    let (model, reference) = (model.to_str().unwrap(), reference.to_str().unwrap());
    let fixed = ["check", "--model", model, "--reference", reference, "--device", &device];
    for (compute, tolerance, verdict) in
        [("f16", "5e-3", "ok"), ("f16", "1e-4", "FAILED"), ("f32", "1e-4", "ok")]
    {
        let more = ["--compute", compute, "--tolerance", tolerance];
        let output = text(&program(&[&fixed[..], &more].concat()));
        // A prediction: what several steps make of its rounding is more.
        let line = output.lines().find(|line| line.starts_with("prediction")).unwrap();
        assert!(line.ends_with(verdict), "{more:?}: {line}");
    }
}

#[test]
fn check_accepts_a_lone_component() {
    let dir = golden("simple");
    let reference = dir.join("reference.safetensors");
    for (part, line) in
        [("unet", "prediction"), ("vae", "image"), ("text_encoder", "encoder_hidden_states")]
    {
        let output = program(&[
            "check",
            "--device",
            "cpu",
            "--model",
            dir.join(part).to_str().unwrap(),
            "--reference",
            reference.to_str().unwrap(),
        ]);
        assert_eq!(output.status.code(), Some(0), "{part}: {output:?}");
        assert!(text(&output).lines().any(|l| l.starts_with(line)), "{part}");
    }
}

#[test]
fn sample_repeats_from_saved_latents() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let start: Vec<f32> =
        pcpo_wgpu::philox::noise(1, pcpo_wgpu::philox::Stream::Evaluation, 0, 0, 2 * 1024);
    let shape = vec![2, 4, 16, 16];
    write_tensors(
        std::path::Path::new(&path("in.safetensors")),
        &[HostTensor::new("latents", shape, start)],
        &[],
    )
    .unwrap();
    let mut finals = Vec::new();
    for (out, eta) in [("a", "0"), ("b", "0"), ("c", "1")] {
        let (folder, saved) = (path(out), path(&format!("{out}.safetensors")));
        let output = program(&[
            "sample",
            "--device",
            "cpu",
            "--model",
            emoji().to_str().unwrap(),
            "--prompt",
            "red apple",
            "--batch",
            "2",
            "--steps",
            "4",
            "--eta",
            eta,
            "--latents",
            &path("in.safetensors"),
            "--save-latents",
            &saved,
            "--out",
            &folder,
        ]);
        assert!(output.status.success(), "{output:?}");
        assert!(dir.path().join(out).join("00001.png").is_file());
        finals.push(std::fs::read(saved).unwrap());
    }
    assert_eq!(finals[0], finals[1]);
    assert_ne!(finals[0], finals[2], "eta matters");
}

#[test]
fn a_flow_samples_with_the_ode_by_default() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, extra: &[&str]| {
        let (out, saved) = (dir.path().join(name), dir.path().join(format!("{name}.safetensors")));
        let fixed = [
            "sample",
            "--device",
            "cpu",
            "--model",
            "emoji-flow",
            "--prompt",
            "red apple",
            "--steps",
            "4",
        ];
        let files =
            ["--max-sequence-length", "16", "--out", out.to_str().unwrap(), "--save-latents"];
        let output = program(&[&fixed[..], &files, &[saved.to_str().unwrap()], extra].concat());
        assert!(output.status.success(), "{output:?}");
        assert!(out.join("00000.png").is_file());
        std::fs::read(saved).unwrap()
    };
    let ode = run("ode", &[]);
    assert!(ode == run("again", &["--sampler", "flow-grpo"]), "eta is 0: every sampler is the ODE");
    assert!(ode != run("sde", &["--sampler", "flow-grpo", "--eta", "0.7"]));
    assert!(ode != run("shifted", &["--grid", "shifted", "--shift", "3"]));
}

#[test]
fn devices_lists_the_cpu_and_the_choice() {
    let output = text(&program(&["devices"]));
    assert!(output.contains("cpu: CPU") && output.contains("<- auto"), "{output}");
}

#[test]
fn recipes_are_listed_and_taken() {
    let listed = text(&program(&["recipes"]));
    for name in ["sd15-6gb", "sd35m-12gb", "sd35m-16gb", "flux-24gb"] {
        assert!(listed.lines().any(|line| line.starts_with(name)), "{name}: {listed}");
    }
    let model = golden("sd35m");
    let fixed = ["plan", "--device", "cpu", "--model", model.to_str().unwrap()];
    let job = ["--reward", "symmetry", "--images-per-epoch", "4", "--group-size", "2"];
    let prompts = ["--prompt", "a", "--prompt", "b", "--resolution", "64"];
    let plan = |recipe| program(&[&fixed[..], &job, &prompts, &["--recipe", recipe]].concat());
    let output = plan("sd35m-12gb");
    assert!(output.status.success(), "{}", crate::support::error_of(&output));
    assert!(text(&output).starts_with("device: ") && text(&output).contains("weights (q8)"));
    let output = plan("sd35m-1gb");
    let error = crate::support::error_of(&output);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("--recipe sd35m-1gb") && error.contains("sd15-6gb"), "{error}");
}

/// A window lies within the part of the steps that may be trained.
#[test]
fn training_stays_within_the_first_part_of_the_steps() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let fixed = ["train", "--device", "cpu", "--out", out.to_str().unwrap(), "--epochs", "2"];
    let images = ["--images-per-epoch", "4", "--group-size", "1", "--advantage", "global"];
    let steps = ["--steps", "6", "--train-steps", "2", "--train-window", "--train-within", "0.5"];
    let output = program(&[&fixed[..], &images, &steps].concat());
    assert!(output.status.success(), "{}", crate::support::error_of(&output));
    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines = metrics.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
    let updates: Vec<serde_json::Value> = lines.filter(|l| l["kind"] == "update").collect();
    assert_eq!(updates.len(), 4);
    for update in &updates {
        // Six steps begin at 834, 668, 502, 336, 170 and 4, or a step of 1 higher.
        let times: Vec<f64> =
            update["steps"].as_array().unwrap().iter().map(|s| s["t"].as_f64().unwrap()).collect();
        assert!(times.len() == 2 && times.iter().all(|t| *t > 450.0), "{times:?}");
    }
    for (within, word) in [
        ("0", "--train-within 0"),
        ("1.5", "--train-within 1.5"),
        ("nan", "--train-within NaN"),
        ("0.1", "--steps 6"),
        ("0.2", "--train-steps 2"),
    ] {
        let other = dir.path().join("other");
        let fixed = ["train", "--device", "cpu", "--out", other.to_str().unwrap()];
        let steps = ["--steps", "6", "--train-steps", "2", "--train-within", within];
        let output = program(&[&fixed[..], &steps].concat());
        let error = crate::support::error_of(&output);
        assert_eq!(output.status.code(), Some(2), "{within}: {error}");
        assert!(error.contains(word), "{within}: {error}");
    }
}

#[test]
fn bench_times_what_is_named() {
    let output = program(&["bench", "--device", "cpu", "--only", "layer_norm,credit_reduce"]);
    let lines = text(&output);
    let rows = lines.lines().skip(2).filter_map(|line| line.split_whitespace().next());
    assert_eq!(rows.collect::<Vec<_>>(), ["credit_reduce", "layer_norm", "layer_norm_gradient"]);
    let output = program(&["bench", "--device", "cpu", "--only", "layer_nrom"]);
    let error = crate::support::error_of(&output);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("'layer_nrom'") && error.contains("frozen_conv"), "{error}");
}
