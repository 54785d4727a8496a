//! Rewards in a run.

use super::{SMALL, of, run};
use crate::command_line::program;
use crate::support::{answers, error_of};

#[test]
fn a_reward_that_does_not_vary_is_reported_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let always_one = answers("1", "1");
    let args = [
        &[
            "train",
            "--out",
            out.to_str().unwrap(),
            "--device",
            "cpu",
            "--epochs",
            "1",
            "--reward",
            &always_one,
        ],
        &SMALL[..],
    ]
    .concat();
    let output = program(&args);
    assert!(output.status.success());
    assert!(error_of(&output).contains("does not vary"), "{output:?}");
}

#[test]
fn a_reward_program_is_asked_for_every_image() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    // Answers with the length of the line: prompts differ, so rewards do.
    let lines = run(
        &out,
        &[
            &["--device", "cpu", "--epochs", "1", "--reward", &answers("${#l}", "$l.Length")],
            &SMALL[..],
        ]
        .concat(),
    );
    assert!(of(&lines, "epoch").next().unwrap()["reward_mean"].as_f64().unwrap() > 20.0);
}

/// Rewards with weights, one that is watched, and metadata: all are recorded by name, and a run
/// goes on with them.
#[test]
fn several_rewards_train_and_are_recorded_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let prompts = dir.path().join("prompts.jsonl");
    let lines = "red apple on a white background\n{\"prompt\": \"owl on a white background\", \
                 \"text\": \"A\"}\n";
    std::fs::write(&prompts, lines).unwrap();
    let clip = "1*clip-score:models/emoji-clip";
    let job = [
        &["--device", "cpu", "--epochs", "1", "--prompts", prompts.to_str().unwrap()][..],
        &["--reward", clip, "--reward", "-0.5*color:blue", "--watch", "symmetry"],
        &["--advantage", "per-prompt", "--tracker-min-count", "2"],
        &SMALL[..],
    ]
    .concat();
    let lines = run(&out, &job);
    let epoch = of(&lines, "epoch").next().unwrap().clone();
    let names: Vec<&String> = epoch["rewards"].as_object().unwrap().keys().collect();
    assert_eq!(names, ["-0.5*color:blue", clip, "symmetry"]);
    for reward in epoch["rewards"].as_object().unwrap().values() {
        assert!(reward["mean"].as_f64().unwrap().abs() < 1.0);
        assert!(reward["group_std"].as_f64().unwrap() > 0.0);
        assert_eq!(reward["flat_groups"].as_f64().unwrap(), 0.0);
    }
    let mean = |name: &str| epoch["rewards"][name]["mean"].as_f64().unwrap();
    let total = mean(clip) - 0.5 * mean("-0.5*color:blue");
    assert!((epoch["reward_mean"].as_f64().unwrap() - total).abs() < 1e-9);
    let evaluation = of(&lines, "evaluation").next().unwrap();
    assert!(evaluation["rewards"][clip].as_f64().unwrap() > 0.5, "{evaluation}");
    let settings = std::fs::read_to_string(out.join("settings.toml")).unwrap();
    let settings: toml::Table = toml::from_str(&settings).unwrap();
    assert_eq!(settings["reward"].as_array().unwrap().len(), 2);
    assert_eq!(settings["mix"].as_str(), Some("per-reward"));
    let state = std::fs::read_to_string(out.join("checkpoints/epoch-00001/state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    assert_eq!(state["more_trackers"].as_array().unwrap().len(), 1, "one a reward");
    let resume = ["train", "--resume", out.to_str().unwrap(), "--epochs", "2"];
    let output = program(&resume);
    assert!(output.status.success(), "{}", error_of(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("symmetry: "), "{output:?}");
    let other = program(&[&resume[..], &["--reward", "color:red"]].concat());
    assert!(error_of(&other).contains("only"), "{other:?}");
}

/// A mixture of one is the reward alone, to the bit; a mixture that is written as text in a TOML
/// file is that of the flags.
#[test]
fn one_reward_of_weight_one_is_the_reward() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let job = [&["--device", "cpu", "--epochs", "1", "--model", "emoji"][..], &SMALL[..]].concat();
    let config = dir.path().join("job.toml");
    std::fs::write(&config, "reward = \"color:blue\"\n").unwrap();
    run(&a, &[&["--config", config.to_str().unwrap()][..], &job].concat());
    run(&b, &[&["--reward", "1*color:blue", "--mix", "sum"][..], &job].concat());
    let read = |dir: &std::path::Path| std::fs::read(dir.join("adapter.safetensors")).unwrap();
    assert!(read(&a) == read(&b));
}
