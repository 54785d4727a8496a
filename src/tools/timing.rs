//! Times of several paths taken in turns, and the rows of their table.

use std::time::Instant;

use anyhow::Result;
use burn::tensor::Tensor;

use crate::device::Compute;
use crate::device::gpu::buffer;

/// The head of a table of [`row`]s.
pub fn header() -> String {
    format!(
        "{:<24} {:>16} {:>12} {:>14} {:>12} {:>12}",
        "operation", "batch x latent", "shader ms", "reference ms", "Burn ms", "Burn/shader"
    )
}

/// Which operations a table has: those that are named, or all.
#[derive(Clone, Debug, Default)]
pub struct Selection(pub Vec<String>);

impl Selection {
    pub fn takes(&self, operation: &str) -> bool {
        self.0.is_empty() || self.0.iter().any(|name| name == operation)
    }
}

/// One line of a table: seconds of (shader, CPU reference, Burn operations).
pub fn row(operation: &str, size: &str, [shader, reference, burn]: [f64; 3]) -> String {
    let ratio = burn / shader;
    let [shader, reference, burn] = [shader, reference, burn].map(|seconds| 1e3 * seconds);
    format!(
        "{operation:<24} {size:>16} {shader:>12.3} {reference:>14.3} {burn:>12.3} {ratio:>11.1}x"
    )
}

/// Makes a result on a GPU: fusion computes nothing that nobody uses.
pub(super) fn force<const D: usize>(compute: &Compute, result: &Tensor<D>) {
    if compute.gpu.is_some() {
        drop(buffer(result));
    }
}

/// Runs of a path in a row: each is measured warm, as in a loop.
const ROW: usize = 5;

/// Seconds of a run from which on it is timed alone: what it touches is more than a cache holds.
const LONG: f64 = 0.05;

/// Median seconds of each path over at least two rounds and 0.2 s a path. In a round each path runs
/// once for warmth and [`ROW`] times for its time, so that a machine that slows down slows all of
/// them. Paths of which one is long take five rounds of one run each.
pub(super) fn medians<const N: usize>(
    mut paths: [&mut dyn FnMut() -> Result<()>; N],
) -> Result<[f64; N]> {
    let (mut times, start) = ([const { Vec::new() }; N], Instant::now());
    let timed = |path: &mut dyn FnMut() -> Result<()>| {
        let one = Instant::now();
        path()?;
        anyhow::Ok(one.elapsed().as_secs_f64())
    };
    let mut longest = 0f64;
    for path in &mut paths {
        // The first run compiles what it needs.
        timed(path)?;
        longest = longest.max(timed(path)?);
    }
    if longest > LONG {
        for _ in 0..ROW {
            for (path, times) in paths.iter_mut().zip(&mut times) {
                times.push(timed(path)?);
            }
        }
        return Ok(times.map(median));
    }
    while times[0].len() < 2 * ROW
        || (start.elapsed().as_secs_f64() < 0.2 * N as f64 && times[0].len() < 40 * ROW)
    {
        for (path, times) in paths.iter_mut().zip(&mut times) {
            path()?;
            for _ in 0..ROW {
                times.push(timed(path)?);
            }
        }
    }
    Ok(times.map(median))
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
