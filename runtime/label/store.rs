//! Where labels are saved, and their form as records of the preference ledger.

use rehearsal_store::{Exchange, Preference, Store, Usage};

use super::queue::{Item, ItemId, Label, LabelValue};
use crate::data::ledger::{judge_name, ranked};

/// Durable storage of labels.
pub trait LabelStore: Send {
    /// Replaces all labels of an item, which has this id in the queue. Once this returns `Ok`, they survive the process.
    fn save(&mut self, id: ItemId, item: &Item, labels: &[Label]) -> Result<(), String>;
}

/// Converts a label to a ledger record: ranks become scores, a demonstration becomes the only completion, and a skip
/// has no scores.
pub fn preference(item: &Item, label: &Label) -> Preference {
    let judge = judge_name(&label.labeller);
    let exchange = Exchange {
        judge: judge.clone(),
        template: String::new(),
        shown: label.shown.clone(),
        reply: label.notation(),
        first: None,
        usage: Usage::default(),
    };
    let (prompt, completions) = (item.prompt.clone(), item.completions.clone());
    let record = match &label.value {
        LabelValue::Ranks(ranks) => {
            let last = ranks.len() as f64;
            ranked(prompt, completions, ranks.iter().map(|&r| last - f64::from(r)).collect(), judge)
        }
        LabelValue::Demonstration(text) => {
            Preference { prompt, completions: vec![text.clone()], judge, ..Preference::default() }
        }
        // A record without scores is neither a verdict nor a demonstration.
        LabelValue::Skipped => Preference { prompt, completions, judge, ..Preference::default() },
    };
    let exchange = match &label.value {
        // The text is stored as the completion already.
        LabelValue::Demonstration(_) => Exchange { reply: "wrote".into(), ..exchange },
        _ => exchange,
    };
    Preference { time_ms: label.time_ms, exchanges: vec![exchange], ..record }
}

/// Converts a ledger record back to the label it was made from; `None` if its judge is not a person.
pub fn label(record: &Preference) -> Option<Label> {
    let labeller = record.judge.strip_prefix("person:")?.to_string();
    let exchange = record.exchanges.first()?;
    let value = match exchange.reply.as_str() {
        "skipped" => LabelValue::Skipped,
        "wrote" => LabelValue::Demonstration(record.completions.first()?.clone()),
        _ => {
            let last = record.scores.len() as f64;
            LabelValue::Ranks(record.scores.iter().map(|s| (last - s) as u32).collect())
        }
    };
    Some(Label { labeller, value, shown: exchange.shown.clone(), time_ms: record.time_ms })
}

/// Labels of a file's items in a preference ledger. The record's step is the item's row in the file, which is its id in a
/// queue that holds the file's items in order.
pub struct LedgerLabels {
    store: Store,
    items: Vec<Item>,
}

impl LedgerLabels {
    /// Opens a ledger for `items` in file order, and returns the labels that it holds of each. Fails if it holds a
    /// label of another item.
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
                        "the directory holds a label by {} of another item than row {} of the file; pass the file \
                         that it was started with, or name another directory",
                        label.labeller,
                        record.step + 1
                    ));
                }
            }
        }
        Ok((Self { store, items }, known))
    }
}

impl LabelStore for LedgerLabels {
    fn save(&mut self, id: ItemId, item: &Item, labels: &[Label]) -> Result<(), String> {
        // Rows may be equal, so an item is found by its place.
        if self.items.get(id as usize) != Some(item) {
            return Err(format!("the item is not row {} of the file", id + 1));
        }
        let step = id;
        let known = self.store.preferences_of_step(step).map_err(|e| e.to_string())?;
        let mut next = known.iter().map(|r| r.index + 1).max().unwrap_or(0);
        let mut records = Vec::new();
        for label in labels {
            let judge = judge_name(&label.labeller);
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
        let label = |who: &str, value| Label { labeller: who.into(), value, shown: vec![1, 0], time_ms: 5 };
        let (mut ledger, known) = LedgerLabels::open(store(), items.clone()).unwrap();
        assert!(known.iter().all(Vec::is_empty));
        let ranks = label("anna", LabelValue::Ranks(vec![2, 1]));
        ledger.save(0, &items[0], &[ranks.clone(), label("ben", LabelValue::Skipped)]).unwrap();
        let wrote = Label { shown: Vec::new(), ..label("anna", LabelValue::Demonstration("Hello.".into())) };
        ledger.save(1, &items[1], std::slice::from_ref(&wrote)).unwrap();
        let records = ledger.store.preferences_of_step(0).unwrap();
        assert_eq!((records[0].pair, records[0].judge.as_str()), (Some((1, 0)), "person:anna"));
        assert_eq!(records[0].exchanges[0].reply, "A > B");
        // Ben's label is undone, and the ledger is opened again.
        ledger.save(0, &items[0], std::slice::from_ref(&ranks)).unwrap();
        let (_, known) = LedgerLabels::open(ledger.store, items.clone()).unwrap();
        assert_eq!(known, [vec![ranks], vec![wrote]]);
    }
    #[test]
    fn equal_rows_keep_labels_of_their_own() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::with_kv(Box::new(MemoryKv::default()), folder.path()).unwrap();
        let row = Item { prompt: Prompt::Text("q".into()), completions: vec!["a".into(), "b".into()] };
        let items = vec![row.clone(), row.clone(), row.clone()];
        let ranks = |best: usize| LabelValue::Ranks(if best == 0 { vec![1, 2] } else { vec![2, 1] });
        let label = |best| Label { labeller: "anna".into(), value: ranks(best), shown: vec![0, 1], time_ms: 5 };
        let (mut ledger, _) = LedgerLabels::open(store, items.clone()).unwrap();
        for (id, best) in [(2, 1), (0, 0), (1, 1)] {
            ledger.save(id, &row, &[label(best)]).unwrap();
        }
        assert!(ledger.save(3, &row, &[label(0)]).is_err());
        let (_, known) = LedgerLabels::open(ledger.store, items).unwrap();
        assert_eq!(known, [vec![label(0)], vec![label(1)], vec![label(1)]]);
    }
}
