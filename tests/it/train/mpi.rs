//! Real processes, started by `mpirun`: `make test-mpi` builds the feature and runs these. Without
//! it, or where there is no MPI, they say so and are skipped.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{metrics, run};
use crate::support::error_of;

/// `mpirun` with so many ranks of the program, or nothing where it cannot be had.
fn mpirun(ranks: usize) -> Option<Command> {
    let installed = Command::new("mpirun").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !cfg!(feature = "mpi") || !installed {
        println!("skipped: built without the feature mpi, or no mpirun: `make test-mpi`");
        return None;
    }
    let mut command = Command::new("mpirun");
    // More ranks than cores, and as root in a container. Each may use all cores, as one process
    // may: what batches are made for is the cores that ranks have together.
    command.args(["--oversubscribe", "--allow-run-as-root", "--bind-to", "none"]);
    command.args(["-n", &ranks.to_string()]);
    // Containers forbid one process to read another's memory, and Open MPI says so at length.
    command.env("OMPI_MCA_btl_vader_single_copy_mechanism", "none");
    command.arg(env!("CARGO_BIN_EXE_pcpo-wgpu"));
    Some(command)
}

const JOB: [&str; 23] = [
    "--config",
    "models/emoji/blue.toml",
    "--device",
    "cpu",
    "--epochs",
    "2",
    "--images-per-epoch",
    "16",
    "--group-size",
    "4",
    "--batch",
    "2",
    "--steps",
    "6",
    "--train-steps",
    "2",
    "--eval-images",
    "1",
    "--eval-prompt",
    "owl",
    "--eval-prompt",
    "cat",
    "--stop-on-collapse=false",
];

fn adapter(out: &Path) -> Vec<u8> {
    std::fs::read(out.join("adapter.safetensors")).unwrap()
}

#[test]
fn mpi_ranks_have_the_bits_of_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let one = dir.path().join("one");
    for ranks in [2, 4] {
        let Some(mut command) = mpirun(ranks) else { return };
        if ranks == 2 {
            run(&one, &JOB);
        }
        let out = dir.path().join(format!("ranks-{ranks}"));
        let output = command.args(["train", "--out", out.to_str().unwrap()]).args(JOB).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{}", error_of(&output));
        assert!(adapter(&one) == adapter(&out), "{ranks} ranks");
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(said.matches("epoch 1/2").count(), 1, "one rank talks: {said}");
        let epoch = metrics(&out).into_iter().find(|l| l["kind"] == "epoch").unwrap();
        assert_eq!(epoch["device_batches"].as_array().unwrap().len(), ranks);
    }
}

/// An error in what all were told is said once.
#[test]
fn mpi_ranks_refuse_bad_input_with_one_line() {
    let Some(mut command) = mpirun(2) else { return };
    let output =
        command.args(["train", "--device", "cpu", "--guidance-scale", "nan"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = error_of(&output);
    assert_eq!(said.matches("error: ").count(), 1, "{said}");
    assert!(said.contains("--guidance-scale NaN"), "{said}");
}

/// A rank that is killed ends the run on all; what was saved goes on with another number.
#[test]
fn a_killed_mpi_rank_ends_the_run() {
    let Some(mut command) = mpirun(2) else { return };
    let dir = tempfile::tempdir().unwrap();
    let (whole, out) = (dir.path().join("whole"), dir.path().join("run"));
    run(&whole, &JOB);
    let mut child = command
        .args(["train", "--out", out.to_str().unwrap()])
        .args(JOB)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    super::wait_for(&out.join("checkpoints/epoch-00001/state.json"), &mut child);
    std::thread::sleep(Duration::from_millis(300));
    let ranks = Command::new("pgrep").args(["-P", &child.id().to_string()]).output().unwrap();
    let ranks = String::from_utf8(ranks.stdout).unwrap();
    let last = ranks.split_whitespace().last().expect("mpirun has started its ranks");
    assert!(Command::new("kill").args(["-9", last]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success());
    assert!(error_of(&output).contains("signal 9"), "{}", error_of(&output));
    let resumed = crate::command_line::program(&["train", "--resume", out.to_str().unwrap()]);
    assert!(resumed.status.success(), "{}", error_of(&resumed));
    assert!(adapter(&whole) == adapter(&out), "resumed in one process");
}
