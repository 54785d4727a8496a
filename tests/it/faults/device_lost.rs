//! A device that is lost in the middle of a run, and one that has not the memory.

use std::path::Path;
use std::sync::Mutex;

use pcpo_wgpu::device::gpu::lose_all;
use pcpo_wgpu::{Event, Job, Observer, Options, train};

use super::{cases, tiny};
use crate::command_line::program;
use crate::support::{error_of, gpu_name};

/// Loses the device at the n-th unit of a phase.
struct Loses {
    phase: &'static str,
    at: Mutex<(bool, usize)>,
}

impl Observer for Loses {
    fn on(&self, event: Event) {
        let mut at = self.at.lock().unwrap();
        match event {
            Event::PhaseBegins { phase, .. } => at.0 = phase == self.phase,
            Event::PhaseAdvances if at.0 => {
                at.1 -= 1;
                if at.1 == 0 {
                    lose_all();
                    at.0 = false;
                }
            }
            _ => {}
        }
    }
}

const WHERE: &str = "PCPO_TEST_LOST";
const ON: &str = "PCPO_TEST_LOST_ON";

/// Runs in a process of its own: what has lost its device is of no use to other tests.
#[test]
fn in_a_process_of_its_own() {
    let Ok(case) = std::env::var(WHERE) else { return };
    let (phase, rest) = case.split_once(' ').unwrap();
    let (at, out) = rest.split_once(' ').unwrap();
    let options = Options {
        device: Some(std::env::var(ON).unwrap()),
        updates_per_epoch: Some(2),
        batch: Some(2),
        ..tiny()
    };
    let phase = if phase == "rollout" { "rollout" } else { "update" };
    let observer = Loses { phase, at: Mutex::new((false, at.parse().unwrap())) };
    pcpo_wgpu::device::guard::note_panics();
    let end = train(Job::new(options.resolve().unwrap(), Path::new(out)), &observer);
    println!("ended: {:#}", end.unwrap_err());
}

/// In a rollout, in decoding (behind the rollout's last step) and in an update: the run ends with
/// one line, what was learnt is kept, and another device goes on.
#[test]
fn a_lost_device_ends_the_run_and_another_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let this = module_path!().split_once("::").unwrap().1;
    // Two batches of three steps; two updates of one batch and step.
    let gpu = gpu_name();
    let beside_cpu = format!("{gpu},cpu");
    let all = [
        ("update", &gpu, "update 2", "1 updates of epoch 1"),
        ("one-of-two", &beside_cpu, "rollout 8", "1 complete epochs"),
        ("first-rollout", &gpu, "rollout 2", "nothing"),
        ("rollout", &gpu, "rollout 8", "1 complete epochs"),
        ("decode", &gpu, "rollout 12", "1 complete epochs"),
    ];
    for (name, on, case, kept) in all.into_iter().take(cases(2, 5)) {
        let out = dir.path().join(name);
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("{this}::in_a_process_of_its_own"), "--nocapture"])
            .env(ON, on)
            .env(WHERE, format!("{case} {}", out.display()))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &error_of(&output);
        let line = said
            .lines()
            .find(|line| line.contains("ended: "))
            .unwrap_or_else(|| panic!("{name}: {said}"));
        assert!(output.status.success() && !said.contains("panicked at"), "{name}: {said}");
        if kept == "nothing" {
            assert!(!out.join("checkpoints").exists(), "{name}");
            continue;
        }
        assert!(line.contains(kept) && line.contains("--resume"), "{name}: {line}");
        assert!(on != &beside_cpu || line.contains("device "), "the device is named: {line}");
        let out = out.to_str().unwrap();
        let output = program(&["train", "--resume", out, "--device", "cpu"]);
        assert!(output.status.success(), "{name}: {}", error_of(&output));
    }
}

/// The setting that helps is named before anything is written.
#[test]
fn a_run_that_does_not_fit_names_the_setting() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let huge = [
        "train",
        "--device",
        &gpu_name(),
        "--prompt",
        "owl",
        "--reward",
        "color:blue",
        "--images-per-epoch",
        "8",
        "--group-size",
        "8",
        "--updates-per-epoch",
        "1",
        "--batch",
        "8",
        "--steps",
        "3",
        "--train-steps",
        "1",
        "--resolution",
        "4096",
        "--out",
        out.to_str().unwrap(),
    ];
    let output = program(&huge);
    let error = error_of(&output);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("the device offers") && error.contains("--batch 1"), "{error}");
    assert!(!out.exists());
}
