//! The numbers that flags take: every command checks them here, whether a flag or a file said them.

use anyhow::{Result, bail, ensure};

use crate::model::conditioning::{MicroConditioning, TIME_IDS, TimeIds};
use crate::model::text::tokenizer::MOST_TOKENS;

/// More images, steps or epochs than anybody means; far below what would overflow.
pub const MOST: usize = 1_000_000;
/// A larger rank than any layer has use for.
pub const MOST_RANK: usize = 16_384;

/// What a number may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Range {
    Finite,
    Positive,
    NotNegative,
    /// Positive and less than this.
    Below(f64),
}

/// Checks a number.
///
/// # Errors
/// When it is not finite or out of range, or no number in f32; names the flag and the value.
pub fn number(flag: &str, value: f64, range: Range) -> Result<()> {
    ensure!(value.is_finite(), "{flag} {value}: must be a finite number");
    // What computes takes f32, in which a device may leave out what is below its smallest.
    let size = value.abs();
    ensure!(
        size <= f64::from(f32::MAX),
        "{flag} {value:e}: must be a finite number in f32, at most {:e}",
        f32::MAX
    );
    ensure!(
        size == 0.0 || size >= f64::from(f32::MIN_POSITIVE),
        "{flag} {value:e}: is 0 in f32; give 0, or at least {:e}",
        f32::MIN_POSITIVE
    );
    match range {
        Range::Finite => {}
        Range::Positive => ensure!(value > 0.0, "{flag} {value}: must be a positive number"),
        Range::NotNegative => ensure!(value >= 0.0, "{flag} {value}: must be zero or positive"),
        Range::Below(most) => ensure!(
            value > 0.0 && value < most,
            "{flag} {value}: must be positive and less than {most}"
        ),
    }
    Ok(())
}

/// Checks a number where one is given.
///
/// # Errors
/// As [`number`].
pub fn optional(flag: &str, value: Option<f64>, range: Range) -> Result<()> {
    value.map_or(Ok(()), |v| number(flag, v, range))
}

/// Checks how many there are of something: from 1 to `most`.
///
/// # Errors
/// Names the flag and the value.
pub fn count(flag: &str, value: usize, most: usize) -> Result<()> {
    ensure!(value > 0, "{flag} {value}: must be at least 1");
    ensure!(value <= most, "{flag} {value}: must be at most {most}");
    Ok(())
}

/// # Errors
/// When a number does not fit the integers of TOML, in which a run is saved.
pub fn fits_toml(flag: &str, value: u64) -> Result<()> {
    ensure!(i64::try_from(value).is_ok(), "{flag} {value}: must be less than 2^63");
    Ok(())
}

/// What SDXL is told of sizes, of `--time-ids` and `--negative-time-ids`.
///
/// # Errors
/// Names the flag whose numbers are not six, or not finite.
pub fn micro(given: Option<&[f64]>, negative: Option<&[f64]>) -> Result<MicroConditioning> {
    let ids = |flag: &str, values: Option<&[f64]>| {
        let Some(values) = values else { return Ok(None) };
        values.iter().try_for_each(|v| number(flag, *v, Range::Finite))?;
        let ids: Vec<f32> = values.iter().map(|v| *v as f32).collect();
        let ids: Result<TimeIds, _> = ids.try_into();
        let Ok(ids) = ids else {
            bail!(
                "{flag}: {} numbers are given; give {TIME_IDS}: original height and width, top and \
                 left of the crop, height and width that are wanted",
                values.len()
            )
        };
        anyhow::Ok(Some(ids))
    };
    Ok(MicroConditioning {
        given: ids("--time-ids", given)?,
        negative: ids("--negative-time-ids", negative)?,
    })
}

/// Checks the number of T5 tokens, which may be none.
///
/// # Errors
/// When there are more than T5 takes.
pub fn sequence_length(value: usize) -> Result<()> {
    ensure!(value <= MOST_TOKENS, "--max-sequence-length {value}: must be at most {MOST_TOKENS}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_are_not_finite_or_out_of_range_are_refused() {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0] {
            for range in [Range::Positive, Range::NotNegative, Range::Below(1.0)] {
                let error = number("--x", bad, range).unwrap_err().to_string();
                assert!(error.starts_with("--x "), "{error}");
            }
        }
        assert!(number("--x", 0.0, Range::NotNegative).is_ok());
        assert!(number("--x", 0.0, Range::Positive).is_err());
        assert!(number("--x", 1.0, Range::Below(1.0)).is_err());
        assert!(optional("--x", None, Range::Positive).is_ok());
        assert!(count("--x", 0, 5).is_err() && count("--x", 6, 5).is_err());
    }
}
