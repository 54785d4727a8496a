//! What the page shows besides rewards: measures of the pictures, and how training went.

use super::bars::{Arrangement, BarSeries, Bars};
use super::format::{Source, escape, timestep, value};
use super::heatmap::{Heatmap, Scale};
use super::history::{Clock, thinned};
use super::plot::{Mark, Plot, Point, Series};
use super::rewards::{figure, key};
use super::svg::{BLUE, GREEN, LARGE, ORANGE, SMALL, VIOLET, drawable};
use super::view::{Run, Section};
use crate::train::metrics::{EpochRecord, EvaluationRecord, Measures, StepRecord, UpdateRecord};

/// A number that evaluations measure.
struct Measure {
    /// Its field in metrics.jsonl.
    name: &'static str,
    title: &'static str,
    /// What it means when it moves.
    reading: &'static str,
    of: fn(&Measures) -> Option<f64>,
}

const MEASURES: [Measure; 10] = [
    Measure {
        name: "pairwise_cosine_distance",
        title: "Distance within a prompt",
        reading: "1 \u{2212} cosine of features; near 0, all pictures of a prompt are one",
        of: |m| m.pairwise_cosine_distance,
    },
    Measure {
        name: "vendi",
        title: "Vendi score within a prompt",
        reading: "how many different pictures there are in effect",
        of: |m| m.vendi,
    },
    Measure {
        name: "pvs",
        title: "Spread of colour and light",
        reading: "PVS; falls when all pictures get one palette",
        of: |m| m.pvs,
    },
    Measure {
        name: "saturated",
        title: "Channels at 0 or 255",
        reading: "share; rises when colours are driven to their ends",
        of: |m| m.saturated,
    },
    Measure {
        name: "laplacian_variance",
        title: "Edges",
        reading: "variance of the Laplacian; falls with blur, rises with grids and noise",
        of: |m| m.laplacian_variance,
    },
    Measure {
        name: "saturation",
        title: "Saturation",
        reading: "mean, 0 to 1",
        of: |m| m.saturation,
    },
    Measure {
        name: "kl",
        title: "KL to the base model",
        reading: "how far the trajectories have moved",
        of: |m| m.kl,
    },
    Measure {
        name: "cmmd",
        title: "CMMD to the first pictures",
        reading: "distance of the features' distributions",
        of: |m| m.cmmd,
    },
    Measure {
        name: "frechet",
        title: "Frechet distance to the first pictures",
        reading: "of their features as Gaussians; too large of few pictures, by as much each time",
        of: |m| m.frechet,
    },
    Measure {
        name: "kid",
        title: "KID to the first pictures",
        reading: "the same by a kernel of another shape",
        of: |m| m.kid,
    },
];

fn measured(of: fn(&Measures) -> Option<f64>, e: &EvaluationRecord) -> Option<f64> {
    e.measures.as_ref().and_then(of).filter(|v| drawable(*v))
}

pub fn measures(run: &Run) -> Option<Section> {
    let mut content = String::new();
    for Measure { name, title, reading, of } in &MEASURES {
        let evaluations = &run.history.evaluations;
        let found: Vec<(usize, f64)> =
            evaluations.iter().filter_map(|e| Some((e.epoch, measured(*of, e)?))).collect();
        let (Some(first), Some(last)) = (found.first(), found.last()) else { continue };
        let points = found.iter().map(|(x, y)| Point { x: *x as f64, y: *y }).collect();
        let series = [Series { name: "evaluations".into(), color: GREEN, points, dots: true }];
        let plot = Plot {
            size: SMALL,
            label: title,
            x_name: "epochs",
            x_counts: true,
            series: &series,
            marks: &[],
        };
        let show = |(epoch, v): (usize, f64)| value(Source { name, epoch: Some(epoch) }, v);
        let below = format!(
            "<p class=\"numbers\">{} \u{2192} {}</p><p class=\"quiet\">{reading}</p>",
            show(*first),
            show(*last)
        );
        content += &figure(title, &plot.svg(), &below);
    }
    let content = format!("<div class=\"plots small\">\n{content}</div>\n");
    let how = "What the pictures of the evaluations are like besides their reward. A reward that \
               is won by making all pictures alike, or garish, or blurred, shows here first."
        .into();
    let any = content.contains("<svg");
    any.then_some(Section { id: "measures", title: "Pictures in numbers", how, content })
}

/// Reward on the y axis, what it may have cost on the x axis, a point for each evaluation.
pub fn trade_offs(run: &Run) -> Option<Section> {
    let plot = |title: &str, x_name: &str, of: fn(&Measures) -> Option<f64>| {
        let place = |e: &&EvaluationRecord| {
            let at = Point { x: measured(of, e)?, y: e.reward_mean };
            Some(Mark { at, text: e.epoch.to_string() })
        };
        let places: Vec<Mark> = run.history.evaluations.iter().filter_map(place).collect();
        let [first, .., last] = &places[..] else { return None };
        let points = places.iter().map(|p| p.at).collect();
        let marks = [first.clone(), last.clone()];
        let series = [Series { name: "evaluations".into(), color: VIOLET, points, dots: true }];
        let plot = Plot {
            size: LARGE,
            label: title,
            x_name,
            x_counts: false,
            series: &series,
            marks: &marks,
        };
        Some(figure(title, &plot.svg(), ""))
    };
    let diversity =
        plot("Reward and diversity", "distance within a prompt", |m| m.pairwise_cosine_distance);
    let diversity = diversity.or_else(|| plot("Reward and diversity", "PVS", |m| m.pvs));
    let kl = plot("Reward and KL", "KL to the base model", |m| m.kl);
    let plots = [diversity, kl].into_iter().flatten().collect::<String>();
    let how = "One point for each evaluation, joined in their order; the numbers are epochs. A \
               path straight up gains reward and loses nothing. One that leans to the left gains \
               it by drawing fewer different pictures; one that runs to the right in KL leaves the \
               base model far behind for what it gains."
        .into();
    let content = format!("<div class=\"plots\">\n{plots}</div>\n");
    (!plots.is_empty()).then_some(Section {
        id: "price",
        title: "The price of reward",
        how,
        content,
    })
}

pub fn heat_maps(run: &Run) -> Option<Section> {
    let updates = &run.history.updates;
    let map = |title: &str, of: fn(&StepRecord) -> f64, scale: Scale| {
        let map = Heatmap::new(updates, of, scale)?;
        Some(figure(title, &map.svg(title), &map.legend()))
    };
    let maps = [
        map("Clip rate", |s| s.clip_frac, Scale::Linear),
        map("Ratio: standard deviation of log \u{3c1}", |s| s.log_rho_std, Scale::AsNeeded),
        map("Gradient: norm of what each step adds", |s| s.grad_norm, Scale::AsNeeded)
            // As far as runs of older versions measured it.
            .or_else(|| map("Gradient: what each step adds", |s| s.contribution, Scale::AsNeeded)),
    ];
    let maps: String = maps.into_iter().flatten().collect();
    let content = format!("<div class=\"plots three\">\n{maps}</div>\n");
    let how =
        "Updates from left to right; timesteps from the finished picture below to pure noise \
               above. A bright row in the first two is a timestep whose ratio runs ahead of the \
               others, so that it is clipped first; in the third, one that rules the gradient. \
               Proportionate credit is there to make the rows alike."
            .into();
    (!maps.is_empty()).then_some(Section { id: "timesteps", title: "By timestep", how, content })
}

/// Steps of the credit plot at most.
const MOST_STEPS: usize = 50;

pub fn credit(run: &Run) -> Option<Section> {
    let update = run.history.updates.iter().rfind(|u| !u.steps.is_empty())?;
    let all: Vec<&StepRecord> = update.steps.iter().collect();
    let steps = thinned(&all, MOST_STEPS);
    let places: Vec<String> = steps.iter().map(|s| timestep(s.t)).collect();
    let values = |of: fn(&StepRecord) -> f64| steps.iter().map(|s| of(s)).collect();
    let plot = |title: String, series: &[BarSeries]| {
        let bars = Bars {
            size: LARGE,
            label: &title,
            x_name: "timestep, in the order of sampling",
            places: &places,
            arrangement: Arrangement::Beside,
            series,
        };
        figure(&title, &bars.svg(), &names(series))
    };
    let weights = [
        BarSeries { name: "credit weight", color: BLUE, values: values(|s| s.weight) },
        BarSeries { name: "the sampler's own", color: ORANGE, values: values(|s| s.w_native) },
    ];
    let parts =
        [BarSeries { name: "contribution", color: GREEN, values: values(|s| s.contribution) }];
    let mut content = String::from("<div class=\"plots\">\n");
    content += &plot(format!("Weights in update {}", update.update), &weights);
    content += &plot(format!("What each step added in update {}", update.update), &parts);
    content += "</div>\n";
    let how = "How much each step of the sampler counts in the gradient, beside what the sampler \
               would give it by itself. Even bars share the reward among the steps by the time \
               that each of them covers; what a step adds to the gradient is its weight times how \
               much its ratio matters to the loss."
        .into();
    Some(Section { id: "credit", title: "Credit by step", how, content })
}

fn names(series: &[BarSeries]) -> String {
    let names: String = series.iter().map(|s| key(s.name, s.color)).collect();
    format!("<p class=\"legend\">{names}</p>")
}

pub fn updates(run: &Run) -> Option<Section> {
    let updates = &run.history.updates;
    if updates.is_empty() {
        return None;
    }
    let plot = |title: &str, of: fn(&UpdateRecord) -> f64| {
        let points = run.history.of_updates(of);
        let series = [Series { name: "updates".into(), color: BLUE, points, dots: false }];
        let plot = Plot {
            size: SMALL,
            label: title,
            x_name: "updates",
            x_counts: true,
            series: &series,
            marks: &[],
        };
        figure(title, &plot.svg(), "")
    };
    let mut content = String::from("<div class=\"plots small\">\n");
    content += &plot("Clip rate", |u| u.clip_frac);
    content += &plot("Approximate KL of an update", |u| u.approx_kl);
    content += &plot("Norm of the gradient", |u| u.grad_norm);
    if updates.iter().any(|u| u.kl > 0.0) {
        content += &plot("KL to the base model", |u| u.kl);
    }
    content += "</div>\n";
    let skipped = updates.iter().filter(|u| u.skipped).count();
    let skipped = match skipped {
        0 => "No update was skipped.".into(),
        n => format!("<b class=\"bad\">Skipped: {n}</b>, whose numbers were not finite."),
    };
    let how = format!(
        "Clip rate near 0 means that updates could be larger, above a half that most of the batch \
         teaches nothing. The norm is that of the gradient before it is cut. {skipped}"
    );
    Some(Section { id: "updates", title: "Updates", how, content })
}

/// Bars of the time plot at most.
const MOST_BARS: usize = 48;

pub fn time(run: &Run) -> Option<Section> {
    let shown = thinned(&run.history.epochs, MOST_BARS);
    let last = shown.last()?;
    let places: Vec<String> = shown.iter().map(|e| e.epoch.to_string()).collect();
    let values = |of: fn(&EpochRecord) -> f64| shown.iter().map(|e| of(e)).collect();
    let series = [
        BarSeries { name: "rollout", color: BLUE, values: values(|e| e.rollout_seconds) },
        BarSeries { name: "decoding", color: GREEN, values: values(|e| e.decode_seconds) },
        BarSeries { name: "reward", color: ORANGE, values: values(|e| e.reward_seconds) },
        BarSeries { name: "update", color: VIOLET, values: values(|e| e.update_seconds) },
    ];
    let bars = Bars {
        size: LARGE,
        label: "Seconds of each epoch by phase",
        x_name: "epochs",
        places: &places,
        arrangement: Arrangement::Upon,
        series: &series,
    };
    let speed = format!(
        "<p class=\"numbers\">{} in epoch {}</p>",
        value(
            Source { name: "images_per_second", epoch: Some(last.epoch) },
            last.images_per_second
        ),
        last.epoch
    );
    let points = run.history.of_epochs(Clock::Epochs, |e| Some(e.images_per_second));
    let rates = [Series { name: "images per second".into(), color: BLUE, points, dots: false }];
    let rate = Plot {
        size: LARGE,
        label: "Images per second",
        x_name: "epochs",
        x_counts: true,
        series: &rates,
        marks: &[],
    };
    let content = format!(
        "<div class=\"plots\">\n{}{}</div>\n",
        figure("Seconds of an epoch", &bars.svg(), &names(&series)),
        figure("Images per second", &rate.svg(), &speed)
    );
    let how = "Where an epoch's time goes: drawing pictures, decoding them, scoring them, and \
               learning from them."
        .into();
    Some(Section { id: "time", title: "Time", how, content })
}

pub fn settings(run: &Run) -> Option<Section> {
    let unknown = "not written down by this run";
    let about = run.view.about.as_ref();
    let program = about.map_or(unknown.into(), |a| escape(&a.program));
    let device = match (about, run.settings.text("device")) {
        (Some(about), _) => escape(&about.device),
        (None, Some(name)) => format!("{} (as it was asked for)", escape(name)),
        (None, None) => unknown.into(),
    };
    let mut content = format!(
        "<dl class=\"facts\"><dt>Device</dt><dd>{device}</dd><dt>Program</dt><dd>{program}</dd>\
         <dt>Page by</dt><dd>{} {}</dd></dl>\n",
        env!("CARGO_PKG_NAME"),
        env!("CARGO_PKG_VERSION")
    );
    if let Some(text) = run.settings.shown().filter(|text| !text.is_empty()) {
        content += "<details><summary>All settings</summary>\n";
        content += &format!("<pre tabindex=\"0\">{}</pre>\n</details>\n", escape(&text));
    }
    let how =
        "What the run was told. As settings.toml it can be given to <code>--config</code>.".into();
    Some(Section { id: "settings", title: "Settings and device", how, content })
}
