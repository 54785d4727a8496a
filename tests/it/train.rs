//! Training end to end: the presets, resuming to the bit, the GPU path, the reward going up.

use std::path::Path;
use std::process::{Child, Command};

use crate::command_line::{program, start};
use crate::support::gpu_name;

/// A small job on the embedded model.
const SMALL: [&str; 12] = [
    "--steps",
    "6",
    "--train-steps",
    "3",
    "--images-per-epoch",
    "8",
    "--group-size",
    "4",
    "--batch",
    "2",
    "--updates-per-epoch",
    "2",
];

fn run(out: &Path, args: &[&str]) -> Vec<serde_json::Value> {
    let mut all = vec!["train", "--out", out.to_str().unwrap()];
    all.extend(args);
    let output = program(&all);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    metrics(out)
}

/// Waits until a running program has made a file.
fn wait_for(file: &Path, program: &mut Child) {
    while !file.exists() {
        assert!(program.try_wait().unwrap().is_none(), "the run ended before {} was there", file.display());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

fn metrics(out: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn of<'a>(lines: &'a [serde_json::Value], kind: &'a str) -> impl Iterator<Item = &'a serde_json::Value> {
    lines.iter().filter(move |l| l["kind"] == kind)
}

#[test]
fn every_preset_and_variant_trains_and_leaves_a_whole_folder() {
    let variants: [&[&str]; 6] = [
        &["--preset", "ddpo", "--updates-per-epoch", "1"],
        &["--preset", "grpo", "--train-window", "true", "--noise-only-trained", "true"],
        &["--preset", "pcpo", "--kl-beta", "0.02", "--inner-epochs", "2"],
        &["--objective", "log-ratio", "--guidance-gradient", "conditional"],
        &["--guidance-scale", "1", "--initial-noise", "shared", "--advantage", "global"],
        &["--storage", "f16", "--target-modules", "to_q,ff.net.2", "--alpha", "16"],
    ];
    for variant in variants {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("run");
        let args = [&["--device", "cpu", "--epochs", "1"], &SMALL[..], variant].concat();
        let lines = run(&out, &args);
        let epoch = of(&lines, "epoch").next().unwrap();
        for field in ["epoch", "reward_mean", "reward_std", "clip_frac", "approx_kl", "images_per_second", "seconds"] {
            assert!(epoch[field].is_number(), "{variant:?}: {field}");
        }
        for update in of(&lines, "update") {
            for field in ["loss", "clip_frac", "approx_kl", "log_rho_mean", "log_rho_std", "grad_norm"] {
                assert!(update[field].is_number(), "{variant:?}: {field}");
            }
            assert!(update["grad_norm"].as_f64().unwrap() > 0.0, "{variant:?}: a gradient arrives");
            assert_eq!(update["steps"].as_array().unwrap().len(), 3);
        }
        for file in [
            "settings.toml",
            "adapter.safetensors",
            "before_after.png",
            "grids/epoch-00001.png",
            "checkpoints/epoch-00001/state.json",
        ] {
            assert!(out.join(file).is_file(), "{variant:?}: {file}");
        }
    }
}

#[test]
fn the_step_credit_and_noise_settings_reach_the_update() {
    let dir = tempfile::tempdir().unwrap();
    let steps = |name: &str, args: &[&str]| {
        let out = dir.path().join(name);
        let lines = run(&out, &[&["--device", "cpu", "--epochs", "1"], &SMALL[..], args].concat());
        let update = of(&lines, "update").next().unwrap().clone();
        let trained = update["steps"].as_array().unwrap().clone();
        trained.iter().map(|s| (s["t"].as_u64().unwrap(), s["contribution"].as_f64().unwrap())).collect::<Vec<_>>()
    };
    let spread = |s: &[(u64, f64)]| {
        let (lo, hi) = s.iter().fold((f64::MAX, 0f64), |(lo, hi), (_, c)| (lo.min(*c), hi.max(*c)));
        hi / lo
    };
    // Five trainable steps of six: the last (t = 1) only with --train-last-step.
    let native = steps("native", &["--credit", "native", "--train-steps", "5"]);
    let even = steps("even", &["--credit", "proportionate", "--train-steps", "5"]);
    assert_eq!(native.len(), 5);
    assert!(native.iter().all(|(t, _)| *t > 1));
    assert!(spread(&native) > 1.2 && spread(&even) < 1.0001, "{native:?} {even:?}");
    let all = steps("all", &["--train-last-step", "true", "--train-steps", "6"]);
    assert_eq!(all.last().unwrap().0, 1);
    let window = steps("window", &["--train-window", "true", "--train-steps", "2"]);
    assert_eq!(window[0].0 - window[1].0, 1000 / 6);
}

#[test]
fn a_killed_run_resumes_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    let job =
        [&["--device", "cpu", "--epochs", "4", "--advantage", "per-prompt", "--tracker-min-count", "4"], &SMALL[..]]
            .concat();
    run(&whole, &job);
    let mut child = start(&[&["train", "--out", broken.to_str().unwrap()][..], &job].concat());
    // Killed in the middle of an epoch: some time after the first checkpoint appears.
    wait_for(&broken.join("checkpoints/epoch-00001/state.json"), &mut child);
    std::thread::sleep(std::time::Duration::from_millis(100));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!broken.join("before_after.png").exists(), "it was killed before its end");
    let output = program(&["train", "--resume", broken.to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let bytes = |dir: &Path, name: &str| std::fs::read(dir.join(name)).unwrap();
    for file in [
        "adapter.safetensors",
        "checkpoints/epoch-00004/optimizer.safetensors",
        "checkpoints/epoch-00004/state.json",
        "before_after.png",
    ] {
        assert_eq!(bytes(&whole, file), bytes(&broken, file), "{file}");
    }
    let (a, b) = (metrics(&whole), metrics(&broken));
    let updates = |lines: &[serde_json::Value]| of(lines, "update").cloned().collect::<Vec<_>>();
    assert_eq!(updates(&a), updates(&b), "the same losses at every update");
}

/// Two runs never write to one folder.
#[test]
fn a_folder_belongs_to_one_run() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let job = [&["train", "--out", out.to_str().unwrap(), "--device", "cpu", "--epochs", "100"], &SMALL[..]].concat();
    let mut first = start(&job);
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(first.stdout.take().unwrap()));
    assert!(lines.any(|line| line.unwrap().starts_with("model:")));
    let refused = |args: &[&str]| {
        let output = program(args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && error.contains("another run"), "{error}");
    };
    refused(&job);
    wait_for(&out.join("checkpoints/epoch-00001/state.json"), &mut first);
    refused(&["train", "--resume", out.to_str().unwrap()]);
    // The lock ends with its holder, however that ends (a_killed_run_resumes_to_the_bit).
    first.kill().unwrap();
    first.wait().unwrap();
}

/// A run that ends earlier than it was meant to is compared with its beginning on the same pictures.
#[test]
fn a_shortened_run_ends_with_whole_pictures() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    run(&out, &[&["--device", "cpu", "--epochs", "1"], &SMALL[..]].concat());
    let settings = std::fs::read_to_string(out.join("settings.toml")).unwrap();
    // As a run of three epochs that was killed after its second.
    std::fs::write(out.join("settings.toml"), settings.replace("epochs = 1", "epochs = 3")).unwrap();
    let mut child = start(&["train", "--resume", out.to_str().unwrap()]);
    wait_for(&out.join("checkpoints/epoch-00002/state.json"), &mut child);
    child.kill().unwrap();
    child.wait().unwrap();
    let size = |epoch: usize| image::image_dimensions(out.join(format!("grids/epoch-{epoch:05}.png"))).unwrap();
    assert_ne!(size(2), size(0));
    let output = program(&["train", "--resume", out.to_str().unwrap(), "--epochs", "2"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(size(2), size(0));
}

#[test]
fn resuming_refuses_another_model_and_other_settings() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    run(&out, &[&["--device", "cpu", "--epochs", "1"], &SMALL[..]].concat());
    let refused = |args: &[&str], word: &str| {
        let output = program(&[&["train", "--resume", out.to_str().unwrap()], args].concat());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && error.contains(word), "{error}");
    };
    refused(&["--learning-rate", "1"], "--resume");
    refused(&["--epochs", "0"], "--epochs 0");
    // More epochs are remembered: the next resume knows of them.
    let more = program(&["train", "--resume", out.to_str().unwrap(), "--epochs", "2"]);
    assert!(more.status.success(), "{more:?}");
    assert!(std::fs::read_to_string(out.join("settings.toml")).unwrap().contains("epochs = 2"));
    refused(&["--epochs", "1"], "has completed 2 already");
    let state = out.join("checkpoints/epoch-00002/state.json");
    let text = std::fs::read_to_string(&state).unwrap();
    let model = serde_json::from_str::<serde_json::Value>(&text).unwrap()["model"].as_str().unwrap().to_string();
    std::fs::write(&state, text.replace(&model, &"0".repeat(64))).unwrap();
    refused(&["--epochs", "3"], "model with hash");
    std::fs::write(&state, text.replace("\"version\": 2", "\"version\": 99")).unwrap();
    refused(&["--epochs", "3"], "version 99");
}

#[test]
fn three_updates_that_are_not_finite_end_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let mut args = vec!["train", "--out", out.to_str().unwrap(), "--device", "cpu", "--epochs", "1"];
    args.extend(SMALL);
    args.extend(["--updates-per-epoch", "8", "--learning-rate", "1e30"]);
    let output = program(&args);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert_eq!(error.matches("is skipped").count(), 3, "{error}");
    assert!(error.contains("3 updates in a row were not finite"), "{error}");
    // The state whose loss was finite is kept, and another run can start from it.
    let adapter = out.join("adapter.safetensors");
    let values = pcpo_wgpu::model::weights::Weights::open_file(&adapter).unwrap();
    let largest = values.names().flat_map(|n| values.f32(n).unwrap().0).fold(0f32, |m, v| m.max(v.abs()));
    assert!(largest < 1.0 && error.contains(adapter.to_str().unwrap()), "{largest} {error}");
    let next = dir.path().join("next");
    run(&next, &[&["--device", "cpu", "--epochs", "1", "--lora", adapter.to_str().unwrap()], &SMALL[..]].concat());
}

#[cfg(unix)]
#[test]
fn a_reward_that_does_not_vary_is_reported_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let args = [
        &[
            "train",
            "--out",
            out.to_str().unwrap(),
            "--device",
            "cpu",
            "--epochs",
            "1",
            "--reward",
            "command:while read l; do echo 1; done",
        ],
        &SMALL[..],
    ]
    .concat();
    let output = program(&args);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("does not vary"), "{output:?}");
}

#[cfg(unix)]
#[test]
fn a_reward_program_is_asked_for_every_image() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    // Answers with the length of the line: prompts differ, so rewards do.
    let lines = run(
        &out,
        &[&["--device", "cpu", "--epochs", "1", "--reward", "command:while read l; do echo ${#l}; done"], &SMALL[..]]
            .concat(),
    );
    assert!(of(&lines, "epoch").next().unwrap()["reward_mean"].as_f64().unwrap() > 20.0);
}

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
        "8",
        "--group-size",
        "4",
        "--batch",
        "4",
        "--steps",
        "8",
        "--train-steps",
        "2",
    ];
    let start = std::time::Instant::now();
    let gpu = run(&dir.path().join("gpu"), &[&["--device", &device], model, &job[..]].concat());
    println!("one epoch on {device}: {:.0} s", start.elapsed().as_secs_f64());
    let cpu = run(&dir.path().join("cpu"), &[&["--device", "cpu"], model, &job[..]].concat());
    let pairs = of(&gpu, "update").zip(of(&cpu, "update"));
    for (i, (g, c)) in pairs.enumerate() {
        // The first update starts from the same adapter; the second has gone through AdamW, which amplifies rounding.
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
    let reward = |lines: &[serde_json::Value]| of(lines, "epoch").next().unwrap()["reward_mean"].as_f64().unwrap();
    assert!((reward(&gpu) - reward(&cpu)).abs() < 1e-3);
}

/// On one GPU too a resumed run is the unbroken one, to the bit.
#[test]
fn a_run_resumes_to_the_bit_on_the_gpu() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    let device = gpu_name();
    let job = ["--device", &device, "--prompt", "red apple", "--images-per-epoch", "2", "--group-size", "2"];
    let short = ["--steps", "3", "--train-steps", "1", "--updates-per-epoch", "1"];
    run(&whole, &[&job[..], &short, &["--epochs", "2"]].concat());
    run(&parts, &[&job[..], &short, &["--epochs", "1"]].concat());
    let output = program(&["train", "--resume", parts.to_str().unwrap(), "--epochs", "2"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for file in ["adapter.safetensors", "checkpoints/epoch-00002/state.json", "before_after.png"] {
        assert_eq!(std::fs::read(whole.join(file)).unwrap(), std::fs::read(parts.join(file)).unwrap(), "{file}");
    }
}

#[test]
fn the_embedded_jobs_raise_their_reward() {
    let dir = tempfile::tempdir().unwrap();
    for model in ["emoji", "emoji-flow"] {
        let lines = run(&dir.path().join(model), &["--device", "cpu", "--epochs", "4", "--model", model]);
        let rewards: Vec<f64> = of(&lines, "evaluation").map(|l| l["reward_mean"].as_f64().unwrap()).collect();
        assert!(rewards[4] > rewards[0] + 2e-3, "{model}: {rewards:?}");
    }
}

#[test]
fn every_sampler_and_credit_of_a_flow_trains() {
    let dir = tempfile::tempdir().unwrap();
    let variants: [&[&str]; 6] = [
        &["--preset", "grpo"],
        &["--sampler", "dance", "--zeta", "13.343", "--grid", "diffusers", "--shift", "3"],
        &["--sampler", "cps", "--credit-total", "trained", "--activation-checkpointing", "true"],
        &["--credit", "guard", "--objective", "ppo-clip", "--kl-beta", "0.02"],
        &["--credit", "noise", "--guidance-gradient", "conditional"],
        &["--noise-only-trained", "true", "--train-window", "true", "--storage", "q8"],
    ];
    for (i, variant) in variants.iter().enumerate() {
        let out = dir.path().join(format!("run{i}"));
        let fixed = ["--device", "cpu", "--epochs", "1", "--model", "emoji-flow"];
        let lines = run(&out, &[&fixed, &SMALL[..], variant].concat());
        for update in of(&lines, "update") {
            assert!(update["grad_norm"].as_f64().unwrap() > 0.0, "{variant:?}: a gradient arrives");
            assert!(update["log_rho_std"].is_number(), "{variant:?}");
        }
        let adapter = pcpo_wgpu::model::weights::Weights::open_file(&out.join("adapter.safetensors")).unwrap();
        assert!(adapter.names().all(|n| n.starts_with("transformer.transformer_blocks.")), "{variant:?}");
    }
}

/// The same update, whatever holds the activations.
#[test]
fn activation_checkpointing_changes_nothing_but_memory() {
    let dir = tempfile::tempdir().unwrap();
    for model in ["emoji", "emoji-flow"] {
        let norms = ["true", "false"].map(|checkpointing| {
            let out = dir.path().join(format!("{model}-{checkpointing}"));
            let fixed = ["--device", "cpu", "--epochs", "1", "--model", model];
            let lines = run(&out, &[&fixed, &SMALL[..], &["--activation-checkpointing", checkpointing]].concat());
            of(&lines, "update").map(|u| u["grad_norm"].as_f64().unwrap()).collect::<Vec<f64>>()
        });
        for (by_block, whole) in norms[0].iter().zip(&norms[1]) {
            assert!((by_block - whole).abs() < 1e-4 * whole, "{model}: {norms:?}");
        }
    }
}

/// Embeddings from a file are those of the encoders: the run is the same to the bit.
#[test]
fn embeddings_from_a_file_train_the_same_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let prompts = ["red apple on a white background", "cat face on a white background"];
    std::fs::write(path("prompts.txt"), prompts.join("\n")).unwrap();
    for model in ["emoji", "emoji-flow"] {
        let file = path(&format!("{model}.safetensors"));
        let list = path("prompts.txt");
        let embed = ["embed", "--device", "cpu", "--model", model, "--prompts", &list, "--out", &file];
        let length = ["--max-sequence-length", "16"];
        let output = program(&[&embed[..], &length].concat());
        assert!(output.status.success(), "{output:?}");
        let adapters = [vec![], vec!["--embeddings", &file]].map(|extra| {
            let out = dir.path().join(format!("{model}-{}", extra.len()));
            let fixed = ["--device", "cpu", "--epochs", "1", "--model", model, "--prompts", &list];
            run(&out, &[&fixed, &SMALL[..], &length, &extra[..]].concat());
            std::fs::read(out.join("adapter.safetensors")).unwrap()
        });
        assert!(adapters[0] == adapters[1], "{model}: the adapters differ");
    }
    let file = path("emoji.safetensors");
    let unknown = ["--device", "cpu", "--prompt", "a whale", "--group-size", "4", "--images-per-epoch", "4"];
    let out = path("unknown");
    let output = program(&[&["train", "--out", &out, "--embeddings", &file][..], &unknown].concat());
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("a whale") && error.contains("pcpo-wgpu embed"), "{error}");
}

/// What the estimate says before a run is what the run needs, within a fifth.
#[cfg(target_os = "linux")]
#[test]
fn memory_estimates_are_within_20_percent_of_the_measured_peak() {
    let dir = tempfile::tempdir().unwrap();
    let cases: [&[&str]; 4] = [
        &["--model", "emoji", "--batch", "8", "--images-per-epoch", "16"],
        &["--model", "emoji", "--batch", "8", "--images-per-epoch", "16", "--activation-checkpointing", "true"],
        &["--model", "emoji-flow", "--batch", "16", "--images-per-epoch", "32"],
        &["--model", "emoji-flow", "--batch", "16", "--images-per-epoch", "32", "--activation-checkpointing", "true"],
    ];
    for (i, case) in cases.iter().enumerate() {
        let fixed = ["--device", "cpu", "--steps", "4", "--train-steps", "1"];
        let plan = program(&[&["plan"], &fixed[..], case].concat());
        assert!(plan.status.success(), "{plan:?}");
        let text = String::from_utf8_lossy(&plan.stdout).into_owned();
        let line = text.lines().find(|l| l.starts_with("peak ")).unwrap();
        let estimate: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        // Which batches meet at their largest is for the threads to say: the median of three runs.
        let mut measured = [0, 1, 2].map(|repeat| {
            let out = dir.path().join(format!("run{i}-{repeat}"));
            let lines = run(&out, &[&["--epochs", "1"], &fixed[..], case].concat());
            let epoch = of(&lines, "epoch").next().unwrap();
            let peaks = ["rollout_peak_mib", "decode_peak_mib", "update_peak_mib"];
            peaks.map(|p| epoch[p].as_f64().unwrap()).into_iter().fold(0.0, f64::max)
        });
        measured.sort_by(f64::total_cmp);
        println!("{case:?}: estimated {estimate:.0} MiB, measured {measured:?}");
        let off = estimate / measured[1] - 1.0;
        assert!(off.abs() < 0.2, "{case:?}: {estimate} MiB estimated, {measured:?} measured");
    }
}

#[test]
fn a_run_that_cannot_fit_is_refused_with_the_setting_to_change() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let fixed = ["train", "--device", "cpu", "--epochs", "1", "--out", out.to_str().unwrap(), "--batch", "16"];
    for (memory, words) in [("0.1", ["--batch 16", "use --batch "]), ("0.05", ["--batch 16", "--storage f16"])] {
        let output = program(&[&fixed[..], &["--memory", memory, "--activation-checkpointing", "true"]].concat());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(words.iter().all(|w| error.contains(w)) && error.contains("--memory GIB"), "{error}");
        assert!(!out.exists());
    }
}

/// A reward program that neither answers nor ends does not hold a run that is asked to stop.
#[cfg(unix)]
#[test]
fn a_signal_stops_a_run_whose_reward_program_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let program = format!("command:touch {}; exec sleep 600", dir.path().join("asked").display());
    let mut child = start(
        &[&["train", "--device", "cpu", "--reward", &program, "--out", out.to_str().unwrap()][..], &SMALL].concat(),
    );
    wait_for(&dir.path().join("asked"), &mut child);
    std::thread::sleep(std::time::Duration::from_secs(3));
    Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    let start = std::time::Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(start.elapsed().as_secs() < 60, "the run still waits for its reward program");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(130), "{error}");
    assert!(error.contains("stopped by a signal"), "{error}");
}

/// A signal between two updates: the epoch is put away and taken up again to the bit, in the first epoch too.
#[cfg(unix)]
#[test]
fn a_stopped_run_keeps_its_updates_and_resumes_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    let many =
        ["--updates-per-epoch", "4", "--inner-epochs", "2", "--advantage", "per-prompt", "--tracker-min-count", "4"];
    let job = [&["--device", "cpu", "--epochs", "2"], &SMALL[..10], &many].concat();
    run(&whole, &job);
    let mut child = start(&[&["train", "--out", broken.to_str().unwrap()][..], &job].concat());
    // The self-test's line comes in the first update.
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    assert!(lines.any(|line| line.unwrap().starts_with("self-test")));
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(130), "{error}");
    assert!(error.contains("updates of epoch 1 are kept") && error.contains("--resume"), "{error}");
    let checkpoints = || std::fs::read_dir(broken.join("checkpoints")).unwrap().map(|e| e.unwrap().path());
    let stopped = || checkpoints().find(|c| c.to_str().unwrap().contains("unfinished-"));
    let state = std::fs::read_to_string(stopped().unwrap().join("state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    let done = state["updates"].as_u64().unwrap();
    assert!((1..8).contains(&done) && broken.join("adapter.safetensors").is_file(), "{done} of 8 updates");
    let output = program(&["train", "--resume", broken.to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(stopped().is_none());
    for file in ["adapter.safetensors", "checkpoints/epoch-00002/state.json", "before_after.png"] {
        assert_eq!(std::fs::read(whole.join(file)).unwrap(), std::fs::read(broken.join(file)).unwrap(), "{file}");
    }
    let updates = |dir: &Path| of(&metrics(dir), "update").cloned().collect::<Vec<_>>();
    assert_eq!(updates(&whole), updates(&broken));
}
