//! Optimizer state that several members share: each holds the moments of some elements and updates these (ZeRO, stage 1, Rajbhandari
//! et al. 2020).

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{Tensor, Var};

use super::moments::QUANTUM;
use crate::{Error, Result};

/// Elements of each variable, by name, as ranges of the flat tensor. Variables without elements are not named.
pub type Ranges = BTreeMap<String, Range<usize>>;

/// Variables are cut at multiples of this many elements: blocks of eight-bit moments and of the gradient norm stay whole.
const UNIT: usize = super::BLOCK;

/// Divides all elements of variables among members: contiguous parts, as equal as cuts at multiples of 65,536 elements of a
/// variable allow.
pub fn shards(variables: &BTreeMap<String, Var>, members: usize) -> Vec<Ranges> {
    let total: usize = variables.values().map(|var| var.elem_count()).sum();
    let mut all = vec![Ranges::new(); members];
    let (mut before, mut member) = (0, 0);
    for (name, var) in variables {
        let n = var.elem_count();
        let mut start = 0;
        while start < n {
            // What is left of this member's share, in whole units of the variable; the last member takes the rest.
            let room = ((member + 1) * total / members).saturating_sub(before + start);
            let end = match (n - start <= room || member + 1 == members, room.next_multiple_of(UNIT)) {
                (true, _) => n,
                (false, room) => (start + room).min(n),
            };
            if end > start {
                all[member].insert(name.clone(), start..end);
            }
            start = end;
            if before + start >= (member + 1) * total / members {
                member = (member + 1).min(members - 1);
            }
        }
        before += n;
    }
    all
}

/// The part of a saved tensor that belongs to a range of its variable's elements, flat.
pub(super) fn part_of_state(saved: &Tensor, key: &str, range: &Range<usize>) -> Result<Tensor> {
    let flat = saved.flatten_all()?;
    let range = stored(key, range);
    if range.end > flat.elem_count() {
        return Err(Error::Moments(format!("`{key}` has {} elements, wanted {}", flat.elem_count(), range.end)));
    }
    Ok(flat.narrow(0, range.start, range.len())?)
}

/// Whether a tensor of the state holds scales of blocks.
fn is_of_blocks(key: &str) -> bool {
    key.split('.').next().is_some_and(|kind| kind.ends_with("_scale"))
}

/// The range of a tensor of the state for a range of its variable's elements: eight-bit moments have a scale for each block.
fn stored(key: &str, range: &Range<usize>) -> Range<usize> {
    if is_of_blocks(key) { range.start / QUANTUM..range.end.div_ceil(QUANTUM) } else { range.clone() }
}

/// The state of an optimizer of all elements, from the shards' ranges and states.
///
/// # Errors
///
/// [`Error::Moments`] if a part is missing.
pub fn joined(
    parts: impl IntoIterator<Item = (Ranges, BTreeMap<String, Tensor>)>,
    variables: &BTreeMap<String, Var>,
) -> Result<BTreeMap<String, Tensor>> {
    let mut pieces: BTreeMap<String, BTreeMap<usize, Tensor>> = BTreeMap::new();
    for (ranges, state) in parts {
        for (key, tensor) in state {
            let name = key.split_once('.').map_or("", |(_, name)| name);
            let start = ranges.get(name).ok_or_else(|| Error::Moments(format!("`{key}` is of no variable")))?.start;
            pieces.entry(key).or_default().insert(start, tensor);
        }
    }
    let join = |(key, pieces): (String, BTreeMap<usize, Tensor>)| {
        let name = key.split_once('.').map_or("", |(_, name)| name);
        let var = variables.get(name).ok_or_else(|| Error::Moments(format!("`{key}` is of no variable")))?;
        let pieces: Vec<Tensor> = pieces.into_values().map(|t| t.flatten_all()).collect::<candle_core::Result<_>>()?;
        let whole = stored(&key, &(0..var.elem_count()));
        let flat = if pieces.len() == 1 { pieces[0].clone() } else { Tensor::cat(&pieces, 0)? };
        if flat.elem_count() != whole.len() {
            return Err(Error::Moments(format!("`{key}` has {} elements, wanted {}", flat.elem_count(), whole.len())));
        }
        let tensor = if is_of_blocks(&key) { flat } else { flat.reshape(var.shape())? };
        Ok((key, tensor))
    };
    pieces.into_iter().map(join).collect()
}
