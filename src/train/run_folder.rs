//! A run's folder: settings, metrics, picture grids, adapter. It is empty, but for its lock, until
//! there is something to continue from; then every epoch leaves a folder that is whole.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use image::RgbImage;

use super::metrics::{EpochRecord, Record};
use crate::io;

/// The folder of a run and what has not been written yet.
pub struct RunFolder {
    pub dir: PathBuf,
    records: Vec<Record>,
    /// Nothing has been written yet.
    fresh: bool,
    /// The folders that were made for the run, innermost first.
    made: Vec<PathBuf>,
    pending: Vec<(PathBuf, Vec<u8>)>,
    /// Locked as long as the run writes here; nothing in the processes that do not write.
    lock: Option<std::fs::File>,
}

/// The file that marks a folder as being written to.
pub const LOCK: &str = ".lock";
/// The file of a run's records.
pub const METRICS: &str = "metrics.jsonl";
/// The file of all that a run was told.
pub const SETTINGS: &str = "settings.toml";
/// The file of what computes a run.
pub const ABOUT: &str = "about.json";

/// Locks a folder for one run.
fn lock(dir: &Path, flag: &str) -> Result<std::fs::File> {
    let path = dir.join(LOCK);
    let file = std::fs::File::create(&path)
        .with_context(|| format!("{flag} {}: cannot be written", dir.display()))?;
    // A page that looks whether a run is alive holds the lock for a moment. Some network
    // filesystems have no locks: a run goes on without.
    let busy = || matches!(file.try_lock(), Err(std::fs::TryLockError::WouldBlock));
    let another = (0..5).all(|tried| {
        std::thread::sleep(std::time::Duration::from_millis(20 * tried));
        busy()
    });
    ensure!(
        !another,
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
        // What is left of one that was killed before it had written a file.
        let mine = |e: std::io::Result<std::fs::DirEntry>| {
            e.is_ok_and(|e| {
                let name = e.file_name();
                name == LOCK || name.to_str().is_some_and(|name| name.starts_with(io::PARTIAL))
            })
        };
        let empty = || !dir.exists() || std::fs::read_dir(dir).is_ok_and(|mut d| d.all(mine));
        let occupied = || {
            format!(
                "--out {}: is not an empty folder; choose another, or continue it with --resume",
                dir.display()
            )
        };
        ensure!(empty(), occupied());
        let missing = dir.ancestors().take_while(|d| !d.as_os_str().is_empty() && !d.exists());
        let made = missing.map(Path::to_path_buf).collect();
        std::fs::create_dir_all(dir)
            .with_context(|| format!("--out {}: cannot be made", dir.display()))?;
        let lock = lock(dir, "--out")?;
        // A run that has just ended may have filled it meanwhile.
        ensure!(empty(), occupied());
        io::sweep(dir);
        Ok(Self {
            lock: Some(lock),
            dir: dir.to_path_buf(),
            records: Vec::new(),
            fresh: true,
            made,
            pending: Vec::new(),
        })
    }

    /// A run's folder to continue, with its records.
    ///
    /// # Errors
    /// When another run writes there, or the metrics cannot be read.
    pub fn resume(dir: &Path) -> Result<Self> {
        let lock = lock(dir, "--resume")?;
        for written_to in [dir.to_path_buf(), dir.join(GRIDS), dir.join(SAMPLED)] {
            io::sweep(&written_to);
        }
        let mut folder = Self::read(dir)?;
        folder.lock = Some(lock);
        Ok(folder)
    }

    /// A new run's folder in a process of several that does not write.
    pub fn elsewhere(dir: &Path) -> Self {
        Self {
            lock: None,
            dir: dir.to_path_buf(),
            records: Vec::new(),
            fresh: false,
            made: Vec::new(),
            pending: Vec::new(),
        }
    }

    /// A run's folder to continue in a process that does not write.
    ///
    /// # Errors
    /// When the metrics cannot be read.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(METRICS);
        let record = |(i, line): (usize, &str)| read_record(&path, i + 1, line);
        // One that was cut short in its first saving may have none.
        let text = if path.exists() { io::read_text(&path)? } else { String::new() };
        let mut folder = Self::elsewhere(dir);
        folder.records = text.lines().enumerate().map(record).collect::<Result<_>>()?;
        Ok(folder)
    }

    /// Whether this process writes here.
    pub fn writes(&self) -> bool {
        self.lock.is_some()
    }

    /// Adds a record.
    pub fn record(&mut self, record: Record) {
        self.records.push(record);
    }

    /// Puts an epoch's record in the place of the one that stands there.
    pub fn amend(&mut self, epoch: &EpochRecord) {
        let of_epoch =
            |r: &&mut Record| matches!(r, Record::Epoch(there) if there.epoch == epoch.epoch);
        if let Some(record) = self.records.iter_mut().rfind(of_epoch) {
            *record = Record::Epoch(epoch.clone());
        }
    }

    /// All records so far.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The mean reward of an epoch's evaluation.
    ///
    /// # Errors
    /// When there was none.
    pub fn reward_of(&self, epoch: usize) -> Result<f64> {
        let of_epoch = |record: &Record| match record {
            Record::Evaluation(e) if e.epoch == epoch => Some(e.reward_mean),
            Record::Evaluation(_) | Record::Update(_) | Record::Epoch(_) | Record::Suspended(_) => {
                None
            }
        };
        let found = self.records.iter().rev().find_map(of_epoch);
        found.with_context(|| format!("{METRICS}: there is no evaluation of epoch {epoch}"))
    }

    /// Drops what was recorded after a checkpoint, and gives it back.
    pub fn keep_records(&mut self, count: usize) -> Vec<Record> {
        self.records.split_off(count.min(self.records.len()))
    }

    /// Drops what would have been written next.
    pub fn drop_pending(&mut self, of: impl Fn(&Path) -> bool) {
        self.pending.retain(|(path, _)| !of(path));
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
        self.file(name, io::png(image)?);
        Ok(())
    }

    /// Writes everything that is pending, then `last`, which makes it count. A folder that fails at
    /// its first writing is emptied again; what is pending stays so until it is written.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn flush(&mut self, last: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        if !self.writes() {
            self.pending.clear();
            return Ok(());
        }
        let written = self.write(last);
        if written.is_ok() {
            self.fresh = false;
            self.pending.clear();
        } else if self.fresh {
            let entries = std::fs::read_dir(&self.dir).into_iter().flatten().flatten();
            entries.filter(|e| e.file_name() != LOCK).for_each(|e| {
                let _ =
                    std::fs::remove_dir_all(e.path()).or_else(|_| std::fs::remove_file(e.path()));
            });
        }
        written
    }

    fn write(&self, last: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        for (path, bytes) in &self.pending {
            io::write(path, bytes)?;
        }
        let mut lines = String::new();
        for record in &self.records {
            lines += &serde_json::to_string(record).context("metrics")?;
            lines.push('\n');
        }
        io::write(&self.dir.join(METRICS), lines.as_bytes())?;
        last(&self.dir)
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if !self.writes() {
            return;
        }
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

/// A line of a run's records.
///
/// # Errors
/// Names the file and the line that is none.
pub fn read_record(path: &Path, number: usize, line: &str) -> Result<Record> {
    serde_json::from_str(line).with_context(|| {
        format!("{}: line {number} is not a record of this version", path.display())
    })
}

/// The folder of the pictures that were asked for, and what their names begin with.
pub const SAMPLED: &str = "samples";
pub const SAMPLE: &str = "update-";

/// The file of pictures that were asked for after so many updates.
pub fn sample_name(updates: usize) -> String {
    format!("{SAMPLED}/{SAMPLE}{updates:06}.png")
}

/// The folder of a run's grids.
pub const GRIDS: &str = "grids";
/// What stands before the number in the name of a grid's file.
pub const GRID: &str = "epoch-";

/// A grid's file in a run's folder.
pub fn grid_name(epoch: usize) -> String {
    format!("{GRIDS}/{GRID}{epoch:05}.png")
}

/// The epoch that a grid's file is of.
pub fn grid_epoch(path: &Path) -> Option<usize> {
    path.file_stem()?.to_str()?.strip_prefix(GRID)?.parse().ok()
}

/// A grid of a run's folder.
///
/// # Errors
/// When there is none, or it is damaged.
pub fn open_grid(dir: &Path, epoch: usize) -> Result<RgbImage> {
    let path = dir.join(grid_name(epoch));
    let image =
        image::open(&path).with_context(|| format!("{}: cannot be read", path.display()))?;
    Ok(image.to_rgb8())
}
