//! Event files, read back by TensorBoard itself.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use crate::command_line::program;
use crate::support::error_of;

/// The Python that `make test` puts TensorBoard into, or another.
fn python() -> Option<PathBuf> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let own = root.join("target/python/bin/python");
    let named = std::env::var_os("PCPO_PYTHON").map(PathBuf::from);
    let found = named.or_else(|| own.exists().then_some(own))?;
    let has = Command::new(&found).args(["-c", "import tensorboard, PIL"]).output();
    has.is_ok_and(|output| output.status.success()).then_some(found)
}

/// The numbers of a record, by the names that TensorBoard has for them.
fn numbers(value: &Value, name: &str, into: &mut BTreeMap<String, f64>) {
    if let Value::Object(fields) = value {
        for (field, value) in fields {
            numbers(value, &format!("{name}/{field}"), into);
        }
    }
    let number = value.as_f64().or(value.as_bool().map(|b| f64::from(u8::from(b))));
    into.extend(number.filter(|v| (*v as f32).is_finite()).map(|v| (name.to_string(), v)));
}

#[test]
fn tensorboard_reads_what_the_log_says() {
    let Some(python) = python() else {
        println!("skipped: tensorboard_reads_what_the_log_says: no Python with tensorboard");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let path = out.to_str().unwrap();
    let job = ["--device", "cpu", "--steps", "3", "--train-steps", "2", "--group-size", "8"];
    let begun = [&["train", "--out", path, "--epochs", "1", "--tensorboard"], &job[..]].concat();
    let first = program(&begun);
    assert!(first.status.success(), "{}", error_of(&first));
    // A run that goes on writes its records anew, each once.
    let more = program(&["train", "--resume", path, "--epochs", "2"]);
    assert!(more.status.success(), "{}", error_of(&more));
    let read = Command::new(python)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/read_events.py"))
        .arg(out.join("tensorboard"))
        .output()
        .unwrap();
    assert!(read.status.success(), "{}", error_of(&read));
    let read: Value = serde_json::from_slice(&read.stdout).unwrap();
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let mut expected: BTreeMap<String, Vec<(u64, f64)>> = BTreeMap::new();
    for line in text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()) {
        let kind = line["kind"].as_str().unwrap();
        let step = if kind == "update" { &line["update"] } else { &line["epoch"] };
        let mut found = BTreeMap::new();
        numbers(&line, kind, &mut found);
        found.retain(|name, _| name.ends_with("_seconds") || !is_counter(name));
        for (name, value) in found {
            expected.entry(name).or_default().push((step.as_u64().unwrap(), value));
        }
    }
    assert!(expected.len() > 30, "{:?}", expected.keys());
    let scalars = read["scalars"].as_object().unwrap();
    assert_eq!(scalars.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, points) in &expected {
        let found: Vec<(u64, f64)> = scalars[name]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| (p[0].as_u64().unwrap(), p[1].as_f64().unwrap()))
            .collect();
        let rounded: Vec<(u64, f64)> =
            points.iter().map(|(step, v)| (*step, f64::from(*v as f32))).collect();
        assert_eq!(found, rounded, "{name}");
    }
    let grids: Vec<u64> = read["images"]["grid"]
        .as_array()
        .unwrap()
        .iter()
        .map(|picture| picture[0].as_u64().unwrap())
        .collect();
    assert_eq!(grids, [0, 1, 2]);
}

/// What says which record it is.
fn is_counter(name: &str) -> bool {
    ["update/epoch", "update/update", "epoch/epoch", "evaluation/epoch"].contains(&name)
}
