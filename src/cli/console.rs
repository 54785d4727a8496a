//! The console: a run's lines, bars with an ETA on a terminal and now and then a plain line
//! elsewhere, and the signals that ask to stop.

use std::io::IsTerminal;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use crate::stop;
use crate::train::{Event, Observer};

/// Time between two plain lines: short phases have none.
const BETWEEN_LINES: Duration = Duration::from_secs(30);
/// The exit code of a program that a signal stopped.
pub const STOPPED: i32 = 130;

/// Prints what happens.
#[derive(Default)]
pub struct Console {
    phase: Mutex<Option<Phase>>,
}

/// The progress of a phase.
struct Phase {
    name: &'static str,
    bar: ProgressBar,
    /// When the last plain line was printed, where there is no terminal.
    plain: Option<Instant>,
}

impl Console {
    pub fn new() -> Self {
        Self::default()
    }

    fn phase(&self) -> MutexGuard<'_, Option<Phase>> {
        self.phase.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Phase {
    fn new(name: &'static str, units: usize, done: usize) -> Self {
        let template = "{msg:<8} {wide_bar} {pos}/{len} eta {eta}";
        let style = ProgressStyle::with_template(template).expect("a valid template");
        let bar = ProgressBar::new(units as u64).with_style(style).with_message(name);
        bar.set_position(done as u64);
        bar.reset_eta();
        let plain = (!std::io::stderr().is_terminal()).then(Instant::now);
        Self { name, bar, plain }
    }

    fn advance(&mut self) {
        self.bar.inc(1);
        let Some(last) = &mut self.plain else { return };
        if last.elapsed() >= BETWEEN_LINES {
            *last = Instant::now();
            let (done, units) = (self.bar.position(), self.bar.length().unwrap_or(0));
            let left = HumanDuration(self.bar.eta());
            say!("{} {done}/{units}, {left} to go", self.name);
        }
    }
}

impl Drop for Phase {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

impl Observer for Console {
    fn on(&self, event: Event) {
        match event {
            Event::Device(name) => say!("device: {name}"),
            Event::Resuming { folder, epoch } => {
                say!("resuming {} after epoch {epoch}", folder.display());
            }
            Event::Ready(lines) => lines.iter().for_each(|line| say!("{line}")),
            Event::PhaseBegins { phase, units, done } => {
                *self.phase() = Some(Phase::new(phase, units, done));
            }
            Event::PhaseAdvances => {
                if let Some(phase) = &mut *self.phase() {
                    phase.advance();
                }
            }
            Event::PhaseEnds => *self.phase() = None,
            Event::SelfTest { of, largest, bound } => {
                say!("self-test: {of}, to {largest:.1e} (at most {bound:.0e})");
            }
            Event::Warning(text) => complain!("warning: {text}"),
            Event::Notice(text) => say!("{text}"),
            Event::Written { .. } => {}
            Event::Dumped { update, file } => {
                say!("update {update} written to {}", file.display());
            }
            Event::Epoch { record, epochs } => say!("{}", record.text(epochs)),
        }
    }
}

/// Runs work of so many units as a phase; it calls what it is given after each.
pub fn in_phase<R>(
    observer: &dyn Observer,
    phase: &'static str,
    units: usize,
    work: impl FnOnce(&(dyn Fn() -> anyhow::Result<()> + Sync)) -> R,
) -> R {
    observer.on(Event::PhaseBegins { phase, units, done: 0 });
    let done = work(&|| {
        observer.on(Event::PhaseAdvances);
        Ok(())
    });
    observer.on(Event::PhaseEnds);
    done
}

/// Says what a command failed with; the program's exit code.
pub fn failed(error: &anyhow::Error) -> i32 {
    complain!("error: {error:#}");
    exit_code()
}

/// The exit code of what failed, or was stopped.
pub fn exit_code() -> i32 {
    if stop::requested() { STOPPED } else { 2 }
}

/// From now on Ctrl-C and SIGTERM ask the run to stop and save; a second one ends it at once.
pub fn catch_signals() {
    // A second run in one process (tests) keeps the first handler.
    let _ = ctrlc::set_handler(|| {
        if stop::request() {
            std::process::exit(STOPPED);
        }
        complain!(
            "stopping: an update in progress is finished and saved, a rollout is dropped; a second \
             signal ends the run at once"
        );
    });
}
