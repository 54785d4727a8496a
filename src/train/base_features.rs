//! The features of a run's first evaluation, in its folder: a run that goes on compares with them.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::io::tensors::{HostTensor, write_tensors};
use crate::io::weights::Weights;

const BASE: &str = "base-features.safetensors";

/// Writes the base's features once.
pub(super) fn save_base(dir: &Path, features: Option<&[Vec<f32>]>) -> Result<()> {
    let path = dir.join(BASE);
    let Some(rows) = features.filter(|_| !path.exists()) else { return Ok(()) };
    let width = rows.first().map_or(0, Vec::len);
    write_tensors(&path, &[HostTensor::new("features", [rows.len(), width], rows.concat())], &[])
}

/// Reads the base's features, where the run has any.
///
/// # Errors
/// When the file is damaged.
pub(super) fn load_base(dir: &Path) -> Result<Option<Vec<Vec<f32>>>> {
    let path = dir.join(BASE);
    if !path.exists() {
        return Ok(None);
    }
    let t = Weights::open_file(&path)?.f32("features").context("the base's features")?;
    let matrix = t.shape.len() == 2 && t.shape[1] > 0;
    ensure!(matrix, "{}: features has shape {:?}, expected [N, D]", path.display(), t.shape);
    Ok(Some(t.values.chunks(t.shape[1]).map(<[f32]>::to_vec).collect()))
}
