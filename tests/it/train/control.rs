//! Wishes that reach a run as files in its folder.

use super::{SMALL, metrics, of, wait_for};
use crate::command_line::start;
use crate::support::error_of;

#[test]
fn a_run_hears_the_files_in_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let path = out.to_str().unwrap();
    let long = ["--device", "cpu", "--epochs", "1000", "--out", path];
    let mut running = start(&[&["train"], &SMALL[..], &long[..]].concat());
    wait_for(&out.join("checkpoints/epoch-00001"), &mut running);
    let ask = |wish: &str| {
        std::fs::create_dir_all(out.join("control")).unwrap();
        std::fs::write(out.join("control").join(wish), b"").unwrap();
    };
    ask("sample");
    wait_for(&out.join("samples"), &mut running);
    ask("save");
    while out.join("control/save").exists() || out.join("control/sample").exists() {
        assert!(running.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    ask("stop");
    let output = running.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", error_of(&output));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("sampled: ") && said.contains("saved: "), "{said}");
    assert!(!out.join("control/stop").exists());
    let picture = std::fs::read_dir(out.join("samples")).unwrap().next().unwrap().unwrap().path();
    assert!(image::open(picture).unwrap().width() > 100);
    // What was saved on the way did not disturb the log, and the run goes on from where it is.
    let lines = metrics(&out);
    let epochs: Vec<u64> = of(&lines, "epoch").map(|e| e["epoch"].as_u64().unwrap()).collect();
    assert_eq!(epochs, (1..=epochs.len() as u64).collect::<Vec<_>>());
    // A wish that nobody heard is not one for the next process.
    ask("stop");
    let more = (epochs.len() + 2).to_string();
    let again = start(&["train", "--resume", path, "--epochs", &more]).wait_with_output().unwrap();
    assert!(again.status.success(), "{}", error_of(&again));
    assert_eq!(of(&metrics(&out), "epoch").count().to_string(), more);
}
