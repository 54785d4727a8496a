//! Bad input: one error line that names the culprit, exit code 2, nothing on disk.

use pcpo_wgpu::io::tensors::{HostTensor, write_tensors};
use pcpo_wgpu::io::weights::Weights;

use crate::command_line::program;
use crate::support::{answers, error_of, for_every_line, golden};

/// Runs `train` with a new folder; the error must hold all `words`, and no folder may be left.
pub fn refused(args: &[&str], words: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let mut all = vec!["train", "--device", "cpu", "--out", out.to_str().unwrap()];
    all.extend(args);
    let output = program(&all);
    let error = error_of(&output);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
    assert_eq!(error.lines().filter(|l| l.starts_with("error: ")).count(), 1, "{args:?}: {error}");
    assert!(!error.contains("panicked") && !error.contains("backtrace"), "{args:?}: {error}");
    words.iter().for_each(|w| assert!(error.contains(w), "{args:?}: {w:?} is not in {error}"));
    assert!(!out.exists(), "{args:?}: a folder is left");
}

/// What a run cannot be has no plan either.
#[test]
fn plan_refuses_what_train_does() {
    let cases: [(&[&str], &[&str]); 21] = [
        (&["--eta", "1.5"], &["--eta 1.5"]),
        (&["--train-within", "0.01"], &["--train-within 0.01"]),
        (&["--train-steps", "99"], &["--train-steps 99", "lower it"]),
        (&["--steps", "1000"], &["1000"]),
        (&["--shift", "2"], &["--shift"]),
        (&["--sampler", "dance"], &["dance"]),
        (&["--time-ids", "1,2,3,4,5,6"], &["--time-ids"]),
        (&["--reward", "color:nope"], &["--reward color:nope", "blue"]),
        (&["--watch", "color:"], &["--watch color:", "blue"]),
        (&["--reward", "http:"], &["--reward http:", "http:URL"]),
        (&["--reward", "judge:http://x"], &["--reward judge:http://x", "no model"]),
        (&["--reward", "command:"], &["--reward command:", "no program"]),
        (&["--target-modules", "nope"], &["--target-modules nope", "to_q"]),
        (&["--reward-device", "no such gpu"], &["--reward-device no such gpu"]),
        (&["--reward-device", "auto,cpu"], &["--reward-device auto,cpu"]),
        (&["--device", ""], &["--device: is empty"]),
        (&["--branch", "18446744073709551615"], &["--branch 18446744073709551615", "2^63"]),
        (&["--lora", "missing.safetensors"], &["--lora", "missing.safetensors"]),
        (&["--model", "emoji-flow", "--shift", "1e300"], &["--shift 1e300", "f32"]),
        (&["--learning-rate", "1e-320"], &["--learning-rate 1e-320", "0 in f32"]),
        (&["--kl-beta", "1e300"], &["--kl-beta 1e300", "f32"]),
    ];
    for (args, words) in cases {
        refused(args, words);
        let output = program(&[&["plan", "--device", "cpu"], args].concat());
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
        assert!(words.iter().all(|word| error.contains(word)), "{args:?}: {error}");
    }
}

#[test]
fn settings() {
    refused(&["--reward", "beauty"], &["--reward beauty"]);
    refused(&["--reward", "color:mauve"], &["color:mauve", "blue"]);
    refused(&["--images-per-epoch", "0"], &["--images-per-epoch 0"]);
    refused(&["--images-per-epoch", "12"], &["--images-per-epoch 12", "--group-size 8"]);
    refused(&["--updates-per-epoch", "3"], &["--updates-per-epoch 3"]);
    refused(&["--images-per-epoch", "64"], &["--images-per-epoch 64", "8 prompts"]);
    refused(&["--steps", "0"], &["--steps 0"]);
    refused(&["--seed", "9223372036854775808"], &["--seed"]);
    refused(&["--steps", "2000"], &["--steps 2000"]);
    refused(&["--train-steps", "20"], &["--train-steps 20", "19"]);
    refused(&["--credit", "released"], &["released", "proportionate"]);
    refused(&["--eta", "0"], &["--eta 0"]);
    refused(&["--eta", "2"], &["--eta 2"]);
    refused(&["--learning-rate", "-1"], &["--learning-rate"]);
    refused(&["--learning-rate", "nan"], &["--learning-rate"]);
    refused(&["--target-modules", "to_x"], &["--target-modules to_x"]);
    refused(&["--device", "no such gpu"], &["no such gpu"]);
    refused(
        &[
            "--train-window",
            "true",
            "--model",
            "tests/golden/simple",
            "--reward",
            "symmetry",
            "--prompt",
            "a",
        ],
        &["--train-window", "--train-steps"],
    );
    refused(&["--credit", "native", "--credit-total", "trained"], &["--credit-total"]);
    refused(&["--grid", "diffusers"], &["--grid", "flow"]);
    refused(
        &["--advantage", "per-prompt", "--tracker-size", "8"],
        &["--tracker-min-count 16", "--tracker-size 8"],
    );
}

#[test]
fn settings_of_a_flow() {
    let flow = ["--model", "emoji-flow"];
    let refused = |args: &[&str], words: &[&str]| refused(&[&flow, args].concat(), words);
    refused(&["--sampler", "ddim"], &["--sampler ddim", "flow-grpo"]);
    refused(&["--sampler", "ode"], &["--sampler ode", "--noise-only-trained"]);
    refused(&["--credit", "released"], &["--credit released", "--zeta"]);
    refused(&["--sampler", "cps", "--eta", "1.5"], &["--eta 1.5", "cps"]);
    refused(&["--shift", "0"], &["--shift 0"]);
    refused(&["--zeta", "-1"], &["--zeta -1"]);
    refused(&["--zeta", "4", "--credit", "native"], &["--zeta", "proportionate"]);
    refused(&["--zeta", "4", "--credit-total", "trained"], &["--zeta 4", "--credit-total"]);
    refused(&["--resolution", "30"], &["--resolution 30", "multiple of 4"]);
    refused(&["--resolution", "256"], &["--resolution", "64x64", "32"]);
    refused(&["--max-sequence-length", "1000"], &["--max-sequence-length 1000", "512"]);
    refused(&["--embeddings", "none.safetensors"], &["none.safetensors"]);
    refused(&["--memory", "0"], &["--memory 0"]);
    refused(&["--target-modules", "to_x"], &["--target-modules to_x"]);
}

#[test]
fn settings_of_the_other_family() {
    refused(&["--sampler", "flow-grpo"], &["--sampler flow-grpo", "ddim"]);
    refused(&["--shift", "3"], &["--shift", "flow"]);
    refused(&["--credit", "guard"], &["--credit guard", "flow"]);
    refused(&["--model", "emoji-flaw"], &["--model emoji-flaw", "no such folder"]);
}

#[test]
fn files() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    refused(
        &["--model", &path("missing"), "--reward", "symmetry", "--prompt", "a"],
        &["--model", "missing"],
    );
    refused(&["--prompts", &path("none.txt")], &["none.txt"]);
    std::fs::write(path("empty.txt"), "\n\n").unwrap();
    refused(&["--prompts", &path("empty.txt")], &["empty.txt", "no prompt"]);
    std::fs::write(path("binary.txt"), [0xff, 0xfe, 0x00]).unwrap();
    refused(&["--prompts", &path("binary.txt")], &["binary.txt"]);
    std::fs::write(path("bad.toml"), "stepz = 3").unwrap();
    refused(&["--config", &path("bad.toml")], &["bad.toml", "stepz"]);
    refused(&["--lora", &path("none.safetensors")], &["none.safetensors"]);
    let foreign = golden("lora/peft.safetensors");
    let foreign = ["--model", "emoji", "--lora", foreign.to_str().unwrap()];
    refused(&foreign, &["peft.safetensors", "another model"]);
}

#[test]
fn a_reward_program_that_dies_or_answers_nonsense() {
    let small = ["--steps", "2", "--train-steps", "1", "--epochs", "1"];
    let with = |reward: &str, words: &[&str]| {
        refused(&[&small[..], &["--reward", reward]].concat(), words)
    };
    with("command:exit 3", &["command:exit 3", "ended without an answer"]);
    with("command:", &["no program"]);
    with(&answers("nan", "'nan'"), &["not a number"]);
    with(
        &for_every_line(
            "echo 1; echo 2",
            "[Console]::Out.WriteLine(1); [Console]::Out.WriteLine(2)",
        ),
        &["without being asked"],
    );
    // It closes its output and lives on; PowerShell cannot.
    if cfg!(unix) {
        let closed = "command:exec >&-; exec sleep 600";
        with(closed, &["ended without an answer", "closed its output"]);
    }
}

#[test]
fn an_occupied_folder_is_not_written_to() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("mine.txt"), "x").unwrap();
    let output = program(&["train", "--device", "cpu", "--out", dir.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    assert!(error_of(&output).contains("--resume"));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// No file may grow beyond some kilobytes, as on a full disk: before the first checkpoint nothing
/// stays, after it the run does, and goes on once there is room.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk() {
    let dir = tempfile::tempdir().unwrap();
    let (fresh, begun) = (dir.path().join("fresh"), dir.path().join("begun"));
    let small =
        ["--device", "cpu", "--steps", "2", "--train-steps", "1", "--images-per-epoch", "8"];
    let full = |args: &[&str]| {
        let script = format!(
            "trap '' XFSZ; ulimit -f 64; exec {} train \"$@\"",
            env!("CARGO_BIN_EXE_pcpo-wgpu")
        );
        let mut command = std::process::Command::new("sh");
        command.args(["-c", &script, "sh"]).args(args).current_dir(env!("CARGO_MANIFEST_DIR"));
        let output = command.output().unwrap();
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains("cannot be written") && error.contains("disk full"), "{error}");
        error
    };
    let job = ["--config", "models/emoji/blue.toml", "--epochs", "1"];
    full(&[&["--out", fresh.to_str().unwrap()], &job[..], &small[..]].concat());
    assert!(!fresh.exists(), "a folder is left");
    let begin = program(
        &[&["train", "--out", begun.to_str().unwrap(), "--epochs", "1"], &small[..]].concat(),
    );
    assert!(begin.status.success(), "{begin:?}");
    let adapter = std::fs::read(begun.join("adapter.safetensors")).unwrap();
    let error = full(&["--resume", begun.to_str().unwrap(), "--epochs", "2"]);
    assert!(error.contains("--resume"), "{error}");
    assert_eq!(std::fs::read(begun.join("adapter.safetensors")).unwrap(), adapter);
    let more = program(&["train", "--resume", begun.to_str().unwrap(), "--epochs", "2"]);
    assert!(more.status.success(), "{more:?}");
}

#[test]
fn places_that_cannot_be_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let below = file.join("x");
    refused(&["--dump-update", below.to_str().unwrap()], &["--dump-update", "file/x"]);
    refused(
        &["--dump-update", "u.safetensors:100000"],
        &["--dump-update 100000", "updates 1 to 60"],
    );
    let sample = ["sample", "--device", "cpu", "--prompt", "a", "--steps", "1", "--out"];
    for args in [
        vec![below.to_str().unwrap()],
        vec![dir.path().to_str().unwrap(), "--save-latents", below.to_str().unwrap()],
    ] {
        let output = program(&[&sample[..], &args].concat());
        let error = error_of(&output);
        assert!(output.status.code() == Some(2) && error.contains("file/x"), "{error}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is written");
    // A folder of the user's stays, one made for the run does not.
    let (own, made) = (dir.path().join("own"), dir.path().join("a/b/c"));
    std::fs::create_dir(&own).unwrap();
    for out in [&own, &made] {
        let output = program(&[
            "train",
            "--device",
            "cpu",
            "--reward",
            "beauty",
            "--out",
            out.to_str().unwrap(),
        ]);
        assert_eq!(output.status.code(), Some(2));
    }
    assert!(
        own.is_dir()
            && std::fs::read_dir(&own).unwrap().count() == 0
            && !dir.path().join("a").exists()
    );
}

/// Tensors of another shape than a model takes.
#[test]
fn tensors_of_the_wrong_shape() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let failed = |args: &[&str], words: &[&str]| {
        let output = program(args);
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
        assert!(!error.contains("panicked"), "{args:?}: {error}");
        words.iter().for_each(|w| assert!(error.contains(w), "{args:?}: {w:?} is not in {error}"));
    };
    let write = |name: &str, tensors: &[HostTensor]| {
        write_tensors(&path(name), tensors, &[]).unwrap();
        path(name).to_str().unwrap().to_string()
    };
    for shape in [vec![1, 4, 0, 0], vec![1, 3, 16, 16], vec![2, 4, 16, 16], vec![4, 16, 16]] {
        let n = shape.iter().product();
        let file = write("latents.safetensors", &[HostTensor::new("latents", shape, vec![0.0; n])]);
        failed(
            &["sample", "--device", "cpu", "--prompt", "a", "--steps", "1", "--latents", &file],
            &["--latents"],
        );
    }
    let lora = |rank: usize| {
        let layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q";
        let matrix = |side: &str, shape: Vec<usize>| {
            let n = shape.iter().product();
            HostTensor::new(format!("{layer}.lora_{side}.weight"), shape, vec![0.1; n])
        };
        write("lora.safetensors", &[matrix("A", vec![rank, 128]), matrix("B", vec![128, rank])])
    };
    failed(
        &["sample", "--device", "cpu", "--prompt", "a", "--steps", "1", "--lora", &lora(0)],
        &["lora.safetensors"],
    );
    // A reference of another model, and one with noise.
    let golden = golden("simple");
    let weights = Weights::open_file(&golden.join("reference.safetensors")).unwrap();
    let HostTensor { values, shape, .. } = weights.f32("in.latents").unwrap();
    let narrow = vec![shape[0], shape[1] / 2, shape[2], shape[3]];
    let half = values[..values.len() / 2].to_vec();
    let run = std::fs::read_to_string(golden.join("reference.json")).unwrap();
    for (latents, json, word) in [
        (HostTensor::new("in.latents", narrow, half), run.clone(), "channels"),
        (
            HostTensor::new("in.latents", shape, values),
            run.replace("\"eta\": 0.0", "\"eta\": 1.0"),
            "eta = 1",
        ),
    ] {
        let out = weights.f32("out.latents").unwrap();
        let file = write("reference.safetensors", &[latents, out]);
        std::fs::write(path("reference.json"), json).unwrap();
        let model = golden.to_str().unwrap();
        failed(&["check", "--device", "cpu", "--model", model, "--reference", &file], &[word]);
    }
}

#[test]
fn rewards() {
    refused(&["--reward", "clip-score:no/such/folder"], &["no/such/folder"]);
    refused(&["--reward", "color:blue", "--reward", "2*color:blue"], &["color:blue", "twice"]);
    let watched = ["--watch", "symmetry", "--watch", "symmetry"];
    refused(&watched, &["--watch symmetry", "twice"]);
    refused(&["--watch", "beauty"], &["--watch beauty"]);
    refused(&["--reward", "inf*color:blue"], &["inf*color:blue"]);
    refused(&["--reward-device", "no such gpu"], &["--reward-device", "no such gpu"]);
    refused(&["--reward", "1e308*color:blue"], &["1e308*color:blue", "smaller weight"]);
    refused(&["--watch", "0.5*symmetry"], &["--watch 0.5*symmetry", "weight"]);
    refused(&["--watch", "clip-score:no/such"], &["--watch clip-score:no/such"]);
    refused(&["--judge-question", "good?"], &["--judge-question", "judge:"]);
    refused(&["--reward-timeout", "0"], &["--reward-timeout 0"]);
    refused(&["--reward-timeout", "nan"], &["--reward-timeout"]);
    refused(&["--reward", "http://127.0.0.1:9/score"], &["127.0.0.1:9", "reached"]);
    let hostile = golden("reward/pickles/hostile_nested.pt");
    refused(&["--reward", &format!("pick-score:{}", hostile.display())], &["imports"]);
}
