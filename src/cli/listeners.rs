//! Who listens to a run that the command line starts: the console, its page, and TensorBoard.

use std::path::Path;
use std::sync::Mutex;

use anyhow::Result;

use crate::cli::console::Console;
use crate::tools::report::Report;
use crate::tools::tensorboard::TensorBoard;
use crate::train::metrics::Record;
use crate::train::{Event, Observer};

pub struct Listeners {
    console: Console,
    files: Mutex<Files>,
}

/// What is written beside the run's own files.
struct Files {
    report: Report,
    tensorboard: Option<TensorBoard>,
    /// Whether it was said that they cannot be written: a run does not end for them.
    told: bool,
}

impl Listeners {
    pub fn new(tensorboard: bool) -> Self {
        let tensorboard = tensorboard.then(TensorBoard::default);
        let files = Files { report: Report::default(), tensorboard, told: false };
        Self { console: Console::new(), files: Mutex::new(files) }
    }
}

impl Files {
    fn write(&mut self, folder: &Path, records: &[Record]) -> Result<()> {
        if let Some(tensorboard) = &mut self.tensorboard {
            tensorboard.write(folder, records)?;
        }
        self.report.write(folder)
    }
}

impl Observer for Listeners {
    fn on(&self, event: Event) {
        self.console.on(event);
        let Event::Written { folder, records } = event else { return };
        let mut files = self.files.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match files.write(folder, records) {
            Err(error) if !files.told => {
                self.console.on(Event::Warning(&format!("{error:#}; the run goes on without")));
                files.told = true;
            }
            Ok(()) | Err(_) => {}
        }
    }
}
