//! The labelling queue: items, their labels, and leases. It has no clock: callers pass the time.

use std::collections::{BTreeMap, BTreeSet};

use rehearsal_learn::evaluation::agreement::{cohen, fleiss};
use rehearsal_lm::random::Stream;
use rehearsal_store::Prompt;
use serde::{Deserialize, Serialize};

/// Time in milliseconds for which an item on show to one labeller is kept from others.
pub const LEASE_MS: u64 = 10 * 60 * 1000;

/// Most completions of an item. The page names each by a letter, and two letters are commands (skip and undo).
pub const COMPLETIONS_MAX: usize = 12;

/// A prompt with two or more completions to rank, or with none, for which a labeller writes a demonstration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Item {
    /// What was asked.
    pub prompt: Prompt,
    /// Texts to rank, at most [`COMPLETIONS_MAX`]; empty if one is to be written.
    pub completions: Vec<String>,
}

/// Content of a label.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum LabelValue {
    /// Rank of each completion, in the item's order; 1 is best, ties share a rank.
    Ranks(Vec<u32>),
    /// A completion that the labeller wrote.
    #[serde(rename = "Wrote")]
    Demonstration(String),
    /// No judgement. A skip does not count towards the labels that an item needs.
    Skipped,
}

/// One labeller's label of an item.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Label {
    /// Name of the labeller.
    pub labeller: String,
    /// The judgement.
    #[serde(rename = "word")]
    pub value: LabelValue,
    /// Display order: index of the completion that was shown as A, as B, and so on.
    pub shown: Vec<u32>,
    /// Milliseconds since the Unix epoch.
    pub time_ms: u64,
}

impl Label {
    /// The ranking in the letters of the page, as `D > C > A = B`; the text of a demonstration; `skipped`.
    pub fn notation(&self) -> String {
        match &self.value {
            LabelValue::Demonstration(text) => text.clone(),
            LabelValue::Skipped => "skipped".into(),
            LabelValue::Ranks(ranks) => {
                let mut tiers: BTreeMap<u32, Vec<String>> = BTreeMap::new();
                for (letter, &index) in (b'A'..).zip(&self.shown) {
                    tiers.entry(ranks[index as usize]).or_default().push(char::from(letter).to_string());
                }
                tiers.into_values().map(|tied| tied.join(" = ")).collect::<Vec<_>>().join(" > ")
            }
        }
    }
}

/// Identifies an item in a queue.
pub type ItemId = u64;

struct Entry {
    item: Item,
    labels: Vec<Label>,
    /// Labellers who have the item on show, with the time in milliseconds at which each lease ends.
    leases: BTreeMap<String, u64>,
}

/// Counts of a queue, as the page shows them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LabelProgress {
    /// Number of items.
    pub items: usize,
    /// Items that have all labels they need.
    pub done: usize,
    /// Number of labels by labeller, without skips.
    pub labellers: BTreeMap<String, usize>,
    /// Number of skips by all labellers.
    pub skipped: usize,
    /// Agreement of the labellers.
    pub agreement: Agreement,
}

/// Agreement of labellers beyond chance, on pairs of completions that both judged as better, worse or equal.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Agreement {
    /// Cohen's κ of each two labellers: their names, the number of pairs that both judged, κ.
    pub cohen: Vec<(String, String, usize, f64)>,
    /// Fleiss' κ of all labellers, on the pairs that all judged; `None` if it is undefined.
    pub fleiss: Option<f64>,
}

/// Items with their labels and leases, in the order in which they were added.
pub struct LabelQueue {
    entries: BTreeMap<ItemId, Entry>,
    next_id: ItemId,
    /// Labels that each item needs.
    labels_per_item: usize,
}

impl LabelQueue {
    /// Creates an empty queue whose items need `labels_per_item` labels each; 0 counts as 1.
    pub fn new(labels_per_item: usize) -> Self {
        Self { entries: BTreeMap::new(), next_id: 0, labels_per_item: labels_per_item.max(1) }
    }

    /// Adds an item with the labels that it already has. Fails if it has one completion or more than
    /// [`COMPLETIONS_MAX`].
    pub fn add(&mut self, item: Item, labels: Vec<Label>) -> Result<ItemId, String> {
        match item.completions.len() {
            1 => {
                return Err("an item has one completion; give two or more to rank, or none to have one written".into());
            }
            n if n > COMPLETIONS_MAX => {
                return Err(format!("an item has {n} completions; at most {COMPLETIONS_MAX} can be ranked"));
            }
            _ => {}
        }
        let id = self.next_id;
        self.next_id += 1;
        self.entries.insert(id, Entry { item, labels, leases: BTreeMap::new() });
        Ok(id)
    }

    /// Removes an item and returns it with its labels.
    pub fn remove(&mut self, id: ItemId) -> Option<(Item, Vec<Label>)> {
        self.entries.remove(&id).map(|entry| (entry.item, entry.labels))
    }

    /// The item, if it is in the queue.
    pub fn item(&self, id: ItemId) -> Option<&Item> {
        self.entries.get(&id).map(|e| &e.item)
    }

    /// Labels of an item; none if it is not in the queue.
    pub fn labels(&self, id: ItemId) -> &[Label] {
        self.entries.get(&id).map_or(&[], |e| &e.labels)
    }

    /// Whether an item has all labels it needs; skips do not count.
    pub fn is_done(&self, id: ItemId) -> bool {
        self.entries.get(&id).is_some_and(|e| counted(e) >= self.labels_per_item)
    }

    /// Leases the next item to a labeller and returns it with its display order: the item that they have on show
    /// already, or the first that needs labels, has none of theirs, and is not on show to enough others.
    pub fn next(&mut self, labeller: &str, now_ms: u64) -> Option<(ItemId, Vec<u32>)> {
        let needed = self.labels_per_item;
        let open = |e: &Entry| counted(e) < needed && !e.labels.iter().any(|l| l.labeller == labeller);
        let mine = |e: &Entry| e.leases.get(labeller).is_some_and(|&until| until > now_ms);
        let others = |e: &Entry| e.leases.iter().filter(|(who, until)| *who != labeller && **until > now_ms).count();
        let id = self.entries.iter().find(|(_, e)| open(e) && mine(e)).map(|(id, _)| *id).or_else(|| {
            self.entries.iter().find(|(_, e)| open(e) && counted(e) + others(e) < needed).map(|(id, _)| *id)
        })?;
        let entry = self.entries.get_mut(&id)?;
        entry.leases.insert(labeller.into(), now_ms + LEASE_MS);
        Some((id, display_order(&entry.item, labeller)))
    }

    /// Validates a value for an item and returns it as a label; the queue does not change. The error says what is
    /// wrong.
    pub fn make_label(&self, labeller: &str, id: ItemId, value: LabelValue, now_ms: u64) -> Result<Label, String> {
        let entry = self.entries.get(&id).ok_or("the item is no longer in the queue; reload the page")?;
        let n = entry.item.completions.len();
        match &value {
            LabelValue::Ranks(ranks) if n == 0 || ranks.len() != n => {
                return Err(format!("{} ranks for {n} completions", ranks.len()));
            }
            LabelValue::Ranks(ranks) if ranks.iter().any(|&r| r == 0 || r as usize > n) => {
                return Err(format!("every rank must be from 1 to {n}"));
            }
            LabelValue::Demonstration(_) if n > 0 => return Err("the item needs a ranking, not a text".into()),
            LabelValue::Demonstration(text) if text.trim().is_empty() => return Err("the text is empty".into()),
            _ => {}
        }
        Ok(Label { labeller: labeller.into(), value, shown: display_order(&entry.item, labeller), time_ms: now_ms })
    }

    /// Labels of an item with `label` added, which replaces one by the same labeller; the queue does not change.
    pub fn with_label(&self, id: ItemId, label: &Label) -> Vec<Label> {
        let others = self.labels(id).iter().filter(|l| l.labeller != label.labeller);
        others.chain([label]).cloned().collect()
    }

    /// Replaces the labels of an item and ends its leases.
    pub fn set_labels(&mut self, id: ItemId, labels: Vec<Label>) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.labels = labels;
            entry.leases.clear();
        }
    }

    /// The item with the labeller's latest label.
    pub fn last_of(&self, labeller: &str) -> Option<ItemId> {
        let mine = |e: &Entry| e.labels.iter().filter(|l| l.labeller == labeller).map(|l| l.time_ms).max();
        self.entries.iter().filter_map(|(id, e)| Some((mine(e)?, *id))).max().map(|(_, id)| id)
    }

    /// Makes an item the labeller's next one; their other leases end.
    pub fn lease(&mut self, id: ItemId, labeller: &str, now_ms: u64) {
        for (at, entry) in &mut self.entries {
            entry.leases.remove(labeller);
            if *at == id {
                entry.leases.insert(labeller.into(), now_ms + LEASE_MS);
            }
        }
    }

    /// Counts items and labels, and measures agreement.
    pub fn progress(&self) -> LabelProgress {
        let mut labellers: BTreeMap<String, usize> = BTreeMap::new();
        let mut skipped = 0;
        for label in self.entries.values().flat_map(|e| &e.labels) {
            let counts = label.value != LabelValue::Skipped;
            *labellers.entry(label.labeller.clone()).or_default() += usize::from(counts);
            skipped += usize::from(!counts);
        }
        LabelProgress {
            items: self.entries.len(),
            done: self.entries.values().filter(|e| counted(e) >= self.labels_per_item).count(),
            labellers,
            skipped,
            agreement: self.agreement(),
        }
    }

    fn agreement(&self) -> Agreement {
        // By labeller and pair of completions of an item: 1, 0 or -1 as the first is better, equal or worse.
        let mut judged: BTreeMap<&str, BTreeMap<(ItemId, usize, usize), i8>> = BTreeMap::new();
        for (id, entry) in &self.entries {
            for label in &entry.labels {
                let LabelValue::Ranks(ranks) = &label.value else { continue };
                let own = judged.entry(&label.labeller).or_default();
                for i in 0..ranks.len() {
                    for j in i + 1..ranks.len() {
                        own.insert((*id, i, j), (ranks[j] > ranks[i]) as i8 - (ranks[j] < ranks[i]) as i8);
                    }
                }
            }
        }
        let names: Vec<&str> = judged.keys().copied().collect();
        let mut two = Vec::new();
        for (at, a) in names.iter().enumerate() {
            for b in &names[at + 1..] {
                let shared = judged[a].iter().filter_map(|(pair, x)| Some((*x, *judged[b].get(pair)?)));
                let (x, y): (Vec<i8>, Vec<i8>) = shared.unzip();
                if let Some(kappa) = cohen(&x, &y) {
                    two.push((a.to_string(), b.to_string(), x.len(), kappa));
                }
            }
        }
        let pairs: BTreeSet<_> = judged.values().flat_map(|own| own.keys()).collect();
        let all = |pair: &&&(ItemId, usize, usize)| judged.values().all(|own| own.contains_key(**pair));
        let counts: Vec<Vec<u32>> = pairs
            .iter()
            .filter(all)
            .map(|pair| {
                let count = |value: i8| judged.values().filter(|own| own[*pair] == value).count() as u32;
                vec![count(1), count(0), count(-1)]
            })
            .collect();
        Agreement { cohen: two, fleiss: fleiss(&counts) }
    }
}

/// Number of labels without skips.
fn counted(entry: &Entry) -> usize {
    entry.labels.iter().filter(|l| l.value != LabelValue::Skipped).count()
}

/// Permutation in which a labeller is shown the completions: a hash of labeller and completions, so that a reload shows
/// the same one and position bias differs between labellers.
fn display_order(item: &Item, labeller: &str) -> Vec<u32> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(labeller.as_bytes());
    for text in &item.completions {
        hasher.update(b"\0").update(text.as_bytes());
    }
    let mut seed = [0; 8];
    seed.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    let order = Stream::new(u64::from_le_bytes(seed), 0).permutation(item.completions.len());
    order.into_iter().map(|i| i as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(items: usize, labels_per_item: usize) -> LabelQueue {
        let mut queue = LabelQueue::new(labels_per_item);
        for i in 0..items {
            let completions = (0..3).map(|c| format!("{i}{c}")).collect();
            queue.add(Item { prompt: Prompt::Text(format!("q{i}")), completions }, Vec::new()).unwrap();
        }
        queue
    }

    fn submit(queue: &mut LabelQueue, who: &str, id: ItemId, ranks: [u32; 3], now: u64) {
        let label = queue.make_label(who, id, LabelValue::Ranks(ranks.to_vec()), now).unwrap();
        let labels = queue.with_label(id, &label);
        queue.set_labels(id, labels);
    }

    #[test]
    fn two_labellers_share_the_items_and_a_lease_ends() {
        let mut queue = queue(2, 1);
        assert_eq!(queue.next("anna", 0).unwrap().0, 0);
        assert_eq!(queue.next("anna", 5).unwrap().0, 0, "a reload shows the same item");
        assert_eq!(queue.next("ben", 0).unwrap().0, 1);
        assert_eq!(queue.next("carl", 0), None);
        assert_eq!(queue.next("carl", LEASE_MS + 10).unwrap().0, 0, "Anna's lease is over");
        submit(&mut queue, "ben", 1, [1, 2, 3], 20);
        assert!(queue.is_done(1) && !queue.is_done(0));
        let mut both = self::queue(1, 2);
        assert!(both.next("anna", 0).is_some() && both.next("ben", 0).is_some() && both.next("carl", 0).is_none());
    }

    #[test]
    fn a_label_is_validated_and_written_in_the_letters_of_the_page() {
        let mut queue = queue(1, 1);
        let (id, shown) = queue.next("anna", 0).unwrap();
        for bad in [vec![1, 2], vec![0, 1, 2], vec![1, 2, 4]] {
            assert!(queue.make_label("anna", id, LabelValue::Ranks(bad), 0).is_err());
        }
        assert!(queue.make_label("anna", id, LabelValue::Demonstration("x".into()), 0).is_err());
        let error = queue.make_label("anna", 7, LabelValue::Skipped, 0).unwrap_err();
        assert!(error.contains("no longer in the queue"), "{error}");
        // The completion shown second is best, the others tie.
        let mut ranks = vec![2; 3];
        ranks[shown[1] as usize] = 1;
        let label = queue.make_label("anna", id, LabelValue::Ranks(ranks), 0).unwrap();
        assert_eq!(label.notation(), "B > A = C");
        let one = Item { prompt: Prompt::default(), completions: vec!["a".into()] };
        assert!(queue.add(one, Vec::new()).is_err());
    }

    #[test]
    fn the_saved_form_of_a_label_is_stable() {
        let value = LabelValue::Demonstration("Hello.".into());
        let label = Label { labeller: "anna".into(), value, shown: vec![], time_ms: 5 };
        let saved = r#"{"labeller":"anna","word":{"Wrote":"Hello."},"shown":[],"time_ms":5}"#;
        assert_eq!(serde_json::to_string(&label).unwrap(), saved);
        assert_eq!(serde_json::from_str::<Label>(saved).unwrap(), label);
    }

    #[test]
    fn the_latest_label_can_be_replaced() {
        let mut queue = queue(2, 1);
        submit(&mut queue, "anna", 0, [1, 2, 3], 10);
        submit(&mut queue, "anna", 1, [1, 2, 3], 20);
        assert_eq!(queue.last_of("anna"), Some(1));
        queue.set_labels(1, Vec::new());
        queue.lease(1, "anna", 30);
        assert_eq!(queue.next("anna", 30).unwrap().0, 1);
        submit(&mut queue, "anna", 1, [3, 2, 1], 40);
        assert_eq!(queue.labels(1).len(), 1);
    }

    #[test]
    fn agreement_is_that_of_the_pairs_both_judged() {
        let mut queue = queue(2, 2);
        submit(&mut queue, "anna", 0, [1, 2, 3], 1);
        submit(&mut queue, "ben", 0, [1, 2, 3], 2);
        submit(&mut queue, "anna", 1, [1, 2, 2], 3);
        submit(&mut queue, "ben", 1, [1, 3, 2], 4);
        let progress = queue.progress();
        let (a, b, pairs, kappa) = progress.agreement.cohen[0].clone();
        // Five of six alike. Anna: 5 better, 1 equal; Ben: 5 better, 1 worse: p_e = 25/36, κ = (30 - 25) / 11.
        assert_eq!((a.as_str(), b.as_str(), pairs), ("anna", "ben", 6));
        assert!((kappa - 5.0 / 11.0).abs() < 1e-12, "{kappa}");
        assert!(progress.agreement.fleiss.is_some() && progress.done == 2);
    }
}

#[cfg(test)]
mod properties {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Operation {
        Next(u8),
        /// A label of the item that a labeller has on show.
        Label(u8),
        Wait(u64),
    }

    fn operation() -> impl Strategy<Value = Operation> {
        prop_oneof![
            4 => (0u8..4).prop_map(Operation::Next),
            4 => (0u8..4).prop_map(Operation::Label),
            1 => (0..2 * LEASE_MS).prop_map(Operation::Wait),
        ]
    }

    proptest! {
        #[test]
        fn no_item_is_on_show_to_more_than_it_needs_and_nobody_judges_twice(
            operations in proptest::collection::vec(operation(), 0..80),
            (items, needed) in (1usize..5, 1usize..4),
        ) {
            let mut queue = LabelQueue::new(needed);
            for n in 0..items {
                let prompt = Prompt::Text(n.to_string());
                queue.add(Item { prompt, completions: vec!["a".into(), "b".into()] }, Vec::new()).unwrap();
            }
            let mut now = 1;
            // By labeller: the item that they have on show, and until when it is theirs.
            let mut shown: BTreeMap<u8, (ItemId, u64)> = BTreeMap::new();
            for operation in operations {
                now += 1;
                match operation {
                    Operation::Wait(ms) => now += ms,
                    Operation::Next(who) => {
                        let name = format!("labeller {who}");
                        let Some((id, order)) = queue.next(&name, now) else {
                            continue;
                        };
                        prop_assert!(queue.labels(id).iter().all(|label| label.labeller != name));
                        prop_assert_eq!(order.iter().copied().collect::<BTreeSet<_>>(), BTreeSet::from([0, 1]));
                        let others = |(other, (item, until)): (&u8, &(ItemId, u64))| {
                            *other != who && *item == id && *until > now
                        };
                        let others = shown.iter().filter(|entry| others(*entry)).count();
                        prop_assert!(queue.labels(id).len() + others < needed, "item {id} needs no more");
                        shown.insert(who, (id, now + LEASE_MS));
                    }
                    Operation::Label(who) => {
                        let Some((id, _)) = shown.remove(&who) else { continue };
                        let value = LabelValue::Ranks(vec![1, 2]);
                        let label = queue.make_label(&format!("labeller {who}"), id, value, now).unwrap();
                        let labels = queue.with_label(id, &label);
                        queue.set_labels(id, labels);
                        shown.retain(|_, (item, _)| *item != id); // the leases of the item end
                    }
                }
                for id in 0..items as u64 {
                    let names: BTreeSet<&str> = queue.labels(id).iter().map(|l| l.labeller.as_str()).collect();
                    prop_assert_eq!(names.len(), queue.labels(id).len());
                }
            }
        }
    }
}
