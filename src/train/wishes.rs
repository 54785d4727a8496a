//! Wishes that reach a run as files in its folder, `control/stop`, `control/sample` and
//! `control/save`: a page in a browser writes them, or `touch` does. The run takes a file away when
//! it hears it: a wish to stop between two steps of the sampler or two updates, the others between
//! two updates.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::io;
use crate::stop;

/// The folder of wishes in a run's.
pub const CONTROL: &str = "control";

/// What can be asked of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// To stop and save, as by Ctrl-C.
    Stop,
    /// To draw the pictures of an evaluation by the adapter as it is.
    Sample,
    /// To save the updates since the last complete epoch, and go on.
    Save,
}

/// All wishes.
pub const WISHES: [Wish; 3] = [Wish::Stop, Wish::Sample, Wish::Save];

impl Wish {
    /// Its file's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Sample => "sample",
            Self::Save => "save",
        }
    }

    /// Its button's text.
    pub fn title(self) -> &'static str {
        match self {
            Self::Stop => "Stop",
            Self::Sample => "Sample now",
            Self::Save => "Save now",
        }
    }

    fn file(self, run: &Path) -> PathBuf {
        run.join(CONTROL).join(self.name())
    }

    /// Asks the run in a folder.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn ask(self, run: &Path) -> Result<()> {
        io::write(&self.file(run), b"")
    }

    /// Whether it was asked for; it is not any more then.
    pub(super) fn take(self, run: &Path) -> bool {
        std::fs::remove_file(self.file(run)).is_ok()
    }
}

/// Drops what was asked of a run that had ended already.
pub(super) fn forget(run: &Path) {
    for wish in WISHES {
        wish.take(run);
    }
}

/// Between two steps of the sampler: whether the run is to stop.
///
/// # Errors
/// When it was asked to.
pub(super) fn check(run: &Path) -> Result<()> {
    if Wish::Stop.take(run) {
        stop::request();
    }
    stop::check()
}
