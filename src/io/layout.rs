//! Weights under other names and in other layouts: nothing is read, only the list of tensors
//! changes.

use anyhow::{Result, ensure};

use super::weights::{Entry, Weights, below};

impl Weights {
    /// Gives a tensor another name.
    pub fn rename(&mut self, from: &str, to: &str) {
        if let Some(entry) = self.entries.remove(from) {
            self.entries.insert(to.to_string(), entry);
        }
    }

    /// Reads a matrix transposed from now on.
    pub fn transpose(&mut self, name: &str) {
        if let Some(e) = self.entries.get_mut(name).filter(|e| e.shape.len() == 2) {
            e.shape.swap(0, 1);
            e.transposed = !e.transposed;
        }
    }

    /// Reads the second half of a tensor's rows first from now on.
    pub fn swap_halves(&mut self, name: &str) {
        let even = |e: &&mut Entry| e.shape.first().is_some_and(|rows| rows.is_multiple_of(2));
        if let Some(e) = self.entries.get_mut(name).filter(even) {
            e.swapped = !e.swapped;
        }
    }

    /// Leaves out the dimensions of one at the end of a tensor's shape that go beyond two: 1x1
    /// convolutions become linear layers.
    pub fn flatten(&mut self, name: &str) {
        if let Some(e) = self.entries.get_mut(name) {
            while e.shape.len() > 2 && e.shape.last() == Some(&1) {
                e.shape.pop();
            }
        }
    }

    /// The tensors below a prefix, by their names without it.
    pub fn view(&self, prefix: &str) -> Self {
        let mut view = self.clone();
        view.entries = below(prefix, &self.entries);
        view
    }

    /// The names that begin with a prefix, in their order.
    pub fn names_from<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        let from = self.entries.range(prefix.to_string()..).map(|(name, _)| name.as_str());
        from.take_while(move |name| name.starts_with(prefix))
    }

    /// Leaves out the tensors that are not wanted.
    pub fn keep(&mut self, wanted: impl Fn(&str) -> bool) {
        self.entries.retain(|name, _| wanted(name));
    }

    /// Splits a tensor along its first dimension into equal parts, which take its place.
    ///
    /// # Errors
    /// When its rows cannot be dealt out evenly.
    pub fn split(&mut self, name: &str, parts: &[String]) -> Result<()> {
        let shares: Vec<(String, usize)> = parts.iter().map(|part| (part.clone(), 1)).collect();
        self.split_by(name, &shares)
    }

    /// The same with the share of rows that each part has.
    ///
    /// # Errors
    /// As [`Self::split`].
    pub fn split_by(&mut self, name: &str, parts: &[(String, usize)]) -> Result<()> {
        let Some(entry) = self.entries.remove(name) else { return Ok(()) };
        let rows = entry.shape.first().copied().unwrap_or_default();
        let shares: usize = parts.iter().map(|(_, share)| share).sum();
        ensure!(
            rows > 0 && rows.is_multiple_of(shares) && entry.plain(),
            "{}: tensor {name} has shape {:?}; its rows must be a multiple of {shares}",
            self.source().display(),
            entry.shape
        );
        let bytes = entry.range.len() / shares;
        let mut start = entry.range.start;
        for (part, share) in parts {
            let mut piece = entry.clone();
            piece.shape[0] = rows / shares * share;
            piece.range = start..start + share * bytes;
            start = piece.range.end;
            self.entries.insert(part.clone(), piece);
        }
        Ok(())
    }
}
