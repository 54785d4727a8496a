//! What the phases of an epoch need of memory.

use crate::device::system::{peak, reset_peak};
use crate::sampling::fleet::Fleet;

/// What a phase needed, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PhaseMemory {
    /// The process's largest resident size, where the system keeps it.
    pub process: Option<u64>,
    /// The largest of its GPUs' pools.
    pub pool: Option<u64>,
}

impl PhaseMemory {
    /// A phase begins.
    pub fn begin() {
        reset_peak();
    }

    /// A phase is over: what it needed. What the pools keep for nobody goes back.
    pub fn end(fleet: &Fleet) -> Self {
        Self { process: peak(), pool: fleet.empty_pools() }
    }
}

/// What an epoch's phases needed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PeakMemory {
    /// Sampling.
    pub rollout: PhaseMemory,
    /// Decoding latents.
    pub decode: PhaseMemory,
    /// Updates.
    pub update: PhaseMemory,
}
