//! A run's records as the page needs them: epochs, evaluations and updates apart, and what has gone
//! by at the end of each epoch.

use std::collections::BTreeMap;

use super::plot::Point;
use crate::train::metrics::{EpochRecord, EvaluationRecord, Record, UpdateRecord};

/// The records of a run by their kind.
pub struct History<'a> {
    pub epochs: Vec<&'a EpochRecord>,
    pub evaluations: Vec<&'a EvaluationRecord>,
    pub updates: Vec<&'a UpdateRecord>,
    /// The epoch in which the run was stopped between two updates.
    pub suspended: Option<usize>,
    /// By epoch, what has gone by at its end.
    spent: BTreeMap<usize, Spent>,
}

/// What a run has cost up to the end of an epoch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spent {
    pub seconds: f64,
    pub calls: usize,
}

/// What a plot's x axis counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Clock {
    Epochs,
    Seconds,
    Calls,
}

impl<'a> History<'a> {
    pub fn new(records: &'a [Record]) -> Self {
        let mut history = Self {
            epochs: Vec::new(),
            evaluations: Vec::new(),
            updates: Vec::new(),
            suspended: None,
            spent: BTreeMap::from([(0, Spent::default())]),
        };
        let mut spent = Spent::default();
        for record in records {
            history.suspended = None;
            match record {
                Record::Epoch(epoch) => {
                    spent.seconds += epoch.seconds;
                    spent.calls += epoch.rollout_calls + epoch.update_calls;
                    history.spent.insert(epoch.epoch, spent);
                    history.epochs.push(epoch);
                }
                Record::Evaluation(evaluation) => history.evaluations.push(evaluation),
                Record::Update(update) => history.updates.push(update),
                Record::Suspended(suspended) => history.suspended = Some(suspended.epoch),
            }
        }
        history
    }

    /// Complete epochs.
    pub fn complete(&self) -> usize {
        self.epochs.last().map_or(0, |e| e.epoch)
    }

    /// What the whole run has cost so far.
    pub fn spent(&self) -> Spent {
        self.spent.last_key_value().map_or(Spent::default(), |(_, spent)| *spent)
    }

    /// Where an epoch's end stands on an axis; an epoch without a record stands nowhere in time.
    pub fn at(&self, epoch: usize, clock: Clock) -> f64 {
        let spent = || self.spent.get(&epoch);
        match clock {
            Clock::Epochs => epoch as f64,
            Clock::Seconds => spent().map_or(f64::NAN, |s| s.seconds),
            Clock::Calls => spent().map_or(f64::NAN, |s| s.calls as f64),
        }
    }

    /// A number of each epoch's rollout. What is scored there was drawn before the epoch's updates,
    /// but the epoch has cost what it cost.
    pub fn of_epochs(&self, clock: Clock, y: impl Fn(&EpochRecord) -> Option<f64>) -> Vec<Point> {
        let point = |e: &&EpochRecord| Some(Point { x: self.at(e.epoch, clock), y: y(e)? });
        self.epochs.iter().filter_map(point).collect()
    }

    /// A number of each evaluation that has it.
    pub fn of_evaluations(
        &self,
        clock: Clock,
        y: impl Fn(&EvaluationRecord) -> Option<f64>,
    ) -> Vec<Point> {
        let point = |e: &&EvaluationRecord| Some(Point { x: self.at(e.epoch, clock), y: y(e)? });
        self.evaluations.iter().filter_map(point).collect()
    }

    /// A number of each update; a skipped one has none.
    pub fn of_updates(&self, y: impl Fn(&UpdateRecord) -> f64) -> Vec<Point> {
        let y = |u: &UpdateRecord| if u.skipped { f64::NAN } else { y(u) };
        self.updates.iter().map(|u| Point { x: u.update as f64, y: y(u) }).collect()
    }

    /// The evaluation after an epoch, the last of several.
    pub fn evaluation(&self, epoch: usize) -> Option<&'a EvaluationRecord> {
        self.evaluations.iter().rfind(|e| e.epoch == epoch).copied()
    }
}

/// At most `most` of a list, evenly spaced, with its first and last.
pub fn thinned<T: Copy>(all: &[T], most: usize) -> Vec<T> {
    if all.len() <= most {
        return all.to_vec();
    }
    let at = |i: usize| all[i * (all.len() - 1) / (most - 1)];
    (0..most).map(at).collect()
}
