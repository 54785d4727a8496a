//! Weights written again under their names of now, in the type that they are stored in.

use std::io::Error;
use std::path::Path;

use anyhow::{Context, Result, bail};
use half::f16;
use safetensors::Dtype;

use super::tensors::{Described, write_file};
use super::weights::{Entry, Weights, e4m3};

/// Bytes of an element, and what safetensors calls its type; 8 bits are written as 16, which
/// PyTorch computes with.
fn written(name: &str, e: &Entry) -> Result<(usize, &'static str)> {
    Ok(match e.dtype {
        Dtype::F64 => (8, "F64"),
        Dtype::F32 => (4, "F32"),
        Dtype::F16 | Dtype::F8_E4M3 => (2, "F16"),
        Dtype::BF16 => (2, "BF16"),
        other => bail!("tensor {name} has type {other:?}, which is not written"),
    })
}

/// Elements in the order in which they are read.
fn in_order(e: &Entry, stored: &[u8]) -> Vec<u8> {
    let count: usize = e.shape.iter().product();
    let size = stored.len() / count.max(1);
    let mut bytes = match e.transposed {
        false => stored.to_vec(),
        true => {
            let [rows, columns] = [e.shape[0], e.shape[1]];
            let at = |i: usize| &stored[((i % columns) * rows + i / columns) * size..][..size];
            (0..count).flat_map(|i| at(i).iter().copied()).collect()
        }
    };
    if e.swapped {
        let half = bytes.len() / 2;
        bytes.rotate_left(half);
    }
    match e.dtype {
        Dtype::F8_E4M3 => {
            bytes.iter().flat_map(|&b| f16::from_f32(e4m3(b)).to_le_bytes()).collect()
        }
        _ => bytes,
    }
}

impl Weights {
    /// Writes all tensors to a safetensors file, whole or not at all; one is in memory at a time.
    ///
    /// # Errors
    /// As [`super::write()`], and when a tensor is of a type that no weight has.
    pub fn write(&self, path: &Path) -> Result<()> {
        let source = || self.source().display().to_string();
        let mut described = Vec::new();
        for (name, e) in &self.entries {
            let (size, dtype) = written(name, e).with_context(source)?;
            described.push(Described { name, dtype, size, shape: &e.shape });
        }
        write_file(path, &[("format", "pt".into())], &described, |out| {
            self.entries.values().try_for_each(|e| {
                let stored = self.stored(e, &e.range).map_err(Error::other)?;
                out.write_all(&in_order(e, &stored))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All finite numbers of 8 bits are numbers of 16.
    #[test]
    fn eight_bits_are_read_and_written_exactly() {
        assert_eq!(
            [e4m3(0x38), e4m3(0x7e), e4m3(0x01), e4m3(0xb8)],
            [1.0, 448.0, 2f32.powi(-9), -1.0]
        );
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        let bytes: Vec<u8> = (0..=255).filter(|b| b & 0x7f != 0x7f).collect();
        let view = safetensors::tensor::TensorView::new(Dtype::F8_E4M3, vec![2, 127], &bytes);
        let file = safetensors::serialize([("x", view.unwrap())], None).unwrap();
        std::fs::write(&from, file).unwrap();
        let read = Weights::open_file(&from).unwrap();
        read.write(&to).unwrap();
        let (one, other) =
            (read.f32("x").unwrap(), Weights::open_file(&to).unwrap().f32("x").unwrap());
        assert_eq!(one, other);
        assert_eq!(one.values.len(), 254);
        // Halves and columns are written as they are read.
        let mut turned = read.clone();
        turned.transpose("x");
        turned.write(&to).unwrap();
        let written = Weights::open_file(&to).unwrap().f32("x").unwrap();
        assert_eq!(written, turned.f32("x").unwrap());
        assert_eq!(written.shape, [127, 2]);
        let mut swapped = read;
        swapped.swap_halves("x");
        swapped.write(&to).unwrap();
        let written = Weights::open_file(&to).unwrap().f32("x").unwrap();
        assert_eq!(written.values[..127], one.values[127..]);
    }
}
