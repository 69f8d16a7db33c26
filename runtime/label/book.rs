//! Where labels are kept.

use rehearsal_store::{Exchange, Preference, Store, Usage};

use super::board::{Item, Label, Word};
use crate::data::ledger::ranked;

/// Keeps what is said of items. What a call returned `Ok` for survives the process.
pub trait Book: Send {
    /// Sets all that is known of an item.
    fn keep(&mut self, item: &Item, labels: &[Label]) -> Result<(), String>;
}

/// Who judged, in the ledger: a person by name.
pub fn person(labeller: &str) -> String {
    format!("person:{labeller}")
}

/// A label as a record of the ledger.
pub fn preference(item: &Item, label: &Label) -> Preference {
    let judge = person(&label.labeller);
    let exchange = Exchange {
        judge: judge.clone(),
        template: String::new(),
        shown: label.shown.clone(),
        reply: label.notation(),
        first: None,
        usage: Usage::default(),
    };
    let (prompt, completions) = (item.prompt.clone(), item.completions.clone());
    let said = match &label.word {
        Word::Ranks(ranks) => {
            let last = ranks.len() as f64;
            ranked(prompt, completions, ranks.iter().map(|&r| last - f64::from(r)).collect(), judge)
        }
        Word::Wrote(text) => Preference { prompt, completions: vec![text.clone()], judge, ..Preference::default() },
        // Without scores it is no verdict, and no demonstration either.
        Word::Skipped => Preference { prompt, completions, judge, ..Preference::default() },
    };
    let exchange = match &label.word {
        // The text is the completion; it is not kept twice.
        Word::Wrote(_) => Exchange { reply: "wrote".into(), ..exchange },
        _ => exchange,
    };
    Preference { time_ms: label.time_ms, exchanges: vec![exchange], ..said }
}

/// The label that a record was made from, if a person made it.
pub fn label(record: &Preference) -> Option<Label> {
    let labeller = record.judge.strip_prefix("person:")?.to_string();
    let exchange = record.exchanges.first()?;
    let word = match exchange.reply.as_str() {
        "skipped" => Word::Skipped,
        "wrote" => Word::Wrote(record.completions.first()?.clone()),
        _ => {
            let last = record.scores.len() as f64;
            Word::Ranks(record.scores.iter().map(|s| (last - s) as u32).collect())
        }
    };
    Some(Label { labeller, word, shown: exchange.shown.clone(), time_ms: record.time_ms })
}

/// A ledger as the book of a file's items: an item's verdicts are those of its step.
pub struct LedgerBook {
    store: Store,
    items: Vec<Item>,
}

impl LedgerBook {
    /// `items` in the order of their file; what the ledger holds must be verdicts on them.
    pub fn open(store: Store, items: Vec<Item>) -> Result<(Self, Vec<Vec<Label>>), String> {
        let mut known = vec![Vec::new(); items.len()];
        for record in store.preferences().map_err(|e| e.to_string())? {
            let record = record.map_err(|e| e.to_string())?;
            let Some(label) = label(&record) else { continue };
            let same = |item: &&Item| {
                item.prompt == record.prompt && (item.completions.is_empty() || item.completions == record.completions)
            };
            match items.get(record.step as usize).filter(same) {
                Some(_) => known[record.step as usize].push(label),
                None => {
                    return Err(format!(
                        "the directory holds a verdict by {} on another item than the file's row {}; give the file it was \
                         started with, or name another directory",
                        label.labeller,
                        record.step + 1
                    ));
                }
            }
        }
        Ok((Self { store, items }, known))
    }
}

impl Book for LedgerBook {
    fn keep(&mut self, item: &Item, labels: &[Label]) -> Result<(), String> {
        let step = self.items.iter().position(|i| i == item).ok_or("the item is not in the file")? as u64;
        let known = self.store.preferences_of_step(step).map_err(|e| e.to_string())?;
        let mut next = known.iter().map(|r| r.index + 1).max().unwrap_or(0);
        let mut records = Vec::new();
        for label in labels {
            let judge = person(&label.labeller);
            let index = known.iter().find(|r| r.judge == judge).map_or(next, |r| r.index);
            next = next.max(index + 1);
            records.push(Preference { step, index, row: step, ..preference(item, label) });
        }
        self.store.log_preferences(&records).map_err(|e| e.to_string())?;
        for old in known.iter().filter(|old| !records.iter().any(|r| r.index == old.index)) {
            self.store.retract_preference(step, old.index).map_err(|e| e.to_string())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rehearsal_store::{MemoryKv, Prompt};

    #[test]
    fn labels_become_records_and_records_labels() {
        let folder = tempfile::tempdir().unwrap();
        let store = || Store::with_kv(Box::new(MemoryKv::default()), folder.path()).unwrap();
        let items = vec![
            Item { prompt: Prompt::Text("q".into()), completions: vec!["a".into(), "b".into()] },
            Item { prompt: Prompt::Text("w".into()), completions: Vec::new() },
        ];
        let said = |who: &str, word| Label { labeller: who.into(), word, shown: vec![1, 0], time_ms: 5 };
        let (mut book, known) = LedgerBook::open(store(), items.clone()).unwrap();
        assert!(known.iter().all(Vec::is_empty));
        let ranks = said("anna", Word::Ranks(vec![2, 1]));
        book.keep(&items[0], &[ranks.clone(), said("ben", Word::Skipped)]).unwrap();
        let wrote = Label { shown: Vec::new(), ..said("anna", Word::Wrote("Hello.".into())) };
        book.keep(&items[1], std::slice::from_ref(&wrote)).unwrap();
        let records = book.store.preferences_of_step(0).unwrap();
        assert_eq!((records[0].pair, records[0].judge.as_str()), (Some((1, 0)), "person:anna"));
        assert_eq!(records[0].exchanges[0].reply, "A > B");
        // Ben's word is taken back, and everything is read again.
        book.keep(&items[0], std::slice::from_ref(&ranks)).unwrap();
        let (_, known) = LedgerBook::open(book.store, items.clone()).unwrap();
        assert_eq!(known, [vec![ranks], vec![wrote]]);
    }
}
