//! The runs of a folder as files: which there are, how far each is, whether it is alive, and what
//! is asked of it. Whatever a symbolic link leads to outside of the folder does not exist here.

use std::fs::{File, Metadata, TryLockError};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::io;
use crate::train::run_folder::{GRIDS, LOCK, METRICS, SAMPLED, SETTINGS};
use crate::train::wishes::{CONTROL, Wish};

/// A folder of runs, or of one.
pub struct Runs {
    dir: PathBuf,
    /// `dir` without symbolic links.
    root: PathBuf,
}

/// A run. All its paths are inside the folder of runs.
#[derive(Debug)]
pub struct Run {
    /// The name of its folder.
    pub name: String,
    pub dir: PathBuf,
    /// Nothing is written outside of it.
    root: PathBuf,
}

/// How far a run is.
#[derive(Debug, Default, PartialEq)]
pub struct Progress {
    /// Complete epochs.
    pub epochs: usize,
    /// The mean reward of the last evaluation, where there is none of the last rollout.
    pub reward: Option<f64>,
}

impl Runs {
    /// # Errors
    /// When there is no such folder.
    pub fn open(dir: PathBuf) -> Result<Self> {
        let way_out = || {
            format!(
                "DIR {}: is no folder that can be read; name the folder that your runs are in, or \
                 begin one with `pcpo-wgpu train`",
                dir.display()
            )
        };
        let root = dir.canonicalize().with_context(way_out)?;
        std::fs::read_dir(&root).with_context(way_out)?;
        Ok(Self { dir, root })
    }

    /// All runs, sorted by name: the folder itself if it is one, or those that are in it.
    ///
    /// # Errors
    /// When the folder cannot be read any more.
    pub fn list(&self) -> Result<Vec<Run>> {
        let run = |name: Option<String>, dir: PathBuf| {
            let root = dir.canonicalize().ok().filter(|dir| self.has_run(dir))?;
            Some(Run { name: name?, dir, root })
        };
        let name = self.root.file_name().map(|name| name.to_string_lossy().into_owned());
        if let Some(run) = run(Some(name.unwrap_or("run".into())), self.dir.clone()) {
            return Ok(vec![run]);
        }
        let entries = std::fs::read_dir(&self.dir);
        let entries = entries.with_context(|| format!("{}: cannot be read", self.dir.display()))?;
        // A name that is not text has no address.
        let found =
            entries.flatten().filter_map(|e| run(e.file_name().into_string().ok(), e.path()));
        let mut found: Vec<Run> = found.collect();
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// The run of a name that the list has.
    ///
    /// # Errors
    /// When the folder cannot be read any more.
    pub fn find(&self, name: &str) -> Result<Option<Run>> {
        Ok(self.list()?.into_iter().find(|run| run.name == name))
    }

    /// Whether a folder holds a run, with all that is read of it inside.
    fn has_run(&self, dir: &Path) -> bool {
        let inside = |name: &str| {
            dir.join(name).canonicalize().is_ok_and(|path| path.starts_with(&self.root))
        };
        let file = |name: &str| dir.join(name).is_file() && inside(name);
        let pictures = [GRIDS, SAMPLED].iter().all(|d| !dir.join(d).exists() || inside(d));
        dir.starts_with(&self.root) && file(METRICS) && file(SETTINGS) && pictures
    }
}

impl Run {
    /// Whether a process runs it now.
    pub fn alive(&self) -> bool {
        let path = self.dir.join(LOCK);
        // A link may lead anywhere, and a pipe would be waited for without end.
        let plain = path.symlink_metadata().is_ok_and(|file| file.is_file());
        let Some(file) = plain.then(|| File::open(&path).ok()).flatten() else { return false };
        // A shared lock, given back at once: two who look at the same time do not see each other.
        match file.try_lock_shared() {
            Ok(()) => false,
            Err(TryLockError::WouldBlock) => true,
            // A filesystem without locks. The run removes its file when it ends.
            Err(TryLockError::Error(_)) => true,
        }
    }

    /// A text that changes whenever the metrics, the pictures or the run's life do.
    pub fn version(&self) -> String {
        let mut hasher = DefaultHasher::new();
        self.hash_state(&mut hasher);
        format!("{:016x}", hasher.finish())
    }

    fn hash_state(&self, hasher: &mut DefaultHasher) {
        let state = |file: Metadata| (file.len(), file.modified().ok());
        self.alive().hash(hasher);
        std::fs::metadata(self.dir.join(METRICS)).ok().map(state).hash(hasher);
        let entries =
            [GRIDS, SAMPLED].map(|d| std::fs::read_dir(self.dir.join(d)).into_iter().flatten());
        let mut pictures: Vec<_> = entries
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| (e.file_name(), e.metadata().ok().map(state)))
            .collect();
        pictures.sort();
        pictures.hash(hasher);
    }

    /// How far the run is, from the end of its metrics.
    ///
    /// # Errors
    /// When they cannot be read. A line that is not whole yet is passed over.
    pub fn progress(&self) -> Result<Progress> {
        /// What is read of a record.
        #[derive(Deserialize)]
        struct Line {
            kind: String,
            epoch: usize,
            reward_mean: Option<f64>,
        }
        let text = io::read_text(&self.dir.join(METRICS))?;
        // Updates are most of the lines and the longest.
        let lines = text.lines().rev().filter(|line| !line.starts_with(r#"{"kind":"update""#));
        let (mut epoch, mut evaluation) = (None, None);
        for line in lines.filter_map(|line| serde_json::from_str::<Line>(line).ok()) {
            match line.kind.as_str() {
                "epoch" if epoch.is_none() => epoch = Some(line),
                "evaluation" if evaluation.is_none() => evaluation = Some(line),
                _ => {}
            }
            if epoch.is_some() && evaluation.is_some() {
                break;
            }
        }
        let epochs = [&epoch, &evaluation].into_iter().flatten().map(|line| line.epoch).max();
        Ok(Progress {
            epochs: epochs.unwrap_or(0),
            reward: evaluation.or(epoch).and_then(|line| line.reward_mean),
        })
    }

    /// Leaves a wish where the run takes it.
    ///
    /// # Errors
    /// When the file cannot be written, or would be written outside of the run's folder.
    pub fn ask(&self, wish: Wish) -> Result<()> {
        let dir = self.dir.join(CONTROL);
        let failed = || format!("{}: cannot be written", dir.display());
        std::fs::create_dir_all(&dir).with_context(failed)?;
        let inside = dir.canonicalize().with_context(failed)?.starts_with(&self.root);
        ensure!(inside, "{}: leads out of the run's folder; remove it", dir.display());
        wish.ask(&self.dir)
    }
}

/// A text that changes whenever one of the runs does, or comes or goes.
pub fn version(runs: &[Run]) -> String {
    let mut hasher = DefaultHasher::new();
    for run in runs {
        run.name.hash(&mut hasher);
        run.hash_state(&mut hasher);
    }
    format!("{:016x}", hasher.finish())
}
