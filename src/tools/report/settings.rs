//! What the page reads of settings.toml, which may be older than the program or not whole.

use toml::{Table, Value};

use super::history::History;
use crate::reward::RewardSpec;
use crate::train::watch::best_of;

/// The settings of a run, as far as they can be read.
pub struct RunSettings {
    table: Option<Table>,
}

impl RunSettings {
    pub fn new(text: &str) -> Self {
        let mut table = toml::from_str::<Table>(text).ok();
        for key in ["reward", "watch"] {
            table.as_mut().and_then(|t| t.get_mut(key)).into_iter().for_each(hide_passwords);
        }
        Self { table }
    }

    /// A setting as text.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.table.as_ref()?.get(key)?.as_str()
    }

    /// A setting that is one text or a list of them.
    pub fn texts(&self, key: &str) -> Vec<&str> {
        match self.table.as_ref().and_then(|t| t.get(key)) {
            Some(Value::String(one)) => vec![one],
            Some(Value::Array(several)) => several.iter().filter_map(Value::as_str).collect(),
            Some(_) | None => Vec::new(),
        }
    }

    pub fn epochs(&self) -> Option<usize> {
        self.table.as_ref()?.get("epochs")?.as_integer()?.try_into().ok()
    }

    pub fn flag(&self, key: &str) -> bool {
        self.table.as_ref().and_then(|t| t.get(key)?.as_bool()).unwrap_or(false)
    }

    /// The whole file as it may be passed on: without the passwords of rewards' addresses.
    pub fn shown(&self) -> Option<String> {
        self.table.as_ref().map(Table::to_string)
    }

    /// The epoch of the best adapter.
    pub fn best_epoch(&self, history: &History) -> Option<usize> {
        let watched = self.texts("watch").first().copied();
        let watched = watched.filter(|_| self.texts("eval-prompt").is_empty());
        best_of(history.evaluations.iter().copied(), watched)
    }
}

/// Rewards by the names that the records have for them.
fn hide_passwords(value: &mut Value) {
    match value {
        Value::String(given) => {
            // What cannot be read as a reward may hold a password all the same.
            let shown = RewardSpec::parse("--reward", given).map(|spec| spec.shown);
            *given = shown.unwrap_or_else(|_| "***".into());
        }
        Value::Array(several) => several.iter_mut().for_each(hide_passwords),
        Value::Integer(_)
        | Value::Float(_)
        | Value::Boolean(_)
        | Value::Datetime(_)
        | Value::Table(_) => {}
    }
}
