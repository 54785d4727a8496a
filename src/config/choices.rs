//! What a run's options choose from, where no other part of the program has it.

use clap::ValueEnum;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A published method; every part of it can be overridden.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// Black et al. 2023.
    Ddpo,
    /// DanceGRPO's and Flow-GRPO's objective (Xue et al. 2025, Liu et al. 2025).
    Grpo,
    /// Lee & Ye 2026.
    Pcpo,
}

/// How the learning rate goes on after its warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrScheduler {
    /// It stays.
    Constant,
    /// Half a cosine, to 0 after the run's last update.
    Cosine,
}

/// Whether the images of a group start from one latent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InitialNoise {
    /// One latent for all images of a group.
    Shared,
    /// One for each image.
    Own,
}

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
