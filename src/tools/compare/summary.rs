//! What a comparison's records say: curves, medians with their intervals, and signs.

use std::collections::BTreeMap;

use super::record::{EpochPoint, RunRecord, StepSummary, place};
use crate::measure::bootstrap::{Bounds, median, median_bounds, sign_test};
use crate::train::metrics::{EvaluationRecord, Measures};

/// What was found for a method.
#[derive(Clone, Debug, Default)]
pub struct Found {
    pub method: String,
    /// What was chosen of what is tuned.
    pub tuned: BTreeMap<String, String>,
    /// The runs by which it was chosen.
    pub trials: Vec<RunRecord>,
    /// A run a seed.
    pub runs: Vec<RunRecord>,
}

/// What a comparison has found, over seeds.
pub struct Summary<'a> {
    pub found: &'a [Found],
    /// The reward that runs are compared at.
    pub target: Option<f64>,
    /// Whether it is the first method's own median at its end.
    pub own_target: bool,
    pub rows: Vec<Row>,
}

/// A number over seeds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub median: f64,
    /// 95% of medians of as many seeds, drawn with replacement; none of one seed.
    pub bounds: Option<Bounds>,
}

impl Spread {
    /// Of a number of each seed; an infinite one is that of a run that never came so far.
    fn of(values: &[f64]) -> Option<Self> {
        Some(Self { median: median(values)?, bounds: median_bounds(values, 0) })
    }
}

/// What an x axis counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Clock {
    Epochs,
    Images,
    Calls,
    Seconds,
}

impl Clock {
    pub const ALL: [Self; 4] = [Self::Epochs, Self::Images, Self::Calls, Self::Seconds];

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Epochs => "epochs",
            Self::Images => "images",
            Self::Calls => "network calls",
            Self::Seconds => "seconds",
        }
    }

    fn of(self, epoch: &EpochPoint) -> f64 {
        match self {
            Self::Epochs => 1.0,
            Self::Images => epoch.images as f64,
            Self::Calls => epoch.calls as f64,
            Self::Seconds => epoch.seconds,
        }
    }
}

/// A method's row of the table.
pub struct Row {
    pub method: String,
    pub seeds: usize,
    pub diverged: usize,
    /// Seeds whose last pictures had collapsed.
    pub collapsed: usize,
    /// Reward of the evaluation after the last epoch.
    pub reward: Option<Spread>,
    /// What it took to the target; infinite where more than half of the seeds never came there.
    pub to_target: BTreeMap<Clock, Spread>,
    /// The same over what the first method took, seed by seed.
    pub of_first: BTreeMap<Clock, Spread>,
    /// Reward after as many network calls as the first method makes in all.
    pub at_calls: Option<Spread>,
    /// Seeds in which its last reward is above and below that of the first method, and how likely
    /// so uneven a split is by chance.
    pub signs: Option<Signs>,
    /// Measures where the run's reward passes the target.
    pub at_target: BTreeMap<&'static str, Spread>,
}

/// Seeds paired with the first method's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Signs {
    pub better: usize,
    pub worse: usize,
    pub p: f64,
}

/// What is measured at equal reward: its name, and how it is read.
type Measure = (&'static str, fn(&Measures) -> Option<f64>);
pub const MEASURES: [Measure; 6] = [
    ("KL", |m| m.kl),
    ("Frechet distance to the base", |m| m.frechet),
    ("CMMD to the base", |m| m.cmmd),
    ("KID to the base", |m| m.kid),
    ("1 - cosine within a prompt", |m| m.pairwise_cosine_distance),
    ("Vendi", |m| m.vendi),
];

/// A run's reward by what was spent: its evaluations.
pub fn curve(run: &RunRecord, clock: Clock) -> Vec<(f64, f64)> {
    let spent = |e: &EvaluationRecord| {
        let done = run.epochs.iter().filter(|point| point.epoch <= e.epoch);
        // An empty sum would be -0.
        done.fold(0.0, |sum, point| sum + clock.of(point))
    };
    run.evaluations.iter().map(|e| (spent(e), e.reward_mean)).collect()
}

/// Where a curve first reaches a height, between its points on a straight line.
fn reaches(curve: &[(f64, f64)], height: f64) -> Option<f64> {
    if curve.first()?.1 >= height {
        return Some(curve[0].0);
    }
    curve.windows(2).find(|pair| pair[1].1 >= height).map(|pair| {
        let [(x0, y0), (x1, y1)] = [pair[0], pair[1]];
        x0 + (x1 - x0) * (height - y0) / (y1 - y0)
    })
}

/// A curve's height at a place that it reaches.
fn height(curve: &[(f64, f64)], x: f64) -> Option<f64> {
    let pair = curve.windows(2).find(|pair| pair[0].0 <= x && x <= pair[1].0)?;
    let [(x0, y0), (x1, y1)] = [pair[0], pair[1]];
    if x1 == x0 { Some(y1) } else { Some(y0 + (y1 - y0) * (x - x0) / (x1 - x0)) }
}

impl<'a> Summary<'a> {
    /// Of what was found, against a reward, or the first method's own at its end.
    pub fn new(found: &'a [Found], target: Option<f64>) -> Self {
        let last =
            |f: &Found| -> Vec<f64> { f.runs.iter().filter_map(RunRecord::final_reward).collect() };
        let of_first = found.first().and_then(|f| median(&last(f)));
        let goal = target.or(of_first);
        let rows = found.iter().map(|f| row(f, &found[0], goal)).collect();
        Self { found, target: goal, own_target: target.is_none(), rows }
    }
}

fn row(own: &Found, first: &Found, target: Option<f64>) -> Row {
    let pair = |run: &RunRecord| first.runs.iter().find(|other| other.seed == run.seed);
    let rewards: Vec<f64> = own.runs.iter().filter_map(RunRecord::final_reward).collect();
    let took = |run: &RunRecord, clock: Clock| {
        target.map(|t| reaches(&curve(run, clock), t).unwrap_or(f64::INFINITY))
    };
    let (mut to_target, mut of_first) = (BTreeMap::new(), BTreeMap::new());
    for clock in Clock::ALL {
        let all: Vec<f64> = own.runs.iter().filter_map(|run| took(run, clock)).collect();
        to_target.extend(Spread::of(&all).map(|s| (clock, s)));
        let ratio = |run: &RunRecord| {
            let (own, other) = (took(run, clock)?, took(pair(run)?, clock)?);
            // Two that never came there say nothing of each other.
            Some(own / other).filter(|r| !r.is_nan())
        };
        let ratios: Vec<f64> = own.runs.iter().filter_map(ratio).collect();
        of_first.extend(Spread::of(&ratios).map(|s| (clock, s)));
    }
    let at_calls = |run: &RunRecord| {
        let other = pair(run).filter(|other| other.diverged.is_none())?;
        if run.diverged.is_some() {
            return None;
        }
        let whole = curve(other, Clock::Calls).last()?.0;
        let own = curve(run, Clock::Calls);
        // A run that makes fewer calls has its last reward by then.
        height(&own, whole).or_else(|| own.last().filter(|(x, _)| *x <= whole).map(|(_, y)| *y))
    };
    let differences: Vec<f64> = own
        .runs
        .iter()
        .filter_map(|run| Some(run.final_reward()? - pair(run)?.final_reward()?))
        .collect();
    let better = differences.iter().filter(|d| **d > 0.0).count();
    let worse = differences.iter().filter(|d| **d < 0.0).count();
    let mut at_target = BTreeMap::new();
    for (name, read) in MEASURES {
        let there = |run: &RunRecord| measure_at(run, target?, read);
        let values: Vec<f64> = own.runs.iter().filter_map(there).collect();
        at_target.extend(Spread::of(&values).map(|s| (name, s)));
    }
    Row {
        method: own.method.clone(),
        seeds: own.runs.len(),
        diverged: own.runs.iter().filter(|r| r.diverged.is_some()).count(),
        collapsed: own.runs.iter().filter(|r| r.collapsed()).count(),
        reward: Spread::of(&rewards),
        to_target,
        of_first,
        at_calls: Spread::of(&own.runs.iter().filter_map(at_calls).collect::<Vec<f64>>()),
        signs: (own.method != first.method && !differences.is_empty()).then(|| Signs {
            better,
            worse,
            p: sign_test(better, worse),
        }),
        at_target,
    }
}

/// A measure where the reward passes the target, between two evaluations on a straight line.
fn measure_at(run: &RunRecord, target: f64, read: fn(&Measures) -> Option<f64>) -> Option<f64> {
    let epoch = reaches(&curve(run, Clock::Epochs), target)?;
    let value = |e: &EvaluationRecord| Some((e.epoch as f64, read(e.measures.as_ref()?)?));
    let measured: Vec<(f64, f64)> = run.evaluations.iter().filter_map(value).collect();
    height(&measured, epoch)
}

/// The median over seeds of a method's reward, evaluation by evaluation.
pub fn median_curve(found: &Found, clock: Clock) -> Vec<(f64, f64)> {
    let curves: Vec<Vec<(f64, f64)>> = found.runs.iter().map(|run| curve(run, clock)).collect();
    let longest = curves.iter().map(Vec::len).max().unwrap_or(0);
    let at = |i: usize| {
        let column = |f: fn(&(f64, f64)) -> f64| -> Vec<f64> {
            curves.iter().filter_map(|c| c.get(i)).map(f).collect()
        };
        Some((median(&column(|p| p.0))?, median(&column(|p| p.1))?))
    };
    (0..longest).filter_map(at).collect()
}

/// The median over seeds of each timestep.
pub fn median_steps(found: &Found) -> Vec<StepSummary> {
    let mut all: BTreeMap<i64, Vec<&StepSummary>> = BTreeMap::new();
    for step in found.runs.iter().flat_map(|run| &run.steps) {
        all.entry(place(step.t)).or_default().push(step);
    }
    let summary = |steps: Vec<&StepSummary>| {
        let measured = |f: fn(&StepSummary) -> Option<f64>| {
            median(&steps.iter().filter_map(|s| f(s)).collect::<Vec<f64>>())
        };
        let of = |f: fn(&StepSummary) -> f64| {
            median(&steps.iter().map(|s| f(s)).collect::<Vec<f64>>()).unwrap_or(f64::NAN)
        };
        StepSummary {
            t: steps[0].t,
            updates: steps.iter().map(|s| s.updates).sum(),
            clip_frac: of(|s| s.clip_frac),
            gradient_mean: of(|s| s.gradient_mean),
            gradient_variance: of(|s| s.gradient_variance),
            grad_norm_mean: measured(|s| s.grad_norm_mean),
            grad_norm_variance: measured(|s| s.grad_norm_variance),
            log_ratio_error: of(|s| s.log_ratio_error),
        }
    };
    all.into_values().map(summary).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(method: &str, seed: u64, rewards: &[f64], calls: usize) -> RunRecord {
        let evaluation = |(epoch, reward): (usize, &f64)| EvaluationRecord {
            epoch,
            reward_mean: *reward,
            rewards: BTreeMap::new(),
            measures: None,
            out_of_bounds: Vec::new(),
            collapse: Vec::new(),
        };
        let epoch = |epoch| EpochPoint {
            epoch,
            reward_mean: 0.0,
            images: 10,
            calls,
            seconds: 2.0,
            clip_frac: None,
        };
        RunRecord {
            method: method.into(),
            seed,
            tuned: BTreeMap::new(),
            settings: String::new(),
            diverged: None,
            epochs: (1..rewards.len()).map(epoch).collect(),
            evaluations: rewards.iter().enumerate().map(evaluation).collect(),
            steps: Vec::new(),
        }
    }

    fn found(method: &str, runs: Vec<RunRecord>) -> Found {
        Found { method: method.into(), runs, ..Default::default() }
    }

    /// Two methods on three seeds: the second needs half the epochs, and twice the calls of each.
    #[test]
    fn methods_are_paired_by_seed() {
        let slow = |seed| run("slow", seed, &[0.0, 1.0, 2.0, 3.0, 4.0], 100);
        let fast = |seed| run("fast", seed, &[0.0, 2.0, 4.0, 6.0, 8.0], 200);
        let all =
            [found("slow", (0..3).map(slow).collect()), found("fast", (0..3).map(fast).collect())];
        let summary = Summary::new(&all, None);
        assert_eq!((summary.target, summary.own_target), (Some(4.0), true));
        let row = &summary.rows[1];
        assert_eq!(row.to_target[&Clock::Epochs].median, 2.0);
        assert_eq!(row.of_first[&Clock::Epochs].median, 0.5);
        assert_eq!(row.of_first[&Clock::Calls].median, 1.0);
        assert_eq!(row.at_calls.unwrap().median, 4.0);
        assert_eq!(row.signs, Some(Signs { better: 3, worse: 0, p: 0.25 }));
        assert_eq!(summary.rows[0].signs, None);
        assert_eq!(median_curve(&all[1], Clock::Images)[1], (10.0, 2.0));
    }

    #[test]
    fn what_is_never_reached_is_infinite() {
        let all = [found("low", vec![run("low", 0, &[0.0, 1.0], 1)])];
        let summary = Summary::new(&all, Some(5.0));
        assert_eq!(summary.rows[0].to_target[&Clock::Epochs].median, f64::INFINITY);
        assert!(summary.rows[0].of_first.is_empty() && summary.rows[0].at_target.is_empty());
        assert_eq!(Summary::new(&[], None).rows.len(), 0);
    }
}
