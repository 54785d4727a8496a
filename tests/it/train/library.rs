//! The crate as a library: rewards and observers of one's own.

use std::sync::atomic::{AtomicUsize, Ordering};

use pcpo_wgpu::{Event, Job, Observer, Options, Prompt, Reward, RgbImage, Settings, Silent, train};

use super::{metrics, of};
use crate::support::emoji;

struct Brightness;

impl Reward for Brightness {
    fn score(&mut self, images: &[RgbImage], _: &[&Prompt]) -> anyhow::Result<Vec<f64>> {
        let mean = |i: &RgbImage| i.iter().map(|&v| f64::from(v)).sum::<f64>() / i.len() as f64;
        Ok(images.iter().map(mean).collect())
    }
}

fn settings(epochs: usize) -> Settings {
    let options = Options {
        model: Some(emoji()),
        device: Some("cpu".into()),
        reward: Some(vec!["color:blue".into()]),
        prompt: Some(vec!["red apple".into(), "cat face".into()]),
        epochs: Some(epochs),
        images_per_epoch: Some(8),
        group_size: Some(4),
        batch: Some(2),
        steps: Some(4),
        train_steps: Some(2),
        rank: Some(2),
        ..Default::default()
    };
    options.resolve().unwrap()
}

#[test]
fn an_own_reward_trains() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let job = Job::new(settings(1), &out).with_reward("brightness", Brightness);
    let done = train(job, &Silent).unwrap();
    assert!(done.before > 10.0 && done.after > 10.0 && done.out == out, "{done:?}");
    let saved = std::fs::read_to_string(out.join("settings.toml")).unwrap();
    assert!(saved.contains("reward = \"brightness\""), "{saved}");
}

/// A reward that gives something else than a number for each picture. Its name is its own, whatever
/// the program calls so.
#[test]
fn a_reward_that_gives_nonsense_is_an_error() {
    struct Nonsense(Vec<f64>);
    impl Reward for Nonsense {
        fn score(&mut self, _: &[RgbImage], _: &[&Prompt]) -> anyhow::Result<Vec<f64>> {
            Ok(self.0.clone())
        }
    }
    let dir = tempfile::tempdir().unwrap();
    for (scores, words) in [(vec![1.0], "1 scores for 8 images"), (vec![f64::NAN; 8], "NaN")] {
        let out = dir.path().join(words);
        let job = Job::new(settings(1), &out).with_reward("clip-score", Nonsense(scores));
        let error = format!("{:#}", train(job, &Silent).unwrap_err());
        assert!(error.contains("clip-score") && error.contains(words), "{error}");
        assert!(!out.exists());
    }
}

/// Burn has operations that panic where a device fails. Whatever panics in the middle of an update,
/// here the observer on one of the threads, what was learnt is saved, and goes on to the bit.
#[test]
fn a_panic_in_an_update_saves_the_epoch() {
    struct Bomb {
        updating: AtomicUsize,
        advanced: AtomicUsize,
    }
    impl Observer for Bomb {
        fn on(&self, event: Event) {
            match event {
                Event::PhaseBegins { phase, .. } => {
                    self.updating.store(usize::from(phase == "update"), Ordering::SeqCst);
                }
                Event::PhaseAdvances if self.updating.load(Ordering::SeqCst) == 1 => {
                    // Two updates of two batches of two steps: in the middle of the second.
                    let done = self.advanced.fetch_add(1, Ordering::SeqCst);
                    assert!(done != 5, "the device was lost");
                }
                _ => {}
            }
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let (broken, whole) = (dir.path().join("broken"), dir.path().join("whole"));
    let bomb = Bomb { updating: AtomicUsize::new(0), advanced: AtomicUsize::new(0) };
    let error = format!("{:#}", train(Job::new(settings(1), &broken), &bomb).unwrap_err());
    assert!(error.contains("the device was lost"), "{error}");
    assert!(error.contains("1 updates of epoch 1 are kept"), "{error}");
    train(Job::resume(&Options::default(), &broken).unwrap(), &Silent).unwrap();
    train(Job::new(settings(1), &whole), &Silent).unwrap();
    let adapter = |run: &std::path::Path| std::fs::read(run.join("adapter.safetensors")).unwrap();
    assert!(adapter(&broken) == adapter(&whole), "the adapters differ");
    let updates = |run: &std::path::Path| of(&metrics(run), "update").cloned().collect::<Vec<_>>();
    assert_eq!(updates(&broken), updates(&whole));
}
