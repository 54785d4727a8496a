//! Signals, terminals that are closed, and readers that go away.

#![cfg(unix)]

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{TINY, begin_or_go_on, outcome};
use crate::command_line::{program, start};
use crate::support::error_of;

fn begin(out: &Path) -> Child {
    start(&[&["train", "--out", out.to_str().unwrap()][..], &TINY, &["--epochs", "12"]].concat())
}

fn signal(name: &str, child: &Child) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

fn within(seconds: u64, child: &mut Child) -> Option<i32> {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(seconds) {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    panic!("it has not ended within {seconds} s");
}

/// SIGINT, SIGTERM and a closed terminal stop a run after what it is doing; it is saved, and goes
/// on. A second signal ends it at once, and what was saved before goes on.
#[test]
fn signals_stop_and_save() {
    let dir = tempfile::tempdir().unwrap();
    for (name, twice) in [("-INT", false), ("-TERM", false), ("-HUP", false), ("-INT", true)] {
        let out = dir.path().join(format!("run{name}{twice}"));
        let mut child = begin(&out);
        crate::train::wait_for(&out.join("checkpoints/epoch-00002/state.json"), &mut child);
        signal(name, &child);
        if twice {
            std::thread::sleep(Duration::from_millis(2));
            // It may have ended by the first.
            let _ = Command::new("kill").args([name, &child.id().to_string()]).output();
        }
        assert_eq!(within(20, &mut child), Some(130), "{name}");
        let output = program(&["train", "--resume", out.to_str().unwrap(), "--epochs", "12"]);
        assert!(output.status.success(), "{name}: {}", error_of(&output));
        let left: Vec<_> =
            std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(left.iter().all(|n| !n.to_str().unwrap().starts_with('.')), "{left:?}");
    }
}

/// Nobody reads what a run says any more: it goes on to its end. A reader that is slow holds it up
/// and loses nothing.
#[test]
fn a_reader_that_goes_away_ends_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (gone, slow, whole) =
        (dir.path().join("gone"), dir.path().join("slow"), dir.path().join("whole"));
    let mut child = begin_or_go_on(&gone);
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(within(120, &mut child), Some(0));
    let mut child = begin_or_go_on(&slow);
    let mut out = child.stdout.take().unwrap();
    let mut byte = [0];
    for _ in 0..50 {
        let _ = out.read(&mut byte);
        std::thread::sleep(Duration::from_millis(10));
    }
    std::io::copy(&mut out, &mut std::io::sink()).unwrap();
    assert_eq!(within(120, &mut child), Some(0));
    let mut child = begin_or_go_on(&whole);
    std::io::copy(&mut child.stdout.take().unwrap(), &mut std::io::sink()).unwrap();
    assert_eq!(within(120, &mut child), Some(0));
    assert!(outcome(&gone) == outcome(&whole) && outcome(&slow) == outcome(&whole));
    // Commands whose product is what they print.
    for args in [&["recipes"][..], &["credit", "--steps", "20"], &["devices"]] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_pcpo-wgpu"))
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(!error_of(&output).contains("panicked"), "{args:?}: {}", error_of(&output));
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", error_of(&output));
    }
}
