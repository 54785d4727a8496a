//! What the kernels' CPU paths share: a tensor's values in memory, and matrix products.

use burn::backend::DispatchTensorKind;
use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_flex::FlexTensor;
use gemm::Parallelism;

use super::strided::row_major;

/// A tensor's values, in row-major order.
pub struct Values(FlexTensor);

impl Values {
    pub fn of<const D: usize>(tensor: &Tensor<D>) -> Self {
        let DispatchTensorKind::Flex(tensor) = tensor.clone().into_dispatch().kind else {
            panic!("a CPU kernel was given a tensor of another backend");
        };
        let tensor = tensor.float();
        Self(match (tensor.is_contiguous(), tensor.dtype()) {
            (true, _) => tensor,
            (false, DType::F32) => in_order(&tensor),
            (false, _) => tensor.to_contiguous(),
        })
    }

    fn typed<E: burn::tensor::Element + bytemuck::Pod>(&self) -> &[E] {
        let (start, n) = (self.0.layout().start_offset(), self.0.layout().num_elements());
        &self.0.storage::<E>()[start..start + n]
    }

    pub fn f16(&self) -> &[half::f16] {
        self.typed()
    }
}

/// A tensor in f32 with its values in row-major order.
fn in_order(tensor: &FlexTensor) -> FlexTensor {
    let layout = tensor.layout();
    let (shape, start) = (layout.shape().as_slice(), layout.start_offset());
    let values = row_major(tensor.storage::<f32>(), shape, layout.strides(), start);
    FlexTensor::from_data(TensorData::new(values, layout.shape().clone()))
}

impl std::ops::Deref for Values {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        self.typed()
    }
}

/// A tensor of the CPU backend that takes the values over.
pub fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

/// Rows that are each a bias, or zero.
pub fn biased(rows: usize, width: usize, bias: Option<&Values>) -> Vec<f32> {
    match bias {
        Some(bias) => {
            let mut y = Vec::with_capacity(rows * width);
            (0..rows).for_each(|_| y.extend_from_slice(bias));
            y
        }
        None => vec![0.0; rows * width],
    }
}

/// A matrix in a slice: element (i, j) is at `i * rows + j * columns`.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    pub values: &'a [f32],
    pub rows: usize,
    pub columns: usize,
}

impl<'a> Matrix<'a> {
    /// A row-major matrix whose rows have a width.
    pub fn new(values: &'a [f32], width: usize) -> Self {
        Self { values, rows: width, columns: 1 }
    }

    pub fn transposed(self) -> Self {
        Self { rows: self.columns, columns: self.rows, ..self }
    }
}

/// What becomes of the numbers that stand where a product goes.
#[derive(Clone, Copy, PartialEq)]
pub enum Write {
    Replace,
    Add,
}

/// Terms of a sum that the gemm crate adds up in one order whatever the other sizes are.
const DEPTH: usize = 512;

/// `out (+)= factor * a b` for `a` `[m, k]` and `b` `[k, n]`; rows of `out` are `width` apart.
///
/// A row's numbers do not depend on how many rows there are: where the gemm crate would add up
/// small products, single rows or long sums in another order, it is given what it takes the common
/// way.
pub fn product(
    [m, k, n]: [usize; 3],
    a: Matrix,
    b: Matrix,
    factor: f32,
    into: Write,
    out: &mut [f32],
    width: usize,
) {
    if m == 0 || n == 0 {
        return;
    }
    if m == 1 {
        let mut twice = [&out[..n], &out[..n]].concat();
        product([2, k, n], Matrix { rows: 0, ..a }, b, factor, into, &mut twice, n);
        return out[..n].copy_from_slice(&twice[..n]);
    }
    const SMALL: usize = 256;
    if m * n <= SMALL && a.columns == 1 && b.rows == 1 && n > 1 {
        let by_rows: Vec<f32> = (0..k * n).map(|i| b.values[i / n + i % n * b.columns]).collect();
        return product([m, k, n], a, Matrix::new(&by_rows, n), factor, into, out, width);
    }
    for first in (0..k.max(1)).step_by(DEPTH) {
        let a = Matrix { values: &a.values[first * a.columns..], ..a };
        let b = Matrix { values: &b.values[first * b.rows..], ..b };
        let into = if first == 0 { into } else { Write::Add };
        gemm([m, DEPTH.min(k - first), n], a, b, factor, into, out, width);
    }
}

fn gemm(
    [m, k, n]: [usize; 3],
    a: Matrix,
    b: Matrix,
    factor: f32,
    into: Write,
    out: &mut [f32],
    width: usize,
) {
    let within = |x: Matrix, rows: usize, columns: usize| {
        rows * columns == 0 || (rows - 1) * x.rows + (columns - 1) * x.columns < x.values.len()
    };
    assert!(within(a, m, k) && within(b, k, n) && (m - 1) * width + n <= out.len());
    let parallel = rayon::current_num_threads() > 1 && m * n * k > 1 << 20;
    let threads = if parallel { Parallelism::Rayon(0) } else { Parallelism::None };
    let stride = |n: usize| n as isize;
    let (to, x, y) = (out.as_mut_ptr(), a.values.as_ptr(), b.values.as_ptr());
    let [xr, xc, yr, yc] = [a.rows, a.columns, b.rows, b.columns].map(stride);
    let add = into == Write::Add;
    // SAFETY: the strides stay within the slices, as asserted.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            to,
            1,
            stride(width),
            add,
            x,
            xc,
            xr,
            y,
            yc,
            yr,
            1.0,
            factor,
            false,
            false,
            false,
            threads,
        );
    }
}
