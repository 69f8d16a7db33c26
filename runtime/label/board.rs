//! What there is to label, who said what, and what comes next. Pure: time comes in as a number.

use std::collections::{BTreeMap, BTreeSet};

use rehearsal_learn::evaluation::agreement::{cohen, fleiss};
use rehearsal_lm::random::Stream;
use rehearsal_store::Prompt;
use serde::{Deserialize, Serialize};

/// Milliseconds for which what one labeller is shown is not given to another.
pub const LEASE_MS: u64 = 10 * 60 * 1000;

/// Answers that one prompt may have: each needs a letter of its own, and two letters are commands.
pub const ANSWERS_MAX: usize = 12;

/// A prompt with answers to rank, or with none: then the labeller writes one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Item {
    pub prompt: Prompt,
    pub completions: Vec<String>,
}

/// What a labeller says of an item.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Word {
    /// A rank for each completion, in the item's order; 1 is best, ties share one.
    Ranks(Vec<u32>),
    /// A demonstration.
    Wrote(String),
    /// The labeller cannot tell.
    Skipped,
}

/// One labeller's word on an item.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Label {
    pub labeller: String,
    pub word: Word,
    /// Places of the completions in the order in which they were shown.
    pub shown: Vec<u32>,
    /// Milliseconds since 1970.
    pub time_ms: u64,
}

impl Label {
    /// The verdict in the letters that the labeller saw: `D > C > A = B`.
    pub fn notation(&self) -> String {
        match &self.word {
            Word::Wrote(text) => text.clone(),
            Word::Skipped => "skipped".into(),
            Word::Ranks(ranks) => {
                let mut tiers: BTreeMap<u32, Vec<String>> = BTreeMap::new();
                for (letter, &place) in (b'A'..).zip(&self.shown) {
                    tiers.entry(ranks[place as usize]).or_default().push(char::from(letter).to_string());
                }
                tiers.into_values().map(|tied| tied.join(" = ")).collect::<Vec<_>>().join(" > ")
            }
        }
    }
}

/// Names an item on a board.
pub type ItemId = u64;

struct Entry {
    item: Item,
    labels: Vec<Label>,
    /// Who is looking at it, and until when nobody else is given it.
    leases: BTreeMap<String, u64>,
}

/// How far the work is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Progress {
    pub items: usize,
    /// Items with all the labels they want.
    pub done: usize,
    /// Labels by labeller, skipped ones apart.
    pub labellers: BTreeMap<String, usize>,
    pub skipped: usize,
    pub agreement: Agreement,
}

/// How far labellers agree beyond chance, on pairs of answers that they both judged: better, worse, or equal.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Agreement {
    /// Cohen's κ of every two labellers with the pairs they share.
    pub cohen: Vec<(String, String, usize, f64)>,
    /// Fleiss' κ of all labellers, on the pairs that all of them judged.
    pub fleiss: Option<f64>,
}

/// Items and what was said of them.
pub struct Board {
    entries: BTreeMap<ItemId, Entry>,
    next_id: ItemId,
    /// Labels that each item wants.
    wanted: usize,
}

impl Board {
    /// An empty board whose items want so many labels each.
    pub fn new(wanted: usize) -> Self {
        Self { entries: BTreeMap::new(), next_id: 0, wanted: wanted.max(1) }
    }

    /// Puts an item up with what is known of it.
    pub fn add(&mut self, item: Item, labels: Vec<Label>) -> Result<ItemId, String> {
        match item.completions.len() {
            1 => return Err("has one completion; two or more can be ranked, and with none one is written".into()),
            n if n > ANSWERS_MAX => return Err(format!("has {n} completions; {ANSWERS_MAX} at most can be ranked")),
            _ => {}
        }
        let id = self.next_id;
        self.next_id += 1;
        self.entries.insert(id, Entry { item, labels, leases: BTreeMap::new() });
        Ok(id)
    }

    /// Takes an item down, with all that was said of it.
    pub fn take(&mut self, id: ItemId) -> Option<(Item, Vec<Label>)> {
        self.entries.remove(&id).map(|entry| (entry.item, entry.labels))
    }

    pub fn item(&self, id: ItemId) -> Option<&Item> {
        self.entries.get(&id).map(|e| &e.item)
    }

    pub fn labels(&self, id: ItemId) -> &[Label] {
        self.entries.get(&id).map_or(&[], |e| &e.labels)
    }

    /// Whether an item has all the labels it wants; a skipped one is none.
    pub fn is_done(&self, id: ItemId) -> bool {
        self.entries.get(&id).is_some_and(|e| said(e) >= self.wanted)
    }

    /// What a labeller is to look at next: what they are looking at already, or the first item that still wants a word
    /// of theirs and is not shown to enough others.
    pub fn next(&mut self, labeller: &str, now_ms: u64) -> Option<(ItemId, Vec<u32>)> {
        let wanted = self.wanted;
        let open = |e: &Entry| said(e) < wanted && !e.labels.iter().any(|l| l.labeller == labeller);
        let mine = |e: &Entry| e.leases.get(labeller).is_some_and(|&until| until > now_ms);
        let others = |e: &Entry| e.leases.iter().filter(|(who, until)| *who != labeller && **until > now_ms).count();
        let id = self.entries.iter().find(|(_, e)| open(e) && mine(e)).map(|(id, _)| *id).or_else(|| {
            self.entries.iter().find(|(_, e)| open(e) && said(e) + others(e) < wanted).map(|(id, _)| *id)
        })?;
        let entry = self.entries.get_mut(&id)?;
        entry.leases.insert(labeller.into(), now_ms + LEASE_MS);
        Some((id, shown(&entry.item, labeller)))
    }

    /// Checks a labeller's word on an item and makes a label of it. Nothing changes yet.
    pub fn label(&self, labeller: &str, id: ItemId, word: Word, now_ms: u64) -> Result<Label, String> {
        let entry = self.entries.get(&id).ok_or("the item is not on the board; the job may have gone on without it")?;
        let n = entry.item.completions.len();
        match &word {
            Word::Ranks(ranks) if n == 0 || ranks.len() != n => {
                return Err(format!("{} ranks for {n} completions", ranks.len()));
            }
            Word::Ranks(ranks) if ranks.iter().any(|&r| r == 0 || r as usize > n) => {
                return Err(format!("ranks lie from 1 to {n}"));
            }
            Word::Wrote(_) if n > 0 => return Err("the item wants a ranking, not a text".into()),
            Word::Wrote(text) if text.trim().is_empty() => return Err("the text is empty".into()),
            _ => {}
        }
        Ok(Label { labeller: labeller.into(), word, shown: shown(&entry.item, labeller), time_ms: now_ms })
    }

    /// What would be known of an item with a label more; one by the same labeller is replaced.
    pub fn with(&self, id: ItemId, label: &Label) -> Vec<Label> {
        let others = self.labels(id).iter().filter(|l| l.labeller != label.labeller);
        others.chain([label]).cloned().collect()
    }

    /// Sets what is known of an item.
    pub fn set(&mut self, id: ItemId, labels: Vec<Label>) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.labels = labels;
            entry.leases.clear();
        }
    }

    /// The item that a labeller labelled last.
    pub fn last_of(&self, labeller: &str) -> Option<ItemId> {
        let mine = |e: &Entry| e.labels.iter().filter(|l| l.labeller == labeller).map(|l| l.time_ms).max();
        self.entries.iter().filter_map(|(id, e)| Some((mine(e)?, *id))).max().map(|(_, id)| id)
    }

    /// Gives an item to a labeller before anything else.
    pub fn lease(&mut self, id: ItemId, labeller: &str, now_ms: u64) {
        for (at, entry) in &mut self.entries {
            entry.leases.remove(labeller);
            if *at == id {
                entry.leases.insert(labeller.into(), now_ms + LEASE_MS);
            }
        }
    }

    /// How far the work is.
    pub fn progress(&self) -> Progress {
        let mut labellers: BTreeMap<String, usize> = BTreeMap::new();
        let mut skipped = 0;
        for label in self.entries.values().flat_map(|e| &e.labels) {
            let counts = label.word != Word::Skipped;
            *labellers.entry(label.labeller.clone()).or_default() += usize::from(counts);
            skipped += usize::from(!counts);
        }
        Progress {
            items: self.entries.len(),
            done: self.entries.values().filter(|e| said(e) >= self.wanted).count(),
            labellers,
            skipped,
            agreement: self.agreement(),
        }
    }

    fn agreement(&self) -> Agreement {
        // Every labeller's word on every pair of an item's completions.
        let mut said: BTreeMap<&str, BTreeMap<(ItemId, usize, usize), i8>> = BTreeMap::new();
        for (id, entry) in &self.entries {
            for label in &entry.labels {
                let Word::Ranks(ranks) = &label.word else { continue };
                let own = said.entry(&label.labeller).or_default();
                for i in 0..ranks.len() {
                    for j in i + 1..ranks.len() {
                        own.insert((*id, i, j), (ranks[j] > ranks[i]) as i8 - (ranks[j] < ranks[i]) as i8);
                    }
                }
            }
        }
        let names: Vec<&str> = said.keys().copied().collect();
        let mut two = Vec::new();
        for (at, a) in names.iter().enumerate() {
            for b in &names[at + 1..] {
                let shared = said[a].iter().filter_map(|(pair, x)| Some((*x, *said[b].get(pair)?)));
                let (x, y): (Vec<i8>, Vec<i8>) = shared.unzip();
                if let Some(kappa) = cohen(&x, &y) {
                    two.push((a.to_string(), b.to_string(), x.len(), kappa));
                }
            }
        }
        let pairs: BTreeSet<_> = said.values().flat_map(|own| own.keys()).collect();
        let all = |pair: &&&(ItemId, usize, usize)| said.values().all(|own| own.contains_key(**pair));
        let counts: Vec<Vec<u32>> = pairs
            .iter()
            .filter(all)
            .map(|pair| {
                let count = |word: i8| said.values().filter(|own| own[*pair] == word).count() as u32;
                vec![count(1), count(0), count(-1)]
            })
            .collect();
        Agreement { cohen: two, fleiss: fleiss(&counts) }
    }
}

fn said(entry: &Entry) -> usize {
    entry.labels.iter().filter(|l| l.word != Word::Skipped).count()
}

/// The order in which a labeller sees the answers: another for each labeller and item, the same each time.
fn shown(item: &Item, labeller: &str) -> Vec<u32> {
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

    fn board(items: usize, wanted: usize) -> Board {
        let mut board = Board::new(wanted);
        for i in 0..items {
            let completions = (0..3).map(|c| format!("{i}{c}")).collect();
            board.add(Item { prompt: Prompt::Text(format!("q{i}")), completions }, Vec::new()).unwrap();
        }
        board
    }

    fn say(board: &mut Board, who: &str, id: ItemId, ranks: [u32; 3], now: u64) {
        let label = board.label(who, id, Word::Ranks(ranks.to_vec()), now).unwrap();
        let labels = board.with(id, &label);
        board.set(id, labels);
    }

    #[test]
    fn two_labellers_share_the_work_and_a_lease_ends() {
        let mut board = board(2, 1);
        assert_eq!(board.next("anna", 0).unwrap().0, 0);
        assert_eq!(board.next("anna", 5).unwrap().0, 0, "a reload shows the same again");
        assert_eq!(board.next("ben", 0).unwrap().0, 1);
        assert_eq!(board.next("carl", 0), None);
        assert_eq!(board.next("carl", LEASE_MS + 10).unwrap().0, 0, "who looks away for long loses the item");
        say(&mut board, "ben", 1, [1, 2, 3], 20);
        assert!(board.is_done(1) && !board.is_done(0));
        let mut both = self::board(1, 2);
        assert!(both.next("anna", 0).is_some() && both.next("ben", 0).is_some() && both.next("carl", 0).is_none());
    }

    #[test]
    fn a_label_is_checked_and_written_in_the_letters_that_were_seen() {
        let mut board = board(1, 1);
        let (id, shown) = board.next("anna", 0).unwrap();
        for bad in [vec![1, 2], vec![0, 1, 2], vec![1, 2, 4]] {
            assert!(board.label("anna", id, Word::Ranks(bad), 0).is_err());
        }
        assert!(board.label("anna", id, Word::Wrote("x".into()), 0).is_err());
        assert!(board.label("anna", 7, Word::Skipped, 0).unwrap_err().contains("not on the board"));
        // The second one shown is best, the others tie.
        let mut ranks = vec![2; 3];
        ranks[shown[1] as usize] = 1;
        assert_eq!(board.label("anna", id, Word::Ranks(ranks), 0).unwrap().notation(), "B > A = C");
        let one = Item { prompt: Prompt::default(), completions: vec!["a".into()] };
        assert!(board.add(one, Vec::new()).is_err());
    }

    #[test]
    fn what_was_said_last_can_be_said_again() {
        let mut board = board(2, 1);
        say(&mut board, "anna", 0, [1, 2, 3], 10);
        say(&mut board, "anna", 1, [1, 2, 3], 20);
        assert_eq!(board.last_of("anna"), Some(1));
        board.set(1, Vec::new());
        board.lease(1, "anna", 30);
        assert_eq!(board.next("anna", 30).unwrap().0, 1);
        say(&mut board, "anna", 1, [3, 2, 1], 40);
        assert_eq!(board.labels(1).len(), 1);
    }

    #[test]
    fn agreement_is_that_of_the_pairs_both_judged() {
        let mut board = board(2, 2);
        say(&mut board, "anna", 0, [1, 2, 3], 1);
        say(&mut board, "ben", 0, [1, 2, 3], 2);
        say(&mut board, "anna", 1, [1, 2, 2], 3);
        say(&mut board, "ben", 1, [1, 3, 2], 4);
        let progress = board.progress();
        let (a, b, pairs, kappa) = progress.agreement.cohen[0].clone();
        // Five of six alike. Anna: 5 better, 1 equal; Ben: 5 better, 1 worse: p_e = 25/36, κ = (30 - 25) / 11.
        assert_eq!((a.as_str(), b.as_str(), pairs), ("anna", "ben", 6));
        assert!((kappa - 5.0 / 11.0).abs() < 1e-12, "{kappa}");
        assert!(progress.agreement.fleiss.is_some() && progress.done == 2);
    }
}
