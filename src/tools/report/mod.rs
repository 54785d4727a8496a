//! `report.html`: the page of a training run in one file, from what its folder holds. It needs no
//! network, and scripts only for the slider over the picture grids.

mod bars;
pub(super) mod format;
mod heatmap;
mod history;
mod page;
mod pictures;
pub(super) mod plot;
pub(super) mod rewards;
mod sections;
mod settings;
mod state;
pub(super) mod svg;
mod table;
mod view;

use std::path::Path;

use anyhow::{Result, ensure};

use self::pictures::PictureCache;
use crate::io;
use crate::train::metrics::Record;
use crate::train::run_folder::{ABOUT, METRICS, SETTINGS, read_record};

pub use self::page::{SCRIPT, STYLE, body, document, page};
pub use self::view::{Picture, RunView};

/// The page's name in a run's folder.
pub const REPORT: &str = "report.html";

impl RunView {
    /// Reads a run's folder, which may still be written to: a last line of metrics.jsonl that is
    /// not whole is left out, and so is every file that does not exist yet.
    ///
    /// # Errors
    /// Names the file that cannot be read.
    pub fn read(dir: &Path) -> Result<Self> {
        Report::new().view(dir)
    }
}

/// Writes a run's page again and again; what pictures cost is paid once for each.
#[derive(Default)]
pub struct Report {
    pictures: PictureCache,
}

impl Report {
    /// One that has read nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// What [`RunView::read`] reads.
    ///
    /// # Errors
    /// Names the file that cannot be read.
    pub fn view(&mut self, dir: &Path) -> Result<RunView> {
        ensure!(dir.is_dir(), "{}: is not the folder of a run", dir.display());
        let metrics = dir.join(METRICS);
        let settings = dir.join(SETTINGS);
        let about = dir.join(ABOUT);
        Ok(RunView {
            title: name(dir),
            records: if metrics.exists() { records(&metrics)? } else { Vec::new() },
            settings: if settings.exists() { io::read_text(&settings)? } else { String::new() },
            about: if about.exists() { Some(io::read_json(&about)?) } else { None },
            pictures: self.pictures.read(dir)?,
        })
    }

    /// Writes the page of a run into its folder.
    ///
    /// # Errors
    /// Names the file that cannot be read or written.
    pub fn write(&mut self, dir: &Path) -> Result<()> {
        let view = self.view(dir)?;
        io::write(&dir.join(REPORT), page(&view).as_bytes())
    }
}

/// The folder's own name, of `.` as well.
fn name(dir: &Path) -> String {
    let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    let last = whole.file_name().map(|n| n.to_string_lossy().into_owned());
    last.unwrap_or_else(|| whole.display().to_string())
}

/// The records of a metrics.jsonl; a last line that is not whole is left out.
///
/// # Errors
/// Names the line that is damaged.
pub fn records(path: &Path) -> Result<Vec<Record>> {
    let text = io::read_text(path)?;
    let mut records = Vec::new();
    for (i, line) in text.split_inclusive('\n').enumerate() {
        match read_record(path, i + 1, line) {
            Ok(record) => records.push(record),
            Err(_) if !line.ends_with('\n') || line.trim().is_empty() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(records)
}
