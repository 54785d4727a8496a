//! Runs that diverge: they end with exit code 2, go back to their last good state and save that.

use std::path::Path;

use pcpo_wgpu::io::tensors::{HostTensor, write_tensors};
use pcpo_wgpu::io::weights::Weights;

use super::{SMALL, metrics, of, run};
use crate::command_line::program;
use crate::support::error_of;

/// A job whose first optimizer step takes the adapter out of every range.
const RUIN: [&str; 4] = ["--learning-rate", "1e20", "--device", "cpu"];

/// Runs a command of `train` that has to diverge; what it said.
fn diverges(args: &[&str]) -> String {
    let output = program(&[&["train"], args].concat());
    let error = error_of(&output);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
    let lines = error.lines().filter(|l| l.starts_with("error: ")).count();
    assert_eq!(lines, 1, "{args:?}: {error}");
    assert!(!error.contains("panicked"), "{args:?}: {error}");
    for word in ["has diverged", "--learning-rate ", "--max-grad-norm", "adapter.safetensors"] {
        assert!(error.contains(word), "{args:?}: {word} is not in {error}");
    }
    error
}

/// The largest value of an adapter.
fn largest(adapter: &Path) -> f32 {
    let file = Weights::open_file(adapter).unwrap();
    file.names().flat_map(|n| file.f32(n).unwrap().values).fold(0f32, |m, v| m.max(v.abs()))
}

/// The names of a run's checkpoints.
fn checkpoints(run: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(run.join("checkpoints")).unwrap();
    let mut names: Vec<String> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_run_that_diverges_goes_back_to_its_beginning() {
    let dir = tempfile::tempdir().unwrap();
    for updates in ["1", "2", "8"] {
        let out = dir.path().join(updates);
        let path = out.to_str().unwrap();
        let job = [&["--out", path, "--epochs", "3"], &RUIN, &SMALL[..12]].concat();
        diverges(&[&job[..], &["--updates-per-epoch", updates]].concat());
        let adapter = out.join("adapter.safetensors");
        assert!(largest(&adapter) < 1.0, "{updates}: {}", largest(&adapter));
        assert!(out.join("grids/epoch-00000.png").is_file(), "{updates}: the grid of epoch 0");
        assert_eq!(checkpoints(&out), ["epoch-00000"], "{updates}: nothing poisoned is kept");
        // The state that is kept can be read, and another run can start from it.
        let again = diverges(&["--resume", path]);
        assert!(!again.contains("damaged"), "{updates}: {again}");
        assert_eq!(checkpoints(&out), ["epoch-00000"]);
        let next = dir.path().join(format!("{updates}-next"));
        let lora = ["--device", "cpu", "--epochs", "1", "--lora", adapter.to_str().unwrap()];
        run(&next, &[&lora, &SMALL[..]].concat());
    }
}

#[test]
fn three_updates_that_are_not_finite_end_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let job = ["--out", out.to_str().unwrap(), "--device", "cpu", "--epochs", "1"];
    let ruin = ["--updates-per-epoch", "8", "--learning-rate", "1e30"];
    let error = diverges(&[&job, &SMALL[..], &ruin].concat());
    assert_eq!(error.matches("is skipped").count(), 3, "{error}");
    assert!(error.contains("3 updates in a row were not finite"), "{error}");
    assert!(error.contains(out.join("adapter.safetensors").to_str().unwrap()), "{error}");
}

/// Where no grid is due, a picture is looked at all the same before an epoch is saved.
#[test]
fn an_epoch_without_a_grid_is_not_saved_unseen() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let job = ["--out", out.to_str().unwrap(), "--epochs", "9", "--sample-every", "5"];
    diverges(&[&job[..], &RUIN, &SMALL[..12], &["--updates-per-epoch", "1"]].concat());
    assert_eq!(checkpoints(&out), ["epoch-00000"]);
    assert!(largest(&out.join("adapter.safetensors")) < 1.0);
}

/// An epoch that was good before the run diverged stays its newest.
#[test]
fn a_good_epoch_outlives_the_one_that_diverges() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    run(&out, &[&["--device", "cpu", "--epochs", "1"], &SMALL[..]].concat());
    let adapter = std::fs::read(out.join("adapter.safetensors")).unwrap();
    let settings = std::fs::read_to_string(out.join("settings.toml")).unwrap();
    let from = settings.lines().find(|l| l.starts_with("learning-rate")).unwrap();
    let ruined = settings.replace(from, "learning-rate = 1e20");
    std::fs::write(out.join("settings.toml"), ruined).unwrap();
    for _ in 0..2 {
        let error = diverges(&["--resume", out.to_str().unwrap(), "--epochs", "4"]);
        assert!(error.contains("after 1 epochs"), "{error}");
        assert_eq!(checkpoints(&out), ["epoch-00000", "epoch-00001"]);
        assert_eq!(std::fs::read(out.join("adapter.safetensors")).unwrap(), adapter);
    }
    // With its own learning rate it goes on as if nothing had been.
    std::fs::write(out.join("settings.toml"), settings).unwrap();
    let more = program(&["train", "--resume", out.to_str().unwrap(), "--epochs", "2"]);
    assert!(more.status.success(), "{}", error_of(&more));
    let whole = dir.path().join("whole");
    run(&whole, &[&["--device", "cpu", "--epochs", "2"], &SMALL[..]].concat());
    let bytes = |run: &Path| std::fs::read(run.join("adapter.safetensors")).unwrap();
    assert!(bytes(&out) == bytes(&whole), "the adapters differ");
}

/// A signal between two updates of a run that has diverged without knowing it yet.
#[cfg(unix)]
#[test]
fn a_poisoned_epoch_that_was_stopped_gives_way_to_its_beginning() {
    use crate::command_line::start;
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let job = ["train", "--out", out.to_str().unwrap(), "--epochs", "3"];
    let many = ["--updates-per-epoch", "8", "--inner-epochs", "4"];
    let mut child = start(&[&job[..], &RUIN, &SMALL[..12], &many].concat());
    let stdout = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut lines = std::io::BufRead::lines(stdout);
    assert!(lines.any(|line| line.unwrap().starts_with("self-test")));
    let id = child.id().to_string();
    std::process::Command::new("kill").args(["-INT", &id]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    // It was stopped after an update, or had found out by then.
    assert!([Some(130), Some(2)].contains(&output.status.code()), "{}", error_of(&output));
    assert!(checkpoints(&out).contains(&"epoch-00000".to_string()), "{:?}", checkpoints(&out));
    diverges(&["--resume", out.to_str().unwrap()]);
    assert_eq!(checkpoints(&out), ["epoch-00000"]);
    assert!(largest(&out.join("adapter.safetensors")) < 1.0);
}

/// Makes the adapter of a checkpoint finite and useless.
fn poison(run: &Path, checkpoint: &str) {
    let path = run.join("checkpoints").join(checkpoint).join("adapter.safetensors");
    let file = Weights::open_file(&path).unwrap();
    let large = |name: &str| {
        let tensor = file.f32(name).unwrap();
        HostTensor::new(name, tensor.shape.clone(), vec![1e15; tensor.values.len()])
    };
    let tensors: Vec<HostTensor> = file.names().map(large).collect();
    drop(file);
    write_tensors(&path, &tensors, &[]).unwrap();
}

/// A checkpoint whose pictures turn out not to be finite only when its run goes on: the epoch
/// before it is there.
#[test]
fn a_poisoned_checkpoint_gives_way_to_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let path = out.to_str().unwrap();
    let resume = ["--resume", path, "--epochs", "3"];
    run(&out, &[&["--device", "cpu", "--epochs", "2"], &SMALL[..]].concat());
    assert_eq!(checkpoints(&out), ["epoch-00001", "epoch-00002"]);
    poison(&out, "epoch-00002");
    let error = diverges(&resume);
    assert!(error.contains("after 1 epochs"), "{error}");
    assert_eq!(checkpoints(&out), ["epoch-00001"]);
    let grids = std::fs::read_dir(out.join("grids")).unwrap().count();
    assert_eq!(grids, 2, "grids of epochs that are gone");
    assert_eq!(of(&metrics(&out), "epoch").count(), 1);
    // Nothing earlier is left now, which is said, and nothing is promised.
    poison(&out, "epoch-00001");
    let output = program(&[&["train"], &resume[..]].concat());
    let error = error_of(&output);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("no earlier state"), "{error}");
    assert!(!error.contains("are kept"), "{error}");
}

/// Going back to before the first epoch keeps the evaluation that was made there.
#[test]
fn the_beginning_is_evaluated_once() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    run(&out, &[&["--device", "cpu", "--epochs", "1"], &SMALL[..]].concat());
    assert_eq!(checkpoints(&out), ["epoch-00000", "epoch-00001"]);
    poison(&out, "epoch-00001");
    let resume = ["--resume", out.to_str().unwrap(), "--epochs", "2"];
    let error = diverges(&resume);
    assert!(error.contains("after 0 epochs"), "{error}");
    let more = program(&[&["train"], &resume[..]].concat());
    assert!(more.status.success(), "{}", error_of(&more));
    let lines = metrics(&out);
    let epochs: Vec<u64> = of(&lines, "evaluation").map(|l| l["epoch"].as_u64().unwrap()).collect();
    assert_eq!(epochs, [0, 1, 2]);
}

/// A device that cannot draw with the earlier state either is not a reason to throw work away.
#[test]
fn a_run_whose_earlier_state_draws_nothing_either_is_left_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    run(&out, &[&["--device", "cpu", "--epochs", "2"], &SMALL[..]].concat());
    poison(&out, "epoch-00001");
    poison(&out, "epoch-00002");
    let adapter = std::fs::read(out.join("adapter.safetensors")).unwrap();
    let output = program(&["train", "--resume", out.to_str().unwrap(), "--epochs", "3"]);
    let error = error_of(&output);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("on this device either") && error.contains("--device"), "{error}");
    assert_eq!(checkpoints(&out), ["epoch-00001", "epoch-00002"]);
    assert!(std::fs::read(out.join("adapter.safetensors")).unwrap() == adapter);
    assert_eq!(of(&metrics(&out), "epoch").count(), 2);
}
