//! Branching: METHOD2's sections 1c and 1d.

use pcpo_wgpu::config::{BranchGroup, Branching};

use super::{of, run};
use crate::bad_input::refused;
use crate::command_line::program;
use crate::support::error_of;

fn branching(branch: &[usize]) -> Branching {
    Branching {
        branch: branch.to_vec(),
        roots: 1,
        branch_group: BranchGroup::Root,
        anchor_steps: 0,
    }
}

/// Section 9.4 and 9.5: what a root and its branches cost on ten steps, and that all steps with
/// branches weigh the same.
#[test]
fn published_branches_cost_and_weigh_what_is_published() {
    for (branch, rest) in [
        (&[6; 9][..], 270),
        (&[3, 3, 4, 5, 6, 7, 7, 8, 11], 215),
        (&[4, 5, 5, 6, 7, 8, 9, 10], 261),
        (&[7, 7, 7, 7, 7, 7, 6, 6], 303),
        (&[6, 6, 8, 10, 11, 13], 325),
        (&[6, 6, 8, 10], 218),
    ] {
        let b = branching(branch);
        let left: usize = b.steps().map(|(i, k)| k * (9 - i)).sum();
        assert_eq!((left, b.images_per_root()), (rest, if rest == 218 { 30 } else { 54 }));
        let totals: Vec<f64> = b.steps().map(|(_, k)| k as f64 * b.row_weight(k)).collect();
        assert!(totals.iter().all(|t| (t - b.mean_branches()).abs() < 1e-12), "{totals:?}");
    }
    assert_eq!(branching(&[6, 6, 8, 10]).mean_branches(), 7.5);
    assert_eq!(Branching::published(true, 10), [6, 6, 8, 10]);
    let diffusion = branching(&Branching::published(false, 50));
    assert!(diffusion.steps().eq([0, 10, 20, 30, 40].map(|i| (i, 4))));
    assert_eq!(diffusion.steps().map(|(i, k)| k * (49 - i)).sum::<usize>(), 580);
    for steps in 1..60 {
        for flow in [true, false] {
            let branch = Branching::published(flow, steps);
            assert!(branch.len() < steps.max(2) && branch.last() > Some(&0), "{steps}: {branch:?}");
        }
    }
}

/// A root at 6, 6, 8 and 10 branches: 4 calls for itself, 218 for the branches' ends, and one for
/// each of the four steps in the update.
#[test]
fn branches_share_their_root_s_calls() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let flow = ["--model", "emoji-flow", "--device", "cpu", "--epochs", "1", "--eval-images", "1"];
    let own = ["--prompt", "owl", "--branch", "6,6,8,10"];
    let lines = run(&out, &[&flow[..], &own].concat());
    let epoch = of(&lines, "epoch").next().unwrap();
    assert_eq!((&epoch["rollout_calls"], &epoch["update_calls"]), (&222.into(), &4.into()));
    let update = of(&lines, "update").next().unwrap();
    assert_eq!(update["steps"].as_array().unwrap().len(), 4);
    assert!(update["grad_norm"].as_f64().unwrap() > 0.0);
    let settings = std::fs::read_to_string(out.join("settings.toml")).unwrap();
    assert!(settings.contains("branch = [6, 6, 8, 10]") && !settings.contains("group-size"));
    // What was saved is what a run that goes on reads.
    let more = program(&["train", "--resume", out.to_str().unwrap(), "--epochs", "2"]);
    assert!(more.status.success(), "{}", error_of(&more));
}

/// The KL at steps without branches reaches the gradient, and only the adapter's own part of it.
#[test]
fn anchors_hold_the_roots() {
    let dir = tempfile::tempdir().unwrap();
    let small = ["--device", "cpu", "--epochs", "2", "--steps", "6", "--branch", "3,2"];
    let more = ["--updates-per-epoch", "1", "--kl-beta", "5", "--eval-images", "1"];
    let norms = |name: &str, anchors: &str| {
        let own = [&small[..], &more, &["--anchor-steps", anchors]].concat();
        let lines = run(&dir.path().join(name), &own);
        let of_epoch = |e: &serde_json::Value| e["update_calls"].as_u64().unwrap();
        let calls: Vec<u64> = of(&lines, "epoch").map(of_epoch).collect();
        let norm = |u: &serde_json::Value| u["grad_norm"].as_f64().unwrap();
        (calls, of(&lines, "update").map(norm).collect::<Vec<f64>>())
    };
    let ((calls, without), (more, with)) = (norms("without", "0"), norms("with", "3"));
    assert_eq!((calls, more), (vec![8, 8], vec![20, 20]), "4 roots at 2 steps, and at 3 more");
    // Before the first update the KL is 0, and so is its gradient.
    assert!((without[0] - with[0]).abs() <= 1e-6 * without[0], "{without:?} {with:?}");
    assert!((without[1] - with[1]).abs() > 1e-3 * without[1], "{without:?} {with:?}");
}

#[test]
fn what_cannot_branch_is_refused() {
    let flow = ["--model", "emoji-flow"];
    refused(&["--branch", "4,4", "--group-size", "4"], &["--group-size 4", "--branch", "leave"]);
    refused(&["--preset", "branch", "--train-steps", "2"], &["--train-steps 2", "--preset branch"]);
    refused(&["--roots", "2"], &["--roots", "--branch"]);
    refused(&["--branch", "0,0"], &["--branch 0,0", "no branch"]);
    refused(&["--branch", "3,1"], &["--branch 3,1", "at least 2", "--branch-group prompt"]);
    refused(&["--branch", "3", "--roots", "0"], &["--roots 0"]);
    refused(&["--branch", "3", "--updates-per-epoch", "3"], &["--updates-per-epoch 3", "roots"]);
    refused(&["--branch", "3", "--anchor-steps", "1"], &["--anchor-steps 1", "--kl-beta"]);
    let anchors = ["--branch", "3", "--anchor-steps", "99", "--kl-beta", "1"];
    refused(&anchors, &["--anchor-steps 99", "lower"]);
    let many = "2,2,2,2,2,2,2,2,2,2,2";
    refused(&[&flow[..], &["--branch", many]].concat(), &["11 steps", "--steps 10"]);
    let last = ["--sampler", "cps", "--branch", "2,0,0,0,0,0,0,0,0,2"];
    refused(&[&flow[..], &last].concat(), &["step 10 of 10", "without noise"]);
}
