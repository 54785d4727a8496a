//! The reward against all that it costs, and each of several rewards on a scale of its own.

use std::collections::BTreeSet;

use super::format::{Source, duration, escape, value};
use super::history::Clock;
use super::plot::{Plot, Point, Series};
use super::svg::{BLUE, Ink, MEDIUM, ORANGE, SMALL};
use super::view::{Run, Section};

/// Rewards in a page at most.
const MOST_REWARDS: usize = 24;

/// A plot under its heading, with what its colours mean and what else there is to say in HTML.
pub fn figure(title: &str, svg: &str, below: &str) -> String {
    format!("<figure class=\"plot\"><h3>{title}</h3>\n{svg}{below}</figure>\n")
}

/// What the colours of a plot mean.
pub fn legend(series: &[Series]) -> String {
    let name = |s: &Series| key(&s.name, s.color);
    let names: String = series.iter().filter(|s| !s.points.is_empty()).map(name).collect();
    format!("<p class=\"legend\">{names}</p>")
}

/// One entry of a legend.
pub fn key(name: &str, ink: Ink) -> String {
    format!("<span><i style=\"background:var(--{})\"></i>{name}</span>", ink.name)
}

fn two(rollout: Vec<Point>, evaluation: Vec<Point>) -> [Series; 2] {
    [
        Series { name: "rollouts".into(), color: BLUE, points: rollout, dots: false },
        Series { name: "evaluations".into(), color: ORANGE, points: evaluation, dots: true },
    ]
}

pub fn reward(run: &Run) -> Option<Section> {
    let history = &run.history;
    if history.epochs.is_empty() && history.evaluations.is_empty() {
        return None;
    }
    let plot = |title: &str, x_name: &str, clock: Clock| {
        let series = two(
            history.of_epochs(clock, |e| Some(e.reward_mean)),
            history.of_evaluations(clock, |e| Some(e.reward_mean)),
        );
        let x_counts = clock != Clock::Seconds;
        let plot = Plot {
            size: MEDIUM,
            label: "Mean reward",
            x_name,
            x_counts,
            series: &series,
            marks: &[],
        };
        figure(title, &plot.svg(), &legend(&series))
    };
    let mut content = String::from("<div class=\"plots three\">\n");
    content += &plot("Against epochs", "epochs", Clock::Epochs);
    let spent = history.spent();
    if spent.seconds > 0.0 {
        let title = format!("Against time: {} so far", duration(spent.seconds));
        content += &plot(&title, "seconds", Clock::Seconds);
    }
    if spent.calls > 0 {
        content += &plot("Against network calls", "network calls", Clock::Calls);
    }
    content += "</div>\n";
    if spent.calls == 0 && !history.epochs.is_empty() {
        content += "<p class=\"quiet\">This run's epochs do not say how often the network was \
                    called.</p>\n";
    }
    let how = "The mean over an epoch's rollout, which training sees, and over the evaluation, \
               whose prompts and noise stay the same. The second rising with the first says that \
               what was learnt holds beyond the pictures it was learnt on. Time and calls leave \
               evaluations out."
        .into();
    Some(Section { id: "reward", title: "Reward", how, content })
}

/// Each reward on its own, where there are several.
pub fn each(run: &Run) -> Option<Section> {
    let history = &run.history;
    let of_epochs = history.epochs.iter().flat_map(|e| e.rewards.keys());
    let of_evaluations = history.evaluations.iter().flat_map(|e| e.rewards.keys());
    let names: BTreeSet<&String> = of_epochs.chain(of_evaluations).collect();
    let watched = run.settings.texts("watch");
    if names.len() < 2 && watched.is_empty() || names.is_empty() {
        return None;
    }
    let is_watched = |name: &str| watched.contains(&name);
    let mut order: Vec<&String> = names.into_iter().collect();
    order.sort_by_key(|name| is_watched(name));
    let mut content = String::from("<div class=\"plots small\">\n");
    for name in order.iter().take(MOST_REWARDS) {
        let series = two(
            history.of_epochs(Clock::Epochs, |e| e.rewards.get(*name).map(|r| r.mean)),
            history.of_evaluations(Clock::Epochs, |e| e.rewards.get(*name).copied()),
        );
        let plot = Plot {
            size: SMALL,
            label: name,
            x_name: "epochs",
            x_counts: true,
            series: &series,
            marks: &[],
        };
        let role = if is_watched(name) { "watched" } else { "trained on" };
        let title = format!(
            "<span class=\"name\" title=\"{0}\">{0}</span> <span class=\"tag\">{role}</span>",
            escape(name)
        );
        let below = format!("{}{}", before_and_now(run, name), legend(&series));
        content += &figure(&title, &plot.svg(), &below);
    }
    content += "</div>\n";
    if let Some(more) = order.len().checked_sub(MOST_REWARDS + 1) {
        content += &format!("<p class=\"quiet\">{} more in metrics.jsonl.</p>\n", more + 1);
    }
    let how =
        "One scale each, since rewards are not in the same units. A watched reward is scored \
               but not trained on: when it falls while the trained ones rise, the model has begun \
               to please the reward instead of improving its pictures."
            .into();
    Some(Section { id: "rewards", title: "Each reward", how, content })
}

/// A reward in the first and in the last epoch and evaluation that have it.
fn before_and_now(run: &Run, name: &str) -> String {
    let span = |source: &str, points: Vec<(usize, f64)>| {
        let (first, last) = (*points.first()?, *points.last()?);
        let show = |(epoch, v)| {
            let source = format!("{source}:{name}");
            value(Source { name: &source, epoch: Some(epoch) }, v)
        };
        Some(format!("{} \u{2192} {}", show(first), show(last)))
    };
    let epochs = &run.history.epochs;
    let evaluations = &run.history.evaluations;
    let evaluated =
        evaluations.iter().filter_map(|e| Some((e.epoch, *e.rewards.get(name)?))).collect();
    let rolled = epochs.iter().filter_map(|e| Some((e.epoch, e.rewards.get(name)?.mean))).collect();
    let found = span("evaluation_reward", evaluated).or_else(|| span("reward", rolled));
    found.map_or(String::new(), |text| format!("<p class=\"numbers\">{text}</p>"))
}
