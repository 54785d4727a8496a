//! Whether a run's pictures have collapsed: what an evaluation says against the run's first, and
//! how far that may move. The thresholds are our own, and two evaluations in a row have to agree.

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::bootstrap::standard_error;
use super::mean;

/// What is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Signal {
    /// A number that is not trained on falls while the reward rises, in standard errors.
    HeldOut,
    /// Mean of 1 - cosine within a prompt, over the base's.
    PairwiseCosineDistance,
    /// The Vendi score less 1, over the base's.
    Vendi,
    /// Over the base's.
    Pvs,
    /// Share of channels at 0 or 255: times the base's, plus a little.
    Saturated,
    /// Variance of the Laplacian over the base's, either way: edges gone, or a grid.
    LaplacianVariance,
    /// The trajectories' KL over the user's budget.
    Kl,
}

/// All of them, in the order in which they are told.
pub const SIGNALS: [Signal; 7] = [
    Signal::HeldOut,
    Signal::PairwiseCosineDistance,
    Signal::Vendi,
    Signal::Pvs,
    Signal::Saturated,
    Signal::LaplacianVariance,
    Signal::Kl,
];

impl Signal {
    /// As metrics.jsonl and `--collapse-bound` call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::HeldOut => "held_out",
            Self::PairwiseCosineDistance => "pairwise_cosine_distance",
            Self::Vendi => "vendi",
            Self::Pvs => "pvs",
            Self::Saturated => "saturated",
            Self::LaplacianVariance => "laplacian_variance",
            Self::Kl => "kl",
        }
    }

    fn bound(self) -> Bound {
        let [warn, stop] = match self {
            Self::HeldOut => [2.0, 4.0],
            Self::PairwiseCosineDistance | Self::Vendi => [0.6, 0.35],
            Self::Pvs => [0.65, 0.45],
            Self::Saturated => [2.0, 4.0],
            Self::LaplacianVariance => [0.5, 0.25],
            Self::Kl => [1.0, 2.0],
        };
        Bound { warn, stop }
    }

    /// Whether what is watched must stay above its bounds.
    fn falls(self) -> bool {
        match self {
            Self::PairwiseCosineDistance | Self::Vendi | Self::Pvs | Self::LaplacianVariance => {
                true
            }
            Self::HeldOut | Self::Saturated | Self::Kl => false,
        }
    }
}

/// Where a signal warns, and where it stops a run.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Bound {
    warn: f64,
    stop: f64,
}

/// The bounds of a run; a signal without one is not watched.
#[derive(Clone, Debug, PartialEq)]
pub struct Bounds(Vec<(Signal, Bound)>);

impl Bounds {
    /// The defaults, with those of `--collapse-bound SIGNAL=WARN,STOP` or `SIGNAL=off` in place.
    ///
    /// # Errors
    /// Names the flag and what cannot be read.
    pub fn new(given: &[String]) -> Result<Self> {
        let mut bounds: Vec<(Signal, Bound)> = SIGNALS.iter().map(|s| (*s, s.bound())).collect();
        for text in given {
            let names: Vec<&str> = SIGNALS.iter().map(|s| s.name()).collect();
            let way_out = || {
                format!(
                    "--collapse-bound {text}: give SIGNAL=WARN,STOP or SIGNAL=off, with a signal \
                     of {}",
                    names.join(", ")
                )
            };
            let (name, numbers) = text.split_once('=').with_context(way_out)?;
            let found = SIGNALS.iter().find(|s| s.name() == name);
            let signal = *found.with_context(way_out)?;
            bounds.retain(|(other, _)| *other != signal);
            if numbers != "off" {
                let (warn, stop) = numbers.split_once(',').with_context(way_out)?;
                let number = |text: &str| text.trim().parse::<f64>().with_context(way_out);
                let bound = Bound { warn: number(warn)?, stop: number(stop)? };
                check(signal, bound).with_context(|| format!("--collapse-bound {text}"))?;
                bounds.push((signal, bound));
            }
        }
        bounds.sort_by_key(|(signal, _)| *signal);
        Ok(Self(bounds))
    }
}

fn check(signal: Signal, Bound { warn, stop }: Bound) -> Result<()> {
    let positive = |v: f64| v.is_finite() && v > 0.0;
    ensure!(positive(warn) && positive(stop), "both bounds must be positive, finite numbers");
    if signal.falls() {
        ensure!(stop <= warn && warn < 1.0, "must be below 1, and STOP at most WARN");
    } else if stop < warn {
        bail!("STOP must be at least WARN");
    }
    Ok(())
}

/// What an evaluation says; `None` where it was not measured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Signs {
    pub pairwise_cosine_distance: Option<f64>,
    pub vendi: Option<f64>,
    pub pvs: Option<f64>,
    pub saturated: Option<f64>,
    pub laplacian_variance: Option<f64>,
    /// KL over the user's budget.
    pub kl: Option<f64>,
    pub held_out: Vec<HeldOut>,
}

/// A number that is not trained on.
#[derive(Clone, Debug, PartialEq)]
pub struct HeldOut {
    pub name: String,
    /// Its mean for each prompt.
    pub by_prompt: Vec<f64>,
    /// Whether what is trained on has risen since the base.
    pub reward_rises: bool,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Warn,
    Stop,
}

/// A signal that has left its bounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    pub signal: Signal,
    pub level: Level,
    /// What moved, and by how much: `SIGNAL ...`.
    pub text: String,
}

/// A signal's distance from the base in the units of its bounds, and in words.
struct Reading {
    value: f64,
    text: String,
}

/// The signals of one evaluation that are out of bounds against the base.
pub fn out_of_bounds(base: &Signs, now: &Signs, bounds: &Bounds) -> Vec<Finding> {
    let found = |(signal, bound): &(Signal, Bound)| {
        let readings = read(*signal, base, now).into_iter();
        let level = |reading: Reading| {
            let level = level(*signal, *bound, base, reading.value)?;
            let text = format!("{} {}", signal.name(), reading.text);
            Some(Finding { signal: *signal, level, text })
        };
        readings.filter_map(level).max_by_key(|finding| finding.level)
    };
    bounds.0.iter().filter_map(found).collect()
}

/// The signals that two evaluations in a row found out of bounds, each as bad as the milder.
pub fn confirmed(before: &[Finding], now: &[Finding]) -> Vec<Finding> {
    let both = |found: &Finding| {
        let earlier = before.iter().find(|f| f.signal == found.signal)?;
        let level = earlier.level.min(found.level);
        Some(Finding { level, ..found.clone() })
    };
    now.iter().filter_map(both).collect()
}

fn level(signal: Signal, bound: Bound, base: &Signs, value: f64) -> Option<Level> {
    let beyond = |bound: f64, margin: f64| match signal {
        Signal::HeldOut | Signal::Kl => value > bound,
        Signal::PairwiseCosineDistance | Signal::Vendi | Signal::Pvs => value < bound,
        Signal::LaplacianVariance => value < bound || value > 1.0 / bound,
        Signal::Saturated => value > bound * base.saturated.unwrap_or(0.0) + margin,
    };
    if beyond(bound.stop, 0.05) {
        Some(Level::Stop)
    } else {
        beyond(bound.warn, 0.01).then_some(Level::Warn)
    }
}

fn read(signal: Signal, base: &Signs, now: &Signs) -> Vec<Reading> {
    let ratio = |of: fn(&Signs) -> Option<f64>, zero: f64| {
        let (base, now) = (of(base)?, of(now)?);
        (base - zero > 1e-9).then(|| {
            let value = (now - zero) / (base - zero);
            let moved = if value < 1.0 { "fell" } else { "rose" };
            let less = if zero == 0.0 { "" } else { ", less 1" };
            let text = format!("{moved} to {value:.2} of the base's{less} ({base:.4} -> {now:.4})");
            Reading { value, text }
        })
    };
    match signal {
        Signal::HeldOut => held_out(base, now),
        Signal::PairwiseCosineDistance => {
            ratio(|s| s.pairwise_cosine_distance, 0.0).into_iter().collect()
        }
        Signal::Vendi => ratio(|s| s.vendi, 1.0).into_iter().collect(),
        Signal::Pvs => ratio(|s| s.pvs, 0.0).into_iter().collect(),
        Signal::LaplacianVariance => ratio(|s| s.laplacian_variance, 0.0).into_iter().collect(),
        Signal::Saturated => {
            let both = base.saturated.zip(now.saturated);
            let reading = both.map(|(base, value)| Reading {
                value,
                text: format!("rose from {:.1}% to {:.1}%", 100.0 * base, 100.0 * value),
            });
            reading.into_iter().collect()
        }
        Signal::Kl => {
            let text = |k: f64| format!("rose to {k:.2} of its budget");
            now.kl.map(|value| Reading { value, text: text(value) }).into_iter().collect()
        }
    }
}

/// How far each number that is not trained on has fallen, in standard errors over the prompts.
fn held_out(base: &Signs, now: &Signs) -> Vec<Reading> {
    let fallen = |now: &HeldOut| {
        let before = base.held_out.iter().find(|b| b.name == now.name)?;
        let paired = before.by_prompt.len() == now.by_prompt.len();
        let pairs = now.by_prompt.iter().zip(&before.by_prompt);
        let falls: Vec<f64> = pairs.map(|(now, before)| before - now).collect();
        let value = mean(&falls) / standard_error(&falls)?;
        let rises = now.reward_rises && paired && value.is_finite();
        rises.then(|| Reading {
            value,
            text: format!(
                "{} fell by {value:.1} standard errors while the reward rises ({:.4} -> {:.4})",
                now.name,
                mean(&before.by_prompt),
                mean(&now.by_prompt)
            ),
        })
    };
    now.held_out.iter().filter_map(fallen).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn levels(base: &Signs, now: &Signs) -> Vec<(Signal, Level)> {
        let found = out_of_bounds(base, now, &Bounds::new(&[]).unwrap());
        found.iter().map(|f| (f.signal, f.level)).collect()
    }

    /// Each signal at, and just beyond, the bounds of METHOD's table.
    #[test]
    fn each_signal_has_its_bounds() {
        let base = Signs {
            pairwise_cosine_distance: Some(0.5),
            vendi: Some(3.0),
            pvs: Some(0.4),
            saturated: Some(0.1),
            laplacian_variance: Some(100.0),
            ..Signs::default()
        };
        assert_eq!(levels(&base, &base), []);
        type Change = (Signal, fn(f64) -> Signs, [f64; 3]);
        let changes: [Change; 7] = [
            (
                Signal::PairwiseCosineDistance,
                |v| Signs { pairwise_cosine_distance: Some(v), ..Signs::default() },
                [0.301, 0.299, 0.174],
            ),
            (Signal::Vendi, |v| Signs { vendi: Some(v), ..Signs::default() }, [2.21, 2.19, 1.69]),
            (Signal::Pvs, |v| Signs { pvs: Some(v), ..Signs::default() }, [0.261, 0.259, 0.179]),
            (
                Signal::Saturated,
                |v| Signs { saturated: Some(v), ..Signs::default() },
                [0.209, 0.211, 0.451],
            ),
            (
                Signal::LaplacianVariance,
                |v| Signs { laplacian_variance: Some(v), ..Signs::default() },
                [50.1, 49.9, 24.9],
            ),
            (
                Signal::LaplacianVariance,
                |v| Signs { laplacian_variance: Some(v), ..Signs::default() },
                [199.0, 201.0, 401.0],
            ),
            (Signal::Kl, |v| Signs { kl: Some(v), ..Signs::default() }, [0.99, 1.01, 2.01]),
        ];
        for (signal, change, [within, warn, stop]) in changes {
            assert_eq!(levels(&base, &change(within)), [], "{signal:?}");
            assert_eq!(levels(&base, &change(warn)), [(signal, Level::Warn)]);
            assert_eq!(levels(&base, &change(stop)), [(signal, Level::Stop)]);
        }
    }

    #[test]
    fn a_held_out_number_counts_only_while_the_reward_rises() {
        let signs = |by_prompt: &[f64], reward_rises| Signs {
            held_out: vec![HeldOut {
                name: "color:red".into(),
                by_prompt: by_prompt.to_vec(),
                reward_rises,
            }],
            ..Signs::default()
        };
        let base = signs(&[1.0, 1.0, 1.0], false);
        // Falls of 1, 2 and 3: the mean 2 is 2 / (1 / sqrt(3)) = 3.46 standard errors.
        let now = [0.0, -1.0, -2.0];
        assert_eq!(levels(&base, &signs(&now, true)), [(Signal::HeldOut, Level::Warn)]);
        assert_eq!(levels(&base, &signs(&now, false)), []);
        assert_eq!(levels(&base, &signs(&[2.0, 3.0, 4.0], true)), []);
        let found = out_of_bounds(&base, &signs(&now, true), &Bounds::new(&[]).unwrap());
        assert!(found[0].text.starts_with("held_out color:red fell by 3.5"), "{found:?}");
    }

    #[test]
    fn two_evaluations_in_a_row_have_to_agree() {
        let base = Signs { pvs: Some(1.0), laplacian_variance: Some(1.0), ..Signs::default() };
        let bounds = Bounds::new(&[]).unwrap();
        let now = |pvs, edges| {
            let (pvs, laplacian_variance) = (Some(pvs), Some(edges));
            out_of_bounds(&base, &Signs { pvs, laplacian_variance, ..base.clone() }, &bounds)
        };
        let found = confirmed(&now(0.6, 1.0), &now(0.3, 0.1));
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!((found[0].signal, found[0].level), (Signal::Pvs, Level::Warn));
        assert_eq!(confirmed(&now(0.3, 1.0), &now(0.3, 1.0))[0].level, Level::Stop);
        assert_eq!(confirmed(&[], &now(0.3, 0.1)), []);
    }

    #[test]
    fn bounds_can_be_moved_and_switched_off() {
        let base = Signs { pvs: Some(1.0), ..Signs::default() };
        let now = Signs { pvs: Some(0.6), ..Signs::default() };
        let given = |text: &str| Bounds::new(&[text.to_string()]);
        let found = |text: &str| out_of_bounds(&base, &now, &given(text).unwrap()).len();
        assert_eq!((found("vendi=off"), found("pvs=off"), found("pvs=0.5,0.4")), (1, 0, 0));
        for bad in ["pvs", "pvs=", "pvs=0.5", "pvs=nan,0.1", "pvs=0.4,0.5", "pvs=2,1", "x=1,2"] {
            let error = format!("{:#}", given(bad).unwrap_err());
            assert!(error.starts_with(&format!("--collapse-bound {bad}: ")), "{error}");
        }
        assert!(given("kl=2,1").is_err() && given("kl=1,1").is_ok());
    }
}
