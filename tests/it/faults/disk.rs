//! A disk that is full or read-only, at each file of a run. A small filesystem of its own is
//! needed, which root can mount on Linux; elsewhere this is skipped by name.

#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{TINY, begin_or_go_on, cases, outcome};
use crate::command_line::program;
use crate::support::error_of;

/// A filesystem in memory of so many KiB, unmounted at the end.
struct Small(PathBuf);

impl Small {
    fn mount(at: &Path, options: &str) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "pcpo-test"])
            .arg(at)
            .output()
            .is_ok_and(|output| output.status.success());
        mounted.then(|| Self(at.to_path_buf()))
    }

    fn resize(&self, kib: usize) {
        let size = format!("remount,size={kib}k");
        assert!(Command::new("mount").args(["-o", &size]).arg(&self.0).status().unwrap().success());
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn mounted(at: &Path, options: &str) -> Option<Small> {
    let small = Small::mount(at, options);
    if small.is_none() {
        println!("skipped: no filesystem can be mounted here; root can");
    }
    small
}

fn go_on(out: &Path) -> std::process::Output {
    begin_or_go_on(out).wait_with_output().unwrap()
}

/// The disk has room for a little more each time: the run ends at one file after the other, names
/// it, keeps what it has, and comes to the same end.
#[test]
fn a_full_disk_costs_no_epoch() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    let Some(small) = mounted(&dir.path().join("disk"), "size=64k") else { return };
    assert!(go_on(&whole).status.success());
    let out = small.0.join("run");
    let (mut full, mut files, mut kib) = (0, std::collections::BTreeSet::new(), 64);
    let step = cases(96, 16);
    let mut epochs = 0;
    loop {
        let output = go_on(&out);
        if output.status.success() {
            break;
        }
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains("cannot be written") || error.contains("cannot be made"), "{error}");
        assert!(error.contains("No space left"), "{error}");
        let named = error.split(": cannot be").next().unwrap();
        files.insert(named.rsplit('/').next().unwrap().to_string());
        full += 1;
        // An epoch that was complete stays so.
        let checkpoints =
            std::fs::read_dir(out.join("checkpoints")).into_iter().flatten().flatten();
        let newest = checkpoints
            .filter_map(|e| e.file_name().to_str()?.strip_prefix("epoch-")?.parse::<usize>().ok())
            .max();
        assert!(newest.unwrap_or(0) >= epochs, "epoch {epochs} is gone");
        epochs = newest.unwrap_or(0);
        kib += step;
        assert!(kib < 16 << 10, "the run never ends");
        small.resize(kib);
    }
    assert!(outcome(&out) == outcome(&whole), "another end");
    assert!(full > 3, "the disk was full {full} times only");
    println!("full {full} times, at {files:?}; {kib} KiB in the end");
}

/// Each folder of a run is read-only in turn, from its beginning on or under way.
#[test]
fn a_read_only_folder_costs_no_epoch() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    assert!(go_on(&whole).status.success());
    let expected = outcome(&whole);
    for folder in ["checkpoints", "grids"] {
        let out = dir.path().join(format!("of-{folder}"));
        let begin = [&["train", "--out", out.to_str().unwrap()][..], &TINY, &["--epochs", "2"]];
        let output = program(&begin.concat());
        assert!(output.status.success(), "{}", error_of(&output));
        let epoch = || std::fs::read(out.join("checkpoints/epoch-00002/state.json")).unwrap();
        let kept = epoch();
        let bind = |args: &[&str]| Command::new("mount").args(args).output().unwrap().status;
        let at = out.join(folder);
        let at_text = at.to_str().unwrap();
        if !bind(&["--bind", at_text, at_text]).success() {
            println!("skipped: no filesystem can be mounted here; root can");
            return;
        }
        let unmount = Small(at.clone());
        assert!(bind(&["-o", "remount,ro,bind", at_text]).success());
        let more = ["train", "--resume", out.to_str().unwrap(), "--epochs", "4"];
        let output = program(&more);
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(2), "{folder}: {error}");
        assert!(error.contains(folder) && error.contains("Read-only"), "{folder}: {error}");
        assert!(epoch() == kept, "{folder}: what was complete is there");
        drop(unmount);
        let output = program(&more);
        assert!(output.status.success(), "{folder}: {}", error_of(&output));
        assert!(outcome(&out)[1..] == expected[1..], "{folder}: another end");
    }
}
