//! Training end to end.

mod branching;
mod collapse;
mod control;
mod diverge;
mod forward;
mod gpu;
mod library;
mod memory;
mod method;
mod mpi;
mod ranks;
mod resume;
mod reward;
mod schedule;
mod stop;

use std::path::Path;
use std::process::Child;

use crate::command_line::program;
use crate::support::error_of;

/// A small job on the embedded model.
const SMALL: [&str; 14] = [
    "--eval-images",
    "1",
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
    assert!(output.status.success(), "{args:?}: {}", error_of(&output));
    metrics(out)
}

/// Waits until a running program has made a file.
pub fn wait_for(file: &Path, program: &mut Child) {
    while !file.exists() {
        assert!(
            program.try_wait().unwrap().is_none(),
            "the run ended before {} was there",
            file.display()
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

fn metrics(out: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn of<'a>(
    lines: &'a [serde_json::Value],
    kind: &'a str,
) -> impl Iterator<Item = &'a serde_json::Value> {
    lines.iter().filter(move |l| l["kind"] == kind)
}
