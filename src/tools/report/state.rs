//! The top of the page: which run it is, where it stands, and what the user was warned of.

use super::format::{Source, count, duration, escape, value};
use super::view::Run;
use crate::measure::collapse::{Finding, Level};
use crate::train::metrics::EvaluationRecord;

/// Warnings in a page at most.
const MOST_WARNINGS: usize = 40;

/// Where a run is.
enum State<'a> {
    /// No epoch is complete yet.
    Beginning,
    Complete,
    /// The reason.
    Collapsed(&'a str),
    /// In an epoch, between two updates.
    Suspended(usize),
    /// Running, or ended from outside.
    Open,
}

fn state<'a>(run: &Run<'a>) -> State<'a> {
    let history = &run.history;
    let reason = history.evaluations.last().and_then(|e| e.reason_to_stop());
    let stops = run.settings.flag("stop-on-collapse");
    if let Some(reason) = reason.filter(|_| stops) {
        State::Collapsed(reason)
    } else if let Some(epoch) = history.suspended {
        State::Suspended(epoch)
    } else if run.settings.epochs().is_some_and(|all| history.complete() >= all) {
        State::Complete
    } else if history.epochs.is_empty() {
        State::Beginning
    } else {
        State::Open
    }
}

/// The mean reward of an evaluation, with its full value.
pub fn evaluation_reward(evaluation: &EvaluationRecord) -> String {
    let source = Source { name: "evaluation_reward_mean", epoch: Some(evaluation.epoch) };
    value(source, evaluation.reward_mean)
}

pub fn header(run: &Run) -> String {
    let mut html = format!("<header>\n<h1>{}</h1>\n", escape(&run.view.title));
    if let Some(what) = what(run) {
        html += &format!("<p class=\"what\">{what}</p>\n");
    }
    html += "<dl class=\"tiles\">\n";
    for Tile { name, content, note } in tiles(run) {
        // A reward is two numbers.
        let class = if name == "Reward" { " class=\"wide\"" } else { "" };
        html += &format!("<div{class}><dt>{name}</dt><dd>{content}</dd>");
        html += &format!("<dd class=\"note\">{note}</dd></div>\n");
    }
    html + "</dl>\n</header>\n"
}

/// The run in one line of HTML: `models/emoji learns color:blue by pcpo`.
fn what(run: &Run) -> Option<String> {
    let model = run.settings.text("model")?;
    let rewards: Vec<String> =
        run.settings.texts("reward").iter().map(|r| format!("<b>{}</b>", escape(r))).collect();
    let preset = run.settings.text("preset").map(|p| format!(" by {}", escape(p)));
    Some(format!(
        "<b>{}</b> trained on {}{}",
        escape(model),
        rewards.join(" + "),
        preset.unwrap_or_default()
    ))
}

/// A number at the top. All fields but the name are HTML.
struct Tile {
    name: &'static str,
    content: String,
    note: String,
}

fn tiles(run: &Run) -> Vec<Tile> {
    let history = &run.history;
    let complete = history.complete();
    let epochs = match run.settings.epochs() {
        Some(all) => format!("{complete} <small>of {all}</small>"),
        None => complete.to_string(),
    };
    let note = match state(run) {
        State::Beginning => "no epoch is complete yet".into(),
        State::Complete => "complete".into(),
        State::Collapsed(_) => "<b class=\"bad\">stopped: the pictures have collapsed</b>".into(),
        State::Suspended(epoch) => format!("stopped within epoch {epoch}; can go on"),
        State::Open => "not at its end".into(),
    };
    let mut tiles = vec![Tile { name: "Epoch", content: epochs, note }];
    tiles.extend(reward(run));
    if let Some(best) = run.settings.best_epoch(history) {
        let reward = history.evaluation(best).map(evaluation_reward).unwrap_or_default();
        let note = format!("reward {reward}, in adapter-best.safetensors");
        let content = format!("epoch {best}");
        tiles.push(Tile { name: "Best adapter", content, note });
    }
    let spent = history.spent();
    if !history.epochs.is_empty() {
        let note = "without evaluations".into();
        tiles.push(Tile { name: "Time", content: duration(spent.seconds), note });
    }
    if spent.calls > 0 {
        let note = "rows through the network".into();
        tiles.push(Tile { name: "Network calls", content: count(spent.calls), note });
    }
    tiles
}

/// The reward before and now: of the evaluations, or where there are not two of them of the
/// rollouts.
fn reward(run: &Run) -> Option<Tile> {
    let history = &run.history;
    let rollout = |epoch: usize, reward: f64| {
        value(Source { name: "reward_mean", epoch: Some(epoch) }, reward)
    };
    let (before, now, note) = match (&history.evaluations[..], &history.epochs[..]) {
        ([first, .., last], _) => {
            let note = format!("evaluations after epochs {} and {}", first.epoch, last.epoch);
            (evaluation_reward(first), evaluation_reward(last), note)
        }
        (_, [first, .., last]) => (
            rollout(first.epoch, first.reward_mean),
            rollout(last.epoch, last.reward_mean),
            format!("rollouts of epochs {} and {}", first.epoch, last.epoch),
        ),
        ([only], _) => {
            let note = format!("evaluation after epoch {}", only.epoch);
            return Some(Tile { name: "Reward", content: evaluation_reward(only), note });
        }
        (_, [only]) => {
            let content = rollout(only.epoch, only.reward_mean);
            let note = format!("rollout of epoch {}", only.epoch);
            return Some(Tile { name: "Reward", content, note });
        }
        ([], []) => return None,
    };
    let content = format!("{before} <span class=\"arrow\">\u{2192}</span> {now}");
    Some(Tile { name: "Reward", content, note })
}

/// The same warning in one or several epochs.
struct Warning<'a> {
    text: &'a str,
    epochs: Vec<usize>,
}

/// A box of what went wrong, and a milder one of what may be about to.
pub fn warnings(run: &Run) -> String {
    let mut found: Vec<Warning> = Vec::new();
    let mut add = |text, epoch| match found.iter_mut().find(|w| w.text == text) {
        Some(known) => known.epochs.push(epoch),
        None => found.push(Warning { text, epochs: vec![epoch] }),
    };
    for epoch in &run.history.epochs {
        // The watch's own words come with the evaluations below.
        let others = epoch.warnings.iter().filter(|w| !w.starts_with("collapse: "));
        others.for_each(|text| add(text, epoch.epoch));
    }
    let mut html = String::new();
    let findings = confirmed(run);
    if !found.is_empty() || !findings.is_empty() {
        html += "<section class=\"box bad\" id=\"warnings\">\n<h2>Warnings</h2>\n<ul>\n";
        if let State::Collapsed(reason) = state(run) {
            let reason = escape(reason);
            html +=
                &format!("<li>The run was stopped: the pictures have collapsed, {reason}</li>\n");
        }
        for Confirmed { finding, first, last } in &findings {
            let level = match finding.level {
                Level::Warn => "Collapse, warning",
                Level::Stop => "Collapse, beyond the bound that stops",
            };
            let epochs = epochs_between(*first, *last);
            html += &format!("<li><b>{level}</b> ({epochs}): {}</li>\n", escape(&finding.text));
        }
        for Warning { text, epochs } in found.iter().take(MOST_WARNINGS) {
            let place = epochs_between(epochs[0], epochs[epochs.len() - 1]);
            let times =
                if epochs.len() > 2 { format!(", {} times", epochs.len()) } else { String::new() };
            html += &format!("<li><b>{place}</b>{times}: {}</li>\n", escape(text));
        }
        if let Some(more) = found.len().checked_sub(MOST_WARNINGS + 1) {
            html += &format!("<li>and {} more in metrics.jsonl</li>\n", more + 1);
        }
        html += "</ul>\n</section>\n";
    }
    html + &unconfirmed(run)
}

fn epochs_between(first: usize, last: usize) -> String {
    if first == last { format!("epoch {first}") } else { format!("epochs {first} to {last}") }
}

/// A signal that two evaluations in a row found out of bounds.
struct Confirmed<'a> {
    /// As it was found last.
    finding: &'a Finding,
    first: usize,
    last: usize,
}

fn confirmed<'a>(run: &Run<'a>) -> Vec<Confirmed<'a>> {
    let mut found: Vec<Confirmed> = Vec::new();
    for evaluation in &run.history.evaluations {
        for finding in &evaluation.collapse {
            let epoch = evaluation.epoch;
            match found.iter_mut().find(|c| c.finding.signal == finding.signal) {
                Some(known) => *known = Confirmed { finding, last: epoch, ..*known },
                None => found.push(Confirmed { finding, first: epoch, last: epoch }),
            }
        }
    }
    found
}

/// What the last evaluation found and the one before did not.
fn unconfirmed(run: &Run) -> String {
    let Some(last) = run.history.evaluations.last() else { return String::new() };
    let new = |f: &&Finding| !last.collapse.iter().any(|c| c.signal == f.signal);
    let new: Vec<&Finding> = last.out_of_bounds.iter().filter(new).collect();
    if new.is_empty() {
        return String::new();
    }
    let mut html = String::from(
        "<section class=\"box mild\">\n<h2>To be watched</h2>\n<p>Out of bounds in the newest \
         evaluation; a second one in a row would confirm it.</p>\n<ul>\n",
    );
    new.iter().for_each(|f| html += &format!("<li>{}</li>\n", escape(&f.text)));
    html + "</ul>\n</section>\n"
}
