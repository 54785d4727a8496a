//! What `--reward` says: a reward by its name, with a weight in front where it is not 1.

use anyhow::{Result, ensure};
use serde::{Serialize, Serializer};

/// A reward as it is given, `NAME`, `NAME:ARGUMENT` or `WEIGHT*..`.
#[derive(Clone, Debug, PartialEq)]
pub struct RewardSpec {
    /// As it was given.
    pub given: String,
    /// Its weight among several.
    pub weight: f64,
    /// What stands behind the weight.
    pub reward: String,
}

impl RewardSpec {
    /// Reads what `flag` says.
    ///
    /// # Errors
    /// When the weight is zero or not finite.
    pub fn parse(flag: &str, given: &str) -> Result<Self> {
        let weighted = given.split_once('*').and_then(|(weight, reward)| {
            Some((weight.trim().parse::<f64>().ok()?, reward.trim_start()))
        });
        let (weight, reward) = weighted.unwrap_or((1.0, given));
        ensure!(
            weight.is_finite() && weight != 0.0,
            "{flag} {given}: the weight {weight} must be a finite number other than 0; --watch \
             scores without training"
        );
        Ok(Self { given: given.to_string(), weight, reward: reward.to_string() })
    }

    /// A reward of weight 1 under a name of its own.
    pub fn named(name: &str) -> Self {
        Self { given: name.to_string(), weight: 1.0, reward: name.to_string() }
    }
}

impl Serialize for RewardSpec {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.given)
    }
}
