//! Lines and points: a number against epochs, time, calls or another number.

use std::borrow::Cow;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::format::short;
use super::svg::{Area, Axis, Drawn, Ink, Size, Span, UNIT, chart, draw, drawable, stroke};

/// A place in a plot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    pub x: f64,
    pub y: f64,
}

/// Points that belong together, in their order.
#[derive(Clone, Debug)]
pub struct Series {
    pub name: Cow<'static, str>,
    pub color: Ink,
    pub points: Vec<Point>,
    /// Whether each point has a dot.
    pub dots: bool,
}

/// A plot of one or several series on one scale.
pub struct Plot<'a> {
    pub size: Size,
    /// What it shows, for those who cannot see it.
    pub label: &'a str,
    /// Below the x axis.
    pub x_name: &'a str,
    /// Whether x is a count, with no ticks between whole numbers.
    pub x_counts: bool,
    pub series: &'a [Series],
    /// Texts beside points.
    pub marks: &'a [Mark],
}

/// A text beside a point.
#[derive(Clone, Debug)]
pub struct Mark {
    pub at: Point,
    pub text: String,
}

/// Points of a series at most: a plot has not many more pixels.
const MOST_POINTS: usize = 300;
/// A series of more points has no dots.
const MOST_DOTS: usize = 60;

impl Plot<'_> {
    pub fn svg(&self) -> String {
        draw(self.size, &self.words(), |area| self.draw(area))
    }

    /// The label, and from where to where each series goes.
    fn words(&self) -> String {
        let mut words = format!("{} against {}", self.label, self.x_name);
        for series in self.series {
            let mut shown = series.points.iter().filter(|p| visible(p));
            if let Some(first) = shown.next() {
                let last = shown.next_back().unwrap_or(first);
                words +=
                    &format!("; {}: from {} to {}", series.name, short(first.y), short(last.y));
            }
        }
        words
    }

    fn draw(&self, area: &Area) -> Drawn {
        let points = || self.series.iter().flat_map(|s| &s.points).filter(|p| visible(p));
        let x = Span::of(points().map(|p| p.x));
        let y =
            Span::of(points().map(|p| p.y)).wider(if self.marks.is_empty() { 0.07 } else { 0.12 });
        let x = if self.marks.is_empty() { x } else { x.wider(0.05) };
        let (x_ticks, y_ticks) = (6, 6);
        let (x_texts, y_texts) = (x.ticks(x_ticks), y.ticks(y_ticks));
        let x_label = |v: f64| {
            let between = self.x_counts && v.fract() != 0.0;
            if between { String::new() } else { x_texts.text(v) }
        };
        let x = Axis { span: x, ticks: x_ticks, text: &x_label };
        let y = Axis { span: y, ticks: y_ticks, text: &|v| y_texts.text(v) };
        let mut chart = chart(area, self.size, self.x_name, &x, &y)?;
        for series in self.series {
            let thinned = thin(&series.points);
            let width = if thinned.len() > MOST_POINTS / 2 { 1.2 } else { 1.8 };
            for line in thinned.split(|p| !visible(p)).filter(|line| line.len() > 1) {
                let line = line.iter().map(|p| (p.x, p.y));
                chart.draw_series(LineSeries::new(line, stroke(series.color.color, width)))?;
            }
            let few = thinned.len() <= MOST_DOTS;
            let alone = |i: usize| {
                let beside =
                    |at: Option<usize>| at.and_then(|at| thinned.get(at)).is_some_and(visible);
                !beside(i.checked_sub(1)) && !beside(Some(i + 1))
            };
            let dots = thinned
                .iter()
                .enumerate()
                .filter(|(i, p)| visible(p) && (alone(*i) || series.dots && few));
            let dot = |(_, p): (usize, &Point)| {
                Circle::new((p.x, p.y), 5 * UNIT / 2, series.color.color.filled())
            };
            chart.draw_series(dots.map(dot))?;
        }
        let above = Pos::new(HPos::Center, VPos::Bottom);
        let mark = |m: &Mark| {
            let letters = self.size.letters().pos(above);
            let text =
                Text::new(m.text.clone(), (0, -((self.size.font * UNIT) as i32) / 3), letters);
            EmptyElement::at((m.at.x, m.at.y)) + text
        };
        chart.draw_series(self.marks.iter().map(mark))?;
        Ok(())
    }
}

fn visible(point: &Point) -> bool {
    drawable(point.x) && drawable(point.y)
}

/// Of a long series, the lowest and the highest point of each stretch, so that no peak is lost, and
/// its ends.
fn thin(points: &[Point]) -> Vec<Point> {
    if points.len() <= MOST_POINTS {
        return points.to_vec();
    }
    let mut thinned = vec![points[0]];
    for stretch in points.chunks(points.len().div_ceil(MOST_POINTS / 2)) {
        let order = |a: &&Point, b: &&Point| a.y.total_cmp(&b.y);
        let seen = || stretch.iter().filter(|p| visible(p));
        let ends = [seen().min_by(order), seen().max_by(order)];
        let mut kept: Vec<Point> = ends.into_iter().flatten().copied().collect();
        kept.sort_by(|a, b| a.x.total_cmp(&b.x));
        thinned.extend(kept);
    }
    thinned.extend(points.last());
    thinned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_series_keeps_its_ends_and_its_peaks() {
        let y = |x: usize| if x == 7777 { 9.0 } else { (x as f64).sin() };
        let points: Vec<Point> = (0..10_000).map(|x| Point { x: x as f64, y: y(x) }).collect();
        let found = thin(&points);
        assert!(found.len() <= MOST_POINTS + 4, "{}", found.len());
        assert!(found.contains(&points[7777]));
        assert_eq!((found[0], found[found.len() - 1]), (points[0], points[9999]));
    }
}
