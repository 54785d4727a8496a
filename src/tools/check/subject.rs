//! What a comparison is made with: a file of references, a device, and how errors are measured.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use burn::tensor::Tensor;

use crate::device::Compute;
use crate::device::tensor::read;
use crate::io::tensors::HostTensor;
use crate::model::reference::ReferenceTensors;
use crate::model::{ModelSpec, Storage};
use crate::tools::errors::relative_error;

/// One line of the answer.
pub struct Comparison {
    pub name: &'static str,
    /// Largest absolute error over the reference's standard deviation; infinite where a value is
    /// not finite.
    pub error: f64,
}

/// What is compared with what.
pub struct Asked {
    /// A model, or the folder of one of its parts.
    pub model: ModelSpec,
    pub reference: PathBuf,
    /// The adapter that the prediction is computed with.
    pub lora: Option<PathBuf>,
    pub storage: Storage,
    /// Whether the network's blocks are read when their turn comes.
    pub stream: bool,
}

/// What a model's files are compared with.
pub(super) struct Subject<'a> {
    pub asked: &'a Asked,
    pub compute: &'a Compute,
    pub reference: ReferenceTensors,
}

impl Subject<'_> {
    pub(super) fn compare(
        &self,
        name: &'static str,
        reference: &str,
        found: HostTensor,
    ) -> Result<Comparison> {
        let expected = self.reference.file.raw(reference)?;
        ensure!(
            expected.shape == found.shape,
            "{}: {reference} has shape {:?}, the model gives {:?}",
            self.reference.path().display(),
            expected.shape,
            found.shape
        );
        Ok(Comparison { name, error: relative_error(&found.values, &expected.values) })
    }

    pub(super) fn compare_tensor<const D: usize>(
        &self,
        name: &'static str,
        reference: &str,
        found: &Tensor<D>,
    ) -> Result<Comparison> {
        self.compare(name, reference, HostTensor::new(name, found.dims(), read(found)?))
    }

    /// Token numbers of the file, `[B, T]`.
    pub(super) fn token_numbers(&self, name: &str) -> Result<Vec<Vec<u32>>> {
        let ids = self.reference.file.raw(name)?;
        let shape = &ids.shape;
        ensure!(
            shape.len() == 2 && shape.iter().all(|&n| n > 0),
            "{}: {name} has shape {shape:?}, expected [B, T]",
            self.reference.path().display()
        );
        let row = |row: &[f32]| row.iter().map(|&i| i as u32).collect();
        Ok(ids.values.chunks(shape[1]).map(row).collect())
    }
}
