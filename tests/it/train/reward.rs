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
