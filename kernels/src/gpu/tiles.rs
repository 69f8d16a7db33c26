//! Tiles of packed sequences, as the attention kernels read them.

use std::ops::Range;

use candle_core::Result;

use super::buffer::Buffer;
use super::launcher::Launcher;
use super::source::ElementType;
use crate::attention::Family;

/// Integers per tile of queries: first row, number of rows, first row of its part, first row of its prompt, length of the
/// prompt.
pub const QUERY_TILE: usize = 5;
/// Integers per tile of keys: first row, number of rows, end of the rows that may attend to them.
pub const KEY_TILE: usize = 3;

/// Rows per tile, at most.
const TILE: usize = 64;

/// Bytes of dynamic shared memory per block of the attention kernels, by the constants of `attention.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShared {
    /// Of the kernels that take a tile of queries: the forward pass, and the gradient of the queries.
    pub queries: usize,
    /// Of the kernel that takes a tile of keys: the gradients of keys and values.
    pub keys: usize,
}

impl AttentionShared {
    /// What heads of a width need. Tiles are loaded ahead where a row of them has 256 bytes at most.
    pub fn of(head_dim: usize, element: ElementType) -> Self {
        let (pad, bytes) = (head_dim.next_multiple_of(16), element.bytes());
        let (buffers, queries) = if pad * bytes > 256 { (1, 16) } else { (2, 32) };
        let line = (pad + 8) * bytes;
        Self { queries: buffers * 2 * TILE * line, keys: (2 * TILE + buffers * 2 * queries) * line }
    }
}

/// Positions of packed rows, and their tiles, on the device.
pub struct Layout {
    /// Position of each row in its sequence.
    pub positions: Buffer,
    /// Tiles of queries, [`QUERY_TILE`] integers each.
    pub query_tiles: Buffer,
    /// Tiles of keys, [`KEY_TILE`] integers each.
    pub key_tiles: Buffer,
}

impl Layout {
    /// Uploads the positions of rows, and the tiles of the families that they belong to.
    pub fn new(launcher: &Launcher, positions: &[u32], families: &[Family]) -> Result<Self> {
        let (queries, keys) = tiles(families);
        Ok(Self {
            positions: launcher.upload(positions)?,
            query_tiles: launcher.upload(&queries)?,
            key_tiles: launcher.upload(&keys)?,
        })
    }

    /// Rows without tiles, for kernels that read only the positions, which are on the device already.
    pub fn at(positions: Buffer, launcher: &Launcher) -> Result<Self> {
        Ok(Self { positions, query_tiles: launcher.upload(&[])?, key_tiles: launcher.upload(&[])? })
    }
}

/// Tiles of queries, those with the most keys first, and tiles of keys.
fn tiles(families: &[Family]) -> (Vec<u32>, Vec<u32>) {
    let (mut queries, mut keys) = (Vec::new(), Vec::new());
    for family in families {
        let prompt = &family.prompt;
        let end = family.completions.iter().map(|c| c.end).max().unwrap_or(prompt.end).max(prompt.end);
        let own = |rows: &Range<usize>, before: &Range<usize>| {
            let tile = |first: usize| {
                let count = TILE.min(rows.end - first);
                [first, count, rows.start, before.start, before.len()].map(|x| x as u32)
            };
            rows.clone().step_by(TILE).map(tile).collect::<Vec<_>>()
        };
        queries.extend(own(prompt, &(0..0)));
        keys.extend(
            prompt.clone().step_by(TILE).map(|first| [first, TILE.min(prompt.end - first), end].map(|x| x as u32)),
        );
        for rows in &family.completions {
            queries.extend(own(rows, prompt));
            keys.extend(
                rows.clone().step_by(TILE).map(|first| [first, TILE.min(rows.end - first), rows.end].map(|x| x as u32)),
            );
        }
    }
    queries.sort_by_key(|[first, count, own, _, past]| std::cmp::Reverse(past + first + count - own));
    (queries.concat(), keys.concat())
}

/// Groups rows by the target that they are added to: the targets, sorted; where the rows of each target start; and the
/// rows in that order.
pub fn by_target(ids: &[u32]) -> (Vec<u32>, Vec<u32>, Vec<u32>) {
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|&row| ids[row as usize]);
    let (mut targets, mut starts) = (Vec::new(), Vec::new());
    for (at, &row) in order.iter().enumerate() {
        if targets.last() != Some(&ids[row as usize]) {
            targets.push(ids[row as usize]);
            starts.push(at as u32);
        }
    }
    starts.push(order.len() as u32);
    (targets, starts, order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_grouped_by_their_target_in_order() {
        let (targets, starts, order) = by_target(&[7, 3, 7, 7, 1]);
        assert_eq!((targets, starts, order), (vec![1, 3, 7], vec![0, 1, 2, 5], vec![4, 1, 0, 2, 3]));
        assert_eq!(by_target(&[]), (vec![], vec![0], vec![]));
    }

    #[test]
    fn attention_fits_the_shared_memory_of_every_card_but_for_wide_f32_heads() {
        // Compute capability, and kilobytes that a block may use, of which the kernels' own variables take less than one.
        let cards = [(80, 163), (86, 99), (89, 99), (90, 227)];
        let fits = |dim, element, card: (u32, usize)| {
            let AttentionShared { queries, keys } = AttentionShared::of(dim, element);
            queries.max(keys) <= (card.1 - 1) << 10
        };
        for card in cards {
            for dim in [16, 32, 64, 80, 96, 128, 256] {
                assert!(fits(dim, ElementType::Bf16, card), "bf16, {dim}, sm_{}", card.0);
                assert_eq!(fits(dim, ElementType::F32, card), dim < 256 || card.0 == 90, "f32, {dim}, sm_{}", card.0);
            }
        }
    }

    #[test]
    fn tiles_cover_every_row_once_and_know_their_prompt() {
        let families = [Family { prompt: 0..70, completions: vec![70..75, 75..75, 75..80] }, Family::alone(80..90)];
        let (queries, keys) = tiles(&families);
        let mut rows: Vec<(u32, u32)> = queries.chunks(QUERY_TILE).map(|t| (t[0], t[1])).collect();
        rows.sort();
        assert_eq!(rows, [(0, 64), (64, 6), (70, 5), (75, 5), (80, 10)]);
        let completion = queries.chunks(QUERY_TILE).find(|t| t[0] == 75).unwrap();
        assert_eq!(completion, [75, 5, 75, 0, 70]);
        let ends: Vec<(u32, u32)> = keys.chunks(KEY_TILE).map(|t| (t[0], t[2])).collect();
        assert_eq!(ends, [(0, 80), (64, 80), (70, 75), (75, 80), (80, 90)]);
    }
}
