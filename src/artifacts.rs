//! A run's folder: settings, metrics, picture grids, adapter. It is empty, but for its lock, until there is something to
//! continue from; then every epoch leaves a folder that is whole.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use image::{RgbImage, imageops};

use crate::files;

/// The folder of a run and what has not been written yet.
pub struct RunFolder {
    pub dir: PathBuf,
    metrics: String,
    /// Nothing has been written yet.
    fresh: bool,
    /// The folders that were made for the run, innermost first.
    made: Vec<PathBuf>,
    pending: Vec<(PathBuf, Vec<u8>)>,
    /// Locked as long as the run writes here.
    _lock: std::fs::File,
}

/// The file that marks a folder as being written to.
const LOCK: &str = ".lock";

/// Locks a folder for one run.
fn lock(dir: &Path, flag: &str) -> Result<std::fs::File> {
    let path = dir.join(LOCK);
    let file = std::fs::File::create(&path).with_context(|| format!("{flag} {}: cannot be written", dir.display()))?;
    // Some network filesystems have no locks: a run goes on without.
    ensure!(
        !matches!(file.try_lock(), Err(std::fs::TryLockError::WouldBlock)),
        "{flag} {}: another run writes there; wait for it or choose another",
        dir.display()
    );
    Ok(file)
}

impl RunFolder {
    /// A new run's folder, which must not exist or be empty.
    ///
    /// # Errors
    /// When it holds something or cannot be made.
    pub fn new(dir: &Path) -> Result<Self> {
        let mine = |e: std::io::Result<std::fs::DirEntry>| e.is_ok_and(|e| e.file_name() == LOCK);
        let empty = || !dir.exists() || std::fs::read_dir(dir).is_ok_and(|mut d| d.all(mine));
        let occupied =
            || format!("--out {}: is not an empty folder; choose another, or continue it with --resume", dir.display());
        ensure!(empty(), occupied());
        let missing = dir.ancestors().take_while(|d| !d.as_os_str().is_empty() && !d.exists());
        let made = missing.map(Path::to_path_buf).collect();
        std::fs::create_dir_all(dir).with_context(|| format!("--out {}: cannot be made", dir.display()))?;
        let lock = lock(dir, "--out")?;
        // A run that has just ended may have filled it meanwhile.
        ensure!(empty(), occupied());
        Ok(Self { _lock: lock, dir: dir.to_path_buf(), metrics: String::new(), fresh: true, made, pending: Vec::new() })
    }

    /// A run's folder to continue, with its metrics.
    ///
    /// # Errors
    /// When another run writes there, or the metrics cannot be read.
    pub fn resume(dir: &Path) -> Result<Self> {
        let lock = lock(dir, "--resume")?;
        let metrics = files::read_text(&dir.join("metrics.jsonl"))?;
        Ok(Self { _lock: lock, dir: dir.to_path_buf(), metrics, fresh: false, made: Vec::new(), pending: Vec::new() })
    }

    /// Adds a line to metrics.jsonl.
    pub fn metric(&mut self, line: impl std::fmt::Display) {
        self.metrics += &format!("{line}\n");
    }

    /// Drops what was written after the checkpoint.
    pub fn keep_lines(&mut self, count: usize) {
        self.metrics = self.metrics.lines().take(count).map(|l| format!("{l}\n")).collect();
    }

    pub fn metrics_lines(&self) -> usize {
        self.metrics.lines().count()
    }

    /// Adds a file to what the next [`Self::flush`] writes.
    pub fn file(&mut self, name: impl AsRef<Path>, bytes: Vec<u8>) {
        self.pending.push((self.dir.join(name), bytes));
    }

    /// Adds a picture.
    ///
    /// # Errors
    /// When it cannot be encoded.
    pub fn picture(&mut self, name: impl AsRef<Path>, image: &RgbImage) -> Result<()> {
        self.file(name, files::png(image)?);
        Ok(())
    }

    /// Writes everything that is pending, then `last`, which makes it count. A folder that fails at its first writing is
    /// emptied again; what is pending stays so until it is written.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn flush(&mut self, last: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let write = || {
            for (path, bytes) in &self.pending {
                files::write(path, bytes)?;
            }
            files::write(&self.dir.join("metrics.jsonl"), self.metrics.as_bytes())?;
            last(&self.dir)
        };
        match write() {
            Ok(()) => {
                self.fresh = false;
                self.pending.clear();
                Ok(())
            }
            Err(e) => {
                if self.fresh {
                    let entries = std::fs::read_dir(&self.dir).into_iter().flatten().flatten();
                    entries.filter(|e| e.file_name() != LOCK).for_each(|e| {
                        let _ = std::fs::remove_dir_all(e.path()).or_else(|_| std::fs::remove_file(e.path()));
                    });
                }
                Err(e)
            }
        }
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.dir.join(LOCK));
        if self.fresh {
            // Removes the folders that were made, while they are empty.
            for dir in &self.made {
                let _ = std::fs::remove_dir(dir);
            }
        }
    }
}

/// `runs/NAME-N` with the smallest free N.
pub fn default_folder(name: &str) -> PathBuf {
    let candidate = |n: usize| PathBuf::from("runs").join(format!("{name}-{n:03}"));
    (1..).map(candidate).find(|d| !d.exists()).expect("numbers do not end")
}

/// Pictures side by side in rows of `columns`, 2 pixels apart.
pub fn grid(images: &[RgbImage], columns: usize) -> RgbImage {
    let Some(first) = images.first() else { return RgbImage::new(1, 1) };
    let (w, h) = (first.width() + 2, first.height() + 2);
    let rows = images.len().div_ceil(columns);
    let mut canvas = RgbImage::from_pixel(w * columns as u32 - 2, h * rows as u32 - 2, image::Rgb([255; 3]));
    for (i, image) in images.iter().enumerate() {
        imageops::replace(&mut canvas, image, i64::from(w) * (i % columns) as i64, i64::from(h) * (i / columns) as i64);
    }
    canvas
}

/// Two grids of one size, one below the other: before and after.
pub fn before_after(before: &RgbImage, after: &RgbImage) -> RgbImage {
    let mut canvas = RgbImage::from_pixel(after.width(), before.height() + after.height() + 10, image::Rgb([255; 3]));
    imageops::replace(&mut canvas, before, 0, 0);
    imageops::replace(&mut canvas, after, 0, i64::from(before.height()) + 10);
    canvas
}
