//! The labelling queue shared between threads. Each label is saved before it counts.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rehearsal_store::Prompt;
use serde::Serialize;

use super::queue::{Item, ItemId, Label, LabelProgress, LabelQueue, LabelValue};
use super::store::LabelStore;
use crate::data::ledger::valid_name;

/// An item as the page shows it to one labeller.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ShownItem {
    /// Id of the item in the queue.
    pub id: ItemId,
    /// What was asked.
    pub prompt: Prompt,
    /// Completions in display order, each with its index in the item.
    pub completions: Vec<(u32, String)>,
}

/// A [`LabelQueue`] and its [`LabelStore`] behind one lock. Methods block on the lock and on the store.
pub struct LabelService {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    queue: LabelQueue,
    store: Box<dyn LabelStore>,
}

impl LabelService {
    /// Shares a queue. Labels are saved in `store`.
    pub fn new(queue: LabelQueue, store: Box<dyn LabelStore>) -> Self {
        Self { state: Mutex::new(State { queue, store }), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leases the next item to a labeller; `None` if there is none. Fails if the name is invalid.
    pub fn next(&self, labeller: &str, now_ms: u64) -> Result<Option<ShownItem>, String> {
        let labeller = valid_name(labeller)?;
        let queue = &mut self.lock().queue;
        let Some((id, order)) = queue.next(labeller, now_ms) else { return Ok(None) };
        let Some(item) = queue.item(id) else { return Ok(None) };
        let text = |index: u32| (index, item.completions[index as usize].clone());
        Ok(Some(ShownItem { id, prompt: item.prompt.clone(), completions: order.into_iter().map(text).collect() }))
    }

    /// Validates and saves a label, which replaces an earlier one by the same labeller.
    pub fn submit(&self, labeller: &str, id: ItemId, value: LabelValue, now_ms: u64) -> Result<(), String> {
        let labeller = valid_name(labeller)?;
        let mut state = self.lock();
        let label = state.queue.make_label(labeller, id, value, now_ms)?;
        let labels = state.queue.with_label(id, &label);
        state.save(id, labels)?;
        self.changed.notify_all();
        Ok(())
    }

    /// Removes a labeller's latest label and leases its item to them again.
    pub fn undo(&self, labeller: &str, now_ms: u64) -> Result<(), String> {
        let labeller = valid_name(labeller)?;
        let mut state = self.lock();
        let id = state.queue.last_of(labeller).ok_or("you have no label to undo")?;
        let labels = state.queue.labels(id).iter().filter(|l| l.labeller != labeller).cloned().collect();
        state.save(id, labels)?;
        state.queue.lease(id, labeller, now_ms);
        Ok(())
    }

    /// Counts items and labels and measures agreement.
    pub fn progress(&self) -> LabelProgress {
        self.lock().queue.progress()
    }

    /// Adds items with the labels that they already have.
    pub fn add(&self, items: Vec<(Item, Vec<Label>)>) -> Result<Vec<ItemId>, String> {
        let mut state = self.lock();
        items.into_iter().map(|(item, labels)| state.queue.add(item, labels)).collect()
    }

    /// Blocks until all items have the labels they need, a label arrives or `timeout` is over, and returns how many items still
    /// lack labels.
    pub fn wait(&self, ids: &[ItemId], timeout: Duration) -> usize {
        let state = self.lock();
        let open = |state: &State| ids.iter().filter(|&&id| !state.queue.is_done(id)).count();
        if open(&state) == 0 {
            return 0;
        }
        let state = self.changed.wait_timeout(state, timeout).unwrap_or_else(PoisonError::into_inner).0;
        open(&state)
    }

    /// Removes items and returns the labels of each, in order.
    pub fn remove(&self, ids: &[ItemId]) -> Vec<Vec<Label>> {
        let mut state = self.lock();
        ids.iter().map(|&id| state.queue.remove(id).map(|(_, labels)| labels).unwrap_or_default()).collect()
    }
}

impl State {
    /// Saves the labels of an item, then puts them into the queue.
    fn save(&mut self, id: ItemId, labels: Vec<Label>) -> Result<(), String> {
        let item = self.queue.item(id).ok_or("the item is no longer in the queue; reload the page")?;
        self.store.save(id, item, &labels)?;
        self.queue.set_labels(id, labels);
        Ok(())
    }
}
