//! Runs that go on, to the bit.

use std::path::Path;

use super::{SMALL, metrics, of, run, wait_for};
use crate::command_line::{program, start};
use crate::support::error_of;

#[test]
fn a_killed_run_resumes_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    let job = [
        &[
            "--device",
            "cpu",
            "--epochs",
            "4",
            "--advantage",
            "per-prompt",
            "--tracker-min-count",
            "4",
        ],
        &SMALL[..],
    ]
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
    assert!(output.status.success(), "{}", error_of(&output));
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
    let job = [
        &["train", "--out", out.to_str().unwrap(), "--device", "cpu", "--epochs", "100"],
        &SMALL[..],
    ]
    .concat();
    let mut first = start(&job);
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(first.stdout.take().unwrap()));
    assert!(lines.any(|line| line.unwrap().starts_with("model:")));
    let refused = |args: &[&str]| {
        let output = program(args);
        let error = error_of(&output);
        assert!(output.status.code() == Some(2) && error.contains("another run"), "{error}");
    };
    refused(&job);
    wait_for(&out.join("checkpoints/epoch-00001/state.json"), &mut first);
    refused(&["train", "--resume", out.to_str().unwrap()]);
    // The lock ends with its holder, however that ends (a_killed_run_resumes_to_the_bit).
    first.kill().unwrap();
    first.wait().unwrap();
}

/// A run that ends earlier than it was meant to is compared with its beginning on the same
/// pictures.
#[test]
fn a_shortened_run_ends_with_whole_pictures() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let job = ["--device", "cpu", "--epochs", "1", "--eval-every", "9"];
    run(&out, &[&job[..], &SMALL[..], &["--eval-images", "2"]].concat());
    let settings = std::fs::read_to_string(out.join("settings.toml")).unwrap();
    // As a run of three epochs that was killed after its second.
    std::fs::write(out.join("settings.toml"), settings.replace("epochs = 1", "epochs = 3"))
        .unwrap();
    let mut child = start(&["train", "--resume", out.to_str().unwrap()]);
    wait_for(&out.join("checkpoints/epoch-00002/state.json"), &mut child);
    child.kill().unwrap();
    child.wait().unwrap();
    let size = |epoch: usize| {
        image::image_dimensions(out.join(format!("grids/epoch-{epoch:05}.png"))).unwrap()
    };
    assert_ne!(size(2), size(0));
    let output = program(&["train", "--resume", out.to_str().unwrap(), "--epochs", "2"]);
    assert!(output.status.success(), "{}", error_of(&output));
    assert_eq!(size(2), size(0));
}

#[test]
fn resuming_refuses_another_model_and_other_settings() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    run(&out, &[&["--device", "cpu", "--epochs", "1"], &SMALL[..]].concat());
    let refused = |args: &[&str], word: &str| {
        let output = program(&[&["train", "--resume", out.to_str().unwrap()], args].concat());
        let error = error_of(&output);
        assert!(output.status.code() == Some(2) && error.contains(word), "{error}");
    };
    refused(&["--learning-rate", "1"], "--resume");
    refused(&["--epochs", "0"], "--epochs 0");
    // More epochs are remembered: the next resume knows of them.
    let more = program(&["train", "--resume", out.to_str().unwrap(), "--epochs", "2"]);
    assert!(more.status.success(), "{more:?}");
    assert!(std::fs::read_to_string(out.join("settings.toml")).unwrap().contains("epochs = 2"));
    refused(&["--epochs", "1"], "has completed 2 already");
    refused(&["--lora", "other.safetensors"], "leave --lora out");
    let settings = out.join("settings.toml");
    let text = std::fs::read_to_string(&settings).unwrap();
    for (bad, word) in [("", "is damaged"), (&*text.replace("rank = 8", "rank = 4"), "rank = 4")] {
        std::fs::write(&settings, bad).unwrap();
        refused(&["--epochs", "3"], word);
        assert_eq!(std::fs::read_to_string(&settings).unwrap(), bad, "it is left as it was");
    }
    std::fs::write(&settings, text).unwrap();
    let state = out.join("checkpoints/epoch-00002/state.json");
    let text = std::fs::read_to_string(&state).unwrap();
    let model = serde_json::from_str::<serde_json::Value>(&text).unwrap()["model"]
        .as_str()
        .unwrap()
        .to_string();
    std::fs::write(&state, text.replace(&model, &"0".repeat(64))).unwrap();
    refused(&["--epochs", "3"], "model with hash");
    std::fs::write(&state, text.replace("\"version\": 2", "\"version\": 99")).unwrap();
    refused(&["--epochs", "3"], "version 99");
}

/// Nothing of time, place or device is in what a run leaves to go on from.
#[test]
fn equal_runs_leave_equal_files() {
    let dir = tempfile::tempdir().unwrap();
    let runs = [("a", "8"), ("b/c", "16")].map(|(name, memory)| {
        let out = dir.path().join(name);
        let fixed = ["--device", "cpu", "--epochs", "2", "--memory", memory, "--keep-every", "1"];
        run(&out, &[&fixed, &SMALL[..]].concat());
        out
    });
    let files = |out: &Path| {
        let mut all = vec![out.join("adapter.safetensors")];
        for epoch in ["epoch-00001", "epoch-00002"] {
            let dir = out.join("checkpoints").join(epoch);
            all.extend(
                ["adapter.safetensors", "optimizer.safetensors", "state.json"].map(|f| dir.join(f)),
            );
        }
        all
    };
    for (a, b) in files(&runs[0]).iter().zip(files(&runs[1])) {
        assert!(std::fs::read(a).unwrap() == std::fs::read(&b).unwrap(), "{}", b.display());
    }
}

/// A run may go on elsewhere: every process tests that sampling and training agree.
#[test]
fn every_process_tests_itself() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    run(&out, &[&["--device", "cpu", "--epochs", "1"], &SMALL[..]].concat());
    let output = program(&["train", "--resume", out.to_str().unwrap(), "--epochs", "3"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", error_of(&output));
    assert_eq!(text.matches("self-test: rho = 1").count(), 1, "{text}");
}

/// A settings.toml from before an option was there.
#[test]
fn a_run_from_before_an_option_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    run(&out, &[&["--device", "cpu", "--epochs", "1"], &SMALL[..]].concat());
    let path = out.join("settings.toml");
    let settings = std::fs::read_to_string(&path).unwrap();
    let older: Vec<&str> = settings.lines().filter(|l| !l.starts_with("sample-every")).collect();
    assert_eq!(older.len() + 1, settings.lines().count());
    std::fs::write(&path, older.join("\n")).unwrap();
    let more = ["train", "--resume", out.to_str().unwrap(), "--epochs", "2", "--sample-every", "2"];
    let output = program(&more);
    assert!(output.status.success(), "{}", error_of(&output));
    assert!(std::fs::read_to_string(&path).unwrap().contains("sample-every = 2"));
}
