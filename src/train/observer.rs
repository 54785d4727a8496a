//! What a run tells while it goes: the command line prints it and draws bars, a report or a page
//! can listen as well.

use std::path::Path;

use super::metrics::{EpochRecord, Record};

/// Something that happened.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The device was opened; its name in one line.
    Device(&'a str),
    /// A run goes on after an epoch.
    Resuming {
        /// The run's folder.
        folder: &'a Path,
        /// Complete epochs.
        epoch: usize,
    },
    /// What the run is, a line each: model, run, method, memory.
    Ready(&'a [String]),
    /// A phase begins that has so many units, some of which are done.
    PhaseBegins {
        /// `rollout` or `update`.
        phase: &'static str,
        /// Of the whole phase.
        units: usize,
        /// Of them, before this process.
        done: usize,
    },
    /// A unit of the phase is done.
    PhaseAdvances,
    /// The phase has ended.
    PhaseEnds,
    /// The self-test passed: training and sampling agree.
    SelfTest {
        /// What is so, in words.
        of: &'static str,
        /// How far it is off: the largest |log rho|, or difference of a prediction.
        largest: f32,
        /// What it may be at most.
        bound: f64,
    },
    /// Something that the user should know of.
    Warning(&'a str),
    /// What was asked of the run is done.
    Notice(&'a str),
    /// An update was written whole, as `--dump-update` asks.
    Dumped {
        /// Counted from 1 over the run.
        update: usize,
        /// Where it was written to.
        file: &'a Path,
    },
    /// An epoch is complete and saved.
    Epoch {
        /// What it was like.
        record: &'a EpochRecord,
        /// Epochs that the run is to have.
        epochs: usize,
    },
    /// All that the run's folder holds so far is written: settings, metrics, pictures.
    Written {
        /// The run's folder.
        folder: &'a Path,
        /// The records of metrics.jsonl.
        records: &'a [Record],
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
