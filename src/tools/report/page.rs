//! The page from top to bottom: the document, and the order of what stands in it.

use super::format::escape;
use super::history::History;
use super::settings::RunSettings;
use super::view::{Picture, Run, RunView, Section};
use super::{rewards, sections, state, table};

/// The page's style sheet.
pub const STYLE: &str = include_str!("style.css");
/// What moves the slider. After a new body is in place, `showGrids()` takes it up again.
pub const SCRIPT: &str = include_str!("slider.js");

/// The whole document.
pub fn page(view: &RunView) -> String {
    let script = format!("<script>\n{SCRIPT}</script>\n");
    document(&escape(&view.title), "training run", &body(view), &script)
}

/// A document that needs no network: its title in HTML and what it is, what stands in `<main>`, and
/// what follows.
pub fn document(title: &str, what: &str, main: &str, after: &str) -> String {
    // An empty icon, or browsers ask a server for one.
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{title} \u{b7} {what}</title>\n<link rel=\"icon\" href=\"data:,\">\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{main}</main>\n{after}</body>\n\
         </html>\n"
    )
}

/// What stands in `<main>`.
pub fn body(view: &RunView) -> String {
    let run = Run {
        history: History::new(&view.records),
        settings: RunSettings::new(&view.settings),
        view,
    };
    let parts: [fn(&Run) -> Option<Section>; 11] = [
        pictures,
        rewards::reward,
        rewards::each,
        sections::measures,
        sections::trade_offs,
        sections::heat_maps,
        sections::credit,
        sections::updates,
        sections::time,
        table::epochs,
        sections::settings,
    ];
    let parts: Vec<Section> = parts.iter().filter_map(|part| part(&run)).collect();
    let link = |s: &Section| format!("<a href=\"#{}\">{}</a>", s.id, s.title);
    let links: Vec<String> = parts.iter().map(link).collect();
    let mut html = state::header(&run);
    html += &state::warnings(&run);
    html += &format!("<nav aria-label=\"On this page\">{}</nav>\n", links.join(" "));
    for Section { id, title, how, content } in parts {
        html += &format!(
            "<section id=\"{id}\">\n<h2>{title}</h2>\n<p class=\"how\">{how}</p>\n{content}\
             </section>\n"
        );
    }
    html
}

fn pictures(run: &Run) -> Option<Section> {
    let (grids, samples): (Vec<&Picture>, Vec<&Picture>) =
        run.view.pictures.iter().partition(|p| p.epoch.is_some());
    if grids.is_empty() && samples.is_empty() {
        return None;
    }
    let mut content = String::new();
    if let Some((first, others)) = grids.split_first() {
        let last = others.len().saturating_sub(1);
        if last > 0 {
            // Above the pictures, whose heights differ: it stays where the finger is.
            content += &format!(
                "<div id=\"grid-control\" hidden><label for=\"grid-slider\">Epoch</label>\
                 <input type=\"range\" id=\"grid-slider\" min=\"0\" max=\"{last}\" step=\"1\" \
                 value=\"{last}\"><output id=\"grid-output\" for=\"grid-slider\"></output></div>\n"
            );
        }
        content += "<div class=\"grids\">\n";
        content += &figure(run, first, "");
        if !others.is_empty() {
            content += "<div id=\"grid-stage\">\n";
            for (i, picture) in others.iter().enumerate() {
                // Without scripts the newest is shown.
                let hidden = if i < last { " hidden" } else { "" };
                content += &figure(run, picture, hidden);
            }
            content += "</div>\n";
        }
        content += "</div>\n";
    }
    if !samples.is_empty() {
        content += "<h3>Asked for by hand</h3>\n<div class=\"grids\">\n";
        samples.iter().for_each(|picture| content += &figure(run, picture, ""));
        content += "</div>\n";
    }
    let how = "The same prompts from the same noise, before training and now. What the reward \
               does not ask for should stay as it was."
        .into();
    Some(Section { id: "pictures", title: "Pictures", how, content })
}

/// How many times larger a picture is shown: small ones, as models of emoji draw, twice.
fn magnified(picture: &Picture) -> u32 {
    if picture.width <= super::pictures::SMALL { 2 } else { 1 }
}

fn figure(run: &Run, picture: &Picture, hidden: &str) -> String {
    let reward = picture.epoch.and_then(|epoch| run.history.evaluation(epoch)).map(|evaluation| {
        let value = state::evaluation_reward(evaluation);
        format!(" <span class=\"quiet\">reward</span> {value}")
    });
    let times = magnified(picture);
    let class = if times > 1 { " class=\"pixelated\"" } else { "" };
    let label = escape(&picture.label);
    format!(
        "<figure{hidden}><img src=\"{}\" width=\"{}\" height=\"{}\" alt=\"Pictures, {label}\"\
         {class}><figcaption><b>{label}</b>{}</figcaption></figure>\n",
        picture.data_uri,
        picture.width * times,
        picture.height * times,
        reward.unwrap_or_default()
    )
}
