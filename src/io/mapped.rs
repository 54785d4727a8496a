//! Files mapped into memory.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use memmap2::Mmap;

/// A file's bytes, read when they are looked at.
///
/// # Errors
/// When it is missing, no regular file, or cannot be read.
pub fn map(path: &Path) -> Result<Mmap> {
    // Opening a pipe would wait for its other end.
    ensure!(!path.exists() || path.is_file(), "{}: is not a regular file", path.display());
    let opened = std::fs::File::open(path);
    let file = opened.with_context(|| format!("{}: cannot be opened", path.display()))?;
    // SAFETY: the map is read-only; like every program that maps weights we rely on nobody
    // truncating them.
    let map = unsafe { Mmap::map(&file) };
    map.with_context(|| format!("{}: cannot be read", path.display()))
}
