//! Whether an update holds the activations of all blocks or computes them again.

use clap::ValueEnum;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Activation checkpointing (Chen et al. 2016): one block's activations at a time, for one more
/// forward pass. In a file `"auto"`, `true` or `false`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Checkpointing {
    /// Off where the estimate of the memory without it leaves room.
    Auto,
    /// One block's activations at a time.
    True,
    /// All blocks' at once.
    False,
}

impl From<bool> for Checkpointing {
    fn from(on: bool) -> Self {
        if on { Self::True } else { Self::False }
    }
}

impl Serialize for Checkpointing {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => to.serialize_str("auto"),
            Self::True => to.serialize_bool(true),
            Self::False => to.serialize_bool(false),
        }
    }
}

impl<'de> Deserialize<'de> for Checkpointing {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "lowercase")]
        enum Word {
            Auto,
        }
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "\"auto\", true or false")]
        enum Value {
            Bool(bool),
            Word(Word),
        }
        Ok(match Value::deserialize(from)? {
            Value::Bool(on) => on.into(),
            Value::Word(Word::Auto) => Self::Auto,
        })
    }
}
