//! From a component's weights to tensors on a device, in the type that they are stored in.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

use anyhow::{Result, ensure};
use burn::tensor::{Device, Tensor, TensorData};

use crate::io::weights::Weights;
use crate::kernels::frozen_weight::{FrozenWeight, PreparedWeight, by_input};

pub use crate::kernels::frozen_weight::Storage;

/// Where the blocks of a network are read from when their turn comes.
#[derive(Clone)]
pub enum Stream {
    /// From the host's memory, where their matrices lie as they go to devices.
    FromHost(Arc<PreparedWeights>),
    /// From their file.
    FromDisk,
}

impl Stream {
    /// What is kept of the matrices that were read.
    pub fn prepared(&self) -> Option<Arc<PreparedWeights>> {
        match self {
            Self::FromHost(prepared) => Some(prepared.clone()),
            Self::FromDisk => None,
        }
    }
}

/// Matrices as they go to a device, by their names, each made once for all devices.
#[derive(Default)]
pub struct PreparedWeights(Mutex<HashMap<String, Arc<PreparedWeight>>>);

impl PreparedWeights {
    /// The one of a name, made where it is missing.
    fn get(
        &self,
        name: &str,
        make: impl FnOnce() -> Result<Arc<PreparedWeight>>,
    ) -> Result<Arc<PreparedWeight>> {
        let all = || self.0.lock().expect("no thread panics with it");
        let found = all().get(name).cloned();
        if let Some(found) = found {
            return Ok(found);
        }
        let made = make()?;
        all().insert(name.into(), made.clone());
        Ok(made)
    }
}

/// A place in a component's weights: the prefix of the names, where tensors go, and how they are
/// stored.
#[derive(Clone)]
pub struct Loader<'a> {
    pub weights: &'a Weights,
    pub device: &'a Device,
    pub storage: Storage,
    /// Whether products take f32 on devices that compute in f16 too.
    pub exact: bool,
    /// Whether blocks are read when their turn comes, and where from.
    pub stream: Option<Stream>,
    /// What is kept of the matrices that were read.
    pub prepared: Option<Arc<PreparedWeights>>,
    prefix: String,
}

impl<'a> Loader<'a> {
    pub fn new(weights: &'a Weights, device: &'a Device, storage: Storage) -> Self {
        let (stream, prepared, prefix) = (None, None, String::new());
        Self { weights, device, storage, exact: false, stream, prepared, prefix }
    }

    /// The same, computed in f32 on every device where `exact` says so.
    pub fn exactly(self, exact: bool) -> Self {
        Self { exact, ..self }
    }

    /// The same, computed in f32 on every device: for layers that the residual stream itself passes
    /// through, whose rounding reaches the end whole (docs/MEASURED.md).
    pub fn in_f32(&self) -> Self {
        self.clone().exactly(true)
    }

    /// The same, whose blocks are streamed where `stream` says so.
    pub fn streaming(self, stream: Option<Stream>) -> Self {
        Self { stream, ..self }
    }

    /// The same, one level deeper.
    pub fn at(&self, part: impl std::fmt::Display) -> Self {
        Self { prefix: self.name(part), ..self.clone() }
    }

    /// The full name of a tensor or module below this place.
    pub fn name(&self, part: impl std::fmt::Display) -> String {
        if self.prefix.is_empty() { part.to_string() } else { format!("{}.{part}", self.prefix) }
    }

    /// Whether the weights have a tensor of that name here.
    pub fn has(&self, part: &str) -> bool {
        self.weights.has(&self.name(part))
    }

    /// One tensor of a known shape, in f32.
    ///
    /// # Errors
    /// As [`Self::values`].
    pub fn tensor<const D: usize>(&self, part: &str, shape: [usize; D]) -> Result<Tensor<D>> {
        let values = self.values(part, shape)?;
        Ok(Tensor::from_data(TensorData::new(values, shape), self.device))
    }

    /// A frozen matrix on the device, from tensor `part` of the shape that PyTorch has it in,
    /// outputs first: row `r` is its column `order(r)`.
    ///
    /// # Errors
    /// As [`Self::values`].
    pub fn frozen<const D: usize>(
        &self,
        part: &str,
        shape: [usize; D],
        storage: Storage,
        order: impl Fn(usize) -> usize + Sync,
    ) -> Result<FrozenWeight> {
        let outputs = shape[0];
        let matrix = [shape[1..].iter().product(), outputs];
        let make = || {
            let name = self.fitting(part, shape)?;
            if let Some(columns) = self.weights.columns(&name) {
                let damaged = AtomicBool::new(false);
                let read = |first: usize, rows: &mut [f32]| {
                    if !columns.read(|r| order(first + r), rows) {
                        damaged.store(true, Relaxed);
                    }
                };
                let made = PreparedWeight::of(matrix, storage, read);
                if !damaged.into_inner() {
                    return Ok(Arc::new(made));
                }
            }
            // As it cannot be read in place; or the error that says what is damaged.
            let values = by_input(&self.values(part, shape)?, outputs, &order);
            Ok(Arc::new(PreparedWeight::new(&values, matrix, storage)))
        };
        let prepared = match &self.prepared {
            Some(kept) => kept.get(&self.name(part), make)?,
            None => make()?,
        };
        let mut weight = prepared.on(self.device);
        weight.exact = self.exact;
        Ok(weight)
    }

    /// The values of one tensor of a known shape, on the host.
    ///
    /// # Errors
    /// When it is missing, of another type or shape, or holds a value that is not finite.
    pub fn values<const D: usize>(&self, part: &str, shape: [usize; D]) -> Result<Vec<f32>> {
        Ok(self.weights.f32(&self.fitting(part, shape)?)?.values)
    }

    /// The full name of a tensor that has a known shape, or is missing.
    fn fitting<const D: usize>(&self, part: &str, shape: [usize; D]) -> Result<String> {
        let name = self.name(part);
        // Linear layers that older versions stored as 1x1 convolutions, and the reverse, hold the
        // same numbers.
        let trim = |s: &[usize]| s[..s.iter().rposition(|&n| n != 1).map_or(0, |i| i + 1)].to_vec();
        if let Some(found) = self.weights.shape(&name) {
            ensure!(
                trim(found) == trim(&shape),
                "{}: tensor {name} has shape {found:?}, the configuration asks for {shape:?}",
                self.weights.source().display()
            );
        }
        Ok(name)
    }
}
