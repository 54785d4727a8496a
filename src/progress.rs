//! Progress bars with an ETA on a terminal; nothing elsewhere, where the epoch's plain line says it all.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// A bar over `total` units of a phase; hidden where standard error is not a terminal.
pub fn bar(phase: &str, total: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:<8} {wide_bar} {pos}/{len} eta {eta}").expect("a valid template");
    ProgressBar::new(total as u64).with_style(style).with_message(phase.to_string())
}

static STOP: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C and SIGTERM ask the run to stop instead of killing it.
pub fn catch_signals() {
    // A second run in one process (tests) keeps the first handler.
    let _ = ctrlc::set_handler(|| STOP.store(true, Ordering::Relaxed));
}

/// # Errors
/// When the user asked to stop.
pub fn check_stop() -> Result<()> {
    if STOP.load(Ordering::Relaxed) {
        bail!("stopped by a signal");
    }
    Ok(())
}
