//! `compare`: matched runs, kept records, one that fails beside others.

use std::path::Path;

use crate::command_line::program;
use crate::support::error_of;

const SMALL: [&str; 18] = [
    "--model",
    "emoji-flow",
    "--device",
    "cpu",
    "--steps",
    "4",
    "--images-per-epoch",
    "4",
    "--group-size",
    "2",
    "--train-steps",
    "2",
    "--epochs",
    "2",
    "--eval-prompt",
    "owl on a white background",
    "--eval-images",
    "2",
];

fn compare(out: &Path, args: &[&str]) -> std::process::Output {
    program(&[&["compare", "--out", out.to_str().unwrap()], &SMALL[..], args].concat())
}

fn record(out: &Path, name: &str) -> serde_json::Value {
    let text = std::fs::read_to_string(out.join("records").join(name)).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn methods_are_tuned_and_compared_on_the_same_pictures() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("all");
    let own = dir.path().join("wide.toml");
    std::fs::write(&own, "preset = \"pcpo\"\nclip-range = 0.01\n").unwrap();
    let methods = format!("grpo,branch,nft,{}", own.display());
    let args =
        ["--methods", &methods, "--seeds", "2", "--tune", "learning-rate=1e-3,8e-3", "--seed", "7"];
    let output = compare(&out, &args);
    assert!(output.status.success(), "{}", error_of(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let table = std::fs::read_to_string(out.join("report.md")).unwrap();
    assert!(text.contains(table.trim()), "the table is printed");
    for method in ["grpo", "branch", "nft", "wide"] {
        assert!(table.lines().any(|l| l.starts_with(&format!("| {method} | learning-rate"))));
        let trial = record(&out, &format!("{method}/learning-rate=8e-3/seed-1007.json"));
        assert_eq!(
            (&trial["seed"], &trial["tuned"]["learning-rate"]),
            (&1007.into(), &"8e-3".into())
        );
        for seed in [7, 8] {
            let chosen = |method: &str| {
                let line = table.lines().find(|l| l.starts_with(&format!("| {method} | learn")));
                let rate = line.unwrap().split(" | ").nth(1).unwrap().replace(' ', "=");
                record(&out, &format!("{method}/{rate}/seed-{seed}.json"))
            };
            let run = chosen(method);
            assert_eq!(run["epochs"].as_array().unwrap().len(), 2, "{method}");
            assert!(run["epochs"][0]["calls"].as_u64().unwrap() > 0);
            assert_eq!(run["evaluations"].as_array().unwrap().len(), 3);
            // The same pictures before anything is learnt.
            let other = chosen("grpo");
            assert_eq!(
                run["evaluations"][0]["reward_mean"],
                other["evaluations"][0]["reward_mean"]
            );
        }
    }
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.matches("<svg").count() >= 6 && page.contains("wide") && !page.contains("NaN"));

    // What is there is not done again, with its runs gone too; more seeds are.
    std::fs::remove_dir_all(out.join("runs")).unwrap();
    let more = ["--methods", "grpo", "--seeds", "3", "--tune", "learning-rate=1e-3,8e-3"];
    let output = compare(&out, &[&more[..], &["--seed", "7"]].concat());
    assert!(output.status.success(), "{}", error_of(&output));
    let choice = std::fs::read_dir(out.join("runs/grpo")).unwrap().next().unwrap().unwrap();
    let done = std::fs::read_dir(choice.path()).unwrap().map(|run| run.unwrap().file_name());
    assert!(done.eq(["seed-9"]), "the third seed alone");
    // A record of other settings is not taken for this one.
    let output = compare(&out, &[&args[..], &["--rank", "2"]].concat());
    let error = error_of(&output);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("other settings") && error.contains(".json"), "{error}");
}

/// One run's failure costs neither the others nor the table; a later call tries it again.
#[test]
fn a_run_that_fails_does_not_lose_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("all");
    let bad = dir.path().join("bad.toml");
    std::fs::write(&bad, "preset = \"pcpo\"\ndevice = \"no such device\"\n").unwrap();
    let methods = format!("{},grpo", bad.display());
    let output = compare(&out, &["--methods", &methods, "--seeds", "1"]);
    let error = error_of(&output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("bad/seed-0") && error.contains("tries again"), "{error}");
    assert!(out.join("records/grpo/seed-0.json").is_file());
    assert!(!out.join("records/bad/seed-0.json").exists());
    assert!(std::fs::read_to_string(out.join("report.md")).unwrap().contains("| grpo |"));
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("all");
    let refused = |args: &[&str], words: &[&str]| {
        let output = compare(&out, args);
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
        assert!(words.iter().all(|word| error.contains(word)), "{args:?}: {error}");
        assert!(!out.exists(), "{args:?}");
    };
    refused(&["--methods", "sgd"], &["--methods sgd", "pcpo", "TOML"]);
    refused(&["--methods", "missing.toml"], &["--methods missing.toml"]);
    refused(&["--methods", "pcpo,pcpo"], &["twice"]);
    let own = dir.path().join("own.toml");
    let method = |text: &str| {
        std::fs::write(&own, text).unwrap();
        format!("pcpo,{}", own.display())
    };
    refused(&["--methods", &method("seed = 3\n")], &["own.toml", "seed", "leave it out"]);
    refused(&["--methods", &method("reward = \"symmetry\"\n")], &["pcpo, own", "other rewards"]);
    refused(&["--methods", "pcpo", "--seeds", "0"], &["--seeds 0"]);
    refused(&["--methods", "pcpo", "--tune-seeds", "0"], &["--tune-seeds 0"]);
    refused(&["--methods", "pcpo", "--target", "nan"], &["--target NaN"]);
    refused(&["--methods", "pcpo", "--tune", "learning-rate"], &["learning-rate", "KEY=VALUE"]);
    refused(&["--methods", "pcpo", "--tune", "speed=1,2"], &["--tune speed=1", "not a setting"]);
    refused(&["--methods", "pcpo", "--tune", "learning-rate=1,x"], &["learning-rate=x"]);
    refused(&["--methods", "pcpo", "--tune", "learning-rate=-1"], &["--learning-rate -1"]);
    refused(&["--methods", "pcpo", "--tune", "learning-rate=1,1.0"], &["1.0 stands there twice"]);
    refused(&["--methods", "pcpo", "--tune", "reward=symmetry"], &["--tune reward", "compared by"]);
    refused(&["--methods", "pcpo", "--preset", "grpo"], &["--preset", "leave it out"]);
    refused(&["--methods", "pcpo,,grpo"], &["--methods: an entry", "empty"]);
    refused(&["--methods", "pcpo", "--seed", "9223372036854775000"], &["--seed", "2^63"]);
    // What no run can be is said before the first one, of methods and of what is tuned.
    refused(&["--methods", "pcpo", "--reward", "color:nope"], &["--reward color:nope"]);
    let most = ["--train-steps 4", "lower it"];
    refused(&["--methods", &method("train-steps = 4\n")], &[&["method own"], &most[..]].concat());
    refused(&["--methods", "pcpo", "--tune", "train-steps=2,4"], &most);
    refused(&["--methods", &method("model = \"emoji\"\n")], &["pcpo, own", "other models"]);
}

/// The folder of something else is left as it is.
#[test]
fn a_comparison_has_a_folder_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let page = dir.path().join("report.html");
    std::fs::write(&page, "a run's page").unwrap();
    for (out, words) in [(dir.path(), "no comparison"), (&page, "is no folder")] {
        let output = compare(out, &["--methods", "pcpo"]);
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains("--out") && error.contains(words), "{error}");
    }
    assert_eq!(std::fs::read_to_string(&page).unwrap(), "a run's page");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}
