//! How sure a mean is. Pictures of one prompt are alike, so prompts are what is resampled: give one
//! value a prompt, its mean over the prompt's pictures.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{finite, mean, squared_deviations};
use crate::philox::{Stream, words};

/// How many resamples an interval is made of.
const RESAMPLES: u32 = 2000;
/// The share of resamples that the bounds enclose.
const COVERAGE: f64 = 0.95;

/// A mean over prompts, with bounds where several prompts give them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The mean over the prompts.
    pub mean: f64,
    /// None for one prompt, whose mean could be anything.
    pub bounds: Option<Bounds>,
}

/// What 95% of the resampled means lie between.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bounds {
    /// Their 2.5th percentile.
    pub low: f64,
    /// Their 97.5th percentile.
    pub high: f64,
}

/// The mean of the values of each prompt, in the order of the prompts' numbers; `prompt_of[i]` is
/// the number of the prompt of value i.
pub fn means_by_prompt(values: &[f64], prompt_of: &[usize]) -> Vec<f64> {
    let mut groups: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
    for (value, prompt) in values.iter().zip(prompt_of) {
        groups.entry(*prompt).or_default().push(*value);
    }
    groups.values().map(|own| mean(own)).collect()
}

/// Percentile bootstrap (Efron & Tibshirani 1993, section 13.3) of the mean over prompts: 95% of
/// 2000 means of as many prompts, drawn with replacement. The seed fixes the draws.
///
/// None without values, or where one is not finite.
pub fn interval(per_prompt: &[f64], seed: u64) -> Option<Interval> {
    let mean = finite(mean(per_prompt))?;
    if per_prompt.len() < 2 {
        return Some(Interval { mean, bounds: None });
    }
    let mut means: Vec<f64> =
        (0..RESAMPLES).into_par_iter().map(|i| resampled_mean(per_prompt, seed, i)).collect();
    means.sort_by(f64::total_cmp);
    let tail = (1.0 - COVERAGE) / 2.0;
    let [low, high] = [tail, 1.0 - tail].map(|share| quantile(&means, share));
    Some(Interval { mean, bounds: Some(Bounds { low: finite(low)?, high: finite(high)? }) })
}

/// The mean of as many values as there are, drawn with replacement.
fn resampled_mean(values: &[f64], seed: u64, resample: u32) -> f64 {
    resampled(values, seed, resample).sum::<f64>() / values.len() as f64
}

/// As many values as there are, drawn with replacement.
fn resampled(values: &[f64], seed: u64, resample: u32) -> impl Iterator<Item = f64> {
    let n = values.len();
    let drawn = move |word: u32| values[((u64::from(word) * n as u64) >> 32) as usize];
    let quads = 0..n.div_ceil(4) as u32;
    let draws = quads.flat_map(move |quad| words(seed, Stream::Bootstrap, resample, 0, quad));
    draws.take(n).map(drawn)
}

/// The median; of an even number of values the mean of the two in the middle. None without values.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    (!sorted.is_empty()).then(|| quantile(&sorted, 0.5))
}

/// Percentile bootstrap of the median, as [`interval`] has it of the mean. None with fewer than two
/// values.
pub fn median_bounds(values: &[f64], seed: u64) -> Option<Bounds> {
    if values.len() < 2 || values.iter().any(|v| v.is_nan()) {
        return None;
    }
    let one = |i: u32| median(&resampled(values, seed, i).collect::<Vec<f64>>());
    let mut medians: Vec<f64> = (0..RESAMPLES).filter_map(one).collect();
    medians.sort_by(f64::total_cmp);
    let tail = (1.0 - COVERAGE) / 2.0;
    Some(Bounds { low: quantile(&medians, tail), high: quantile(&medians, 1.0 - tail) })
}

/// Two-sided sign test (Arbuthnott; exact, binomial): how likely as one-sided a split of `better`
/// and `worse` pairs is where either is as likely. Ties are left out by the caller.
pub fn sign_test(better: usize, worse: usize) -> f64 {
    let n = better + worse;
    let least = better.min(worse);
    let mut term = 0.5f64.powi(n as i32);
    let mut tail = 0.0;
    for k in 0..=least {
        tail += term;
        term *= (n - k) as f64 / (k + 1) as f64;
    }
    (2.0 * tail).min(1.0)
}

/// The quantile of ascending values, linear between neighbours; at least one value.
fn quantile(ascending: &[f64], share: f64) -> f64 {
    let place = share * (ascending.len() - 1) as f64;
    let below = place.floor() as usize;
    let above = (below + 1).min(ascending.len() - 1);
    let fraction = place - below as f64;
    // Infinities have no difference, and no part of one.
    if fraction == 0.0 || ascending[below] == ascending[above] {
        return ascending[below];
    }
    ascending[below] + fraction * (ascending[above] - ascending[below])
}

/// Standard error of the mean: sample deviation (n - 1) over sqrt(n).
///
/// None with fewer than two values, or where one is not finite.
pub fn standard_error(values: &[f64]) -> Option<f64> {
    if values.len() < 2 {
        return None;
    }
    let n = values.len() as f64;
    finite((squared_deviations(values) / (n - 1.0) / n).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_signs() {
        assert_eq!(median(&[3.0, 1.0, f64::INFINITY, 2.0]), Some(2.5));
        assert_eq!(median(&[1.0, f64::INFINITY, 2.0]), Some(2.0));
        let never = [1.0, f64::INFINITY, f64::INFINITY];
        assert_eq!(median(&never), Some(f64::INFINITY));
        assert_eq!(median_bounds(&never, 0).unwrap().high, f64::INFINITY);
        assert_eq!(median(&[]), None);
        let bounds = median_bounds(&[1.0, 2.0, 3.0, 4.0, 5.0], 0).unwrap();
        assert!(bounds.low >= 1.0 && bounds.low < 3.0 && bounds.high > 3.0 && bounds.high <= 5.0);
        assert_eq!(median_bounds(&[1.0], 0), None);
        // Five of five: 2 / 32; four of five: 12 / 32.
        assert!((sign_test(5, 0) - 0.0625).abs() < 1e-15);
        assert!((sign_test(1, 4) - 0.375).abs() < 1e-15);
        assert_eq!(sign_test(2, 2), 1.0);
        assert_eq!(sign_test(0, 0), 1.0);
    }

    #[test]
    fn standard_error_is_of_the_sample() {
        // Sample variance 5/3 of four values.
        let found = standard_error(&[1.0, 2.0, 3.0, 4.0]).unwrap();
        assert!((found - (5.0f64 / 12.0).sqrt()).abs() < 1e-15, "{found}");
        assert_eq!(standard_error(&[0.1; 7]), Some(0.0));
    }
}
