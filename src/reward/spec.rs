//! What `--reward` says: a reward by its name, with a weight in front where it is not 1.

use anyhow::{Result, ensure};
use serde::{Serialize, Serializer};

use super::address;

/// A reward as it is given, `NAME`, `NAME:ARGUMENT` or `WEIGHT*..`.
#[derive(Clone, Debug, PartialEq)]
pub struct RewardSpec {
    /// The flag that names it.
    pub flag: &'static str,
    /// As it was given.
    pub given: String,
    /// The same for people and records: without a password that stands in a URL.
    pub shown: String,
    /// Its weight among several.
    pub weight: f64,
    /// What stands behind the weight.
    pub reward: String,
    /// Whether it is a library user's own, and the name means nothing.
    pub own: bool,
}

impl RewardSpec {
    /// Reads what `flag` says.
    ///
    /// # Errors
    /// When the weight is zero or not finite.
    pub fn parse(flag: &'static str, given: &str) -> Result<Self> {
        let weighted = given.split_once('*').and_then(|(weight, reward)| {
            Some((weight.trim().parse::<f64>().ok()?, reward.trim_start()))
        });
        let (weight, reward) = weighted.unwrap_or((1.0, given));
        let shown = address::shown(given);
        ensure!(
            weight.is_finite() && weight != 0.0,
            "{flag} {shown}: the weight {weight} must be a finite number other than 0; --watch \
             scores without training"
        );
        let (given, reward) = (given.to_string(), reward.to_string());
        Ok(Self { flag, given, shown, weight, reward, own: false })
    }

    /// A reward of one's own, of weight 1.
    pub fn named(name: &str) -> Self {
        let name = name.to_string();
        let (given, shown) = (name.clone(), name.clone());
        Self { flag: "--reward", given, shown, weight: 1.0, reward: name, own: true }
    }
}

impl Serialize for RewardSpec {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.given)
    }
}
