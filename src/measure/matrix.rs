//! The linear algebra below the measures, in f64: rows of features as matrices, and singular
//! values.

use nalgebra::DMatrix;
use rayon::prelude::*;

/// How many rotations a singular value may take; two or three are usual.
const ROTATIONS: usize = 100;
/// What counts as zero beside its neighbours while singular values converge.
const PRECISION: f64 = 4.0 * f64::EPSILON;

/// The width that all rows share. None without rows, or where a row is empty or differs.
pub(super) fn width<R: AsRef<[f32]>>(rows: &[R]) -> Option<usize> {
    let width = rows.first()?.as_ref().len();
    (width > 0 && rows.iter().all(|row| row.as_ref().len() == width)).then_some(width)
}

/// Rows of features, \[N, d\].
pub(super) fn from_rows<R: AsRef<[f32]>>(rows: &[R]) -> DMatrix<f64> {
    let width = rows.first().map_or(0, |row| row.as_ref().len());
    let values = rows.iter().flat_map(|row| row.as_ref()).map(|&v| f64::from(v));
    DMatrix::from_row_iterator(rows.len(), width, values)
}

/// Rows of features, each divided by its norm, \[N, d\]. A row of zeros becomes NaN.
pub(super) fn unit_rows<R: AsRef<[f32]>>(rows: &[R]) -> DMatrix<f64> {
    let mut matrix = from_rows(rows);
    matrix.row_iter_mut().for_each(|mut row| row /= row.norm());
    matrix
}

/// Singular values, in no order. None where the matrix is empty or holds a value that is not
/// finite: with those the iteration would not end.
pub(super) fn singular_values(matrix: DMatrix<f64>) -> Option<Vec<f64>> {
    if matrix.is_empty() || !matrix.iter().all(|v| v.is_finite()) {
        return None;
    }
    let most = ROTATIONS * matrix.nrows().min(matrix.ncols());
    let svd = matrix.try_svd_unordered(false, false, PRECISION, most)?;
    Some(svd.singular_values.as_slice().to_vec())
}

/// A factor F of at most d rows with F^T F = X^T X, where X is `rows` minus `mean`, \[N, d\].
///
/// X itself where N <= d. Otherwise R of X = QR, made of the R of blocks of rows: they fit the
/// caches, keep all cores busy, and are combined in pairs, always the same ones, so that the same
/// rows give the same bits.
pub(super) fn centred_factor(rows: &[&[f32]], mean: &[f64]) -> DMatrix<f64> {
    let centred = |rows: &[&[f32]]| {
        let mut matrix = from_rows(rows);
        let columns = matrix.column_iter_mut().zip(mean);
        columns.for_each(|(mut column, &mean)| column.add_scalar_mut(-mean));
        no_taller_than_wide(matrix)
    };
    let block = 2 * mean.len();
    let mut factors: Vec<DMatrix<f64>> = rows.par_chunks(block).map(centred).collect();
    while factors.len() > 1 {
        factors = factors.par_chunks(2).map(stacked).collect();
    }
    factors.pop().unwrap_or_else(|| DMatrix::zeros(0, mean.len()))
}

/// One factor of the rows of several.
fn stacked(factors: &[DMatrix<f64>]) -> DMatrix<f64> {
    let [upper, lower] = factors else { return factors[0].clone() };
    let (top, height) = (upper.nrows(), upper.nrows() + lower.nrows());
    let mut both = DMatrix::zeros(height, upper.ncols());
    both.rows_mut(0, top).copy_from(upper);
    both.rows_mut(top, lower.nrows()).copy_from(lower);
    no_taller_than_wide(both)
}

/// The matrix, or R of its QR decomposition where it has more rows than columns.
fn no_taller_than_wide(matrix: DMatrix<f64>) -> DMatrix<f64> {
    if matrix.nrows() > matrix.ncols() { matrix.qr().unpack_r() } else { matrix }
}
