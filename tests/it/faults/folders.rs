//! Folders that are not what a run expects: another run's, a copy in the making, another version's.

use std::path::Path;
use std::time::Duration;

use super::{TINY, begin_or_go_on, cases, outcome};
use crate::command_line::program;
use crate::support::error_of;

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    // What vanishes while it is copied is not copied, as by `cp`.
    for entry in std::fs::read_dir(from).into_iter().flatten().flatten() {
        let target = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target)),
        }
    }
}

/// A copy that was made while the run wrote is refused with what to do, or goes on to the same end.
#[test]
fn a_folder_that_is_copied_while_the_run_writes_is_refused_or_right() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    let output = begin_or_go_on(&whole).wait_with_output().unwrap();
    assert!(output.status.success(), "{}", error_of(&output));
    let expected = outcome(&whole);
    let out = dir.path().join("run");
    let mut child = begin_or_go_on(&out);
    // Before that there is nothing to copy.
    crate::train::wait_for(&out.join("settings.toml"), &mut child);
    let (mut copies, wanted) = (Vec::new(), cases(6, 60));
    while child.try_wait().unwrap().is_none() && copies.len() < wanted {
        let to = dir.path().join(format!("copy-{}", copies.len()));
        copy(&out, &to);
        copies.push(to);
        std::thread::sleep(Duration::from_millis(if wanted > 10 { 10 } else { 80 }));
    }
    assert!(child.wait().unwrap().success());
    let (mut right, mut refused, mut empty) = (0, 0, 0);
    for copied in &copies {
        let output = program(&["train", "--resume", copied.to_str().unwrap()]);
        if output.status.success() {
            assert!(outcome(copied) == expected, "{}", copied.display());
            right += 1;
            continue;
        }
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(copied.to_str().unwrap()) && !error.contains("panic"), "{error}");
        match copied.join("settings.toml").exists() {
            true => refused += 1,
            false => empty += 1,
        }
    }
    println!("{} copies: {right} right, {refused} refused, {empty} of nothing yet", copies.len());
    assert!(right > 0, "no copy goes on");
}

/// Checkpoints of another version are refused by their number.
#[test]
fn another_version_s_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let begin =
        [&["train", "--out", out.to_str().unwrap()][..], &TINY, &["--epochs", "1"]].concat();
    assert!(program(&begin).status.success());
    let path = out.join("checkpoints/epoch-00001/state.json");
    let state = std::fs::read_to_string(&path).unwrap();
    let newer = state.replacen("\"version\": 2", "\"version\": 3", 1);
    assert_ne!(state, newer);
    std::fs::write(&path, newer).unwrap();
    let resume = ["train", "--resume", out.to_str().unwrap(), "--epochs", "2"];
    let error = error_of(&program(&resume));
    assert!(error.contains("version 3") && error.contains("state.json"), "{error}");
    std::fs::write(&path, state).unwrap();
    let settings = out.join("settings.toml");
    let text = std::fs::read_to_string(&settings).unwrap();
    std::fs::write(&settings, format!("{text}a-setting-of-tomorrow = 1\n")).unwrap();
    let error = error_of(&program(&resume));
    assert!(error.contains("a-setting-of-tomorrow") && error.contains("settings.toml"), "{error}");
    // A log that is shorter than what the checkpoint counts.
    std::fs::write(&settings, text).unwrap();
    std::fs::write(out.join("metrics.jsonl"), "").unwrap();
    let error = error_of(&program(&resume));
    assert!(error.contains("metrics.jsonl: has 0 lines"), "{error}");
}
