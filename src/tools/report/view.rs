//! What the page is made of: a run as its folder has it, and the parts of the page.

use super::history::History;
use super::settings::RunSettings;
use crate::train::metrics::{About, Record};

/// All that the page of a run shows.
#[derive(Clone, Debug, Default)]
pub struct RunView {
    /// The folder's name.
    pub title: String,
    /// The lines of metrics.jsonl.
    pub records: Vec<Record>,
    /// The text of settings.toml, empty where there is none.
    pub settings: String,
    /// What the run was computed by, where that was written down.
    pub about: Option<About>,
    /// The grids of the evaluations in order of their epochs, then pictures asked for by hand.
    pub pictures: Vec<Picture>,
}

/// A picture of a run, ready to stand in a page.
#[derive(Clone, Debug, Default)]
pub struct Picture {
    /// What it shows, in words.
    pub label: String,
    /// Complete epochs when it was drawn; `None` for one that was asked for by hand.
    pub epoch: Option<usize>,
    /// `data:image/jpeg;base64,..`
    pub data_uri: String,
    /// In pixels, as it stands in `data_uri`.
    pub width: u32,
    /// In pixels, as it stands in `data_uri`.
    pub height: u32,
}

/// A part of the page under a heading of its own.
pub struct Section {
    /// Where links within the page lead.
    pub id: &'static str,
    pub title: &'static str,
    /// How what follows is read, in HTML.
    pub how: String,
    /// HTML.
    pub content: String,
}

/// A run as its parts see it.
pub struct Run<'a> {
    pub history: History<'a>,
    pub settings: RunSettings,
    pub view: &'a RunView,
}
