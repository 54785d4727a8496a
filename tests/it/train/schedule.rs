//! What goes on over a run's updates besides the adapter: learning rate, running mean, checkpoints.

use std::path::Path;

use pcpo_wgpu::io::weights::Weights;

use super::{SMALL, of, run};
use crate::command_line::program;
use crate::support::error_of;

/// All values of an adapter's file, by name.
fn values(file: &Path) -> Vec<(String, Vec<f32>)> {
    let file = Weights::open_file(file).unwrap();
    let mut names: Vec<String> = file.names().map(str::to_string).collect();
    names.sort_unstable();
    let of = |name: String| {
        let values = file.f32(&name).unwrap().values;
        (name, values)
    };
    names.into_iter().map(of).collect()
}

#[test]
fn the_running_mean_follows_the_adapter_and_resumes_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (first, whole, parts) =
        (dir.path().join("first"), dir.path().join("whole"), dir.path().join("parts"));
    let fixed = [&["--device", "cpu", "--learning-rate", "0.1"], &SMALL[..]].concat();
    run(&first, &[&fixed[..], &["--epochs", "1"]].concat());
    let start = first.join("adapter.safetensors");
    let ema = ["--ema", "0.5", "--ema-every", "2", "--lora", start.to_str().unwrap()];
    let ema = [&fixed[..], &ema].concat();
    run(&whole, &[&ema[..], &["--epochs", "1"]].concat());
    // Of two updates the second is taken in, of which 9 / 11 are: n is 1.
    let [start, end, mean] =
        [&start, &whole.join("adapter.safetensors"), &whole.join("adapter-ema.safetensors")]
            .map(|file| values(file));
    let mut moved = 0;
    for ((start, end), mean) in start.iter().zip(&end).zip(&mean) {
        assert_eq!((&start.0, &start.0), (&end.0, &mean.0));
        for ((start, end), mean) in start.1.iter().zip(&end.1).zip(&mean.1) {
            let expected = (2.0 * f64::from(*start) + 9.0 * f64::from(*end)) / 11.0;
            assert!((f64::from(*mean) - expected).abs() < 1e-6, "{mean} is not {expected}");
            moved += usize::from((start - end).abs() > 1e-3);
        }
    }
    assert!(moved > 1000, "{moved} values have moved");
    // Two epochs in one go, and in two.
    let two = dir.path().join("two");
    run(&two, &[&ema[..], &["--epochs", "2"]].concat());
    run(&parts, &[&ema[..], &["--epochs", "1"]].concat());
    let output = program(&["train", "--resume", parts.to_str().unwrap(), "--epochs", "2"]);
    assert!(output.status.success(), "{}", error_of(&output));
    for file in ["adapter.safetensors", "adapter-ema.safetensors", "before_after.png"] {
        let bytes = |run: &Path| std::fs::read(run.join(file)).unwrap();
        assert!(bytes(&two) == bytes(&parts), "{file}");
    }
    // The pictures are the mean's: the same adapter without one has others.
    let plain = dir.path().join("plain");
    run(&plain, &[&fixed[..], &["--epochs", "1", ema[ema.len() - 2], ema[ema.len() - 1]]].concat());
    let bytes = |run: &Path, file: &str| std::fs::read(run.join(file)).unwrap();
    assert!(bytes(&plain, "adapter.safetensors") == bytes(&whole, "adapter.safetensors"));
    assert!(bytes(&plain, "before_after.png") != bytes(&whole, "before_after.png"));
    assert!(!plain.join("adapter-ema.safetensors").exists());
}

#[test]
fn the_learning_rate_rises_and_falls_and_checkpoints_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let schedule = ["--lr-scheduler", "cosine", "--lr-warmup-steps", "2", "--learning-rate", "0.1"];
    let keep = ["--keep-last", "3", "--keep-every", "100", "--epochs", "5"];
    let lines = run(&out, &[&["--device", "cpu"], &SMALL[..], &schedule, &keep].concat());
    let rates: Vec<f64> =
        of(&lines, "update").map(|u| u["learning_rate"].as_f64().unwrap()).collect();
    let cosine = |done: f64| 0.05 * (1.0 + (std::f64::consts::PI * done / 8.0).cos());
    let expected: Vec<f64> =
        [0.05, 0.1].into_iter().chain((0..8).map(|i| cosine(f64::from(i)))).collect();
    assert_eq!(rates.len(), 10);
    for (found, expected) in rates.iter().zip(&expected) {
        assert!((found - expected).abs() < 1e-12, "{rates:?} are not {expected:?}");
    }
    let kept = |epoch: usize| out.join(format!("checkpoints/epoch-{epoch:05}")).is_dir();
    assert_eq!([1, 2, 3, 4, 5].map(kept), [false, false, true, true, true]);
    // A cosine that ends elsewhere is another run.
    let output = program(&["train", "--resume", out.to_str().unwrap(), "--epochs", "6"]);
    let error = error_of(&output);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("--epochs 6") && error.contains("cosine"), "{error}");
}
