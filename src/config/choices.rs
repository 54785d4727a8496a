//! What a run's options choose from, where no other part of the program has it.

use clap::ValueEnum;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A published method; every part of it can be overridden.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// Black et al. 2023.
    Ddpo,
    /// DanceGRPO's and Flow-GRPO's objective (Xue et al. 2025, Liu et al. 2025).
    Grpo,
    /// PCPO's objective with the sampler's own credit.
    LogHinge,
    /// Lee & Ye 2026.
    Pcpo,
    /// The same as its code for 50 steps of diffusion has it.
    Released,
    /// Reward Score Matching's branches and credit (arXiv 2604.17415).
    Branch,
    /// Its branches with PCPO's credit.
    BranchPcpo,
    /// DiffusionNFT (arXiv 2509.16117).
    Nft,
    /// Advantage Weighted Matching (arXiv 2509.25050).
    Awm,
}

impl Preset {
    /// Whether its images are branches of a few trajectories.
    pub fn branches(self) -> bool {
        match self {
            Self::Branch | Self::BranchPcpo => true,
            Self::Ddpo
            | Self::Grpo
            | Self::LogHinge
            | Self::Pcpo
            | Self::Released
            | Self::Nft
            | Self::Awm => false,
        }
    }

    /// Whether it is of the forward process.
    pub fn forward(self) -> bool {
        matches!(self, Self::Nft | Self::Awm)
    }
}

/// What is minimised: of the steps of a trajectory, or of the forward process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// PPO's (DDPO, DanceGRPO, Flow-GRPO).
    PpoClip,
    /// PCPO's ablation.
    LogRatio,
    /// PCPO's.
    LogHinge,
    /// DiffusionNFT's (arXiv 2509.16117): of the forward process, sampled by an old policy.
    Nft,
    /// Advantage Weighted Matching's (arXiv 2509.25050): of the forward process.
    Awm,
}

impl Objective {
    /// Whether it is of the forward process.
    pub fn forward(self) -> bool {
        match self {
            Self::PpoClip | Self::LogRatio | Self::LogHinge => false,
            Self::Nft | Self::Awm => true,
        }
    }
}

/// How an objective of the forward process lets its old policy follow after an epoch, `n` optimizer
/// steps into the run: old = d old + (1 - d) adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum OldDecay {
    /// d = 0: it is the adapter.
    #[value(name = "type-0")]
    #[serde(rename = "type-0")]
    Type0,
    /// DiffusionNFT: d = min(0.001 n, 0.5).
    #[value(name = "type-1")]
    #[serde(rename = "type-1")]
    Type1,
    /// DiffusionNFT for text in pictures: d = min(0.0075 (n - 75), 0.999), 0 before.
    #[value(name = "type-2")]
    #[serde(rename = "type-2")]
    Type2,
    /// AWM: d = min(0.001 n, 0.3).
    #[value(name = "awm")]
    #[serde(rename = "awm")]
    Awm,
}

/// Which branches of a step have their rewards compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BranchGroup {
    /// Those of one root.
    Root,
    /// Those of all roots of a prompt.
    Prompt,
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

/// What saves memory and costs something: on, off, or as the estimate of the memory has it. In a
/// file `"auto"`, `true` or `false`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Off where the estimate of the memory without it leaves room.
    Auto,
    /// On.
    True,
    /// Off.
    False,
}

impl From<bool> for Switch {
    fn from(on: bool) -> Self {
        if on { Self::True } else { Self::False }
    }
}

impl Serialize for Switch {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => to.serialize_str("auto"),
            Self::True => to.serialize_bool(true),
            Self::False => to.serialize_bool(false),
        }
    }
}

impl<'de> Deserialize<'de> for Switch {
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
