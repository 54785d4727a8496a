//! Spacings of a flow's times.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// How the times from 1 to 0 are spaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Grid {
    /// The trainers': N equal intervals from 1 to 0, shifted once (docs/METHOD.md, 6b). Published
    /// zetas belong to it.
    Shifted,
    /// The pipelines': FlowMatchEulerDiscreteScheduler's, which for SD3 shifts twice and ends in a
    /// jump to 0.
    Diffusers,
}
