//! From a component's weights to tensors on a device, in the type that they are stored in.

use anyhow::{Result, ensure};
use burn::tensor::{Device, Tensor, TensorData};

use crate::io::weights::Weights;

pub use crate::kernels::frozen_weight::Storage;

/// A place in a component's weights: the prefix of the names, where tensors go, and how they are
/// stored.
#[derive(Clone)]
pub struct Loader<'a> {
    pub weights: &'a Weights,
    pub device: &'a Device,
    pub storage: Storage,
    /// Whether products take f32 on devices that compute in f16 too.
    pub exact: bool,
    prefix: String,
}

impl<'a> Loader<'a> {
    pub fn new(weights: &'a Weights, device: &'a Device, storage: Storage) -> Self {
        Self { weights, device, storage, exact: false, prefix: String::new() }
    }

    /// The same, computed in f32 on every device where `exact` says so.
    pub fn exactly(self, exact: bool) -> Self {
        Self { exact, ..self }
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

    /// The values of one tensor of a known shape, on the host.
    ///
    /// # Errors
    /// When it is missing, of another type or shape, or holds a value that is not finite.
    pub fn values<const D: usize>(&self, part: &str, shape: [usize; D]) -> Result<Vec<f32>> {
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
        Ok(self.weights.f32(&name)?.values)
    }
}
