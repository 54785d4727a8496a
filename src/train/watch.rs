//! The watch: each evaluation against the run's first and the one before, and which adapter was the
//! best. All of it is a function of the records, so that a resumed run sees what an unbroken one
//! does.

use super::metrics::{EvaluationRecord, Record};
use crate::config::Settings;
use crate::measure::collapse::{Bounds, Finding, HeldOut, Signs, confirmed, out_of_bounds};

impl EvaluationRecord {
    /// Compares it with the first evaluation and the one before.
    pub(super) fn watch(&mut self, s: &Settings, bounds: &Bounds, earlier: &[Record]) {
        let measured: Vec<&EvaluationRecord> =
            evaluations(earlier).filter(|e| e.measures.is_some() && e.epoch < self.epoch).collect();
        let Some(base) = measured.first().filter(|e| e.epoch == 0) else { return };
        let Some(previous) = measured.last() else { return };
        let (base_signs, now) = (base.signs(s, base, earlier), self.signs(s, base, earlier));
        self.out_of_bounds = out_of_bounds(&base_signs, &now, bounds);
        self.collapse = confirmed(&previous.out_of_bounds, &self.out_of_bounds);
    }

    /// What should be told of it: what the evaluation before has not told.
    pub(super) fn news(&self, earlier: &[Record]) -> Vec<String> {
        let previous = evaluations(earlier).rfind(|e| e.epoch < self.epoch);
        let told = |found: &&Finding| {
            let known = previous.iter().flat_map(|p| &p.collapse);
            !known.clone().any(|k| k.signal == found.signal && k.level >= found.level)
        };
        self.collapse.iter().filter(told).map(|f| format!("collapse: {}", f.text)).collect()
    }

    fn signs(&self, s: &Settings, base: &EvaluationRecord, records: &[Record]) -> Signs {
        let Some(m) = &self.measures else { return Signs::default() };
        let rises = self.reward_mean > base.reward_mean;
        let watched = s.watch.iter().filter_map(|spec| {
            let by_prompt = m.rewards_by_prompt.get(&spec.shown)?.clone();
            Some(HeldOut { name: spec.shown.clone(), by_prompt, reward_rises: rises })
        });
        // On prompts that are not trained on, the reward itself is held out.
        let own = (!s.eval_prompt.is_empty()).then(|| HeldOut {
            name: "reward".into(),
            by_prompt: m.reward_by_prompt.clone(),
            reward_rises: rollouts_rise(self.epoch, records),
        });
        Signs {
            pairwise_cosine_distance: m.pairwise_cosine_distance,
            vendi: m.vendi,
            pvs: m.pvs,
            saturated: m.saturated,
            laplacian_variance: m.laplacian_variance,
            kl: m.kl.zip(s.kl_budget).map(|(kl, budget)| kl / budget),
            held_out: own.into_iter().chain(watched).collect(),
        }
    }
}

/// The evaluations among records.
pub fn evaluations(records: &[Record]) -> impl DoubleEndedIterator<Item = &EvaluationRecord> {
    records.iter().filter_map(|record| match record {
        Record::Evaluation(e) => Some(e),
        Record::Update(_) | Record::Epoch(_) | Record::Suspended(_) => None,
    })
}

/// Whether the rollouts up to an epoch have a higher reward than the first, which is the base's.
fn rollouts_rise(epoch: usize, records: &[Record]) -> bool {
    let mean = |record: &Record| match record {
        Record::Epoch(e) if e.epoch <= epoch => Some(e.reward_mean),
        Record::Epoch(_) | Record::Update(_) | Record::Evaluation(_) | Record::Suspended(_) => None,
    };
    let mut means = records.iter().filter_map(mean);
    let first = means.next();
    first.zip(means.next_back()).is_some_and(|(first, last)| last > first)
}

/// The epoch whose adapter is the best, the first of equal ones.
pub fn best_epoch(s: &Settings, records: &[Record]) -> Option<usize> {
    let watched = s.watch.first().filter(|_| s.eval_prompt.is_empty());
    best_of(evaluations(records), watched.map(|spec| spec.shown.as_str()))
}

/// The same of evaluations: by a watched reward where there is one and no prompt is held out, else
/// by the reward. What was not measured, or is out of bounds, is never the best.
pub fn best_of<'a>(
    evaluations: impl Iterator<Item = &'a EvaluationRecord>,
    watched: Option<&str>,
) -> Option<usize> {
    let score = |e: &EvaluationRecord| {
        e.measures.as_ref()?;
        let number = match watched {
            Some(name) => *e.rewards.get(name)?,
            None => e.reward_mean,
        };
        (e.out_of_bounds.is_empty() && number.is_finite()).then_some(number)
    };
    let mut best: Option<(f64, usize)> = None;
    for evaluation in evaluations {
        let Some(score) = score(evaluation) else { continue };
        if best.is_none_or(|(most, _)| score > most) {
            best = Some((score, evaluation.epoch));
        }
    }
    best.map(|(_, epoch)| epoch)
}
