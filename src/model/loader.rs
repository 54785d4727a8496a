//! From a component's weights to tensors on a device, in the type that they are stored in.

use anyhow::{Result, ensure};
use burn::tensor::quantization::{QuantScheme, QuantValue, ScaleDtype};
use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::io::weights::Weights;

/// The type that frozen weights are stored in; computation is f32. 8 and 4 bits hold the linear
/// layers' matrices, with one scale for each block of [`QUANTISED_BLOCK`] values; what they leave
/// out is stored as f16.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Storage {
    F32,
    F16,
    Q8,
    Q4,
}

/// Weights that share a scale where they are quantised.
pub const QUANTISED_BLOCK: usize = 32;

impl Storage {
    /// The type of weights that are not quantised.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 | Self::Q8 | Self::Q4 => DType::F16,
        }
    }

    /// How models store their weights whose outputs have to tell pictures apart that differ
    /// little: as f32, or f16 where the run stores smaller ones.
    pub fn of_scores(self) -> Self {
        match self {
            Self::F32 => Self::F32,
            Self::F16 | Self::Q8 | Self::Q4 => Self::F16,
        }
    }

    /// Symmetric quantisation with f32 scales, for linear layers.
    pub fn scheme(self) -> Option<QuantScheme> {
        let value = match self {
            Self::F32 | Self::F16 => return None,
            Self::Q8 => QuantValue::Q8S,
            Self::Q4 => QuantValue::Q4S,
        };
        Some(
            QuantScheme::default()
                .with_value(value)
                .per_block([QUANTISED_BLOCK as u8], ScaleDtype::F32),
        )
    }
}

/// A place in a component's weights: the prefix of the names, where tensors go, and how they are
/// stored.
#[derive(Clone)]
pub struct Loader<'a> {
    pub weights: &'a Weights,
    pub device: &'a Device,
    pub storage: Storage,
    prefix: String,
}

impl<'a> Loader<'a> {
    pub fn new(weights: &'a Weights, device: &'a Device, storage: Storage) -> Self {
        Self { weights, device, storage, prefix: String::new() }
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
    /// When it is missing, of another type or shape, or holds a value that is not finite.
    pub fn tensor<const D: usize>(&self, part: &str, shape: [usize; D]) -> Result<Tensor<D>> {
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
        let values = self.weights.f32(&name)?.values;
        Ok(Tensor::from_data(TensorData::new(values, shape), self.device))
    }

    /// A large weight, stored in the type of choice.
    pub fn stored<const D: usize>(&self, part: &str, shape: [usize; D]) -> Result<Tensor<D>> {
        let tensor = self.tensor(part, shape)?;
        let dtype = self.storage.dtype();
        Ok(if dtype == DType::F32 { tensor } else { tensor.cast(dtype) })
    }
}
