//! The watch: a run that destroys its pictures is told, stopped, and its best adapter kept.

use std::path::Path;

use serde_json::Value;

use super::{SMALL, metrics, of, run};
use crate::command_line::program;
use crate::support::error_of;

fn evaluations(out: &Path) -> Vec<Value> {
    of(&metrics(out), "evaluation").cloned().collect()
}

/// The job that ended as a success over ruined pictures.
#[test]
fn a_run_that_ruins_its_pictures_is_stopped_and_its_best_adapter_kept() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let path = out.to_str().unwrap();
    let ruin = ["--device", "cpu", "--learning-rate", "1e4", "--seed", "1", "--stop-on-collapse"];
    let pictures = ["--eval-images", "2"];
    let output = program(&[&["train", "--out", path][..], &ruin, &SMALL[..], &pictures].concat());
    assert_eq!(output.status.code(), Some(0), "{}", error_of(&output));
    let error = error_of(&output);
    let told: Vec<&str> = error.lines().filter(|l| l.starts_with("warning: collapse: ")).collect();
    assert!(!told.is_empty(), "{error}");
    let found = evaluations(&out);
    let warned = found.iter().find(|e| !e["collapse"].is_null()).unwrap();
    let last = found.last().unwrap();
    assert!(warned["epoch"].as_u64() <= Some(3), "{warned}");
    assert!(last["epoch"].as_u64() <= Some(5), "{last}");
    let levels = last["collapse"].as_array().unwrap();
    let reason = levels.iter().find(|f| f["level"] == "stop").unwrap()["text"].as_str().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains(&format!("stopped: the pictures have collapsed: {reason}")), "{said}");
    // The best adapter is that of an evaluation within its bounds, with the highest reward.
    let sound = found.iter().filter(|e| e["out_of_bounds"].is_null());
    let score = |e: &&Value| e["reward_mean"].as_f64().unwrap();
    let best = sound.max_by(|a, b| score(a).total_cmp(&score(b))).unwrap();
    let line = format!("best: adapter-best.safetensors, after epoch {}", best["epoch"]);
    assert!(said.contains(&line), "{line} is not in {said}");
    let read = |file: &Path| std::fs::read(file).unwrap();
    let kept = read(&out.join("adapter-best.safetensors"));
    assert_ne!(kept, read(&out.join("adapter.safetensors")));
    let epoch = best["epoch"].as_u64().unwrap();
    let checkpoint = out.join(format!("checkpoints/epoch-{epoch:05}/adapter.safetensors"));
    if checkpoint.exists() {
        assert_eq!(kept, read(&checkpoint));
    }
    // It stays stopped, until it is told to go on.
    let again = program(&["train", "--resume", path]);
    assert_eq!(again.status.code(), Some(0), "{}", error_of(&again));
    assert!(
        String::from_utf8_lossy(&again.stdout)
            .contains(&format!("stopped: the pictures have collapsed: {reason}"))
    );
    assert_eq!(evaluations(&out).last().unwrap()["epoch"], last["epoch"]);
    let more = (last["epoch"].as_u64().unwrap() + 1).to_string();
    let on =
        program(&["train", "--resume", path, "--stop-on-collapse", "false", "--epochs", &more]);
    assert_eq!(on.status.code(), Some(0), "{}", error_of(&on));
    assert_eq!(evaluations(&out).last().unwrap()["epoch"].to_string(), more);
}

/// What an evaluation measures, on held-out prompts, and which adapter is the best by them.
#[test]
fn evaluations_measure_held_out_prompts() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let prompts = dir.path().join("held-out.txt");
    let lines: Vec<String> =
        ["cat", "owl", "ant", "dove", "boar"].map(|n| format!("{n} on a red background")).into();
    std::fs::write(&prompts, lines.join("\n")).unwrap();
    let args = [
        "--device",
        "cpu",
        "--epochs",
        "3",
        "--eval-every",
        "2",
        "--eval-images",
        "2",
        "--eval-prompts",
        prompts.to_str().unwrap(),
        "--features",
        "clip:models/emoji-clip",
        "--watch",
        "symmetry",
        "--learning-rate",
        "0.05",
    ];
    let lines = run(&out, &[&SMALL[..], &args[..]].concat());
    let found: Vec<&Value> = of(&lines, "evaluation").collect();
    let epochs: Vec<u64> = found.iter().map(|e| e["epoch"].as_u64().unwrap()).collect();
    assert_eq!(epochs, [0, 1, 2, 3]);
    for (epoch, e) in found.iter().enumerate() {
        // A row between two evaluations is scored, not measured.
        let whole = epoch != 1;
        assert_eq!(e["pictures"].as_u64(), whole.then_some(10), "{e}");
        let fields = ["pvs", "saturated", "laplacian_variance", "pairwise_cosine_distance"];
        for field in fields.into_iter().chain(["vendi", "frechet", "kid", "cmmd", "kl", "jpeg_kb"])
        {
            assert_eq!(e[field].is_f64(), whole, "epoch {epoch}: {field} {}", e[field]);
        }
        if whole {
            let by_prompt = e["rewards_by_prompt"]["symmetry"].as_array().unwrap();
            assert_eq!(by_prompt.len(), 5);
            let mean = by_prompt.iter().map(|v| v.as_f64().unwrap()).sum::<f64>() / 5.0;
            assert!((mean - e["rewards"]["symmetry"].as_f64().unwrap()).abs() < 1e-12);
        }
    }
    assert_eq!((found[0]["kl"].as_f64(), found[0]["cmmd"].as_f64()), (Some(0.0), Some(0.0)));
    assert!(found[2]["kl"].as_f64().unwrap() > 0.0 && found[2]["cmmd"].as_f64().unwrap() > 0.0);
    // Calls of the network: 8 images of 6 steps, and 3 of them trained.
    for epoch in of(&lines, "epoch") {
        assert_eq!(
            (epoch["rollout_calls"].as_u64(), epoch["update_calls"].as_u64()),
            (Some(48), Some(24))
        );
    }
    // The run goes on with the same numbers as one that was never stopped.
    let whole = dir.path().join("whole");
    let args = [&args[..3], &["4"], &args[4..]].concat();
    run(&whole, &[&SMALL[..], &args[..]].concat());
    let resumed = program(&["train", "--resume", out.to_str().unwrap(), "--epochs", "4"]);
    assert!(resumed.status.success(), "{}", error_of(&resumed));
    let last = |out: &Path| evaluations(out).last().unwrap().clone();
    assert_eq!(last(&out), last(&whole));
}

/// A signal that is off, or whose bounds are wide, says nothing.
#[test]
fn bounds_and_budgets_are_the_users() {
    let dir = tempfile::tempdir().unwrap();
    let args = |name: &str| {
        let out = dir.path().join(name).to_str().unwrap().to_string();
        let rest = ["--device", "cpu", "--epochs", "2", "--learning-rate", "0.05", "--out"];
        let all: Vec<String> = rest.iter().map(|a| a.to_string()).chain([out]).collect();
        all
    };
    let told = |name: &str, more: &[&str]| {
        let own = args(name);
        let own: Vec<&str> = own.iter().map(String::as_str).collect();
        let output = program(&[&["train"], &SMALL[..], &own, more].concat());
        assert!(output.status.success(), "{}", error_of(&output));
        let error = error_of(&output);
        error.lines().filter(|l| l.starts_with("warning: collapse: kl ")).count()
    };
    assert_eq!(told("budget", &["--kl-budget", "1e-12"]), 1);
    assert_eq!(told("off", &["--kl-budget", "1e-12", "--collapse-bound", "kl=off"]), 0);
    for (more, part) in [
        (["--collapse-bound", "colour=1,2"], "--collapse-bound colour=1,2: give SIGNAL=WARN,STOP"),
        (["--kl-budget", "nan"], "--kl-budget NaN: must be a finite number"),
        (["--eval-images", "0"], "--eval-images 0: must be at least 1"),
        (["--features", "x"], "--features x: unknown; give clip:PATH"),
        (["--eval-prompts", "none.txt"], "--eval-prompts: none.txt"),
    ] {
        let output = program(&[&["plan"], &more[..]].concat());
        assert_eq!(output.status.code(), Some(2), "{more:?}");
        assert!(error_of(&output).contains(part), "{more:?}: {}", error_of(&output));
    }
}
