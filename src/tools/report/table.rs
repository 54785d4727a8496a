//! The epochs as a table, in which every cell has its full value.

use super::format::{Source, attributes, count, short};
use super::history::thinned;
use super::view::{Run, Section};

/// Rows at most.
const MOST_ROWS: usize = 200;

/// How a cell's number is written.
#[derive(Clone, Copy)]
enum Kind {
    Count,
    Number,
    Seconds,
}

fn cell(name: &str, epoch: usize, number: f64, kind: Kind) -> String {
    let text = match kind {
        Kind::Count => count(number as usize),
        Kind::Number => short(number),
        Kind::Seconds => format!("{number:.1}"),
    };
    let attributes = attributes(Source { name, epoch: Some(epoch) }, number);
    format!("<td {attributes}>{text}</td>")
}

pub fn epochs(run: &Run) -> Option<Section> {
    let all = &run.history.epochs;
    if all.is_empty() {
        return None;
    }
    let calls = run.history.spent().calls > 0;
    let shown = thinned(all, MOST_ROWS);
    let names = ["Epoch", "Reward", "Evaluation", "Clip rate", "Rollout calls", "Update calls"];
    let names = names.iter().take(if calls { 6 } else { 4 }).chain(&["Seconds"]);
    let mut content = String::from("<div class=\"scroll\" tabindex=\"0\">\n<table>\n<thead><tr>");
    names.for_each(|name| content += &format!("<th scope=\"col\">{name}</th>"));
    content += "</tr></thead>\n<tbody>\n";
    for e in &shown {
        let cell = |name, number, kind| cell(name, e.epoch, number, kind);
        content += "<tr>";
        content += &cell("epoch", e.epoch as f64, Kind::Count);
        content += &cell("reward_mean", e.reward_mean, Kind::Number);
        content += &match run.history.evaluation(e.epoch) {
            Some(found) => cell("evaluation_reward_mean", found.reward_mean, Kind::Number),
            None => "<td></td>".into(),
        };
        content += &cell("clip_frac", e.clip_frac, Kind::Number);
        if calls {
            content += &cell("rollout_calls", e.rollout_calls as f64, Kind::Count);
            content += &cell("update_calls", e.update_calls as f64, Kind::Count);
        }
        content += &cell("seconds", e.seconds, Kind::Seconds);
        content += "</tr>\n";
    }
    content += "</tbody>\n</table>\n</div>\n";
    if shown.len() < all.len() {
        content += &format!(
            "<p class=\"quiet\">{} of {} epochs, evenly spaced; metrics.jsonl has all.</p>\n",
            count(shown.len()),
            count(all.len())
        );
    }
    let how =
        "The numbers of metrics.jsonl, rounded; each cell's <code>data-value</code> is exact."
            .into();
    Some(Section { id: "epochs", title: "Epochs", how, content })
}
