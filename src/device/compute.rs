//! An opened device, for Burn and for our own shaders.

use anyhow::{Result, anyhow};
use burn::tensor::Device;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::{gpu, system};

/// What convolutions, linear layers and attention take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeType {
    #[default]
    F32,
    /// f16, added up in f32; everything else stays f32. On GPUs.
    F16,
}

/// An opened device: Burn computes the networks on `burn`; the hot path's shaders run on `gpu`,
/// which is the same device and queue, or on the CPU references where there is none.
#[derive(Clone)]
pub struct Compute {
    /// Burn's handle, without autodiff.
    pub burn: Device,
    /// What our kernels are on Burn's wgpu device; `None` on the CPU backend.
    pub gpu: Option<gpu::Gpu>,
    /// One line for people: name, backend and driver.
    pub name: String,
    /// Whether a GPU is software that runs on the CPU.
    pub software: bool,
    /// Bytes of memory that it offers: what is free for the CPU and software Vulkan, a GPU's own
    /// where it says so.
    pub memory: Option<u64>,
}

impl Compute {
    /// The CPU backend, on all cores.
    pub fn cpu() -> Self {
        Self {
            burn: Device::flex(),
            gpu: None,
            name: format!("CPU ({} threads)", system::cores()),
            software: false,
            memory: Some(system::available()),
        }
    }

    /// Batches that run side by side: one a core on the CPU.
    pub fn threads(&self) -> usize {
        if self.gpu.is_some() { 1 } else { system::cores() }
    }

    /// Bytes that a GPU's pool holds, weights among them; gives back what nothing uses.
    pub fn empty_pool(&self) -> Option<u64> {
        self.gpu.as_ref()?;
        let held = self.burn.memory_pool_usage()?.bytes_reserved;
        self.burn.memory_cleanup();
        Some(held)
    }

    /// Waits for everything that was submitted.
    ///
    /// # Errors
    /// When an earlier operation failed or the device was lost.
    pub fn sync(&self) -> Result<()> {
        self.burn.sync().map_err(|e| anyhow!("the device {} failed: {e}", self.name))
    }
}

/// How many rows go at a time where `total` are to be worked on by so many threads: `most`, or a
/// thread's share of them.
pub fn rows_at_a_time(threads: usize, total: usize, most: usize) -> usize {
    most.min(total.div_ceil(threads)).max(1)
}
