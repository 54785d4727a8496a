//! The pages as HTML. Whatever comes from the disk is escaped; what `render` writes is HTML.

use std::path::Path;

use anyhow::Result;
use base64::Engine;
use html_escape::encode_text;
use sha2::{Digest, Sha256};

use super::route::Route;
use super::runs::Run;
use crate::train::wishes::{WISHES, Wish};

/// Looks for news and presses buttons.
const SCRIPT: &str = include_str!("page.js");
/// The style of what is around the run.
const STYLE: &str = include_str!("page.css");

/// What is inside `<main>` of a run's page: HTML, with pictures as data URIs, from its folder.
pub type Render = fn(&Path) -> Result<String>;

/// How pages look.
#[derive(Clone, Copy)]
pub struct Look {
    pub render: Render,
    /// The style sheet of what `render` writes.
    pub style: &'static str,
    /// The script of what `render` writes, or nothing. Where it has a function `showGrids`, that is
    /// called when the run's elements were replaced; its sliders then get an `input` event.
    pub script: &'static str,
}

/// What all pages have in common.
pub struct Page {
    look: Look,
    policy: String,
}

impl Page {
    pub fn new(look: Look) -> Self {
        let hash = |script: &str| {
            let digest = Sha256::digest(script);
            format!("'sha256-{}'", base64::engine::general_purpose::STANDARD.encode(digest))
        };
        // Scripts are known by their content: what a run's files smuggle in does not run.
        let policy = format!(
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {} {}; \
             connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
            hash(look.script),
            hash(SCRIPT)
        );
        Self { look, policy }
    }

    /// `Content-Security-Policy`.
    pub fn policy(&self) -> &str {
        &self.policy
    }

    /// A whole page, of a run or of the list.
    pub fn whole(&self, run: Option<&str>, version: &str, main: &str) -> String {
        let title = run.map_or("Runs".into(), |name| encode_text(name));
        let base = Route::base(run);
        let back = if run.is_some() { "<nav><a href=\"/\">All runs</a></nav>" } else { "" };
        let Look { style, script, .. } = self.look;
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta \
             name=\"viewport\" content=\"width=device-width\">\n<title>{title}</title>\n<link \
             rel=\"icon\" href=\"data:,\">\n<style>{STYLE}</style>\n<style>{style}</style>\n\
             </head>\n<body data-base=\"{base}\" data-version=\"{version}\">\n{back}\n<p \
             id=\"serve-said\" role=\"status\"></p>\n<main>\n{main}</main>\n\
             <script>{script}</script>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
        )
    }

    /// What is inside `<main>` of a run's page.
    ///
    /// # Errors
    /// Of `render`.
    pub fn run(&self, run: &Run) -> Result<String> {
        let alive = run.alive();
        let disabled = if alive { "" } else { " disabled" };
        let button = |wish: Wish| {
            let (name, title) = (wish.name(), wish.title());
            format!(
                "<button type=\"button\" id=\"serve-{name}\" data-ask=\"{name}\"{disabled}>\
                 {title}</button>\n"
            )
        };
        let buttons: String = WISHES.into_iter().map(button).collect();
        let (name, life) = (encode_text(&run.name), life(alive));
        let rendered = (self.look.render)(&run.dir)?;
        Ok(format!("<p class=\"serve-run\"><b>{name}</b> {life}\n{buttons}</p>\n{rendered}\n"))
    }
}

/// What is inside `<main>` of the list.
pub fn list(runs: &[Run]) -> String {
    if runs.is_empty() {
        return "<p>There is no run here yet. One appears after its first evaluation.</p>\n".into();
    }
    let row = |run: &Run| {
        let base = Route::base(Some(&run.name));
        let (name, life) = (encode_text(&run.name), life(run.alive()));
        let progress = match run.progress() {
            Ok(progress) => {
                let reward = progress.reward.map_or("-".into(), |reward| format!("{reward:.4}"));
                format!("<td>{}</td><td>{reward}</td>", progress.epochs)
            }
            Err(error) => format!("<td colspan=\"2\">{}</td>", encode_text(&format!("{error:#}"))),
        };
        format!("<tr><td><a href=\"{base}\">{name}</a></td>{progress}<td>{life}</td></tr>\n")
    };
    let rows: String = runs.iter().map(row).collect();
    format!(
        "<table class=\"serve-list\">\n<tr><th>Run</th><th>Epochs</th><th>Reward</th><th></th>\
         </tr>\n{rows}</table>\n"
    )
}

/// What is inside `<main>` where there was an error.
pub fn error(error: &anyhow::Error) -> String {
    format!("<p class=\"serve-error\">{}</p>\n", encode_text(&format!("{error:#}")))
}

fn life(alive: bool) -> &'static str {
    if alive { "<span class=\"serve-alive\">running</span>" } else { "<span>not running</span>" }
}
