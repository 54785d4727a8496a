//! Fields of a scheduler's configuration.

use anyhow::{Result, anyhow, ensure};
use serde_json::Value;

pub(super) fn number(config: &Value, field: &str, default: f64) -> Result<f64> {
    match &config[field] {
        Value::Null => Ok(default),
        v => v
            .as_f64()
            .ok_or_else(|| anyhow!("scheduler_config.json: {field} = {v} is not a number")),
    }
}

pub(super) fn whole(config: &Value, field: &str, default: usize) -> Result<usize> {
    /// More than any schedule has, and little enough to hold.
    const MOST: f64 = 1e6;
    let n = number(config, field, default as f64)?;
    ensure!(
        n.fract() == 0.0 && (0.0..=MOST).contains(&n),
        "scheduler_config.json: {field} = {n} is not a whole number of at most {MOST}"
    );
    Ok(n as usize)
}

pub(super) fn flag(config: &Value, field: &str, default: bool) -> Result<bool> {
    match &config[field] {
        Value::Null => Ok(default),
        v => v
            .as_bool()
            .ok_or_else(|| anyhow!("scheduler_config.json: {field} = {v} is not true or false")),
    }
}
