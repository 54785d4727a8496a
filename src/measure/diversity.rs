//! How much the pictures of one prompt differ, by their features: those of the same prompts and
//! noise each time, or the numbers say something about the prompts.

use std::collections::BTreeMap;

use nalgebra::DMatrix;
use serde::{Deserialize, Serialize};

use super::matrix::{singular_values, unit_rows, width};
use super::{finite, mean};

/// Means over the prompts that have at least two pictures.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Diversity {
    /// [`pairwise_cosine_distance`].
    pub pairwise_cosine_distance: Option<f64>,
    /// [`vendi`].
    pub vendi: Option<f64>,
}

/// Mean of 1 - cosine over the n(n-1)/2 pairs of the pictures of one prompt, in \[0, 2\]; rows of
/// features \[n, d\], divided by their norms first.
///
/// With f of norm 1 the mean cosine is (|sum_i f_i|^2 - n) / (n(n-1)).
///
/// None with fewer than two rows, or where a row is zero.
pub fn pairwise_cosine_distance(rows: &[&[f32]]) -> Option<f64> {
    let unit = comparable(rows)?;
    let n = rows.len() as f64;
    let cosine = (unit.row_sum().norm_squared() - n) / (n * (n - 1.0));
    // Rounding can leave a negative rest where the rows are equal.
    finite(1.0 - cosine).map(|distance| distance.max(0.0))
}

/// Vendi score of the pictures of one prompt (Friedman & Dieng, TMLR 2023): exp(-sum l log l) over
/// the eigenvalues l of K/n, K_ij = f_i.f_j; rows of features \[n, d\], divided by their norms
/// first. From 1 (all alike) to n (all orthogonal), a number of different pictures.
///
/// None with fewer than two rows, of which it would say nothing, or where a row is zero.
pub fn vendi(rows: &[&[f32]]) -> Option<f64> {
    let unit = comparable(rows)?;
    // K is positive semidefinite: its singular values are its eigenvalues.
    let eigenvalues = singular_values(&unit * unit.transpose() / rows.len() as f64)?;
    let entropy: f64 = eigenvalues.iter().filter(|&&l| l > 0.0).map(|l| -l * l.ln()).sum();
    finite(entropy.exp())
}

/// Rows of norm 1, where there are two or more.
fn comparable(rows: &[&[f32]]) -> Option<DMatrix<f64>> {
    width(rows).filter(|_| rows.len() > 1).map(|_| unit_rows(rows))
}

/// Means over prompts of [`pairwise_cosine_distance`] and [`vendi`]; `prompts[i]` is the number of
/// the prompt of picture i, whose features are `features[i]`.
///
/// Prompts with one picture are left out; None where none is left, or where one of the others has
/// no such number: a mean without it would be one of other prompts.
pub fn over_prompts(features: &[Vec<f32>], prompts: &[usize]) -> Diversity {
    let mut groups: BTreeMap<usize, Vec<&[f32]>> = BTreeMap::new();
    for (row, &prompt) in features.iter().zip(prompts) {
        groups.entry(prompt).or_default().push(row);
    }
    groups.retain(|_, rows| rows.len() > 1);
    let over = |measure: fn(&[&[f32]]) -> Option<f64>| {
        let values: Vec<f64> = groups.values().map(|rows| measure(rows)).collect::<Option<_>>()?;
        finite(mean(&values))
    };
    Diversity { pairwise_cosine_distance: over(pairwise_cosine_distance), vendi: over(vendi) }
}
