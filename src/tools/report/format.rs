//! Pieces of HTML: escaped text, numbers that carry their full value, times and counts for people.

/// Text as it may stand in HTML, in SVG and in attributes of both. Control characters, which XML
/// does not have, become spaces.
pub fn escape(text: &str) -> String {
    let plain: String =
        text.chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect();
    html_escape::encode_quoted_attribute(&plain).into_owned()
}

/// Where a number of the page comes from.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Its field in metrics.jsonl.
    pub name: &'a str,
    /// The epoch of its record, where it has one.
    pub epoch: Option<usize>,
}

/// The attributes that hold a number as metrics.jsonl has it.
pub fn attributes(source: Source, value: f64) -> String {
    let name = escape(source.name);
    let epoch = source.epoch.map_or(String::new(), |e| format!(" data-epoch=\"{e}\""));
    format!("data-name=\"{name}\"{epoch} data-value=\"{}\"", exact(value))
}

/// A number for people, with its full value.
pub fn value(source: Source, value: f64) -> String {
    let attributes = attributes(source, value);
    format!("<span class=\"value\" {attributes}>{}</span>", short(value))
}

/// As JSON has it: `null` for what is not finite.
fn exact(value: f64) -> String {
    let whole = value.fract() == 0.0 && value.abs() < 1e15;
    if whole { format!("{value:.0}") } else { serde_json::json!(value).to_string() }
}

/// Four decimals, or three digits of a number that would have none of its own.
pub fn short(value: f64) -> String {
    let size = value.abs();
    if !value.is_finite() {
        "\u{2013}".into()
    } else if size != 0.0 && !(5e-4..1e7).contains(&size) {
        format!("{value:.2e}")
    } else {
        format!("{value:.4}")
    }
}

/// A count with its thousands apart: `12,480`.
pub fn count(n: usize) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A time for people: `48 s`, `3 min 20 s`, `2 h 5 min`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() {
        return "\u{2013}".into();
    }
    if seconds < 99.5 {
        let decimals = if seconds < 10.0 { 1 } else { 0 };
        return format!("{seconds:.decimals$} s");
    }
    let whole = seconds.round() as u64;
    let (hours, minutes) = (whole / 3600, whole / 60 % 60);
    if hours > 0 {
        format!("{hours} h {minutes} min")
    } else {
        format!("{minutes} min {} s", whole % 60)
    }
}

/// How the ticks of one axis are written, so that they look alike.
#[derive(Clone, Copy, Debug)]
pub struct Ticks {
    notation: Notation,
    /// As many as each of them needs.
    decimals: usize,
    /// From one to the next.
    apart: f64,
}

#[derive(Clone, Copy, Debug)]
enum Notation {
    /// In units of a number that has a letter.
    Plain { unit: f64, letter: &'static str },
    /// `2e-6`
    Scientific,
}

impl Ticks {
    /// Of an axis with ticks in these places.
    pub fn new(places: &[f64]) -> Self {
        let size = places.iter().fold(0.0, |most: f64, v| most.max(v.abs()));
        let pairs = places.windows(2).map(|pair| (pair[1] - pair[0]).abs());
        let apart = pairs.fold(f64::INFINITY, f64::min).min(size);
        let notation = if !(5e-3..1e13).contains(&size) {
            Notation::Scientific
        } else {
            // Four digits are as short as one with a letter.
            let (unit, letter) = match size {
                1e9.. => (1e9, "G"),
                1e6.. => (1e6, "M"),
                1e4.. => (1e3, "k"),
                _ => (1.0, ""),
            };
            Notation::Plain { unit, letter }
        };
        let enough = |decimals: &usize| {
            let ticks = Self { notation, decimals: *decimals, apart };
            places.iter().all(|v| (ticks.read(*v) - v).abs() <= apart * 1e-3)
        };
        Self { notation, decimals: (0..6).find(enough).unwrap_or(6), apart }
    }

    /// What a reader would take a tick for.
    fn read(self, value: f64) -> f64 {
        let Self { notation, decimals, .. } = self;
        let text = match notation {
            Notation::Plain { unit, .. } => format!("{:.decimals$}", value / unit),
            Notation::Scientific => format!("{value:.decimals$e}"),
        };
        let unit = match notation {
            Notation::Plain { unit, .. } => unit,
            Notation::Scientific => 1.0,
        };
        text.parse::<f64>().map_or(f64::NAN, |v| v * unit)
    }

    /// A tick's label.
    pub fn text(self, value: f64) -> String {
        let Self { notation, decimals, .. } = self;
        // Sums of steps pass 0 by a little.
        if value.abs() <= self.apart * 1e-3 {
            return "0".into();
        }
        match notation {
            Notation::Plain { unit, letter } => format!("{:.decimals$}{letter}", value / unit),
            Notation::Scientific => format!("{value:.decimals$e}"),
        }
    }
}

/// A timestep: whole for diffusion, with what it needs of decimals for a flow.
pub fn timestep(t: f64) -> String {
    let text = format!("{t:.1}");
    text.strip_suffix(".0").map_or(text.clone(), String::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_exact() {
        assert_eq!(short(-0.617380929272642), "-0.6174");
        assert_eq!((short(0.0), short(3.77e-16)), ("0.0000".into(), "3.77e-16".into()));
        assert_eq!((exact(3.0), exact(f64::NAN)), ("3".into(), "null".into()));
        assert_eq!(exact(-0.617380929272642), "-0.617380929272642");
        assert_eq!((count(7), count(12480), count(1_000_000)), {
            ("7".into(), "12,480".into(), "1,000,000".into())
        });
        assert_eq!(duration(3.21), "3.2 s");
        assert_eq!((duration(200.0), duration(7500.0)), ("3 min 20 s".into(), "2 h 5 min".into()));
    }

    #[test]
    fn ticks_are_as_fine_as_their_axis() {
        let texts = |places: &[f64]| {
            let ticks = Ticks::new(places);
            places.iter().map(|v| ticks.text(*v)).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(texts(&[-0.7, -0.65, -0.6]), "-0.70 -0.65 -0.60");
        assert_eq!(texts(&[-0.1, 0.1 + 0.2 - 0.3, 0.1]), "-0.1 0 0.1");
        assert_eq!((texts(&[0.0, 5.0, 10.0]), texts(&[0.0, 5e4])), {
            ("0 5 10".into(), "0 50k".into())
        });
        assert_eq!(texts(&[0.0, 2e-6, 4e-6]), "0 2e-6 4e-6");
        assert_eq!((texts(&[]), texts(&[0.25])), (String::new(), "0.25".into()));
        assert_eq!((timestep(901.0), timestep(712.5)), ("901".into(), "712.5".into()));
    }

    #[test]
    fn names_cannot_leave_their_place() {
        assert_eq!(escape("<b a=\"1\">&'\u{1b}"), "&lt;b a=&quot;1&quot;&gt;&amp;&#x27; ");
    }
}
