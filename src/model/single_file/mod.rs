//! stub
use std::path::Path;
use anyhow::{Result, bail};
use serde_json::Value;
use super::component::Component;
use super::family::Family;
use crate::schedule::PredictionType;
pub struct SingleFile { pub family: Family }
impl SingleFile {
    pub fn open(path: &Path, _config: Option<&Path>) -> Result<Self> { bail!("{}", path.display()) }
    pub fn has(&self, _part: &str) -> bool { false }
    pub fn part(&self, part: &str) -> Result<Component> { bail!("{part}") }
    pub fn is_open_clip(&self, _encoder: &str) -> bool { false }
    pub fn scheduler(&self, _p: Option<PredictionType>) -> Result<Value> { bail!("") }
    pub fn add_to_hash(&self, _h: &mut sha2::Sha256) {}
}
pub fn vae_of(path: &Path, _f: Family) -> Result<Component> { bail!("{}", path.display()) }
pub fn text_encoder_of(path: &Path, _f: Family) -> Result<Component> { bail!("{}", path.display()) }
