//! Sampling: a policy, the chain of its steps, and the batches of all devices.

pub mod fleet;
pub mod generate;
pub mod kl;
pub mod mpi;
pub mod policy;
pub mod trajectory;
pub mod world;

use crate::device::Compute;
use crate::model::Pipeline;

/// A device with a model on it. Work is dealt out to all replicas of a run.
pub struct Replica {
    pub compute: Compute,
    pub pipeline: Pipeline,
}
