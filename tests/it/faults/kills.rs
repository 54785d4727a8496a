//! `kill -9` at random moments of a run, its writing among them.

use std::path::Path;
use std::time::{Duration, Instant};

use super::{Draws, begin_or_go_on, cases, outcome};
use crate::support::error_of;

/// Whatever a killed run leaves goes on to the bits of one that was not: by `--resume` where there
/// is something to go on from, in the same folder anew where there is not.
#[test]
fn a_run_that_is_killed_goes_on_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    let run = |out: &Path| {
        let output = begin_or_go_on(out).wait_with_output().unwrap();
        assert!(output.status.success(), "{}", error_of(&output));
    };
    let started = Instant::now();
    run(&whole);
    let length = started.elapsed();
    let expected = outcome(&whole);
    let (wanted, mut kills, mut in_writing, mut runs) = (cases(5, 100), 0, 0, 0);
    let mut draws = Draws(1);
    while kills < wanted {
        runs += 1;
        let out = dir.path().join(format!("run-{runs}"));
        // Killed a few times, then left alone.
        for _ in 0..3 {
            let mut child = begin_or_go_on(&out);
            let moment = length.mul_f64(draws.below(1000) as f64 / 1000.0);
            let started = Instant::now();
            while started.elapsed() < moment && child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
            let ended = child.try_wait().unwrap().is_some();
            child.kill().unwrap();
            let output = child.wait_with_output().unwrap();
            if ended {
                assert!(output.status.success(), "{}", error_of(&output));
            } else {
                kills += 1;
                in_writing += usize::from(partial(&out));
            }
        }
        run(&out);
        assert!(outcome(&out) == expected, "run {runs}");
        assert!(!partial(&out), "nothing of what was cut short is left");
        std::fs::remove_dir_all(&out).unwrap();
    }
    println!("{kills} kills in {runs} runs, {in_writing} of them while a file was written");
}

/// Whether a folder has something that is not whole.
fn partial(dir: &Path) -> bool {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| {
        let name = entry.file_name();
        name.to_str().is_some_and(|name| name.starts_with(".partial-"))
            || entry.path().is_dir() && partial(&entry.path())
    })
}
