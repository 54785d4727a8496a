//! What an evaluation leaves in metrics.jsonl.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::measure::collapse::{Finding, Level};

/// Fixed prompts and noise after an epoch; epoch 0 is the beginning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluationRecord {
    /// Complete epochs.
    pub epoch: usize,
    /// Mean reward of the pictures, of several their weighted sum.
    pub reward_mean: f64,
    /// The mean of each reward, trained on or watched, by its name as it was given.
    #[serde(default)]
    pub rewards: BTreeMap<String, f64>,
    /// What a whole evaluation measures; one row of pictures is not measured.
    #[serde(flatten)]
    pub measures: Option<Measures>,
    /// The signals that are out of bounds, in this evaluation alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub out_of_bounds: Vec<Finding>,
    /// The signals that were out of bounds in the evaluation before as well.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub collapse: Vec<Finding>,
}

/// What is measured of an evaluation's pictures; null where it cannot be had.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measures {
    /// Pictures of the evaluation.
    pub pictures: usize,
    /// The mean reward of each prompt, of several rewards their weighted sum.
    pub reward_by_prompt: Vec<f64>,
    /// The mean of each reward for each prompt.
    pub rewards_by_prompt: BTreeMap<String, Vec<f64>>,
    /// Spread of colour and light over the pictures (PVS).
    pub pvs: Option<f64>,
    /// Share of channels at 0 or 255.
    pub saturated: Option<f64>,
    /// Mean saturation, 0 to 1.
    pub saturation: Option<f64>,
    /// Variance of the Laplacian: edges.
    pub laplacian_variance: Option<f64>,
    /// Mean size as JPEG in kB.
    pub jpeg_kb: Option<f64>,
    /// Mean of 1 - cosine between the pictures of a prompt.
    pub pairwise_cosine_distance: Option<f64>,
    /// Mean Vendi score of a prompt's pictures.
    pub vendi: Option<f64>,
    /// Frechet distance to the pictures of the first evaluation: compared only among as many.
    #[serde(default)]
    pub frechet: Option<f64>,
    /// Kernel distances to the pictures of the first evaluation.
    pub kid: Option<f64>,
    /// The same by CMMD.
    pub cmmd: Option<f64>,
    /// Mean KL of trajectories to the model without its adapter.
    pub kl: Option<f64>,
}

impl EvaluationRecord {
    /// Why the run is to end, where its pictures have collapsed.
    pub fn reason_to_stop(&self) -> Option<&str> {
        let stop = |found: &&Finding| found.level == Level::Stop;
        self.collapse.iter().find(stop).map(|found| found.text.as_str())
    }
}
