//! Bars: several side by side, or several upon each other.

use plotters::prelude::*;

use super::svg::{Area, Axis, Drawn, Ink, Size, Span, chart, draw, drawable};

/// What the bars of one colour show, one value for each place.
pub struct BarSeries {
    pub name: &'static str,
    pub color: Ink,
    pub values: Vec<f64>,
}

/// How the bars of one place stand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrangement {
    Beside,
    Upon,
}

/// Bars at places that have names.
pub struct Bars<'a> {
    pub size: Size,
    /// What they show, for those who cannot see them.
    pub label: &'a str,
    /// Below the x axis.
    pub x_name: &'a str,
    /// The places from left to right.
    pub places: &'a [String],
    pub arrangement: Arrangement,
    pub series: &'a [BarSeries],
}

/// A bar, in places and values.
struct Bar {
    left: f64,
    right: f64,
    low: f64,
    high: f64,
    color: Ink,
}

impl Bars<'_> {
    pub fn svg(&self) -> String {
        draw(self.size, self.label, |area| self.draw(area))
    }

    fn bars(&self) -> Vec<Bar> {
        let mut bars = Vec::new();
        for place in 0..self.places.len() {
            let (mut low, mut left) = (0.0, place as f64 - 0.4);
            for series in self.series {
                let value = series.values.get(place).copied().filter(|v| drawable(*v));
                let value = value.unwrap_or(0.0);
                let color = series.color;
                match self.arrangement {
                    Arrangement::Beside => {
                        let right = left + 0.8 / self.series.len() as f64;
                        bars.push(Bar { left, right, low: 0.0, high: value, color });
                        left = right;
                    }
                    Arrangement::Upon => {
                        let (right, high) = (left + 0.8, low + value);
                        bars.push(Bar { left, right, low, high, color });
                        low = high;
                    }
                }
            }
        }
        bars
    }

    fn draw(&self, area: &Area) -> Drawn {
        let bars = self.bars();
        let span = Span::of(bars.iter().flat_map(|b| [0.0, b.low, b.high]));
        let top = span.high + span.length() * 0.07;
        let last = self.places.len().max(1) as f64 - 1.0;
        let y = Span { high: top, ..span };
        let y_ticks = 6;
        let y_texts = y.ticks(y_ticks);
        let x = Axis {
            span: Span { low: -0.5, high: last + 0.5 },
            ticks: 7,
            text: &|at| place_name(self.places, at),
        };
        let y = Axis { span: y, ticks: y_ticks, text: &|v| y_texts.text(v) };
        let mut chart = chart(area, self.size, self.x_name, &x, &y)?;
        let bar =
            |b: Bar| Rectangle::new([(b.left, b.low), (b.right, b.high)], b.color.color.filled());
        chart.draw_series(bars.into_iter().map(bar))?;
        Ok(())
    }
}

/// The name of the place at a tick, which may lie between two.
pub fn place_name(places: &[String], at: f64) -> String {
    let whole = at.fract() == 0.0 && at >= 0.0;
    places.get(at as usize).filter(|_| whole).cloned().unwrap_or_default()
}
