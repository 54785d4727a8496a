//! Panics of a device's operations as errors.

use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::{Result, anyhow};

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
        Err(anyhow!(
            "an operation of the device failed: {}; if it ran out of memory, use a smaller --batch \
             or --resolution",
            said.unwrap_or("it gave no reason").trim()
        ))
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
}
