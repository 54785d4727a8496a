//! A heat map: a number of every trained timestep in every update.

use plotters::prelude::*;
use plotters::style::RGBColor;

use super::bars::place_name;
use super::format::{short, timestep};
use super::svg::{AXIS, Area, Drawn, MEDIUM, UNIT, draw, drawable, stroke};
use crate::train::metrics::{StepRecord, UpdateRecord};

/// Columns at most: so many updates, or so many stretches of updates.
const MOST_COLUMNS: usize = 48;
/// Rows at most: so many timesteps, or so many stretches of them.
const MOST_ROWS: usize = 40;
/// How much larger the highest value of a logarithmic scale is than its lowest, at most.
const DECADES: f64 = 1000.0;
/// From low to high, seen on a light page and on a dark one (the map of matplotlib's viridis).
const RAMP: [RGBColor; 5] = [
    RGBColor(0x44, 0x01, 0x54),
    RGBColor(0x3b, 0x52, 0x8b),
    RGBColor(0x21, 0x91, 0x8c),
    RGBColor(0x5e, 0xc9, 0x62),
    RGBColor(0xfd, 0xe7, 0x25),
];

/// What colours follow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    Linear,
    /// The logarithm, where the values are far apart.
    AsNeeded,
}

/// A heat map's cells, from the lowest timestep up, each row from the first update to the last.
pub struct Heatmap {
    /// The timesteps of the rows.
    rows: Vec<String>,
    /// The updates of the columns.
    columns: Vec<String>,
    /// The mean of a cell, NaN where there is nothing.
    cells: Vec<f64>,
    low: f64,
    high: f64,
    /// Whether cells are below `low`.
    cut: bool,
    /// Whether colours follow the logarithm.
    logarithmic: bool,
}

impl Heatmap {
    /// Of a number of the steps; `None` where no update has one.
    pub fn new(
        updates: &[&UpdateRecord],
        of: fn(&StepRecord) -> f64,
        scale: Scale,
    ) -> Option<Self> {
        let seen = |s: &&StepRecord| drawable(s.t) && drawable(of(s));
        let updates: Vec<&&UpdateRecord> =
            updates.iter().filter(|u| u.steps.iter().any(|s| seen(&s))).collect();
        let steps = || updates.iter().flat_map(|u| &u.steps).filter(seen);
        let mut times: Vec<f64> = steps().map(|s| s.t).collect();
        times.sort_by(f64::total_cmp);
        times.dedup();
        if times.is_empty() {
            return None;
        }
        let rows = times.len().min(MOST_ROWS);
        let columns = updates.len().min(MOST_COLUMNS);
        let mut sums = vec![0.0; rows * columns];
        let mut counts = vec![0.0; rows * columns];
        for (i, update) in updates.iter().enumerate() {
            let column = i * columns / updates.len();
            for step in update.steps.iter().filter(seen) {
                let place = times.partition_point(|t| *t < step.t);
                let cell = place * rows / times.len() * columns + column;
                sums[cell] += of(step);
                counts[cell] += 1.0;
            }
        }
        // A cell that no step falls into is 0 / 0: NaN, and stays empty.
        let cells: Vec<f64> = sums.iter().zip(&counts).map(|(s, n)| s / n).collect();
        let filled = || cells.iter().copied().filter(|v| v.is_finite());
        let lowest = filled().fold(f64::INFINITY, f64::min);
        let high = filled().fold(f64::NEG_INFINITY, f64::max);
        let wide = lowest > 0.0 && high / lowest > 50.0;
        let logarithmic = scale == Scale::AsNeeded && wide;
        // A first update's ratio is 1 but for rounding: it would take all colours for itself.
        let low = if logarithmic { lowest.max(high / DECADES) } else { lowest };
        // The first place of each row and of each column stands for it.
        let first = |at: usize, most: usize, of: usize| (at * of).div_ceil(most);
        Some(Self {
            rows: (0..rows).map(|r| timestep(times[first(r, rows, times.len())])).collect(),
            columns: (0..columns)
                .map(|c| updates[first(c, columns, updates.len())].update.to_string())
                .collect(),
            cells,
            low,
            high,
            cut: low > lowest,
            logarithmic,
        })
    }

    pub fn svg(&self, label: &str) -> String {
        let (low, high) = (short(self.low), short(self.high));
        let label = format!("{label}, by timestep and update: from {low} to {high}");
        draw(MEDIUM, &label, |area| self.draw(area))
    }

    /// What the colours mean, in HTML.
    pub fn legend(&self) -> String {
        let colors: Vec<String> = RAMP.iter().map(|c| hex(*c)).collect();
        let scale = if self.logarithmic { "<span>logarithmic</span>" } else { "" };
        let below = if self.cut { "\u{2264} " } else { "" };
        format!(
            "<p class=\"legend\"><span>{below}{}</span><span class=\"ramp\" \
             style=\"background:linear-gradient(90deg,{})\"></span><span>{}</span>{scale}</p>",
            short(self.low),
            colors.join(","),
            short(self.high)
        )
    }

    fn draw(&self, area: &Area) -> Drawn {
        let font = MEDIUM.font * UNIT;
        let end = |names: &[String]| names.len() as f64 - 0.5;
        let mut chart = ChartBuilder::on(area)
            .margin_top(font / 2)
            .margin_right(font * 3 / 2)
            .x_label_area_size(font * 3)
            .y_label_area_size(font * 4)
            .build_cartesian_2d(-0.5..end(&self.columns), -0.5..end(&self.rows))?;
        chart
            .configure_mesh()
            .disable_mesh()
            .axis_style(stroke(AXIS, 1.0))
            .label_style(MEDIUM.letters())
            .axis_desc_style(MEDIUM.letters())
            .set_all_tick_mark_size((UNIT * 4) as i32)
            .x_desc("update")
            .x_labels(6)
            .y_labels(8)
            .x_label_formatter(&|at| place_name(&self.columns, *at))
            .y_label_formatter(&|at| place_name(&self.rows, *at))
            .draw()?;
        let columns = self.columns.len();
        let cell = |(i, value): (usize, &f64)| {
            let (x, y) = ((i % columns) as f64, (i / columns) as f64);
            let color = self.color(*value)?.filled();
            Some(Rectangle::new([(x - 0.5, y - 0.5), (x + 0.5, y + 0.5)], color))
        };
        chart.draw_series(self.cells.iter().enumerate().filter_map(cell))?;
        Ok(())
    }

    fn color(&self, value: f64) -> Option<RGBColor> {
        let scale = |v: f64| if self.logarithmic { v.ln() } else { v };
        let length = scale(self.high) - scale(self.low);
        let part = if length > 0.0 { (scale(value) - scale(self.low)) / length } else { 0.0 };
        value.is_finite().then(|| ramp(part))
    }
}

/// `#rrggbb`
fn hex(color: RGBColor) -> String {
    let RGBColor(r, g, b) = color;
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// The colour at a part of the way from low to high.
fn ramp(part: f64) -> RGBColor {
    let at = part.clamp(0.0, 1.0) * (RAMP.len() - 1) as f64;
    let below = (at as usize).min(RAMP.len() - 2);
    let (RGBColor(r0, g0, b0), RGBColor(r1, g1, b1)) = (RAMP[below], RAMP[below + 1]);
    let mix = |a: u8, b: u8| {
        (f64::from(a) + (f64::from(b) - f64::from(a)) * (at - below as f64)).round() as u8
    };
    RGBColor(mix(r0, r1), mix(g0, g1), mix(b0, b1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ramp_begins_and_ends_with_its_colours() {
        assert_eq!((ramp(-1.0), ramp(0.5), ramp(2.0)), (RAMP[0], RAMP[2], RAMP[4]));
    }
}
