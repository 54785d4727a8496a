//! Panics of a device's operations as errors.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use anyhow::{Result, anyhow};

/// Where the last panic was, once [`note_panics`] has been called.
static LAST: Mutex<Option<String>> = Mutex::new(None);

/// Keeps panics off the console: [`guard`] says what they said, and where.
pub fn note_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(|at| format!("{}:{}", short(at.file()), at.line()));
        *LAST.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = place;
    }));
}

/// A source file's path from its crate on.
fn short(file: &str) -> &str {
    let of_registry = file.split_once("/registry/src/").and_then(|(_, rest)| rest.split_once('/'));
    of_registry.map_or(file, |(_, path)| path)
}

/// Runs work on a device; a panic in it is an error. Burn has operations that panic where a driver
/// fails, runs out of memory or loses its device: what a run has learnt must outlive that.
///
/// # Errors
/// The work's own, or what it panicked with.
pub fn guard<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    // What the work leaves half done is dropped with it: nothing of it is used after an error.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| {
        let said = payload.downcast_ref::<String>().map(String::as_str);
        let said = said.or_else(|| payload.downcast_ref::<&str>().copied());
        let said = said.unwrap_or("it gave no reason").trim();
        let place = LAST.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        Err(match place {
            Some(place) if place.starts_with("src/") || place.starts_with("src\\") => {
                anyhow!("a fault of this program at {place}: {said}; please report it")
            }
            _ => anyhow!(
                "an operation of the device failed: {said}; if it ran out of memory, use a smaller \
                 --batch or --resolution"
            ),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_with_its_words() {
        let error = guard::<()>(|| panic!("out of {}", "memory")).unwrap_err().to_string();
        assert!(error.contains("out of memory") && error.contains("--batch"), "{error}");
        assert_eq!(guard(|| Ok(1)).unwrap(), 1);
        assert_eq!(guard::<()>(|| Err(anyhow!("x"))).unwrap_err().to_string(), "x");
    }

    #[test]
    fn a_place_begins_with_its_crate() {
        let burn = "/home/x/.cargo/registry/src/index-0123/burn-wgpu-0.22.1/src/lib.rs";
        assert_eq!(short(burn), "burn-wgpu-0.22.1/src/lib.rs");
        assert_eq!(short("src/train/mod.rs"), "src/train/mod.rs");
    }
}
