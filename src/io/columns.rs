//! A matrix read column by column, straight from the bytes of its file: what a product by rows of
//! inputs needs of PyTorch's `[outputs, inputs]`, without the whole of it in f32 in between.

use std::borrow::Cow;

use half::{bf16, f16};
use safetensors::Dtype;

use super::weights::{Entry, Weights, e4m3};

/// A tensor of at least two dimensions as `outputs` rows of all its other numbers.
pub struct Columns<'a> {
    weights: &'a Weights,
    entry: &'a Entry,
    bytes: Cow<'a, [u8]>,
    outputs: usize,
    /// Numbers of a row.
    pub width: usize,
}

/// Outputs whose numbers are written at a time: a line of a cache.
const OUTPUTS: usize = 16;

impl Weights {
    /// A tensor's columns, where they lie as they are read and are of a type of weights.
    pub fn columns(&self, name: &str) -> Option<Columns<'_>> {
        let e = self.entries.get(name).filter(|e| e.plain())?;
        let outputs = *e.shape.first().filter(|outputs| **outputs > 0)?;
        let width = e.shape.iter().product::<usize>() / outputs;
        let known =
            matches!(e.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64 | Dtype::F8_E4M3);
        #[cfg(test)]
        self.reads.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let bytes = known.then(|| self.stored(e, &e.range).ok())??;
        Some(Columns { weights: self, entry: e, bytes, outputs, width })
    }
}

impl Drop for Columns<'_> {
    fn drop(&mut self) {
        self.weights.release(self.entry, &self.entry.range);
    }
}

impl Columns<'_> {
    /// Writes columns as rows of `outputs` numbers: row `r` of `rows` is column `order(r)`. Whether
    /// all of them are finite.
    pub fn read(&self, order: impl Fn(usize) -> usize, rows: &mut [f32]) -> bool {
        match self.entry.dtype {
            Dtype::F16 => self.fill(order, rows, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => self.fill(order, rows, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::F64 => self.fill(order, rows, |b| f64::from_le_bytes(b) as f32),
            Dtype::F8_E4M3 => self.fill(order, rows, |[b]| e4m3(b)),
            _ => self.fill(order, rows, f32::from_le_bytes),
        }
        rows.iter().all(|v| v.is_finite())
    }

    fn fill<const N: usize>(
        &self,
        order: impl Fn(usize) -> usize,
        rows: &mut [f32],
        value: impl Fn([u8; N]) -> f32,
    ) {
        let numbers = self.bytes.as_chunks::<N>().0;
        for first in (0..self.outputs).step_by(OUTPUTS) {
            let end = self.outputs.min(first + OUTPUTS);
            for (r, row) in rows.chunks_exact_mut(self.outputs).enumerate() {
                let column = order(r);
                (first..end).for_each(|o| row[o] = value(numbers[o * self.width + column]));
            }
        }
    }
}
