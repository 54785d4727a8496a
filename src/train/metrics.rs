//! The records of a run, one line of metrics.jsonl each: written and read here and nowhere else.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use super::epoch_record::{EpochRecord, ScoreRecord, Seconds};
pub use super::evaluation_record::{EvaluationRecord, Measures};
pub use super::update_record::{StepRecord, Took, UpdateRecord};

/// What a run was computed by, in the file `about.json` of its folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct About {
    /// Its name and version.
    pub program: String,
    /// The device in one line.
    pub device: String,
}

/// One line of metrics.jsonl.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    /// After each update.
    Update(UpdateRecord),
    /// After each epoch.
    Epoch(EpochRecord),
    /// After each evaluation.
    Evaluation(EvaluationRecord),
    /// At the end of a run that was stopped between two updates.
    Suspended(SuspendedRecord),
}

/// An epoch that was stopped between two updates: where its time went until then. Dropped when the
/// run goes on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SuspendedRecord {
    /// Counted from 1.
    pub epoch: usize,
    /// In seconds, by phase.
    #[serde(flatten)]
    pub seconds: Seconds,
}

impl About {
    /// Of this program on a device.
    pub fn this(device: &str) -> Self {
        let (program, version) = (env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"));
        Self { program: format!("{program} {version}"), device: device.into() }
    }
}

/// Records as lines of text in JSON, as checkpoints hold them.
pub mod lines {
    use serde::de::Error;

    use super::{Deserialize, Deserializer, Record, Serializer, UpdateRecord};

    /// # Errors
    /// The serializer's own.
    pub fn serialize<S: Serializer>(updates: &[UpdateRecord], to: S) -> Result<S::Ok, S::Error> {
        let line = |u: &UpdateRecord| {
            serde_json::to_string(&Record::Update(u.clone())).expect("a record is JSON")
        };
        to.collect_seq(updates.iter().map(line))
    }

    /// # Errors
    /// When a line is not an update's.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<UpdateRecord>, D::Error> {
        let lines = Vec::<String>::deserialize(from)?;
        let update = |line: &String| match serde_json::from_str(line).map_err(D::Error::custom)? {
            Record::Update(update) => Ok(update),
            other => Err(D::Error::custom(format!("{other:?} is not an update"))),
        };
        lines.iter().map(update).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::update_record::TrainedStep;
    use super::*;
    use crate::ops::credit_reduce::StepStats;

    #[test]
    fn records_read_back_to_the_bit_and_nan_is_null() {
        let stats = StepStats { log_rho_mean: 0.1, loss: f32::NAN, ..Default::default() };
        let step = crate::schedule::Ddim::stable_diffusion().steps(7, 1.0).unwrap()[2];
        let took = Took { learning_rate: 1e-3, grad_norm: f64::INFINITY, calls: 0 };
        let trained = TrainedStep { step, stats, grad_norm: 0.1 + 0.2 };
        let update = UpdateRecord::new(1, 2, &[trained], took);
        assert!(update.skipped);
        let text = serde_json::to_string(&Record::Update(update.clone())).unwrap();
        assert!(text.contains("\"kind\":\"update\"") && text.contains("\"loss\":null"), "{text}");
        assert!(text.contains(&format!("\"t\":{}", step.t as u64)), "{text}");
        let Record::Update(read) = serde_json::from_str(&text).unwrap() else { panic!("{text}") };
        assert_eq!(serde_json::to_string(&Record::Update(read)).unwrap(), text);
        let seconds = Seconds { rollout: 0.1 + 0.2, ..Default::default() };
        let suspended = Record::Suspended(SuspendedRecord { epoch: 3, seconds });
        let text = serde_json::to_string(&suspended).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), suspended);
    }
}
