//! Hundreds of epochs: memory, open files and time stay as they are.

#![cfg(target_os = "linux")]

use std::io::{BufRead, BufReader};

use super::{TINY, cases};
use crate::command_line::start;

/// Resident memory of a process in KiB, and its open files.
fn sizes(id: u32) -> (f64, usize) {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    let kib = line.trim().trim_end_matches(" kB").parse().unwrap();
    (kib, std::fs::read_dir(format!("/proc/{id}/fd")).unwrap().count())
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

#[test]
fn memory_files_and_time_stay_flat() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let epochs = cases(60, 500);
    let number = epochs.to_string();
    let own = ["--epochs", &number, "--sample-every", "50", "--learning-rate", "1e-5"];
    let mut child = start(&[&["train", "--out", out.to_str().unwrap()][..], &TINY, &own].concat());
    let id = child.id();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (mut memory, mut files) = (Vec::new(), Vec::new());
    for line in lines.map_while(Result::ok).filter(|line| line.starts_with("epoch ")) {
        if line.starts_with(&format!("epoch {epochs}/")) {
            break;
        }
        let (kib, open) = sizes(id);
        memory.push(kib);
        files.push(open);
    }
    assert!(child.wait().unwrap().success());
    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let records = metrics.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
    let seconds: Vec<f64> = records.filter_map(|l| l["seconds"].as_f64()).collect();
    assert_eq!((memory.len(), seconds.len()), (epochs - 1, epochs));
    // From the twentieth epoch on, in tenths of the run.
    let tenth = (epochs - 20) / 10;
    let (first, last) = (&memory[20..20 + tenth], &memory[memory.len() - tenth..]);
    // A file that is being written is open for a moment.
    let least = |of: &[usize]| of.iter().copied().min().unwrap();
    let grown = median(last) / median(first) - 1.0;
    let slower = median(&seconds[epochs - tenth..]) / median(&seconds[20..20 + tenth]) - 1.0;
    println!(
        "{epochs} epochs: memory {:.0} to {:.0} MiB ({:+.1}%), {} open files, {:.0} to {:.0} ms an \
         epoch ({:+.0}%)",
        median(first) / 1024.0,
        median(last) / 1024.0,
        100.0 * grown,
        least(&files[files.len() - tenth..]),
        1e3 * median(&seconds[20..20 + tenth]),
        1e3 * median(&seconds[epochs - tenth..]),
        100.0 * slower,
    );
    assert_eq!(least(&files[20..20 + tenth]), least(&files[files.len() - tenth..]), "{files:?}");
    // A short run is still filling its heaps, and its times beside other tests say little.
    let (most_memory, most_time) = if super::long() { (0.05, 0.1) } else { (0.25, 1.0) };
    assert!(grown < most_memory, "memory grows: {memory:?}");
    assert!(slower < most_time, "epochs become slower: {seconds:?}");
}
