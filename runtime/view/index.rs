//! The records of a job's ledger in brief, filtered and sorted.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::access::Brief;

/// Which records are listed. The default lists all, the newest first.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Filter {
    /// First and last step.
    pub from_step: Option<u64>,
    pub to_step: Option<u64>,
    /// Bounds of the best completion's score.
    pub score_min: Option<f64>,
    pub score_max: Option<f64>,
    /// Bounds of the longest completion's length in characters.
    pub characters_min: Option<u32>,
    pub characters_max: Option<u32>,
    /// Smallest disagreement of the judges.
    pub disagreement_min: Option<f64>,
    /// A part of the judge's name.
    pub judge: Option<String>,
    /// Only ties.
    pub ties: bool,
    /// Only records that a person overruled.
    pub overruled: bool,
    pub sort: Sort,
}

/// Order of a list.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sort {
    #[default]
    Newest,
    Oldest,
    /// By the best completion's score, the highest first.
    Best,
    /// By the worst completion's score, the lowest first.
    Worst,
    /// By the difference of the scores, the largest first.
    Spread,
    /// By the longest completion.
    Longest,
    Disagreement,
}

/// A record with the person who overruled it.
#[derive(Debug, Serialize)]
pub struct Listed<'a> {
    #[serde(flatten)]
    pub record: &'a Brief,
    pub overruled_by: Option<&'a str>,
}

/// Records by step and index. Those of people are kept apart, with the records that they overrule.
#[derive(Debug, Default)]
pub struct Index {
    records: BTreeMap<(u64, u32), Brief>,
    overruled: BTreeMap<(u64, u32), Brief>,
}

impl Index {
    /// Adds records, each in place of one with the same step and index.
    pub fn add(&mut self, records: Vec<Brief>) {
        for record in records {
            match record.overrules {
                Some(index) => self.overruled.insert((record.step, index), record),
                None => self.records.insert((record.step, record.index), record),
            };
        }
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// The step and index of the last record.
    pub fn last(&self) -> Option<(u64, u32)> {
        self.records.keys().next_back().copied()
    }

    /// The number of records that pass a filter, and a page of them.
    pub fn list(&self, filter: &Filter, offset: usize, limit: usize) -> (usize, Vec<Listed<'_>>) {
        let person = |p: &Brief| self.overruled.get(&(p.step, p.index)).map(|o| o.judge.as_str());
        let passes = |p: &&Brief| filter.passes(p) && (!filter.overruled || person(p).is_some());
        let mut found: Vec<&Brief> = self.records.values().filter(passes).collect();
        match filter.sort {
            Sort::Oldest => {}
            Sort::Newest => found.reverse(),
            // Equal ones stay in the order of steps.
            sort => found.sort_by(|a, b| sort.compare(a, b)),
        }
        let page = found.iter().skip(offset).take(limit);
        (found.len(), page.map(|p| Listed { record: p, overruled_by: person(p) }).collect())
    }
}

impl Filter {
    fn passes(&self, p: &Brief) -> bool {
        let from = |bound: Option<f64>, value: f64| bound.is_none_or(|bound| value >= bound);
        let to = |bound: Option<f64>, value: f64| bound.is_none_or(|bound| value <= bound);
        self.from_step.is_none_or(|step| p.step >= step)
            && self.to_step.is_none_or(|step| p.step <= step)
            && from(self.score_min, p.scores.1)
            && to(self.score_max, p.scores.1)
            && from(self.characters_min.map(f64::from), f64::from(p.characters.1))
            && to(self.characters_max.map(f64::from), f64::from(p.characters.1))
            && from(self.disagreement_min, p.disagreement)
            && self.judge.as_ref().is_none_or(|judge| p.judge.contains(judge))
            && (!self.ties || p.tie)
    }
}

impl Sort {
    fn compare(self, a: &Brief, b: &Brief) -> Ordering {
        match self {
            Self::Newest | Self::Oldest => Ordering::Equal,
            Self::Best => b.scores.1.total_cmp(&a.scores.1),
            Self::Worst => a.scores.0.total_cmp(&b.scores.0),
            Self::Spread => (b.scores.1 - b.scores.0).total_cmp(&(a.scores.1 - a.scores.0)),
            Self::Longest => b.characters.1.cmp(&a.characters.1),
            Self::Disagreement => b.disagreement.total_cmp(&a.disagreement),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64, index: u32, scores: (f64, f64), characters: u32, disagreement: f64) -> Brief {
        Brief {
            step,
            index,
            overrules: None,
            prompt: format!("prompt {index}"),
            judge: "rules".into(),
            completions: 2,
            scores,
            characters: (1, characters),
            tie: scores.0 == scores.1,
            disagreement,
            time_ms: 0,
        }
    }

    fn index() -> Index {
        let mut index = Index::default();
        index.add(vec![
            record(1, 0, (0.0, 1.0), 10, 0.0),
            record(1, 1, (0.5, 0.5), 90, 0.9),
            record(2, 0, (-3.0, 4.0), 40, 0.1),
        ]);
        let person = Brief {
            overrules: Some(1),
            index: 1 + (1 << 31),
            judge: "person:anna".into(),
            ..record(1, 1, (0.0, 1.0), 90, 0.0)
        };
        index.add(vec![person]);
        index
    }

    fn listed(filter: Filter) -> Vec<(u64, u32)> {
        index().list(&filter, 0, 10).1.iter().map(|l| (l.record.step, l.record.index)).collect()
    }

    #[test]
    fn records_are_sorted_by_what_was_asked_for() {
        let by = |sort| listed(Filter { sort, ..Filter::default() });
        let (a, b, c) = ((1, 0), (1, 1), (2, 0));
        assert_eq!((by(Sort::Newest), by(Sort::Oldest)), (vec![c, b, a], vec![a, b, c]));
        assert_eq!((by(Sort::Best), by(Sort::Worst)), (vec![c, a, b], vec![c, a, b]));
        assert_eq!((by(Sort::Spread), by(Sort::Longest)), (vec![c, a, b], vec![b, c, a]));
        assert_eq!(by(Sort::Disagreement), [b, c, a]);
    }

    #[test]
    fn filters_combine_and_pages_are_cut_from_what_passes() {
        let ties = Filter { ties: true, ..Filter::default() };
        assert_eq!(listed(ties.clone()), [(1, 1)]);
        assert_eq!(listed(Filter { score_min: Some(2.0), ..ties }), []);
        assert_eq!(listed(Filter { overruled: true, ..Filter::default() }), [(1, 1)]);
        let short = Filter { characters_max: Some(40), from_step: Some(1), to_step: Some(1), ..Filter::default() };
        assert_eq!(listed(short), [(1, 0)]);
        assert_eq!(listed(Filter { judge: Some("anna".into()), ..Filter::default() }), []);
        let index = index();
        let (total, page) = index.list(&Filter::default(), 1, 1);
        assert_eq!((total, page[0].record.step, page[0].overruled_by), (3, 1, Some("person:anna")));
        assert_eq!((index.len(), index.last()), (3, Some((2, 0))));
    }
}
