//! The GPU path trains like the CPU.

use super::{of, run};
use crate::command_line::program;
use crate::support::{error_of, gpu_name};

#[test]
fn the_gpu_path_trains_like_the_cpu() {
    gpu_like_cpu(&[]);
}

#[test]
fn the_gpu_path_trains_a_flow_like_the_cpu() {
    gpu_like_cpu(&["--model", "emoji-flow"]);
}

/// One epoch on both devices. What both embedded models' jobs leave open is set here.
fn gpu_like_cpu(model: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let device = gpu_name();
    let job = [
        "--epochs",
        "1",
        "--prompt",
        "red apple on a white background",
        "--prompt",
        "cat face on a white background",
        "--images-per-epoch",
        "4",
        "--group-size",
        "2",
        "--batch",
        "2",
        "--steps",
        "4",
        "--train-steps",
        "2",
        "--eval-images",
        "1",
    ];
    let start = std::time::Instant::now();
    let gpu = run(&dir.path().join("gpu"), &[&["--device", &device], model, &job[..]].concat());
    println!("one epoch on {device}: {:.0} s", start.elapsed().as_secs_f64());
    let cpu = run(&dir.path().join("cpu"), &[&["--device", "cpu"], model, &job[..]].concat());
    let updates = [&gpu, &cpu].map(|lines| of(lines, "update").count());
    assert_eq!(updates, [2, 2], "both devices did their updates");
    let pairs = of(&gpu, "update").zip(of(&cpu, "update"));
    for (i, (g, c)) in pairs.enumerate() {
        // The first update starts from the same adapter; the second has gone through AdamW, which
        // amplifies rounding.
        let close = |field: &str, tolerance: f64| {
            let (g, c) = (g[field].as_f64().unwrap(), c[field].as_f64().unwrap());
            assert!(
                (g - c).abs() <= tolerance * c.abs().max(1e-6),
                "{field} of update {i}: {g} on the GPU, {c} on the CPU"
            );
        };
        close("loss", 1e-2);
        close("grad_norm", 5e-2);
    }
    let reward = |lines: &[serde_json::Value]| {
        of(lines, "epoch").next().unwrap()["reward_mean"].as_f64().unwrap()
    };
    assert!((reward(&gpu) - reward(&cpu)).abs() < 1e-3);
}

/// On one GPU too a resumed run is the unbroken one, to the bit.
#[test]
fn a_run_resumes_to_the_bit_on_the_gpu() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    let device = gpu_name();
    let job = [
        "--device",
        &device,
        "--prompt",
        "red apple",
        "--images-per-epoch",
        "2",
        "--group-size",
        "2",
    ];
    let short = ["--steps", "3", "--train-steps", "1", "--updates-per-epoch", "1"];
    let job = [&job[..], &["--eval-images", "1"]].concat();
    run(&whole, &[&job[..], &short, &["--epochs", "2"]].concat());
    run(&parts, &[&job[..], &short, &["--epochs", "1"]].concat());
    let output = program(&["train", "--resume", parts.to_str().unwrap(), "--epochs", "2"]);
    assert!(output.status.success(), "{}", error_of(&output));
    for file in ["adapter.safetensors", "checkpoints/epoch-00002/state.json", "before_after.png"] {
        assert_eq!(
            std::fs::read(whole.join(file)).unwrap(),
            std::fs::read(parts.join(file)).unwrap(),
            "{file}"
        );
    }
}

/// f16 in products: the self-test holds, gradients arrive, and the pictures are worth the same.
#[test]
fn compute_in_f16_trains_like_f32() {
    let dir = tempfile::tempdir().unwrap();
    let device = gpu_name();
    let job = ["--device", &device, "--epochs", "1", "--prompt", "owl", "--images-per-epoch", "2"];
    let rest = ["--group-size", "2", "--steps", "3", "--train-steps", "1", "--seed", "3"];
    let once = ["--updates-per-epoch", "1", "--eval-images", "1"];
    let job = [&job[..], &rest, &once].concat();
    let single = run(&dir.path().join("f32"), &job);
    let out = dir.path().join("f16");
    let half = run(&out, &[&job[..], &["--compute", "f16"]].concat());
    let settings = std::fs::read_to_string(out.join("settings.toml")).unwrap();
    assert!(settings.contains("compute = \"f16\""), "the choice is saved");
    let of_first = |lines: &[serde_json::Value], kind: &str, field: &str| {
        of(lines, kind).next().unwrap()[field].as_f64().unwrap()
    };
    let [h, s] = [&half, &single].map(|lines| of_first(lines, "epoch", "reward_mean"));
    assert!(h != s && (h - s).abs() < 2e-3, "{h} in f16, {s} in f32");
    let [h, s] = [&half, &single].map(|lines| of_first(lines, "update", "grad_norm"));
    assert!(h != s && (h / s - 1.0).abs() < 0.1, "norms of {h} in f16, {s} in f32");
    let [h, s] = [&half, &single].map(|lines| of_first(lines, "update", "log_rho_std"));
    assert!(h <= 1e-6 && s <= 1e-6, "rho begins at 1: {h} in f16, {s} in f32");
}

#[test]
fn compute_in_f16_needs_a_gpu() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let out = out.to_str().unwrap();
    for command in [
        &["train", "--out", out][..],
        &["plan"],
        &["sample", "--out", out, "--prompt", "owl"],
        &["eval", "--out", out, "--prompt", "owl"],
    ] {
        let output = program(&[command, &["--device", "cpu", "--compute", "f16"]].concat());
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(2), "{command:?}: {error}");
        assert!(error.contains("--compute f16") && error.contains("--device"), "{error}");
        assert!(!std::path::Path::new(out).exists(), "{command:?}: nothing is written");
    }
}

/// Two replicas of one device have its bits, and an unlike one beside it is within rounding of it.
/// Each does its share.
#[test]
fn several_devices_train_like_one() {
    let dir = tempfile::tempdir().unwrap();
    let device = gpu_name();
    let job = [
        "--epochs",
        "1",
        "--images-per-epoch",
        "4",
        "--group-size",
        "2",
        "--batch",
        "1",
        "--updates-per-epoch",
        "1",
        "--steps",
        "3",
        "--train-steps",
        "1",
        "--eval-images",
        "1",
        "--eval-prompt",
        "owl",
    ];
    let on = |name: &str, device: &str| {
        let lines = run(&dir.path().join(name), &[&["--device", device], &job[..]].concat());
        let update = of(&lines, "update").last().unwrap().clone();
        let adapter = std::fs::read(dir.path().join(name).join("adapter.safetensors")).unwrap();
        (of(&lines, "epoch").next().unwrap().clone(), update, adapter)
    };
    let (one, update, adapter) = on("one", &device);
    assert!(one.get("device_batches").is_none(), "{one}");
    let (two, of_two, of_both) = on("two", &format!("{device},{device}"));
    assert_eq!(update, of_two);
    assert!(adapter == of_both, "two replicas have the bits of one");
    // Four batches to sample, to decode and to update by.
    assert_eq!(two["device_batches"], serde_json::json!([6, 6]));
    let (mixed, of_mixed, _) = on("mixed", &format!("{device},cpu"));
    assert_eq!(mixed["device_batches"], serde_json::json!([6, 6]));
    let (a, b) = (update["grad_norm"].as_f64().unwrap(), of_mixed["grad_norm"].as_f64().unwrap());
    assert!((a - b).abs() < 5e-2 * a, "{a} and {b}");
    // It goes on with another number of devices.
    let resumed = dir.path().join("two");
    let more = ["train", "--resume", resumed.to_str().unwrap(), "--device", "cpu", "--epochs", "2"];
    let output = program(&more);
    assert!(output.status.success(), "{}", error_of(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.contains("batches by device"), "{text}");
}

#[test]
fn a_list_of_devices_that_is_none_is_refused() {
    for (bad, words) in [
        ("cpu,", "--device cpu,: an entry between the commas is empty"),
        ("cpu,all", "--device cpu,all: all stands alone"),
        ("cpu,no-such-card", "--device no-such-card: no adapter has that name"),
        ("cpu,99", "--device 99: there are"),
    ] {
        let output = program(&["train", "--device", bad, "--out", "unused-folder"]);
        assert_eq!(output.status.code(), Some(2), "{bad}");
        assert!(error_of(&output).contains(words), "{}", error_of(&output));
    }
    let output = program(&["sample", "--prompt", "owl", "--device", "cpu,cpu"]);
    assert!(
        error_of(&output).contains("--device cpu,cpu: takes one device"),
        "{}",
        error_of(&output)
    );
}
