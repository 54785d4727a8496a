//! How far two results are apart.

/// max |a - b|; infinite where a value is not finite, which a maximum alone would pass over, or one
/// side is longer.
pub fn largest_error(found: &[f32], expected: &[f32]) -> f64 {
    if found.len() != expected.len() || found.iter().chain(expected).any(|v| !v.is_finite()) {
        return f64::INFINITY;
    }
    found
        .iter()
        .zip(expected)
        .map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs())
        .fold(0.0, f64::max)
}

/// max |a - b| / std(b); infinite where either side holds a value that is not finite.
pub fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    let n = expected.len() as f64;
    let mean = expected.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let std = (expected.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n).sqrt();
    match largest_error(found, expected) {
        worst if worst.is_finite() && worst > 0.0 => worst / std,
        worst => worst,
    }
}
