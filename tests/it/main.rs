//! All integration tests in one binary: Burn is linked once.

mod model;
mod support;
