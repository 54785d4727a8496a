//! Every number of every command is finite and in range, whether a flag or a file says it.

use crate::command_line::program;
use crate::support::{error_of, golden};

/// A command with a flag that has to be refused with the flag and the value. Written as one word:
/// `-inf` alone would be taken for flags.
fn refused(command: &[&str], flag: &str, value: &str) {
    let word = format!("{flag}={value}");
    said(&[command, &[&word]].concat(), flag, value);
}

/// A command that has to be refused with the flag and the value.
fn said(args: &[&str], flag: &str, value: &str) {
    let shown = if value == "nan" { "NaN" } else { value };
    let value = shown.trim_end_matches(".0");
    let output = program(args);
    let error = error_of(&output);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
    assert!(!error.contains("panicked"), "{args:?}: {error}");
    assert!(error.contains(flag) && error.contains(value), "{args:?}: {error}");
}

const NOT_NUMBERS: [&str; 4] = ["nan", "inf", "-inf", "-1"];
const TOO_MANY: &str = "999999999999";

#[test]
fn numbers_of_sample() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("pictures");
    let fixed = ["sample", "--device", "cpu", "--prompt", "a", "--out", out.to_str().unwrap()];
    for value in NOT_NUMBERS {
        for flag in ["--guidance", "--eta", "--shift"] {
            refused(&fixed, flag, value);
        }
    }
    for flag in ["--steps", "--batch", "--resolution"] {
        for value in ["0", TOO_MANY, "-1"] {
            refused(&fixed, flag, value);
        }
    }
    for length in ["999999", "-1"] {
        refused(&fixed, "--max-sequence-length", length);
    }
    assert!(!out.exists(), "nothing is drawn");
}

#[test]
fn numbers_of_check() {
    let model = golden("simple");
    let reference = model.join("reference.safetensors");
    let fixed = ["check", "--device", "cpu", "--model", model.to_str().unwrap(), "--reference"];
    let fixed = [&fixed[..], &[reference.to_str().unwrap()]].concat();
    for value in NOT_NUMBERS {
        refused(&fixed, "--tolerance", value);
    }
}

#[test]
fn numbers_of_credit() {
    let flow = ["credit", "--sampler", "flow-grpo"];
    for value in NOT_NUMBERS {
        for flag in ["--eta", "--shift", "--zeta"] {
            refused(&flow, flag, value);
        }
    }
    for flag in ["--shift", "--zeta", "--steps"] {
        refused(&flow, flag, "0");
    }
    refused(&["credit"], "--steps", TOO_MANY);
    // Finite, and still too much for the kernels' f32.
    said(&["credit", "--sampler", "dance", "--eta", "1e300"], "--eta", "finite");
}

#[test]
fn numbers_of_embed() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("e.safetensors");
    let fixed = ["embed", "--device", "cpu", "--model", "emoji-flow", "--prompt", "a", "--out"];
    let fixed = [&fixed[..], &[out.to_str().unwrap()]].concat();
    for length in ["0", "513", "99999999"] {
        refused(&fixed, "--max-sequence-length", length);
    }
    assert!(!out.exists());
}

const FLOATS: [&str; 10] = [
    "memory",
    "kl-beta",
    "eta",
    "guidance-scale",
    "clip-range",
    "advantage-clamp",
    "learning-rate",
    "weight-decay",
    "max-grad-norm",
    "alpha",
];
const COUNTS: [&str; 14] = [
    "epochs",
    "images-per-epoch",
    "group-size",
    "updates-per-epoch",
    "inner-epochs",
    "batch",
    "steps",
    "train-steps",
    "rank",
    "keep-every",
    "sample-every",
    "tracker-size",
    "tracker-min-count",
    "resolution",
];

/// Flags of `train` and `plan`, and the same keys in a TOML file, which can say nan and inf too.
#[test]
fn numbers_of_train_and_plan() {
    let dir = tempfile::tempdir().unwrap();
    let (out, config) = (dir.path().join("run"), dir.path().join("job.toml"));
    let train = ["train", "--device", "cpu", "--out", out.to_str().unwrap()];
    let plan = ["plan", "--device", "cpu"];
    for (key, value) in FLOATS.iter().flat_map(|k| NOT_NUMBERS.map(|v| (k, v))) {
        let flag = format!("--{key}");
        refused(&train, &flag, value);
        refused(&plan, &flag, value);
        let value = if value == "-1" { "-1.0" } else { value };
        std::fs::write(&config, format!("{key} = {value}")).unwrap();
        let with = ["--config", config.to_str().unwrap()];
        said(&[&train[..], &with].concat(), &flag, value);
    }
    for (key, value) in ["zeta", "shift"].iter().flat_map(|k| NOT_NUMBERS.map(|v| (k, v))) {
        refused(&[&train[..], &["--model", "emoji-flow"]].concat(), &format!("--{key}"), value);
    }
    for key in COUNTS {
        for value in ["0", TOO_MANY, "18446744073709551615", "-1"] {
            refused(&train, &format!("--{key}"), value);
        }
    }
    assert!(!out.exists());
}
