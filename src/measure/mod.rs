//! Numbers about sets of pictures: how far they are from others, how they differ among themselves,
//! what their pixels say, and whether a run's have collapsed.

pub mod bootstrap;
pub mod collapse;
pub mod distances;
pub mod diversity;
pub mod features;
mod matrix;
pub mod pixels;

/// The number, where it is one.
fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

/// The mean; NaN of nothing.
pub(crate) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// sum_i (v_i - mean)^2. Exactly 0 where all values are equal, because they are taken relative to
/// the first before anything is rounded.
pub(crate) fn squared_deviations(values: &[f64]) -> f64 {
    let Some(&first) = values.first() else { return 0.0 };
    let shifted: Vec<f64> = values.iter().map(|v| v - first).collect();
    let mean = mean(&shifted);
    shifted.iter().map(|v| (v - mean).powi(2)).sum()
}
