//! Which completions are generated where.
//!
//! A completion is a function of weights, prompt, settings and id, to the bit. So it does not matter who generates it: what a node
//! does not deliver in time is leased again, the first result counts, and a second one must be equal. A node's first lease, and some
//! of the later ones, count only when the coordinator has generated one of their completions too, with the same bits.
//!
//! This is the state alone: it knows neither the network nor the clock.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rehearsal_lm::generate::{Completion, Options, Request};
use tokio::sync::mpsc::UnboundedSender;

use super::protocol::{Delivery, Lease};
use super::weights::Weights;

/// What happened to a node or a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    Joined {
        node: String,
    },
    Left {
        node: String,
    },
    /// It was not heard of, and what it generated is leased again.
    Lost {
        node: String,
        completions: usize,
    },
    /// It is shut out.
    Excluded {
        node: String,
        reason: String,
    },
}

/// Why a node's request is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// It must join first: the coordinator has been started again, or has given the node up.
    Unknown,
    /// It is shut out.
    Excluded(String),
}

/// What became of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivered {
    /// It counts.
    Counted,
    /// It counts once the coordinator has generated one of it too.
    Held,
    /// Somebody else was first, with the same bits.
    Late,
}

/// What the coordinator generates itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Local {
    /// Its part of what is to be done.
    Share,
    /// Nothing but what nodes are checked by.
    Checks,
}

struct Node {
    name: String,
    /// Identifies it however often it joins: its certificate.
    identity: String,
    leases: u64,
    seen: Instant,
}

struct Held {
    session: u64,
    completions: Vec<Completion>,
    /// The completion that the coordinator generates too.
    check: u64,
}

struct Leased {
    session: u64,
    ids: Vec<u64>,
    until: Instant,
    checked: bool,
}

struct Work {
    weights: Arc<Weights>,
    options: Options,
    prompts: BTreeMap<u64, Arc<Vec<u32>>>,
    /// Completions that nobody generates.
    pending: VecDeque<u64>,
    leased: BTreeMap<u64, Leased>,
    held: BTreeMap<u64, Held>,
    /// Completions that count, and the session of the node that was first; `None` for the coordinator.
    done: BTreeMap<u64, (Completion, Option<u64>)>,
    finished: UnboundedSender<Completion>,
}

impl Work {
    fn is_done(&self) -> bool {
        self.done.len() == self.prompts.len()
    }

    /// Puts completions that nobody has back, in order, before the others.
    fn put_back(&mut self, mut ids: Vec<u64>) {
        ids.retain(|id| !self.done.contains_key(id) && !self.pending.contains(id));
        ids.sort_unstable();
        for id in ids.into_iter().rev() {
            self.pending.push_front(id);
        }
    }

    fn request(&self, id: u64) -> Option<Request> {
        self.prompts.get(&id).map(|prompt| Request { id, prompt: prompt.clone() })
    }

    fn count(&mut self, completion: Completion, by: Option<u64>) {
        self.pending.retain(|id| *id != completion.id);
        let _ = self.finished.send(completion.clone()); // the step may have been given up
        self.done.insert(completion.id, (completion, by));
    }
}

/// Nodes, what there is to generate, and who generates it.
pub struct Leases {
    next: u64,
    work: BTreeMap<u64, Work>,
    nodes: BTreeMap<u64, Node>,
    excluded: BTreeMap<String, String>,
    /// How long a lease lasts that is not renewed.
    term: Duration,
    /// Completions of a lease.
    size: usize,
    /// A node's first lease is checked, and one in so many after it.
    check_every: u64,
    news: Vec<News>,
    /// Completions of nodes that count, and those that are leased again.
    pub counted: u64,
    pub again: u64,
    /// Completions that count and were found to be wrong.
    wrong: Vec<String>,
}

impl Leases {
    pub fn new(term: Duration, size: usize, check_every: u64) -> Self {
        let (work, nodes, excluded) = Default::default();
        Self {
            next: 1,
            work,
            nodes,
            excluded,
            term,
            size,
            check_every,
            news: Vec::new(),
            counted: 0,
            again: 0,
            wrong: Vec::new(),
        }
    }

    /// What has happened since the last call.
    pub fn take_news(&mut self) -> Vec<News> {
        std::mem::take(&mut self.news)
    }

    /// Completions that were counted and are wrong, if there are any.
    pub fn take_wrong(&mut self) -> Option<String> {
        (!self.wrong.is_empty()).then(|| std::mem::take(&mut self.wrong).join("; "))
    }

    /// Number of nodes that have joined.
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Adds a node under a session that nobody can guess.
    pub fn join(&mut self, session: u64, name: &str, identity: &str, now: Instant) -> Result<(), Refusal> {
        if let Some(reason) = self.excluded.get(identity) {
            return Err(Refusal::Excluded(reason.clone()));
        }
        self.nodes.insert(session, Node { name: name.into(), identity: identity.into(), leases: 0, seen: now });
        self.news.push(News::Joined { node: name.into() });
        Ok(())
    }

    /// Removes a node that says so.
    pub fn leave(&mut self, session: u64) {
        if let Some(node) = self.nodes.remove(&session) {
            self.release(session);
            self.news.push(News::Left { node: node.name });
        }
    }

    fn seen(&mut self, session: u64, now: Instant) -> Result<&mut Node, Refusal> {
        let node = self.nodes.get_mut(&session).ok_or(Refusal::Unknown)?;
        node.seen = now;
        Ok(node)
    }

    /// Adds completions to generate, each of which is sent to `finished` when it counts; the number of the work.
    pub fn add(
        &mut self,
        weights: Arc<Weights>,
        options: Options,
        requests: Vec<Request>,
        finished: UnboundedSender<Completion>,
    ) -> u64 {
        let pending = requests.iter().map(|r| r.id).collect();
        let prompts = requests.into_iter().map(|r| (r.id, r.prompt)).collect();
        let (leased, held, done) = Default::default();
        let number = self.next;
        self.next += 1;
        self.work.insert(number, Work { weights, options, prompts, pending, leased, held, done, finished });
        number
    }

    /// Gives work up, or forgets what is done.
    pub fn remove(&mut self, work: u64) {
        self.work.remove(&work);
    }

    /// Whether all completions of a work count.
    pub fn is_done(&self, work: u64) -> bool {
        self.work.get(&work).is_none_or(Work::is_done)
    }

    /// The bytes of a shard that current work needs.
    pub fn shard(&self, hash: &str) -> Option<axum::body::Bytes> {
        self.work.values().find_map(|work| work.weights.shard(hash))
    }

    /// A lease for a node, if there is something to do.
    pub fn take(&mut self, session: u64, now: Instant) -> Result<Option<Lease>, Refusal> {
        self.seen(session, now)?;
        let Some(work) = self.work.values_mut().find(|work| !work.pending.is_empty()) else { return Ok(None) };
        let id = self.next;
        self.next += 1;
        let size = self.size.min(Delivery::completions_max(work.options.max_new_tokens));
        let ids: Vec<u64> = work.pending.drain(..size.min(work.pending.len())).collect();
        let mut prompts: Vec<(Vec<u32>, Vec<u64>)> = Vec::new();
        let mut last: Option<&Arc<Vec<u32>>> = None;
        for id in &ids {
            let Some(prompt) = work.prompts.get(id) else { continue };
            match (last, prompts.last_mut()) {
                (Some(before), Some((_, of_prompt))) if Arc::ptr_eq(before, prompt) => of_prompt.push(*id),
                _ => prompts.push((prompt.to_vec(), vec![*id])),
            }
            last = Some(prompt);
        }
        let lease = Lease { id, weights: work.weights.manifest.clone(), options: work.options.clone(), prompts };
        let until = now + self.term;
        let node = self.nodes.get_mut(&session).ok_or(Refusal::Unknown)?;
        let checked = node.leases.is_multiple_of(self.check_every);
        node.leases += 1;
        work.leased.insert(id, Leased { session, ids, until, checked });
        Ok(Some(lease))
    }

    /// Says that a node is there, and renews its lease; whether it still holds it.
    pub fn renew(&mut self, session: u64, lease: Option<u64>, now: Instant) -> Result<bool, Refusal> {
        self.seen(session, now)?;
        let Some(lease) = lease else { return Ok(true) };
        let until = now + self.term;
        let leased = self.work.values_mut().find_map(|work| work.leased.get_mut(&lease));
        Ok(leased.filter(|leased| leased.session == session).map(|leased| leased.until = until).is_some())
    }

    /// Takes what a node has generated.
    pub fn deliver(
        &mut self,
        session: u64,
        lease: u64,
        completions: Vec<Completion>,
        now: Instant,
    ) -> Result<Delivered, Refusal> {
        self.seen(session, now)?;
        let found = self.work.iter_mut().find_map(|(number, work)| Some((*number, work.leased.remove(&lease)?)));
        let Some((number, leased)) = found else {
            return self.compare(session, &completions).map(|()| Delivered::Late);
        };
        let mut ids: Vec<u64> = completions.iter().map(|c| c.id).collect();
        let mut wanted = leased.ids.clone();
        ids.sort_unstable();
        wanted.sort_unstable();
        let whole = completions.iter().all(|c| !c.tokens.is_empty() && c.tokens.len() == c.logprobs.len());
        if ids != wanted || !whole || leased.session != session {
            self.give_back(number, leased.ids);
            return self.exclude(session, "it delivered other completions than it was asked for".into());
        }
        match (self.work.get_mut(&number), ids.first()) {
            (Some(work), Some(&check)) if leased.checked => {
                work.held.insert(lease, Held { session, completions, check });
                Ok(Delivered::Held)
            }
            _ => self.count_all(number, session, completions),
        }
    }

    /// Counts completions of a node.
    fn count_all(&mut self, work: u64, session: u64, completions: Vec<Completion>) -> Result<Delivered, Refusal> {
        self.compare(session, &completions)?;
        let Some(work) = self.work.get_mut(&work) else { return Ok(Delivered::Late) };
        for completion in completions {
            if !work.done.contains_key(&completion.id) {
                work.count(completion, Some(session));
                self.counted += 1;
            }
        }
        Ok(Delivered::Counted)
    }

    /// Shuts a node out whose completions differ from those that count.
    fn compare(&mut self, session: u64, completions: &[Completion]) -> Result<(), Refusal> {
        let counted = |c: &Completion| self.work.values().find_map(|work| work.done.get(&c.id));
        let differs = completions.iter().find(|c| counted(c).is_some_and(|(first, _)| first != *c));
        match differs.map(|c| c.id) {
            Some(id) => self.exclude(session, format!("it computed other bits for completion {id}")).map(drop),
            None => Ok(()),
        }
    }

    /// What the coordinator generates next of a work: what nodes are checked by, then its share, then what somebody else is
    /// at, who may be slow.
    pub fn take_local(&mut self, work: u64, local: Local) -> Vec<Request> {
        let size = self.size;
        let Some(work) = self.work.get_mut(&work) else { return Vec::new() };
        let mut ids: Vec<u64> = work.held.values().map(|held| held.check).collect();
        if ids.is_empty() && local == Local::Share {
            ids = work.pending.drain(..size.min(work.pending.len())).collect();
            if ids.is_empty() {
                let oldest = work.leased.values().next();
                ids = oldest.map(|leased| leased.ids.clone()).unwrap_or_default();
                ids.retain(|id| !work.done.contains_key(id));
            }
        }
        ids.iter().filter_map(|id| work.request(*id)).collect()
    }

    /// Takes a completion that the coordinator has generated: it counts, and nodes are checked by it.
    pub fn deliver_local(&mut self, number: u64, completion: Completion) {
        let Some(work) = self.work.get_mut(&number) else { return };
        match work.done.get(&completion.id) {
            Some((counted, Some(session))) if *counted != completion => {
                let (session, id) = (*session, completion.id);
                let name = self.nodes.get(&session).map_or("a node that left", |node| node.name.as_str()).to_string();
                self.wrong.push(format!("node {name} computed other bits for completion {id}, which was logged"));
                let _ = self.exclude(session, format!("it computed other bits for completion {id}"));
                return;
            }
            Some(_) => {}
            None => work.count(completion.clone(), None),
        }
        let Some(work) = self.work.get_mut(&number) else { return };
        let checked = work.held.extract_if(.., |_, held| held.check == completion.id);
        for held in checked.map(|(_, held)| held).collect::<Vec<_>>() {
            // A refusal is noted as news.
            let _ = if held.completions.contains(&completion) {
                self.count_all(number, held.session, held.completions)
            } else {
                self.give_back(number, held.completions.iter().map(|c| c.id).collect());
                self.exclude(held.session, format!("it computed other bits for completion {}", completion.id))
            };
        }
    }

    /// Takes back what somebody did not finish.
    pub fn give_back(&mut self, number: u64, ids: Vec<u64>) {
        if let Some(work) = self.work.get_mut(&number) {
            work.put_back(ids);
        }
    }

    /// Leases again what nodes have not delivered in time, and forgets nodes that are silent.
    pub fn expire(&mut self, now: Instant) {
        let mut late: BTreeMap<u64, usize> = BTreeMap::new();
        for work in self.work.values_mut() {
            let over: Vec<u64> = work.leased.iter().filter(|(_, l)| l.until <= now).map(|(id, _)| *id).collect();
            for id in over {
                if let Some(leased) = work.leased.remove(&id) {
                    self.again += leased.ids.len() as u64;
                    *late.entry(leased.session).or_default() += leased.ids.len();
                    work.put_back(leased.ids);
                }
            }
        }
        let silent = self.nodes.iter().filter(|(_, node)| node.seen + self.term <= now).map(|(session, _)| *session);
        for session in silent.collect::<Vec<_>>() {
            if let Some(node) = self.nodes.remove(&session) {
                let completions = late.get(&session).copied().unwrap_or_default() + self.release(session);
                self.news.push(News::Lost { node: node.name, completions });
            }
        }
    }

    /// Puts back what a node holds; the number of completions.
    fn release(&mut self, session: u64) -> usize {
        let mut count = 0;
        for work in self.work.values_mut() {
            let held = work.held.extract_if(.., |_, held| held.session == session);
            let mut ids: Vec<u64> = held.flat_map(|(_, held)| held.completions).map(|c| c.id).collect();
            let leased = work.leased.extract_if(.., |_, leased| leased.session == session);
            ids.extend(leased.flat_map(|(_, leased)| leased.ids));
            count += ids.len();
            work.put_back(ids);
        }
        self.again += count as u64;
        count
    }

    fn exclude(&mut self, session: u64, reason: String) -> Result<Delivered, Refusal> {
        if let Some(node) = self.nodes.remove(&session) {
            self.release(session);
            self.excluded.insert(node.identity, reason.clone());
            self.news.push(News::Excluded { node: node.name, reason: reason.clone() });
        }
        Err(Refusal::Excluded(reason))
    }
}

#[cfg(test)]
mod tests {
    use rehearsal_actors::ModelSnapshot;
    use rehearsal_lm::generate::{Finish, Sampling};
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;

    const TERM: Duration = Duration::from_secs(10);

    fn completion(id: u64) -> Completion {
        Completion { id, tokens: vec![id as u32, 2], logprobs: vec![-0.5, -1.0], finish: Finish::Eos }
    }

    fn wrong(id: u64) -> Completion {
        Completion { logprobs: vec![-0.5, -1.5], ..completion(id) }
    }

    /// Twelve completions of three prompts, four to a lease; nodes `a` and `b` have the sessions 1 and 2.
    fn leases(now: Instant) -> (Leases, u64, UnboundedReceiver<Completion>) {
        let mut leases = Leases::new(TERM, 4, 1000);
        for (session, name) in [(1, "a"), (2, "b")] {
            leases.join(session, name, name, now).unwrap();
        }
        let options = Options {
            sampling: Sampling::default(),
            max_new_tokens: 8,
            min_new_tokens: 0,
            eos: vec![2],
            stop: Vec::new(),
            seed: 1,
            batch: 8,
        };
        let prompts: Vec<_> = (0..3u32).map(|i| Arc::new(vec![i])).collect();
        let requests = (0..12).map(|id| Request { id, prompt: prompts[id as usize / 4].clone() }).collect();
        let (sender, receiver) = unbounded_channel();
        let weights = Arc::new(Weights::new(&ModelSnapshot::default()).unwrap());
        let work = leases.add(weights, options, requests, sender);
        leases.take_news();
        (leases, work, receiver)
    }

    fn ids(lease: &Lease) -> Vec<u64> {
        lease.prompts.iter().flat_map(|(_, ids)| ids.clone()).collect()
    }

    fn received(receiver: &mut UnboundedReceiver<Completion>) -> Vec<u64> {
        let mut all: Vec<u64> = std::iter::from_fn(|| receiver.try_recv().ok()).map(|c| c.id).collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn every_completion_counts_once_and_a_first_lease_when_it_is_checked() {
        let now = Instant::now();
        let (mut leases, work, mut receiver) = leases(now);
        let first = leases.take(1, now).unwrap().unwrap();
        assert_eq!(ids(&first), [0, 1, 2, 3]);
        let all = |lease: &Lease| ids(lease).into_iter().map(completion).collect::<Vec<_>>();
        assert_eq!(leases.deliver(1, first.id, all(&first), now), Ok(Delivered::Held));
        assert_eq!(received(&mut receiver), [0u64; 0]);
        // The coordinator generates one of it, even if it has no share of the work.
        let checks = leases.take_local(work, Local::Checks);
        assert_eq!(checks.iter().map(|r| r.id).collect::<Vec<_>>(), [0]);
        leases.deliver_local(work, completion(0));
        assert_eq!(received(&mut receiver), [0, 1, 2, 3]);
        let second = leases.take(1, now).unwrap().unwrap();
        assert_eq!(leases.deliver(1, second.id, all(&second), now), Ok(Delivered::Counted));
        assert_eq!(leases.deliver(1, second.id, all(&second), now), Ok(Delivered::Late));
        for request in leases.take_local(work, Local::Share) {
            leases.deliver_local(work, completion(request.id));
        }
        assert_eq!(received(&mut receiver), [4, 5, 6, 7, 8, 9, 10, 11]);
        assert!(leases.is_done(work) && leases.take_wrong().is_none() && leases.take_news().is_empty());
    }

    #[test]
    fn what_a_silent_node_holds_is_leased_again_and_it_must_join_again() {
        let now = Instant::now();
        let (mut leases, work, mut receiver) = leases(now);
        let lost = leases.take(1, now).unwrap().unwrap();
        assert_eq!(leases.renew(1, Some(lost.id), now + TERM / 2), Ok(true));
        leases.renew(2, None, now + TERM).unwrap();
        leases.expire(now + TERM);
        assert_eq!(leases.take_news(), []);
        leases.expire(now + TERM * 3 / 2);
        assert_eq!(leases.take_news(), [News::Lost { node: "a".into(), completions: 4 }]);
        assert_eq!(leases.renew(1, Some(lost.id), now + TERM * 2), Err(Refusal::Unknown));
        let again = leases.take(2, now + TERM * 3 / 2).unwrap().unwrap();
        assert_eq!(ids(&again), ids(&lost));
        // Its late result is compared when it has joined again.
        leases.deliver(2, again.id, (0..4).map(completion).collect(), now).unwrap();
        leases.take_local(work, Local::Checks);
        leases.deliver_local(work, completion(0));
        assert_eq!(received(&mut receiver), [0, 1, 2, 3]);
        leases.join(3, "a", "a", now).unwrap();
        let late = (0..4).map(completion).collect();
        assert_eq!(leases.deliver(3, lost.id, late, now), Ok(Delivered::Late));
        let refused = leases.deliver(3, lost.id, vec![wrong(2)], now).unwrap_err();
        assert_eq!(refused, Refusal::Excluded("it computed other bits for completion 2".into()));
    }

    #[test]
    fn a_node_with_other_bits_is_shut_out_and_counts_for_nothing() {
        let now = Instant::now();
        let (mut leases, work, mut receiver) = leases(now);
        let lease = leases.take(1, now).unwrap().unwrap();
        leases.deliver(1, lease.id, ids(&lease).into_iter().map(wrong).collect(), now).unwrap();
        leases.take_local(work, Local::Share);
        leases.deliver_local(work, completion(0));
        let reason = "it computed other bits for completion 0".to_string();
        assert_eq!(leases.take_news(), [News::Excluded { node: "a".into(), reason: reason.clone() }]);
        assert_eq!(received(&mut receiver), [0]);
        assert_eq!(leases.join(9, "a", "a", now), Err(Refusal::Excluded(reason)));
        assert_eq!(ids(&leases.take(2, now).unwrap().unwrap()), [1, 2, 3, 4], "it is leased again");
        let refused = leases.deliver(2, 1, vec![completion(7)], now);
        assert_eq!(refused, Ok(Delivered::Late), "a lease that nobody has");
    }

    #[test]
    fn the_coordinator_races_those_that_are_slow_and_notices_what_it_counted_wrongly() {
        let now = Instant::now();
        let (mut leases, work, mut receiver) = leases(now);
        let slow = leases.take(1, now).unwrap().unwrap();
        leases.deliver(1, slow.id, ids(&slow).into_iter().map(completion).collect(), now).unwrap();
        leases.take_local(work, Local::Checks);
        leases.deliver_local(work, completion(0));
        let second = leases.take(1, now).unwrap().unwrap();
        assert_eq!(leases.take_local(work, Local::Share).len(), 4);
        assert_eq!(leases.take_local(work, Local::Share).iter().map(|r| r.id).collect::<Vec<_>>(), ids(&second));
        leases.deliver(1, second.id, ids(&second).into_iter().map(wrong).collect(), now).unwrap();
        leases.deliver_local(work, completion(4));
        let wrong = leases.take_wrong().unwrap();
        assert!(wrong.contains("node a computed other bits for completion 4"), "{wrong}");
        assert_eq!(received(&mut receiver).len(), 8);
        // What it was at when it failed is there again.
        leases.give_back(work, vec![8, 9, 10, 11]);
        assert_eq!(ids(&leases.take(2, now).unwrap().unwrap()), [8, 9, 10, 11]);
    }

    #[test]
    fn a_node_that_delivers_what_it_was_not_asked_for_is_shut_out() {
        let now = Instant::now();
        let (mut leases, _, _receiver) = leases(now);
        for (session, completions) in [(1, vec![completion(5)]), (2, vec![])] {
            let lease = leases.take(session, now).unwrap().unwrap();
            let refused = leases.deliver(session, lease.id, completions, now).unwrap_err();
            assert!(matches!(refused, Refusal::Excluded(_)), "{refused:?}");
        }
        assert_eq!(leases.nodes(), 0);
        assert_eq!(leases.take(1, now).err(), Some(Refusal::Unknown));
    }
}
