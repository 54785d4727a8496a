//! Progress: bars with an ETA on a terminal, now and then a plain line elsewhere; and the wish to stop.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

/// Time between two plain lines: short phases have none.
const BETWEEN_LINES: Duration = Duration::from_secs(30);

/// The progress of one phase.
pub struct Bar {
    bar: ProgressBar,
    phase: &'static str,
    /// When the last plain line was printed, where there is no terminal.
    plain: Option<Mutex<Instant>>,
}

/// A phase of `total` units.
pub fn bar(phase: &'static str, total: usize) -> Bar {
    let style = ProgressStyle::with_template("{msg:<8} {wide_bar} {pos}/{len} eta {eta}").expect("a valid template");
    let plain = (!std::io::stderr().is_terminal()).then(|| Mutex::new(Instant::now()));
    Bar { bar: ProgressBar::new(total as u64).with_style(style).with_message(phase), phase, plain }
}

impl Bar {
    pub fn inc(&self, units: u64) {
        self.bar.inc(units);
        let Some(mut last) = self.plain.as_ref().and_then(|m| m.lock().ok()) else { return };
        if last.elapsed() >= BETWEEN_LINES {
            *last = Instant::now();
            let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
            println!("{} {done}/{total}, {} to go", self.phase, HumanDuration(self.bar.eta()));
        }
    }

    /// Units that were done before.
    pub fn set_position(&self, units: u64) {
        self.bar.set_position(units);
        self.bar.reset_eta();
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

static STOP: AtomicBool = AtomicBool::new(false);
/// The exit code of a program that a signal stopped.
pub const STOPPED: i32 = 130;

/// From now on Ctrl-C and SIGTERM ask the run to stop and save; a second one ends it at once.
pub fn catch_signals() {
    // A second run in one process (tests) keeps the first handler.
    let _ = ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(STOPPED);
        }
        eprintln!(
            "stopping: an update in progress is finished and saved, a rollout is dropped; a second signal ends the run at once"
        );
    });
}

/// Whether the user asked to stop.
pub fn stopped() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// # Errors
/// When the user asked to stop.
pub fn check_stop() -> Result<()> {
    if stopped() {
        bail!("stopped by a signal");
    }
    Ok(())
}
