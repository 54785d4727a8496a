//! Where a run computes: adapters, buffers and launches, tensors between device and host, the
//! machine.

pub mod adapters;
pub mod chosen;
pub mod compute;
pub mod gpu;
pub mod guard;
pub mod in_order;
mod runtime;
pub mod system;
pub mod tensor;

pub use self::adapters::{open, open_with};
pub use self::compute::{Compute, ComputeType, rows_at_a_time};
pub use self::guard::guard;
