//! The comparison as tables: of methods, of what is measured at equal reward, of timesteps.

use std::collections::BTreeMap;

use super::record::StepSummary;
use super::summary::{Clock, Found, MEASURES, Row, Spread, Summary, median_steps};
use crate::tools::report::format::short;

/// A table of texts.
pub struct Table {
    pub title: String,
    /// How it is read.
    pub how: String,
    pub head: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

/// A number, or that a run never came there.
fn number(value: f64) -> String {
    if value.is_infinite() { "never".into() } else { short(value) }
}

/// A median with its interval.
pub fn spread(found: Option<&Spread>) -> String {
    let Some(Spread { median, bounds }) = found else { return "\u{2013}".into() };
    match bounds {
        None => number(*median),
        Some(b) => format!("{} ({} to {})", number(*median), number(b.low), number(b.high)),
    }
}

fn tuned(choice: &BTreeMap<String, String>) -> String {
    let parts: Vec<String> = choice.iter().map(|(k, v)| format!("{k} {v}")).collect();
    if parts.is_empty() { "\u{2013}".into() } else { parts.join(", ") }
}

fn texts(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| name.to_string()).collect()
}

fn methods(s: &Summary) -> Table {
    let target = s.target.map_or_else(|| "the target".into(), short);
    let mut head = texts(&["method", "tuned", "seeds", "last reward"]);
    head.extend(Clock::ALL.map(|clock| format!("{} to {target}", clock.name())));
    head.extend(texts(&["epochs, of the first's", "calls, of the first's"]));
    head.extend(texts(&["reward at the first's calls", "better : worse (p)"]));
    let row = |(row, found): (&Row, &Found)| {
        let mut seeds = row.seeds.to_string();
        for (n, what) in [(row.diverged, "diverged"), (row.collapsed, "collapsed")] {
            seeds += &if n > 0 { format!(", {n} {what}") } else { String::new() };
        }
        let mut cells = vec![row.method.clone(), tuned(&found.tuned), seeds];
        cells.push(spread(row.reward.as_ref()));
        cells.extend(Clock::ALL.map(|clock| spread(row.to_target.get(&clock))));
        cells.extend([Clock::Epochs, Clock::Calls].map(|c| spread(row.of_first.get(&c))));
        cells.push(spread(row.at_calls.as_ref()));
        cells.push(row.signs.map_or_else(
            || "\u{2013}".into(),
            |s| format!("{} : {} ({})", s.better, s.worse, short(s.p)),
        ));
        cells
    };
    let whose = if s.own_target { "the first method's median at its end" } else { "as given" };
    Table {
        title: "Methods".into(),
        how: format!(
            "Medians over seeds, with 95% bootstrap intervals over seeds. Rewards are of fixed \
             prompts and noise, epochs without evaluations. The target is {whose}. A call is a \
             row through the network; with guidance it is still one. The sign test pairs seeds \
             with the first method's; p is two-sided."
        ),
        head,
        rows: s.rows.iter().zip(s.found).map(row).collect(),
    }
}

fn at_target(s: &Summary) -> Table {
    let mut head = texts(&["method"]);
    head.extend(MEASURES.map(|(name, _)| name.to_string()));
    let row = |row: &Row| {
        let mut cells = vec![row.method.clone()];
        cells.extend(MEASURES.map(|(name, _)| spread(row.at_target.get(name))));
        cells
    };
    Table {
        title: "At equal reward".into(),
        how: "Where a run's evaluation passes the target, between two evaluations on a straight \
              line; of the seeds that come there. KL and distances should be small, diversity \
              large. The Frechet distance of few pictures is too large, here by as much for every \
              method; KID and CMMD have no bias to speak of."
            .into(),
        head,
        rows: s.rows.iter().map(row).collect(),
    }
}

fn timesteps(s: &Summary) -> Vec<Table> {
    const HEAD: [&str; 8] = [
        "t",
        "updates",
        "clipped",
        "gradient norm",
        "variance",
        "at the output",
        "variance",
        "error",
    ];
    let measured = |value: Option<f64>| value.map_or_else(|| "\u{2013}".into(), short);
    let table = |found: &Found| {
        let steps = median_steps(found);
        let row = |step: &StepSummary| {
            vec![
                short(step.t),
                step.updates.to_string(),
                format!("{:.1}%", 100.0 * step.clip_frac),
                measured(step.grad_norm_mean),
                measured(step.grad_norm_variance),
                short(step.gradient_mean),
                short(step.gradient_variance),
                short(step.log_ratio_error),
            ]
        };
        (!steps.is_empty()).then(|| Table {
            title: format!("Timesteps: {}", found.method),
            how:
                "Clipped entries; the norm of what the step adds to the adapter's gradient, added \
                  up over an update's batches, as mean and variance over updates; the same at the \
                  network's output, |d loss / d log rho| times the step's weight; and the error \
                  of 1 + log rho against rho, log rho\u{b2} / 2. Medians over seeds."
                    .into(),
            head: texts(&HEAD),
            rows: steps.iter().map(row).collect(),
        })
    };
    s.found.iter().filter_map(table).collect()
}

fn trials(s: &Summary) -> Option<Table> {
    let row = |found: &Found| {
        let rows = found.trials.iter().map(|trial| {
            let mut reward = trial.final_reward().map_or_else(|| "diverged".into(), short);
            reward += if trial.collapsed() { ", collapsed" } else { "" };
            vec![found.method.clone(), tuned(&trial.tuned), trial.seed.to_string(), reward]
        });
        rows.collect::<Vec<_>>()
    };
    let rows: Vec<Vec<String>> = s.found.iter().flat_map(row).collect();
    (!rows.is_empty()).then(|| Table {
        title: "Tuning".into(),
        how: "Each method's last reward with each choice, on seeds of its own. The best mean is \
              taken, of the choices whose pictures have not collapsed where there are any."
            .into(),
        head: texts(&["method", "choice", "seed", "last reward"]),
        rows,
    })
}

/// All tables, in their order.
pub fn tables(s: &Summary) -> Vec<Table> {
    let mut all = vec![methods(s), at_target(s)];
    all.extend(trials(s));
    all.extend(timesteps(s));
    all
}

/// The tables as Markdown.
pub fn markdown(s: &Summary) -> String {
    let line = |cells: &[String]| {
        let cells: Vec<String> = cells.iter().map(|c| c.replace('|', "\\|")).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let table = |t: Table| {
        let rule = vec!["---".to_string(); t.head.len()];
        let rows: String = t.rows.iter().map(|row| line(row)).collect();
        format!("## {}\n\n{}\n\n{}{}{rows}\n", t.title, t.how, line(&t.head), line(&rule))
    };
    tables(s).into_iter().map(table).collect::<String>().trim_end().to_string() + "\n"
}
