//! Faults on purpose: what docs/RELIABILITY.md claims. Each runs in a short form; with PCPO_LONG=1
//! (`make reliability`) in the one whose figures stand there.

mod device_lost;
mod disk;
mod folders;
mod kills;
mod long_run;
mod mutate;
mod mutations;
mod not_finite;
mod power_cut;
mod reward_programs;
mod signals;

use std::path::Path;
use std::process::Child;

use pcpo_wgpu::Options;

use crate::command_line::start;
use crate::support::emoji;

/// A job of a second or two.
const TINY: [&str; 22] = [
    "--device",
    "cpu",
    "--reward",
    "color:blue",
    "--prompt",
    "red apple",
    "--steps",
    "3",
    "--train-steps",
    "1",
    "--images-per-epoch",
    "4",
    "--group-size",
    "4",
    "--batch",
    "1",
    "--eval-images",
    "1",
    "--rank",
    "2",
    "--epochs",
    "4",
];

/// The same for the library, of two epochs.
fn tiny() -> Options {
    Options {
        model: Some(emoji()),
        device: Some("cpu".into()),
        reward: Some(vec!["color:blue".into()]),
        prompt: Some(vec!["red apple".into()]),
        epochs: Some(2),
        images_per_epoch: Some(4),
        group_size: Some(4),
        batch: Some(1),
        steps: Some(3),
        train_steps: Some(1),
        eval_images: Some(1),
        rank: Some(2),
        ..Default::default()
    }
}

/// Begins the job in a folder, or goes on with it where there is something to go on with.
fn begin_or_go_on(out: &Path) -> Child {
    let text = out.to_str().unwrap();
    match out.join("settings.toml").exists() {
        true => start(&["train", "--resume", text]),
        false => start(&[&["train", "--out", text][..], &TINY].concat()),
    }
}

/// Whether the figures are made.
fn long() -> bool {
    std::env::var_os("PCPO_LONG").is_some()
}

/// One of two numbers: of the short form and of the long one.
fn cases(short: usize, full: usize) -> usize {
    if long() { full } else { short }
}

/// What a run leaves that depends on nothing but its settings: the adapter, the newest checkpoint,
/// the last pictures.
fn outcome(run: &Path) -> Vec<Vec<u8>> {
    let checkpoints = std::fs::read_dir(run.join("checkpoints")).unwrap();
    let newest = checkpoints.map(|entry| entry.unwrap().path()).max().unwrap();
    let own = ["adapter.safetensors", "before_after.png"].map(|name| run.join(name));
    let checkpoint = ["adapter.safetensors", "optimizer.safetensors", "state.json"]
        .map(|name| newest.join(name));
    let read = |path: &std::path::PathBuf| {
        std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    };
    own.iter().chain(&checkpoint).map(read).collect()
}

/// Numbers that seem to be drawn, the same at every run.
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> u64 {
        // splitmix64 (Steele, Lea, Flood 2014).
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`.
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}
