//! The comparison as a page: plots over what was spent, and the tables.

use super::summary::{Clock, Found, MEASURES, Summary, median_curve};
use super::table::{Table, tables};
use crate::tools::report::document;
use crate::tools::report::format::{escape, short};
use crate::tools::report::plot::{Plot, Point, Series};
use crate::tools::report::rewards::{figure, legend};
use crate::tools::report::svg::{INKS, MEDIUM};
use crate::train::metrics::Measures;

/// The whole document.
pub fn page(s: &Summary) -> String {
    let names: Vec<&str> = s.found.iter().map(|f| f.method.as_str()).collect();
    let title = escape(&names.join(", "));
    let mut body = format!("<header><h1>{title}</h1></header>\n");
    body += &section("Reward", &rewards(s), "Medians over seeds, evaluation by evaluation.");
    let paid = "Median over seeds of what is measured, against the reward at the same evaluation: \
                what a method pays for it.";
    body += &section("Against reward", &measures(s), paid);
    tables(s).iter().for_each(|t| body += &section(&escape(&t.title), &html(t), &escape(&t.how)));
    document(&title, "comparison", &body, "")
}

fn section(title: &str, content: &str, how: &str) -> String {
    format!("<section>\n<h2>{title}</h2>\n<p class=\"how\">{how}</p>\n{content}</section>\n")
}

fn html(table: &Table) -> String {
    let head: String = table.head.iter().map(|h| format!("<th>{}</th>", escape(h))).collect();
    let row = |cells: &Vec<String>| {
        let cells: String = cells.iter().map(|c| format!("<td>{}</td>", escape(c))).collect();
        format!("<tr>{cells}</tr>\n")
    };
    let rows: String = table.rows.iter().map(row).collect();
    format!(
        "<div class=\"scroll\" tabindex=\"0\">\n<table>\n<thead><tr>{head}</tr></thead>\n\
         <tbody>\n{rows}</tbody>\n</table>\n</div>\n"
    )
}

/// A series a method, in colours that come again where there are many.
fn series(s: &Summary, points: impl Fn(&Found) -> Vec<(f64, f64)>) -> Vec<Series> {
    let one = |(i, found): (usize, &Found)| Series {
        name: escape(&found.method).into(),
        color: INKS[i % INKS.len()],
        points: points(found).into_iter().map(|(x, y)| Point { x, y }).collect(),
        dots: true,
    };
    s.found.iter().enumerate().map(one).collect()
}

fn rewards(s: &Summary) -> String {
    let plot = |clock: Clock| {
        let series = series(s, |found| median_curve(found, clock));
        let plot = Plot {
            size: MEDIUM,
            label: "Reward of fixed prompts and noise",
            x_name: clock.name(),
            x_counts: clock != Clock::Seconds,
            series: &series,
            marks: &[],
        };
        figure(&format!("Against {}", clock.name()), &plot.svg(), &legend(&series))
    };
    let plots: String = Clock::ALL.into_iter().map(plot).collect();
    let target = s.target.map_or_else(String::new, |target| {
        format!("<p class=\"quiet\">The target is {}.</p>\n", short(target))
    });
    format!("<div class=\"plots\">\n{plots}</div>\n{target}")
}

fn measures(s: &Summary) -> String {
    let plot = |(name, read): (&str, fn(&Measures) -> Option<f64>)| {
        let series = series(s, |found| {
            let rewards = median_curve(found, Clock::Epochs);
            let value = |i: usize| {
                let of_seed = |run: &super::record::RunRecord| {
                    read(run.evaluations.get(i)?.measures.as_ref()?)
                };
                let values: Vec<f64> = found.runs.iter().filter_map(of_seed).collect();
                crate::measure::bootstrap::median(&values)
            };
            let points = rewards.iter().enumerate();
            points.filter_map(|(i, (_, reward))| Some((*reward, value(i)?))).collect()
        });
        let empty = series.iter().all(|s| s.points.is_empty());
        let plot = Plot {
            size: MEDIUM,
            label: name,
            x_name: "reward",
            x_counts: false,
            series: &series,
            marks: &[],
        };
        if empty { String::new() } else { figure(name, &plot.svg(), &legend(&series)) }
    };
    let plots: String = MEASURES.into_iter().map(plot).collect();
    format!("<div class=\"plots\">\n{plots}</div>\n")
}
