//! What a reward is made with.

use anyhow::{Result, ensure};

use super::remote::RemoteOptions;
use crate::device::Compute;
use crate::model::Storage;

/// Where rewards compute, and what they are told besides their names.
pub struct RewardContext {
    /// Where reward models compute.
    pub compute: Compute,
    /// How the run stores frozen weights.
    pub storage: Storage,
    /// How servers are asked.
    pub remote: RemoteOptions,
}

/// A reward that is being made.
pub struct Opening<'a> {
    /// As it was given, without its weight.
    pub spec: &'a str,
    /// What stands behind the colon.
    pub argument: &'a str,
    /// Where it computes.
    pub compute: &'a Compute,
    storage: Storage,
    /// How servers are asked.
    pub remote: &'a RemoteOptions,
}

impl<'a> Opening<'a> {
    pub(super) fn new(spec: &'a str, argument: &'a str, context: &'a RewardContext) -> Self {
        let RewardContext { compute, storage, remote } = context;
        Self { spec, argument, compute, storage: *storage, remote }
    }

    /// What errors begin with.
    pub fn name(&self) -> String {
        format!("--reward {}", self.spec)
    }

    /// What stands behind the colon, where something must.
    ///
    /// # Errors
    /// When nothing does.
    pub fn needs(&self, what: &str) -> Result<&'a str> {
        let name = self.spec.split(':').next().unwrap_or_default();
        ensure!(
            !self.argument.trim().is_empty(),
            "--reward {}: names nothing; write {name}:{what}",
            self.spec
        );
        Ok(self.argument)
    }

    /// How a reward model stores its weights.
    pub fn storage(&self) -> Storage {
        self.storage.unquantised()
    }
}
