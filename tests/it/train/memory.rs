//! The memory estimate against what runs take.

use super::{of, run};
use crate::command_line::program;
use crate::support::error_of;

/// What the estimate says before a run is what the run needs, within a fifth.
#[cfg(target_os = "linux")]
#[test]
fn memory_estimates_are_within_20_percent_of_the_measured_peak() {
    let dir = tempfile::tempdir().unwrap();
    let cases: [&[&str]; 4] = [
        &["--model", "emoji", "--batch", "8", "--images-per-epoch", "16"],
        &[
            "--model",
            "emoji",
            "--batch",
            "8",
            "--images-per-epoch",
            "16",
            "--activation-checkpointing",
            "true",
        ],
        &["--model", "emoji-flow", "--batch", "16", "--images-per-epoch", "32"],
        &[
            "--model",
            "emoji-flow",
            "--batch",
            "16",
            "--images-per-epoch",
            "32",
            "--activation-checkpointing",
            "true",
        ],
    ];
    for (i, case) in cases.iter().enumerate() {
        let fixed = ["--device", "cpu", "--steps", "4", "--train-steps", "1", "--eval-images", "1"];
        let plan = program(&[&["plan"], &fixed[..], case].concat());
        assert!(plan.status.success(), "{plan:?}");
        let text = String::from_utf8_lossy(&plan.stdout).into_owned();
        let line = text.lines().find(|l| l.starts_with("peak ")).unwrap();
        let estimate: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        // Which batches meet at their largest is for the threads to say: the median of three runs.
        let mut measured = [0, 1, 2].map(|repeat| {
            let out = dir.path().join(format!("run{i}-{repeat}"));
            let lines = run(&out, &[&["--epochs", "1"], &fixed[..], case].concat());
            let epoch = of(&lines, "epoch").next().unwrap();
            let peaks = ["rollout_peak_mib", "decode_peak_mib", "update_peak_mib"];
            peaks.map(|p| epoch[p].as_f64().unwrap()).into_iter().fold(0.0, f64::max)
        });
        measured.sort_by(f64::total_cmp);
        println!("{case:?}: estimated {estimate:.0} MiB, measured {measured:?}");
        let off = estimate / measured[1] - 1.0;
        assert!(off.abs() < 0.2, "{case:?}: {estimate} MiB estimated, {measured:?} measured");
    }
}

#[test]
fn a_run_that_cannot_fit_is_refused_with_the_setting_to_change() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let fixed = [
        "train",
        "--device",
        "cpu",
        "--epochs",
        "1",
        "--out",
        out.to_str().unwrap(),
        "--batch",
        "16",
    ];
    for (memory, words) in
        [("0.085", ["--batch 16", "use --batch "]), ("0.05", ["--batch 16", "--storage f16"])]
    {
        let output = program(
            &[&fixed[..], &["--memory", memory, "--activation-checkpointing", "true"]].concat(),
        );
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(
            words.iter().all(|w| error.contains(w)) && error.contains("--memory GIB"),
            "{error}"
        );
        assert!(!out.exists());
    }
}
