//! Which device an estimate is for.

use crate::device::Compute;

/// A device as an estimate sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    pub gpu: bool,
    /// A GPU path that computes on the CPU.
    pub software: bool,
    /// Whether text encoders and reward models run on it: on the first of several.
    pub first: bool,
    /// Batches that run at once: one a core on the CPU.
    pub threads: usize,
    /// What the batches are made for: those that the first device runs at once.
    pub layout: usize,
    /// Bytes that it offers, where it says so.
    pub offered: Option<u64>,
}

impl Target {
    /// The devices of a process; those that compute on the CPU share its memory. A limit in GiB
    /// takes the place of what each says.
    pub fn of_all(computes: &[Compute], layout: usize, gib: Option<f64>) -> Vec<Self> {
        let limit = gib.map(|g| (g * f64::from(1 << 30)) as u64);
        let on_host = |c: &Compute| c.gpu.is_none() || c.software;
        let sharing = computes.iter().filter(|c| on_host(c)).count().max(1) as u64;
        let target = |(i, c): (usize, &Compute)| Self {
            gpu: c.gpu.is_some(),
            software: c.software,
            first: i == 0,
            threads: c.threads(),
            layout,
            offered: limit.or(c.memory.map(|m| if on_host(c) { m / sharing } else { m })),
        };
        computes.iter().enumerate().map(target).collect()
    }
}
