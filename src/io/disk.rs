//! What is done to the disk, one step after the other, each of which a power cut may be the end of.
//! The test of power cuts records the steps of a run, and resumes from what each of them leaves.

use std::fs::File;
use std::io::Result;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// One step.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// A folder is made.
    MakeDir(PathBuf),
    /// A file is there with this content.
    Write(PathBuf, Vec<u8>),
    /// A file's content is on the disk.
    SyncFile(PathBuf),
    Rename(PathBuf, PathBuf),
    /// What a folder's entries are called is on the disk.
    SyncDir(PathBuf),
    /// A file, or a folder with all that is in it, is removed.
    Remove(PathBuf),
}

static RECORDING: AtomicBool = AtomicBool::new(false);
static STEPS: Mutex<Vec<Step>> = Mutex::new(Vec::new());

/// Begins a record of all steps of this process.
pub fn record() {
    RECORDING.store(true, Ordering::SeqCst);
}

/// Ends the record.
pub fn recorded() -> Vec<Step> {
    RECORDING.store(false, Ordering::SeqCst);
    std::mem::take(&mut *steps())
}

fn steps() -> std::sync::MutexGuard<'static, Vec<Step>> {
    STEPS.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn note(step: impl FnOnce() -> Step) {
    if RECORDING.load(Ordering::Relaxed) {
        let step = step();
        steps().push(step);
    }
}

/// Makes a folder and those above it.
///
/// # Errors
/// The system's.
pub fn make_dir(dir: &Path) -> Result<()> {
    let exists = |d: &&Path| d.as_os_str().is_empty() || d.is_dir();
    let missing: Vec<&Path> = dir.ancestors().take_while(|d| !exists(d)).collect();
    std::fs::create_dir_all(dir)?;
    for made in missing.into_iter().rev() {
        note(|| Step::MakeDir(made.into()));
        sync_dir(parent(made))?;
    }
    Ok(())
}

/// Notes that a folder of another's making is there.
pub(super) fn made_dir(dir: &Path) {
    note(|| Step::MakeDir(dir.into()));
}

/// Brings the content of a file that is written to the disk.
///
/// # Errors
/// The system's.
pub(super) fn sync_file(path: &Path, file: &File) -> Result<()> {
    note(|| Step::Write(path.into(), std::fs::read(path).unwrap_or_default()));
    file.sync_all()?;
    note(|| Step::SyncFile(path.into()));
    Ok(())
}

/// Notes a renaming that was done, and brings the names of both folders to the disk.
///
/// # Errors
/// The system's.
pub(super) fn renamed(from: &Path, to: &Path) -> Result<()> {
    note(|| Step::Rename(from.into(), to.into()));
    sync_dir(parent(to))?;
    if parent(from) != parent(to) {
        sync_dir(parent(from))?;
    }
    Ok(())
}

/// Gives a file or folder another name; the name is on the disk then.
///
/// # Errors
/// The system's.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to)?;
    renamed(from, to)
}

/// Removes a file.
///
/// # Errors
/// The system's.
pub fn remove_file(path: &Path) -> Result<()> {
    std::fs::remove_file(path)?;
    note(|| Step::Remove(path.into()));
    Ok(())
}

/// Removes a folder and all that is in it.
///
/// # Errors
/// The system's.
pub fn remove_dir(dir: &Path) -> Result<()> {
    std::fs::remove_dir_all(dir)?;
    note(|| Step::Remove(dir.into()));
    Ok(())
}

/// The folder that something lies in.
pub(super) fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Brings the names in a folder to the disk. Windows has no such call, and does it by itself.
fn sync_dir(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        match File::open(dir)?.sync_all() {
            // Some network filesystems do not know it.
            Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => {}
            other => other?,
        }
    }
    note(|| Step::SyncDir(dir.into()));
    Ok(())
}
