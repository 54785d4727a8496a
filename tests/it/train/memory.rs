//! The memory estimate against what runs take.

use burn::tensor::Tensor;
use pcpo_wgpu::device::open;
use pcpo_wgpu::device::tensor::read;

use super::{of, run};
use crate::command_line::program;
use crate::support::{error_of, gpu_name};

/// The figure of a line of `plan`, in MiB.
fn planned(flags: &[&str], line: &str) -> f64 {
    let plan = program(&[&["plan"], flags].concat());
    assert!(plan.status.success(), "{plan:?}");
    let text = String::from_utf8_lossy(&plan.stdout).into_owned();
    let line = text.lines().find(|l| l.starts_with(line)).unwrap();
    line.split_whitespace().find_map(|word| word.parse().ok()).unwrap()
}

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
        let estimate = planned(&[&fixed[..], case].concat(), "peak ");
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

/// What `plan` says of weights and an update is what a GPU's pool holds after it, within a quarter:
/// models as small as these leave some of it to the sizes of its pages.
#[test]
fn a_gpus_pool_holds_what_was_planned() {
    let dir = tempfile::tempdir().unwrap();
    let device = gpu_name();
    for model in ["emoji", "emoji-flow"] {
        let flags = ["--model", model, "--device", &device, "--steps", "2", "--train-steps", "1"];
        let more = ["--batch", "16", "--images-per-epoch", "32", "--initial-noise", "own"];
        let last = ["--activation-checkpointing", "false"];
        let flags = [&flags[..], &more, &last].concat();
        let estimate = planned(&flags, "weights") + planned(&flags, "update");
        let once = ["--epochs", "1", "--eval-images", "1"];
        let lines = run(&dir.path().join(model), &[&once, &flags[..]].concat());
        let held = of(&lines, "epoch").next().unwrap()["update_pool_mib"].as_f64().unwrap();
        println!("{model}: {estimate} MiB planned, {held} held");
        assert!((estimate / held - 1.0).abs() < 0.25, "{model}: {estimate} planned, {held} held");
    }
}

/// Threads that come and go leave nothing of theirs behind on a GPU.
#[test]
fn threads_share_a_gpus_memory() {
    let gpu = open(&gpu_name()).unwrap();
    let held_after_a_thread = || {
        let sum = || read(&(Tensor::<1>::ones([1 << 20], &gpu.burn) + 1.0)).unwrap();
        let sum = std::thread::scope(|scope| scope.spawn(sum).join().unwrap());
        assert!(sum.iter().all(|x| *x == 2.0));
        gpu.burn.memory_pool_usage().unwrap().bytes_reserved
    };
    let first = held_after_a_thread();
    for _ in 0..4 {
        assert_eq!(held_after_a_thread(), first);
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
