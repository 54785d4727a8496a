//! Signals.

use std::path::Path;
use std::process::Command;

use super::{SMALL, metrics, of, run, wait_for};
use crate::command_line::{program, start};
use crate::support::error_of;

/// A reward program that neither answers nor ends does not hold a run that is asked to stop.
#[cfg(unix)]
#[test]
fn a_signal_stops_a_run_whose_reward_program_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let program = format!("command:touch {}; exec sleep 600", dir.path().join("asked").display());
    let mut child = start(
        &[
            &["train", "--device", "cpu", "--reward", &program, "--out", out.to_str().unwrap()][..],
            &SMALL,
        ]
        .concat(),
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
    let error = error_of(&output);
    assert_eq!(output.status.code(), Some(130), "{error}");
    assert!(error.contains("stopped by a signal"), "{error}");
}

/// A signal between two updates: the epoch is put away and taken up again to the bit, in the first
/// epoch too.
#[cfg(unix)]
#[test]
fn a_stopped_run_keeps_its_updates_and_resumes_to_the_bit() {
    let many = [
        "--updates-per-epoch",
        "4",
        "--inner-epochs",
        "2",
        "--advantage",
        "per-prompt",
        "--tracker-min-count",
        "4",
    ];
    stops_and_resumes(&[&SMALL[..12], &many].concat());
    let branches = ["--branch", "2,0,3", "--roots", "2", "--steps", "6", "--kl-beta", "0.01"];
    let many = [
        "--eval-images",
        "1",
        "--anchor-steps",
        "2",
        "--updates-per-epoch",
        "4",
        "--inner-epochs",
        "2",
    ];
    stops_and_resumes(&[&branches[..], &many].concat());
}

/// The same of one job of eight updates an epoch.
#[cfg(unix)]
fn stops_and_resumes(job: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    let job = [&["--device", "cpu", "--epochs", "2"], job].concat();
    run(&whole, &job);
    let mut child = start(&[&["train", "--out", broken.to_str().unwrap()][..], &job].concat());
    // The self-test's line comes in the first update.
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    assert!(lines.any(|line| line.unwrap().starts_with("self-test")));
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    let error = error_of(&output);
    assert_eq!(output.status.code(), Some(130), "{error}");
    assert!(error.contains("updates of epoch 1 are kept") && error.contains("--resume"), "{error}");
    let checkpoints =
        || std::fs::read_dir(broken.join("checkpoints")).unwrap().map(|e| e.unwrap().path());
    let stopped = || checkpoints().find(|c| c.to_str().unwrap().contains("unfinished-"));
    let state = std::fs::read_to_string(stopped().unwrap().join("state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    assert!(state["unfinished"]["seconds"].is_null(), "no time is in a checkpoint");
    let suspended = metrics(&broken).pop().unwrap();
    assert!(suspended["kind"] == "suspended" && suspended["rollout"].as_f64().unwrap() > 0.0);
    let done = state["updates"].as_u64().unwrap();
    assert!(
        (1..8).contains(&done) && broken.join("adapter.safetensors").is_file(),
        "{done} of 8 updates"
    );
    let output = program(&["train", "--resume", broken.to_str().unwrap()]);
    assert!(output.status.success(), "{}", error_of(&output));
    // Its adapter has been updated since the rollout; the process tests itself all the same.
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(text.matches("self-test: rho = 1").count(), 1, "{text}");
    assert!(stopped().is_none());
    assert_eq!(of(&metrics(&broken), "suspended").count(), 0);
    for file in ["adapter.safetensors", "checkpoints/epoch-00002/state.json", "before_after.png"] {
        assert_eq!(
            std::fs::read(whole.join(file)).unwrap(),
            std::fs::read(broken.join(file)).unwrap(),
            "{file}"
        );
    }
    let updates = |dir: &Path| of(&metrics(dir), "update").cloned().collect::<Vec<_>>();
    assert_eq!(updates(&whole), updates(&broken));
}
