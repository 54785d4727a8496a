//! A job: what a run is made of.

use std::path::PathBuf;

use anyhow::{Result, ensure};

use crate::config::{Options, Settings};
use crate::reward::{Reward, RewardSpec};
use crate::sampling::world::World;

/// What is to be trained, where the run writes, and what it starts from.
pub struct Job {
    pub(crate) settings: Settings,
    pub(crate) out: PathBuf,
    pub(crate) resume: bool,
    pub(crate) dump: Option<DumpRequest>,
    pub(crate) reward: Option<Box<dyn Reward>>,
    pub(crate) world: World,
}

impl Job {
    /// A new run in the folder `out`, which must not exist or be empty.
    pub fn new(settings: Settings, out: impl Into<PathBuf>) -> Self {
        let (out, world) = (out.into(), World::default());
        Self { settings, out, resume: false, dump: None, reward: None, world }
    }

    /// The run in the folder `out` goes on with the settings that it was begun with. Options that
    /// alter none of its numbers, such as `epochs`, may be given anew.
    ///
    /// # Errors
    /// When the folder is not that of a run, or another option is given.
    pub fn resume(options: &Options, out: impl Into<PathBuf>) -> Result<Self> {
        let out = out.into();
        Ok(Self { resume: true, ..Self::new(options.resumed(&out)?, out) })
    }

    /// What the run is told.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Scores pictures by a reward of one's own in place of the settings'; `name` is what the run's
    /// folder calls it.
    pub fn with_reward(mut self, name: &str, reward: impl Reward + 'static) -> Self {
        self.settings.reward = vec![RewardSpec::named(name)];
        self.reward = Some(Box::new(reward));
        self
    }

    /// As one of several processes, which all run the same job.
    #[doc(hidden)]
    pub fn with_world(mut self, world: World) -> Self {
        self.world = world;
        self
    }

    /// Writes one update whole, so that it can be recomputed outside.
    #[doc(hidden)]
    pub fn with_dump(mut self, dump: Option<DumpRequest>) -> Self {
        self.dump = dump;
        self
    }
}

/// Which update is written whole, and to which file.
#[derive(Clone, Debug, PartialEq)]
pub struct DumpRequest {
    /// Where it is written.
    pub file: PathBuf,
    /// Counted from 1 over the run.
    pub update: usize,
}

impl std::str::FromStr for DumpRequest {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |k: &str| !k.is_empty() && k.bytes().all(|b| b.is_ascii_digit());
        let (file, update) = match text.rsplit_once(':') {
            Some((file, k)) if number(k) => (file, k.parse::<usize>()?),
            _ => (text, 1),
        };
        ensure!(
            update > 0 && !file.is_empty(),
            "--dump-update {text}: give FILE or FILE:K, with K counted from 1"
        );
        Ok(Self { file: file.into(), update })
    }
}
