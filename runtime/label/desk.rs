//! The board behind a lock: every word is written down before it counts.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;

use super::board::{Board, Item, ItemId, Label, Progress, Word};
use super::book::Book;
use rehearsal_store::Prompt;

/// Characters of a labeller's name at most.
const NAME_MAX: usize = 40;

/// What a labeller sees.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Shown {
    pub id: ItemId,
    pub prompt: Prompt,
    /// In the order in which they are to be shown, each with its place in the item.
    pub completions: Vec<(u32, String)>,
}

/// Items, labels, and the book they are written in.
pub struct Desk {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    board: Board,
    book: Box<dyn Book>,
}

impl Desk {
    pub fn new(board: Board, book: Box<dyn Book>) -> Self {
        Self { state: Mutex::new(State { board, book }), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a labeller is to look at next, if there is anything.
    pub fn next(&self, labeller: &str, now_ms: u64) -> Result<Option<Shown>, String> {
        let labeller = name(labeller)?;
        let board = &mut self.lock().board;
        let Some((id, order)) = board.next(labeller, now_ms) else { return Ok(None) };
        let Some(item) = board.item(id) else { return Ok(None) };
        let text = |place: u32| (place, item.completions[place as usize].clone());
        Ok(Some(Shown { id, prompt: item.prompt.clone(), completions: order.into_iter().map(text).collect() }))
    }

    /// Takes a labeller's word.
    pub fn say(&self, labeller: &str, id: ItemId, word: Word, now_ms: u64) -> Result<(), String> {
        let labeller = name(labeller)?;
        let mut state = self.lock();
        let label = state.board.label(labeller, id, word, now_ms)?;
        let labels = state.board.with(id, &label);
        state.set(id, labels)?;
        self.changed.notify_all();
        Ok(())
    }

    /// Takes back what a labeller said last, and shows it to them again.
    pub fn undo(&self, labeller: &str, now_ms: u64) -> Result<(), String> {
        let labeller = name(labeller)?;
        let mut state = self.lock();
        let id = state.board.last_of(labeller).ok_or("there is nothing to take back")?;
        let labels = state.board.labels(id).iter().filter(|l| l.labeller != labeller).cloned().collect();
        state.set(id, labels)?;
        state.board.lease(id, labeller, now_ms);
        Ok(())
    }

    pub fn progress(&self) -> Progress {
        self.lock().board.progress()
    }

    /// Puts items up with what is known of them.
    pub fn add(&self, items: Vec<(Item, Vec<Label>)>) -> Result<Vec<ItemId>, String> {
        let mut state = self.lock();
        items.into_iter().map(|(item, labels)| state.board.add(item, labels)).collect()
    }

    /// Waits until all of these have the labels they want, or for a while; whether they have.
    pub fn wait(&self, ids: &[ItemId], at_most: Duration) -> bool {
        let state = self.lock();
        let done = |state: &State| ids.iter().all(|&id| state.board.is_done(id));
        if done(&state) {
            return true;
        }
        let state = self.changed.wait_timeout(state, at_most).unwrap_or_else(PoisonError::into_inner).0;
        done(&state)
    }

    /// Takes items down with what was said of them.
    pub fn take(&self, ids: &[ItemId]) -> Vec<Vec<Label>> {
        let mut state = self.lock();
        ids.iter().map(|&id| state.board.take(id).map(|(_, labels)| labels).unwrap_or_default()).collect()
    }
}

impl State {
    fn set(&mut self, id: ItemId, labels: Vec<Label>) -> Result<(), String> {
        let item = self.board.item(id).ok_or("the item is not on the board")?;
        self.book.keep(item, &labels)?;
        self.board.set(id, labels);
        Ok(())
    }
}

/// A labeller's name, if it is one.
fn name(typed: &str) -> Result<&str, String> {
    let name = typed.trim();
    if name.is_empty() || name.chars().count() > NAME_MAX || name.chars().any(char::is_control) {
        return Err(format!("say who you are, in 1 to {NAME_MAX} characters"));
    }
    Ok(name)
}
