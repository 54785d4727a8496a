//! A run's records as TensorBoard's event files, in the folder `tensorboard` of the run: each
//! number under the name that metrics.jsonl gives it, `epoch/reward_mean`, `evaluation/pvs`,
//! `update/grad_norm`, and the picture grids as `grid`. The step is the epoch, of updates the
//! update.

mod events;

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use self::events::EventFile;
use crate::train::metrics::Record;
use crate::train::run_folder::open_grid;

/// Writes the records that are new.
#[derive(Default)]
pub struct TensorBoard {
    file: Option<EventFile>,
    /// How many records are in the file, which are the run's first, and the last of them in JSON.
    written: usize,
    last: String,
}

impl TensorBoard {
    /// Brings the event file of a run's folder up to its records. What was written before this
    /// process, or before the run went back, is written anew.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn write(&mut self, folder: &Path, records: &[Record]) -> Result<()> {
        let last = |count: usize| match count.checked_sub(1).and_then(|i| records.get(i)) {
            Some(record) => serde_json::to_string(record).context("a record"),
            None => Ok(String::new()),
        };
        // A run that went back has fewer records, or others in their place.
        if self.written > records.len() || last(self.written)? != self.last {
            *self = Self::default();
        }
        let mut file = match self.file.take() {
            Some(file) => file,
            None => EventFile::create(&folder.join("tensorboard"))?,
        };
        for record in &records[self.written..] {
            write(&mut file, folder, record)?;
        }
        file.flush()?;
        *self = Self { file: Some(file), written: records.len(), last: last(records.len())? };
        Ok(())
    }
}

fn write(file: &mut EventFile, folder: &Path, record: &Record) -> Result<()> {
    let step = match record {
        Record::Update(update) => update.update,
        Record::Epoch(epoch) => epoch.epoch,
        Record::Evaluation(evaluation) => evaluation.epoch,
        // The time of an epoch that goes on.
        Record::Suspended(_) => return Ok(()),
    };
    let Value::Object(mut fields) = serde_json::to_value(record).context("a record")? else {
        return Ok(());
    };
    let kind = fields.remove("kind").and_then(|kind| kind.as_str().map(String::from));
    scalars(file, &kind.unwrap_or_default(), step as u64, &Value::Object(fields))?;
    if matches!(record, Record::Evaluation(_)) {
        // Of an epoch that was gone back from there is no picture any more.
        if let Ok(grid) = open_grid(folder, step) {
            file.picture("grid", step as u64, &grid)?;
        }
    }
    Ok(())
}

/// The numbers of a value, each under its path.
fn scalars(file: &mut EventFile, tag: &str, step: u64, value: &Value) -> Result<()> {
    match value {
        Value::Number(number) => file.scalar(tag, step, number.as_f64().unwrap_or(f64::NAN)),
        Value::Object(fields) => fields.iter().try_for_each(|(name, value)| {
            let counted = ["epoch", "update"].contains(&name.as_str()) && value.is_u64();
            if counted { Ok(()) } else { scalars(file, &format!("{tag}/{name}"), step, value) }
        }),
        Value::Bool(yes) => file.scalar(tag, step, f64::from(u8::from(*yes))),
        Value::Null | Value::Array(_) | Value::String(_) => Ok(()),
    }
}
