//! The matrix of a layer that does not train, `[inputs, outputs]`, in the type that it is stored
//! in. Products take it in as it is: on the CPU a panel of rows at a time becomes f32, on a GPU a
//! tile.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::cpu::Values;
use crate::device::tensor::upload;

/// The type that frozen weights are stored in; computation is f32. 8 and 4 bits hold the linear
/// layers' matrices, with one scale for each block of [`BLOCK`] values; what they leave out is
/// stored as f16.
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

/// Inputs that share a scale where a matrix is quantised.
pub const BLOCK: usize = 32;

impl Storage {
    /// The type of weights that are not quantised.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 | Self::Q8 | Self::Q4 => DType::F16,
        }
    }

    /// The same without quantisation, f16 instead: of convolutions, and of models whose outputs
    /// have to tell pictures apart that differ little.
    pub fn unquantised(self) -> Self {
        match self {
            Self::F32 => Self::F32,
            Self::F16 | Self::Q8 | Self::Q4 => Self::F16,
        }
    }

    /// Bytes of a value of a linear layer's matrix.
    pub fn bytes_per_value(self) -> f64 {
        let bits = |bits: u32| f64::from(bits) / 8.0 + 4.0 / BLOCK as f64;
        self.bits().map_or(self.dtype().size() as f64, bits)
    }

    /// Bits of a quantised weight.
    fn bits(self) -> Option<u32> {
        match self {
            Self::F32 | Self::F16 => None,
            Self::Q8 => Some(8),
            Self::Q4 => Some(4),
        }
    }
}

/// A frozen matrix on a device.
pub struct FrozenWeight {
    pub rows: usize,
    pub columns: usize,
    /// Whether its products take f32 on devices that compute in f16 too.
    pub exact: bool,
    pub(super) stored: Stored,
}

pub(super) enum Stored {
    F32(Tensor<2>),
    F16(Tensor<2>),
    Quantised(Box<Quantised>),
}

/// Symmetric quantisation: value (k, n) is `q scale[k / 32, n]`.
pub(super) struct Quantised {
    pub bits: u32,
    /// Words of four or eight values in row-major order, the first in the lowest bits. Of a type
    /// that every backend stores as it is; nothing computes with it.
    pub words: Tensor<1>,
    /// `[rows / 32, columns]`
    pub scales: Tensor<2>,
}

/// A frozen matrix as it goes to a device.
pub struct PreparedWeight {
    rows: usize,
    columns: usize,
    values: HostValues,
}

#[derive(Clone)]
enum HostValues {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Quantised { bits: u32, words: Vec<u32>, scales: Vec<f32> },
}

/// Rows that become what is stored at a time: whole blocks of scales.
const ROWS: usize = 2 * BLOCK;

impl PreparedWeight {
    /// From values `[rows, columns]`, quantised where the storage says so and the rows are whole
    /// blocks.
    pub fn new(values: &[f32], shape: [usize; 2], storage: Storage) -> Self {
        let copy = |first: usize, rows: &mut [f32]| {
            rows.copy_from_slice(&values[first * shape[1]..][..rows.len()]);
        };
        Self::of(shape, storage, copy)
    }

    /// The same from what `read` writes of the rows from a number on, on several threads.
    pub fn of(
        [rows, columns]: [usize; 2],
        storage: Storage,
        read: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Self {
        let size = (ROWS * columns).max(1);
        let panel = || vec![0f32; size];
        let values = match storage.bits().filter(|_| rows.is_multiple_of(BLOCK)) {
            Some(bits) => {
                let each = (32 / bits) as usize;
                let mut scales = vec![0f32; rows / BLOCK * columns];
                let mut words = vec![0u32; rows * columns / each];
                let parts = words.par_chunks_mut((size / each).max(1));
                let parts = parts.zip(scales.par_chunks_mut((size / BLOCK).max(1))).enumerate();
                parts.for_each_init(panel, |panel, (part, (words, scales))| {
                    let panel = &mut panel[..words.len() * each];
                    read(part * ROWS, panel);
                    quantise(panel, columns, bits, scales, words);
                });
                HostValues::Quantised { bits, words, scales }
            }
            None if storage == Storage::F32 => {
                let mut values = vec![0f32; rows * columns];
                let parts = values.par_chunks_mut(size).enumerate();
                parts.for_each(|(part, values)| read(part * ROWS, values));
                HostValues::F32(values)
            }
            None => {
                let mut half = vec![f16::ZERO; rows * columns];
                let parts = half.par_chunks_mut(size).enumerate();
                parts.for_each_init(panel, |panel, (part, half)| {
                    let panel = &mut panel[..half.len()];
                    read(part * ROWS, panel);
                    half.convert_from_f32_slice(panel);
                });
                HostValues::F16(half)
            }
        };
        Self { rows, columns, values }
    }

    /// The same on a device; what it was is let go of where nothing else holds it.
    pub fn on(self: Arc<Self>, device: &Device) -> FrozenWeight {
        let (rows, columns) = (self.rows, self.columns);
        let values = match Arc::try_unwrap(self) {
            Ok(own) => own.values,
            Err(shared) => shared.values.clone(),
        };
        let stored = match values {
            HostValues::F32(values) => {
                Stored::F32(Tensor::from_data(TensorData::new(values, [rows, columns]), device))
            }
            HostValues::F16(values) => {
                let data = TensorData::new(values, [rows, columns]);
                Stored::F16(Tensor::from_data(data, (device, DType::F16)))
            }
            HostValues::Quantised { bits, words, scales } => {
                Stored::Quantised(Box::new(Quantised {
                    bits,
                    words: upload(bytemuck::cast_slice(&words), [words.len()], device),
                    scales: upload(&scales, [rows / BLOCK, columns], device),
                }))
            }
        };
        FrozenWeight { rows, columns, exact: false, stored }
    }
}

impl FrozenWeight {
    /// From values `[rows, columns]`, as [`PreparedWeight::new`].
    pub fn new(values: Vec<f32>, shape: [usize; 2], storage: Storage, device: &Device) -> Self {
        Arc::new(PreparedWeight::new(&values, shape, storage)).on(device)
    }

    /// An adapter's matrix, which trains, for the same kernels: in f32 everywhere.
    pub(super) fn trained(matrix: Tensor<2>) -> Self {
        let [rows, columns] = matrix.dims();
        Self { rows, columns, exact: true, stored: Stored::F32(matrix) }
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        let all = |t: &Tensor<2>, each: usize| each * t.shape().num_elements();
        match &self.stored {
            Stored::F32(w) => all(w, 4),
            Stored::F16(w) => all(w, 2),
            Stored::Quantised(q) => 4 * q.words.shape().num_elements() + all(&q.scales, 4),
        }
    }

    /// The matrix in memory, of the CPU backend.
    pub fn on_host(&self) -> HostWeight {
        match &self.stored {
            Stored::F32(w) => HostWeight::F32(Values::of(w)),
            Stored::F16(w) => HostWeight::F16(Values::of(w)),
            Stored::Quantised(q) => HostWeight::Quantised {
                bits: q.bits,
                words: Values::of(&q.words),
                scales: Values::of(&q.scales),
            },
        }
    }
}

/// Quantises whole blocks of rows.
fn quantise(values: &[f32], columns: usize, bits: u32, scales: &mut [f32], words: &mut [u32]) {
    let most = ((1 << (bits - 1)) - 1) as f32;
    let each = (32 / bits) as usize;
    let mask = u32::MAX >> (32 - bits);
    let size = BLOCK * columns;
    let blocks = values.chunks_exact(size).zip(scales.chunks_exact_mut(columns));
    for ((block, scales), words) in blocks.zip(words.chunks_exact_mut(size / each)) {
        for row in block.chunks_exact(columns) {
            scales.iter_mut().zip(row).for_each(|(s, v)| *s = s.max(v.abs() / most));
        }
        for (k, row) in block.chunks_exact(columns).enumerate() {
            for (i, (v, scale)) in (k * columns..).zip(row.iter().zip(&*scales)) {
                let fits = *scale > 0.0;
                let q = if fits { (v / scale).round().clamp(-most, most) as i32 } else { 0 };
                words[i / each] |= (q as u32 & mask) << (bits * (i % each) as u32);
            }
        }
    }
}

/// PyTorch's weight `[outputs, columns]` as rows for a product: row r of `[columns, outputs]` is
/// its column `order(r)`. A few outputs at a time, so that what is read stays in a cache.
pub fn by_input(values: &[f32], outputs: usize, order: impl Fn(usize) -> usize + Sync) -> Vec<f32> {
    const OUTPUTS: usize = 16;
    // Rows that a core writes at a time.
    const ROWS: usize = 64;
    let columns = values.len() / outputs;
    let mut rows = vec![0.0; values.len()];
    rows.par_chunks_mut(ROWS * outputs).enumerate().for_each(|(part, rows)| {
        for first in (0..outputs).step_by(OUTPUTS) {
            let end = outputs.min(first + OUTPUTS);
            for (r, row) in rows.chunks_exact_mut(outputs).enumerate() {
                let column = order(part * ROWS + r);
                (first..end).for_each(|o| row[o] = values[o * columns + column]);
            }
        }
    });
    rows
}

/// A frozen matrix of the CPU backend.
pub enum HostWeight {
    F32(Values),
    F16(Values),
    Quantised { bits: u32, words: Values, scales: Values },
}

/// Rows that are f32 at a time: whole blocks of scales.
const PANEL: usize = 256;

impl HostWeight {
    /// Hands `work` all rows, a panel of at most `most` at a time, with the number of the first.
    pub fn panels(&self, [rows, columns]: [usize; 2], mut work: impl FnMut(usize, &[f32])) {
        if let Self::F32(values) = self {
            return work(0, values);
        }
        let mut panel = vec![0f32; PANEL.min(rows) * columns];
        for first in (0..rows).step_by(PANEL) {
            let panel = &mut panel[..PANEL.min(rows - first) * columns];
            self.read(first, columns, panel);
            work(first, panel);
        }
    }

    /// Rows from `first` on as f32.
    pub fn read(&self, first: usize, columns: usize, out: &mut [f32]) {
        let part = columns.max(1 << 12).next_multiple_of(columns);
        let from = first * columns;
        match self {
            Self::F32(values) => out.copy_from_slice(&values[from..from + out.len()]),
            Self::F16(values) => {
                let values = &values.f16()[from..];
                out.par_chunks_mut(part).enumerate().for_each(|(i, out)| {
                    values[i * part..][..out.len()].convert_to_f32_slice(out);
                });
            }
            Self::Quantised { bits, words, scales } => {
                let words: &[u32] = bytemuck::cast_slice(words);
                let (bits, each) = (*bits, (32 / *bits) as usize);
                out.par_chunks_mut(part).enumerate().for_each(|(i, out)| {
                    let from = from + i * part;
                    for (row, out) in out.chunks_exact_mut(columns).enumerate() {
                        let at = from + row * columns;
                        let scales = &scales[at / columns / BLOCK * columns..][..columns];
                        for (j, (out, scale)) in out.iter_mut().zip(scales).enumerate() {
                            let shift = bits * ((at + j) % each) as u32;
                            // Up to the sign, and down again with it.
                            let up = words[(at + j) / each] << (32 - bits - shift);
                            *out = (up as i32 >> (32 - bits)) as f32 * scale;
                        }
                    }
                });
            }
        }
    }
}
