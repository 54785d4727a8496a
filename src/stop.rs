//! The user's wish to stop, which a signal or another thread makes known and long work looks at.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};

static STOP: AtomicBool = AtomicBool::new(false);

/// Asks everything in this process to stop and save; whether it had been asked before.
pub fn request() -> bool {
    STOP.swap(true, Ordering::Relaxed)
}

/// Whether it was asked to stop.
pub fn requested() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// # Errors
/// When it was asked to stop.
pub fn check() -> Result<()> {
    if requested() {
        bail!("stopped by a signal, or by a file in the folder `control` of its run");
    }
    Ok(())
}
