//! Distances of two sets of pictures by their features in R^d, one row a picture; in f64.
//!
//! FD      Frechet distance of the Gaussians with the sets' means and covariances (Heusel et al.,
//!         NeurIPS 2017, equation 6). Its bias falls with the number of pictures: never compare it
//!         between sets of different sizes.
//! FD_inf  FD extrapolated to infinitely many evaluated pictures (Chong & Forsyth, CVPR 2020).
//! KID     unbiased squared MMD with a polynomial kernel (Binkowski et al., ICLR 2018, section 4).
//! CMMD    1000 times the squared MMD of CLIP embeddings with a Gaussian kernel (Jayasumana et al.,
//!         CVPR 2024).

use nalgebra::{DMatrix, DVector};
use rayon::prelude::*;

use super::finite;
use super::matrix::{centred_factor, from_rows, singular_values, unit_rows, width};
use crate::philox::{Stream, choose};

/// How many sizes of subsets FD is extrapolated from.
const SIZES: usize = 15;
/// How many rows of each set one block of a Gram matrix has.
const BLOCK: usize = 512;
/// 2 sigma^2 of CMMD's kernel, sigma = 10.
const CMMD_WIDTH: f64 = 200.0;
/// What CMMD's authors multiply by for readable numbers.
const CMMD_SCALE: f64 = 1000.0;

/// Mean and covariance of a set of rows.
struct Moments {
    /// \[d\]
    mean: DVector<f64>,
    /// F with F^T F = S, the unbiased covariance; \[min(N, d), d\].
    factor: DMatrix<f64>,
}

impl Moments {
    /// None with fewer than two rows, or rows of different widths.
    fn of(rows: &[&[f32]]) -> Option<Self> {
        let width = width(rows)?;
        if rows.len() < 2 {
            return None;
        }
        let mut mean = DVector::zeros(width);
        for row in rows {
            mean.iter_mut().zip(*row).for_each(|(sum, &v)| *sum += f64::from(v));
        }
        mean /= rows.len() as f64;
        let factor = centred_factor(rows, mean.as_slice()) / (rows.len() as f64 - 1.0).sqrt();
        Some(Self { mean, factor })
    }

    /// |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2).
    ///
    /// The last trace is the sum of the singular values of F1 F2^T, because (F1 F2^T)(F1 F2^T)^T
    /// and S1^1/2 S2 S1^1/2 share their eigenvalues but for zeros. No root of a singular matrix is
    /// taken, so this holds for sets of fewer pictures than dimensions too.
    fn distance(&self, other: &Self) -> Option<f64> {
        if self.mean.len() != other.mean.len() {
            return None;
        }
        let shared: f64 = singular_values(&self.factor * other.factor.transpose())?.iter().sum();
        let traces = self.factor.norm_squared() + other.factor.norm_squared();
        let distance = (&self.mean - &other.mean).norm_squared() + traces - 2.0 * shared;
        // Rounding can leave a negative rest where the sets are equal.
        finite(distance).map(|distance| distance.max(0.0))
    }
}

fn slices(rows: &[Vec<f32>]) -> Vec<&[f32]> {
    rows.iter().map(Vec::as_slice).collect()
}

/// FD = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2) of features as they come, with
/// unbiased covariances at full width; `a` is \[N, d\], `b` \[M, d\].
///
/// For samples of one N(0, I_d) it is d/N + d(d+1)/(4(N-1)) and the same in M, not 0.
///
/// None where either side has fewer than two rows.
pub fn frechet(a: &[Vec<f32>], b: &[Vec<f32>]) -> Option<f64> {
    Moments::of(&slices(a))?.distance(&Moments::of(&slices(b))?)
}

/// FD_inf: the a of the least-squares fit FD_n = a + b/n over random subsets of n evaluated
/// pictures, at 15 sizes n evenly from max(2, N/10) to N; the reference is whole each time, so its
/// own bias stays. Noise can make it negative. The seed fixes the subsets.
///
/// FD_n is such a line only where n is well above d: with N < 10 d prefer [`kid`] or [`cmmd`].
///
/// None where fewer than two of the sizes differ, or the reference has fewer than two rows.
pub fn frechet_infinity(evaluated: &[Vec<f32>], reference: &[Vec<f32>], seed: u64) -> Option<f64> {
    let sizes = subset_sizes(evaluated.len());
    if sizes.len() < 2 {
        return None;
    }
    let reference = Moments::of(&slices(reference))?;
    let distance = |(number, &size): (usize, &usize)| {
        let stream = Stream::DistanceSubsets;
        let chosen = choose(seed, stream, number as u32, evaluated.len(), size);
        let subset: Vec<&[f32]> = chosen.iter().map(|&i| evaluated[i].as_slice()).collect();
        Moments::of(&subset)?.distance(&reference)
    };
    let distances: Vec<f64> = sizes.par_iter().enumerate().map(distance).collect::<Option<_>>()?;
    let inverse: Vec<f64> = sizes.iter().map(|&n| 1.0 / n as f64).collect();
    finite(intercept(&inverse, &distances))
}

/// The distinct sizes of subsets of `n` pictures, ascending; none below two pictures.
fn subset_sizes(n: usize) -> Vec<usize> {
    let least = (n / 10).max(2);
    let size = |k: usize| least + k * (n - least) / (SIZES - 1);
    let mut sizes: Vec<usize> = if n < 2 { vec![] } else { (0..SIZES).map(size).collect() };
    sizes.dedup();
    sizes
}

/// The a of the least-squares line y = a + b x.
fn intercept(x: &[f64], y: &[f64]) -> f64 {
    let (x_mean, y_mean) = (super::mean(x), super::mean(y));
    let products = x.iter().zip(y).map(|(x, y)| (x - x_mean) * (y - y_mean));
    let slope = products.sum::<f64>() / super::squared_deviations(x);
    y_mean - slope * x_mean
}

/// KID = sum_{i != j} k(a_i, a_j) / (N(N-1)) + the same in b - 2 mean k(a_i, b_j), with
/// k(x, y) = (x.y/d + 1)^3 of features as they come; `a` is \[N, d\], `b` \[M, d\]. Unbiased, so it
/// can be negative.
///
/// None where either side has fewer than two rows.
pub fn kid(a: &[Vec<f32>], b: &[Vec<f32>]) -> Option<f64> {
    let d = shared_width(a, b)? as f64;
    if a.len() < 2 || b.len() < 2 {
        return None;
    }
    let kernel = |dot: f64| (dot / d + 1.0).powi(3);
    let within = |rows: &[Vec<f32>]| {
        let n = rows.len() as f64;
        let sums = sums_within(rows, from_rows, kernel);
        sums.unequal / (n * (n - 1.0))
    };
    let pairs = a.len() as f64 * b.len() as f64;
    finite(within(a) + within(b) - 2.0 * sum_between(a, b, from_rows, kernel) / pairs)
}

/// CMMD = 1000 (mean k(a_i, a_j) + mean k(b_i, b_j) - 2 mean k(a_i, b_j)), pairs of a row with
/// itself included, with k(x, y) = exp(-|x - y|^2 / 200) of rows that are first divided by their
/// norms; `a` is \[N, d\], `b` \[M, d\]. Its scale is that of CLIP ViT-L/14-336's embeddings.
///
/// None where a side is empty, or a row is zero.
pub fn cmmd(a: &[Vec<f32>], b: &[Vec<f32>]) -> Option<f64> {
    shared_width(a, b)?;
    // |x - y|^2 = 2 - 2 x.y at norm 1.
    let kernel = |dot: f64| ((2.0 * dot - 2.0) / CMMD_WIDTH).exp();
    let within = |rows: &[Vec<f32>]| {
        let n = rows.len() as f64;
        let sums = sums_within(rows, unit_rows, kernel);
        (sums.unequal + sums.equal) / (n * n)
    };
    let pairs = a.len() as f64 * b.len() as f64;
    let between = sum_between(a, b, unit_rows, kernel) / pairs;
    let distance = CMMD_SCALE * (within(a) + within(b) - 2.0 * between);
    // Rounding can leave a negative rest where the sets are equal.
    finite(distance).map(|distance| distance.max(0.0))
}

/// The width of the rows of both sets.
fn shared_width(a: &[Vec<f32>], b: &[Vec<f32>]) -> Option<usize> {
    width(a).filter(|&d| width(b) == Some(d))
}

/// How a block of rows becomes a matrix.
type ToMatrix = fn(&[Vec<f32>]) -> DMatrix<f64>;

/// Sums of a kernel over the pairs of rows of one set.
struct WithinSums {
    /// Over the N(N-1) ordered pairs of two rows.
    unequal: f64,
    /// Over the N pairs of a row with itself.
    equal: f64,
}

/// Sums of kernel(x_i.x_j) over a set's pairs. Of the Gram matrix only the blocks on and above the
/// diagonal are computed, one for each core at a time.
fn sums_within(
    rows: &[Vec<f32>],
    to_matrix: ToMatrix,
    kernel: impl Fn(f64) -> f64 + Sync,
) -> WithinSums {
    let blocks: Vec<&[Vec<f32>]> = rows.chunks(BLOCK).collect();
    let n = blocks.len();
    let pairs: Vec<[usize; 2]> = (0..n).flat_map(|i| (i..n).map(move |j| [i, j])).collect();
    let sums = |&[i, j]: &[usize; 2]| {
        let left = to_matrix(blocks[i]);
        if i != j {
            let gram = left * to_matrix(blocks[j]).transpose();
            let sum: f64 = gram.iter().map(|&dot| kernel(dot)).sum();
            return WithinSums { unequal: 2.0 * sum, equal: 0.0 };
        }
        let gram = (&left * left.transpose()).map(&kernel);
        let above = (1..gram.ncols()).map(|c| gram.column(c).rows(0, c).sum());
        WithinSums { unequal: 2.0 * above.sum::<f64>(), equal: gram.trace() }
    };
    // Collected before they are added: the order of a sum decides its last bits.
    let sums: Vec<WithinSums> = pairs.par_iter().map(sums).collect();
    WithinSums {
        unequal: sums.iter().map(|s| s.unequal).sum(),
        equal: sums.iter().map(|s| s.equal).sum(),
    }
}

/// The sum of kernel(a_i.b_j) over all pairs, block by block.
fn sum_between(
    a: &[Vec<f32>],
    b: &[Vec<f32>],
    to_matrix: ToMatrix,
    kernel: impl Fn(f64) -> f64 + Sync,
) -> f64 {
    let sum = |rows: &[Vec<f32>]| {
        let left = to_matrix(rows);
        let block = |other: &[Vec<f32>]| {
            let gram = &left * to_matrix(other).transpose();
            gram.iter().map(|&dot| kernel(dot)).sum::<f64>()
        };
        b.chunks(BLOCK).map(block).sum::<f64>()
    };
    a.par_chunks(BLOCK).map(sum).collect::<Vec<f64>>().iter().sum()
}
