//! What a run tells while it goes: the command line prints it and draws bars, a report or a page
//! can listen as well.

use std::path::Path;

use super::metrics::EpochRecord;

/// Something that happened.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The device was opened; its name in one line.
    Device(&'a str),
    /// A run goes on after an epoch.
    Resuming {
        folder: &'a Path,
        epoch: usize,
    },
    /// What the run is, a line each: model, run, method, memory.
    Ready(&'a [String]),
    /// A phase begins that has so many units, some of which are done.
    PhaseBegins {
        phase: &'static str,
        units: usize,
        done: usize,
    },
    /// A unit of the phase is done.
    PhaseAdvances,
    PhaseEnds,
    /// The self-test passed: the largest |log rho| before the first update, and its bound.
    SelfTest {
        largest: f32,
        bound: f64,
    },
    /// Something that the user should know of.
    Warning(&'a str),
    /// An update was written whole, as `--dump-update` asks.
    Dumped {
        update: usize,
        file: &'a Path,
    },
    /// An epoch is complete and saved.
    Epoch {
        record: &'a EpochRecord,
        epochs: usize,
    },
}

/// Listens to a run, from several threads.
pub trait Observer: Sync {
    /// Takes an event; a run waits for it.
    fn on(&self, event: Event);
}

/// An observer that does nothing.
pub struct Silent;

impl Observer for Silent {
    fn on(&self, _event: Event) {}
}
