//! What all plots share: colours, sizes, axes, and how plotters' SVG becomes part of a page.

use plotters::coord::Shift;
use plotters::coord::ranged1d::BoldPoints;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::format::{Ticks, escape};

/// Plotters places things on whole units: four of them to a pixel keep curves smooth.
pub const UNIT: u32 = 4;
/// An error of drawing into a string, which has no file that could fail.
pub const DRAWN: &str = "a plot of finite numbers can be drawn into a string";

// Written into the SVG; style.css has each of them once more, with another one for dark pages.
pub const TEXT: RGBColor = RGBColor(0x5b, 0x64, 0x70);
pub const GRID: RGBColor = RGBColor(0xe3, 0xe6, 0xea);
pub const AXIS: RGBColor = RGBColor(0xb4, 0xba, 0xc3);
pub const BLUE: Ink = Ink { name: "blue", color: RGBColor(0x2f, 0x6f, 0xde) };
pub const ORANGE: Ink = Ink { name: "orange", color: RGBColor(0xe0, 0x7b, 0x39) };
pub const GREEN: Ink = Ink { name: "green", color: RGBColor(0x2e, 0x9e, 0x6b) };
pub const VIOLET: Ink = Ink { name: "violet", color: RGBColor(0x8a, 0x5c, 0xd6) };
pub const RED: Ink = Ink { name: "red", color: RGBColor(0xd6, 0x45, 0x45) };
pub const TEAL: Ink = Ink { name: "teal", color: RGBColor(0x1f, 0x9a, 0xa8) };
pub const GOLD: Ink = Ink { name: "gold", color: RGBColor(0xb8, 0x90, 0x1c) };
pub const PINK: Ink = Ink { name: "pink", color: RGBColor(0xd6, 0x5a, 0xa5) };
/// All colours of series, in the order in which they are taken.
pub const INKS: [Ink; 8] = [BLUE, ORANGE, GREEN, VIOLET, RED, TEAL, GOLD, PINK];

/// The colour of a series.
#[derive(Clone, Copy, Debug)]
pub struct Ink {
    /// Its variable in style.css.
    pub name: &'static str,
    pub color: RGBColor,
}

/// A plot's size in pixels where it is shown as it is; pages scale it.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub width: u32,
    pub height: u32,
    /// Of the letters.
    pub font: u32,
}

/// Two of them side by side fill a page.
pub const LARGE: Size = Size { width: 400, height: 230, font: 12 };
/// Three of them side by side fill a page.
pub const MEDIUM: Size = Size { width: 360, height: 220, font: 12 };
/// The same, where there are many.
pub const SMALL: Size = Size { width: 300, height: 160, font: 11 };

/// Where a plot is drawn.
pub type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws a plot. `label` tells what it shows to those who cannot see it.
pub fn draw(size: Size, label: &str, plot: impl FnOnce(&Area) -> Drawn) -> String {
    let mut text = String::new();
    let area = SVGBackend::with_string(&mut text, (size.width * UNIT, size.height * UNIT))
        .into_drawing_area();
    plot(&area).expect(DRAWN);
    area.present().expect(DRAWN);
    drop(area);
    inline(&text, size, label)
}

/// A chart on two axes of numbers.
pub type Chart<'a, 'b> =
    ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// How an axis is written.
pub struct Axis<'a> {
    pub span: Span,
    /// Ticks at most.
    pub ticks: usize,
    /// The text at a tick.
    pub text: &'a dyn Fn(f64) -> String,
}

/// Axes with lines at the ticks of y, on which a plot is drawn.
///
/// # Errors
/// As plotters has them.
pub fn chart<'a, 'b>(
    area: &'a Area<'b>,
    size: Size,
    x_name: &str,
    x: &Axis,
    y: &Axis,
) -> Result<Chart<'a, 'b>, Box<dyn std::error::Error>> {
    let font = size.font * UNIT;
    let mut chart = ChartBuilder::on(area)
        .margin_top(font / 2)
        .margin_right(font * 3 / 2)
        .x_label_area_size(font * 3)
        .y_label_area_size(font * 19 / 4)
        .build_cartesian_2d(x.span.low..x.span.high, y.span.low..y.span.high)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .max_light_lines(0)
        .bold_line_style(stroke(GRID, 1.0))
        .axis_style(stroke(AXIS, 1.0))
        .label_style(size.letters())
        .axis_desc_style(size.letters())
        .set_all_tick_mark_size((UNIT * 4) as i32)
        .x_desc(x_name)
        .x_labels(x.ticks)
        .y_labels(y.ticks)
        .x_label_formatter(&|v| (x.text)(*v))
        .y_label_formatter(&|v| (y.text)(*v))
        .draw()?;
    Ok(chart)
}

/// How drawing ends.
pub type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Plotters writes a whole file. In a page the SVG has the width of its place, so that its own is
/// dropped; its namespace is known there; and it gets words for those who cannot see it. What is
/// the default anyway is left out, which makes heat maps a third smaller.
fn inline(text: &str, size: Size, label: &str) -> String {
    let inner = text.split_once('>').map_or("", |(_, inner)| inner);
    let inner = inner.replace(" opacity=\"1\"", "").replace(" stroke=\"none\"", "");
    let (width, height, label) = (size.width * UNIT, size.height * UNIT, escape(label));
    format!(
        "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{label}\">\
         <title>{label}</title>{inner}"
    )
}

impl Size {
    /// The letters of a plot.
    pub fn letters(self) -> TextStyle<'static> {
        // Plotters divides by 1.24 what it takes for the height of a line.
        ("sans-serif", f64::from(self.font * UNIT) * 1.24).into_font().color(&TEXT)
    }
}

/// Numbers between which an axis runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    pub low: f64,
    pub high: f64,
}

impl Span {
    /// Of all finite values, never empty, so that an axis of one value, or of none, has a length.
    pub fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut span = Self { low: f64::INFINITY, high: f64::NEG_INFINITY };
        for value in values.filter(|v| drawable(*v)) {
            span = Self { low: span.low.min(value), high: span.high.max(value) };
        }
        if span.low > span.high {
            return Self { low: 0.0, high: 1.0 };
        }
        let size = span.low.abs().max(span.high.abs());
        if span.high - span.low <= size * 1e-6 {
            let around = if size == 0.0 { 1.0 } else { size * 0.05 };
            return Self { low: span.low - around, high: span.high + around };
        }
        span
    }

    /// With a part of its length more at both ends.
    pub fn wider(self, part: f64) -> Self {
        let more = (self.high - self.low) * part;
        Self { low: self.low - more, high: self.high + more }
    }

    pub fn length(self) -> f64 {
        self.high - self.low
    }

    /// How an axis with so many ticks writes them.
    pub fn ticks(self, count: usize) -> Ticks {
        let places = RangedCoordf64::from(self.low..self.high).key_points(BoldPoints(count));
        Ticks::new(&places)
    }
}

/// Whether an axis can hold a number.
pub fn drawable(value: f64) -> bool {
    value.is_finite() && value.abs() < 1e100
}

/// A line of a number of pixels.
pub fn stroke(color: RGBColor, pixels: f64) -> ShapeStyle {
    color.stroke_width((pixels * f64::from(UNIT)).round() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_axis_has_a_length() {
        for values in [
            vec![],
            vec![f64::NAN],
            vec![0.0],
            vec![-3.0, -3.0],
            vec![1e300, 2.0],
            vec![1e-300, 1e-300],
            vec![1.0, 1.0 + 1e-16],
        ] {
            let span = Span::of(values.iter().copied());
            assert!(span.length() > 0.0 && span.length().is_finite(), "{values:?}: {span:?}");
        }
    }
}
