//! Runs by objectives of the forward process: NFT and AWM.

use std::path::Path;

use super::{of, run};
use crate::bad_input::refused;
use crate::command_line::program;
use crate::support::error_of;

const SMALL: [&str; 14] = [
    "--device",
    "cpu",
    "--steps",
    "5",
    "--images-per-epoch",
    "8",
    "--group-size",
    "4",
    "--batch",
    "4",
    "--eval-images",
    "1",
    "--learning-rate",
    "0.01",
];

/// An image is 5 calls to draw; int(0.99 5) = 4 of the times of NFT and the three of AWM, each by
/// the policy and by the old one. The old policy goes with the checkpoint, and a run that goes on
/// has the bits of one that never stopped.
#[test]
fn runs_of_the_forward_process_count_their_calls_and_resume_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    for (preset, calls) in [("nft", 8 * 4 * 2), ("awm", 8 * 3 * 2)] {
        for model in ["emoji", "emoji-flow"] {
            let own = ["--model", model, "--preset", preset, "--epochs"];
            let at = |name: &str| dir.path().join(format!("{name}-{preset}-{model}"));
            let job = |epochs| [&SMALL[..], &own, &[epochs]].concat();
            let lines = run(&at("whole"), &job("2"));
            let epoch = of(&lines, "epoch").next().unwrap();
            let found = (&epoch["rollout_calls"], &epoch["update_calls"]);
            assert_eq!(found, (&40.into(), &calls.into()), "{preset} of {model}");
            let learnt = |u: &serde_json::Value| u["grad_norm"].as_f64().unwrap() > 0.0;
            assert!(of(&lines, "update").all(learnt), "{preset} of {model}");
            run(&at("broken"), &job("1"));
            let broken = at("broken");
            let more = ["train", "--resume", broken.to_str().unwrap(), "--epochs", "2"];
            let output = program(&more);
            assert!(output.status.success(), "{}", error_of(&output));
            let bytes = |dir: &Path, file: &str| std::fs::read(dir.join(file)).unwrap();
            for file in ["adapter.safetensors", "checkpoints/epoch-00002/old.safetensors"] {
                assert_eq!(bytes(&at("whole"), file), bytes(&broken, file), "{preset}: {file}");
            }
            let (adapter, old) = (
                bytes(&broken, "checkpoints/epoch-00002/adapter.safetensors"),
                bytes(&broken, "checkpoints/epoch-00002/old.safetensors"),
            );
            assert_ne!(adapter, old, "{preset}: the old policy lags behind");
        }
    }
}

#[test]
fn what_has_no_trajectory_is_refused() {
    refused(&["--preset", "nft", "--credit", "proportionate"], &["--credit", "nft"]);
    refused(&["--preset", "nft", "--branch", "4,4"], &["--objective nft", "branches"]);
    refused(&["--preset", "awm", "--noise-only-trained", "true"], &["--noise-only-trained", "awm"]);
    refused(&["--preset", "awm", "--clip-range", "1.5"], &["--clip-range 1.5", "at most 1"]);
    refused(&["--preset", "nft", "--nft-beta", "0"], &["--nft-beta 0"]);
    refused(&["--preset", "nft", "--nft-beta", "nan"], &["--nft-beta NaN"]);
    refused(&["--objective", "nft", "--train-steps", "99"], &["--train-steps 99", "lower"]);
}
