//! What all ranks do together: add gradients, and share the updated weights. Each rank owns a part of the elements
//! ([`shards`]), whose gradients it receives from all, adds in the tree's order, and sends or applies.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::Tensor;
use rehearsal_learn::adamw::{BLOCK, Ranges, block_squares, shards};
use rehearsal_lm::add_floats;

use super::Wire;
use super::message::Node;
use super::tensors::{flat, floats};
use crate::trained::{LeafSum, Member, Tree};
use crate::{Error, Result};

/// Elements that go from one rank to another at a time, at most: whole blocks of the gradient norm.
const PIECE: usize = 64 * BLOCK;

/// Ranges of elements of variables that go over the wire together.
type Piece = Vec<(String, Range<usize>)>;

/// A member with its part of a step's gradients.
pub struct Exchange {
    /// The elements of each rank.
    ranges: Vec<Ranges>,
    /// The summed gradients of this rank's elements, by variable.
    sum: BTreeMap<String, Vec<f32>>,
}

/// A rank's elements in pieces.
fn pieces(ranges: &Ranges) -> Vec<Piece> {
    let (mut all, mut piece, mut room) = (Vec::new(), Piece::new(), PIECE);
    for (name, range) in ranges {
        let mut start = range.start;
        while start < range.end {
            // A block is never cut, so a piece ends where the next one has no room.
            let take = (range.end - start).min(room / BLOCK * BLOCK);
            if take == 0 {
                all.push(std::mem::take(&mut piece));
                room = PIECE;
                continue;
            }
            piece.push((name.clone(), start..start + take));
            (start, room) = (start + take, room - take);
        }
    }
    if !piece.is_empty() {
        all.push(piece);
    }
    all
}

fn elements(piece: Option<&Piece>) -> usize {
    piece.into_iter().flatten().map(|(_, range)| range.len()).sum()
}

/// The elements of a piece, one after the other.
fn take(piece: Option<&Piece>, of: &BTreeMap<String, Tensor>) -> Result<Vec<f32>> {
    let mut all = Vec::with_capacity(elements(piece));
    for (name, range) in piece.into_iter().flatten() {
        let missing = || rehearsal_lm::Error::NoGradient(name.clone());
        let tensor = of.get(name).ok_or_else(missing)?;
        all.extend(floats(&tensor.flatten_all()?.narrow(0, range.start, range.len())?)?);
    }
    Ok(all)
}

impl Exchange {
    /// Adds the gradients of all ranks. `own` are this rank's sums, `nodes` those that each rank has. Returns the sums of squares of
    /// the blocks of this rank's part.
    pub fn sum(
        wire: &dyn Wire,
        member: &Member,
        leaves: usize,
        own: Vec<(Range<usize>, LeafSum)>,
        nodes: &[Vec<Node>],
    ) -> Result<(Self, Vec<f64>)> {
        let ranges = shards(member.variables(), wire.size());
        let all: Vec<Vec<Piece>> = ranges.iter().map(pieces).collect();
        let rounds = all.iter().map(Vec::len).max().unwrap_or(0);
        let (mut sum, mut squares) = (BTreeMap::<String, Vec<f32>>::new(), Vec::new());
        for round in 0..rounds {
            let mine = all[wire.rank()].get(round);
            let send = all.iter().map(|pieces| {
                let of_nodes = own.iter().filter_map(|(_, sum)| sum.gradients.as_ref());
                Ok(of_nodes
                    .map(|gradients| take(pieces.get(round), gradients))
                    .collect::<Result<Vec<Vec<f32>>>>()?
                    .concat())
            });
            let send = send.collect::<Result<Vec<Vec<f32>>>>()?;
            let n = elements(mine);
            let with_gradients = |nodes: &Vec<Node>| nodes.iter().filter(|(_, has)| *has).count();
            let counts: Vec<usize> = nodes.iter().map(|nodes| with_gradients(nodes) * n).collect();
            let received = wire.all_to_all(&send, &counts);
            let mut tree: Tree<Option<Vec<f32>>> = Tree::new(leaves);
            for (nodes, values) in nodes.iter().zip(received) {
                let mut values = values.chunks_exact(n.max(1));
                for (leaves, has) in nodes {
                    let part = if *has { Some(values.next().unwrap_or_default().to_vec()) } else { None };
                    tree.push(leaves.clone(), part, |a, b| {
                        Ok::<_, Error>(match (a, b) {
                            (Some(mut a), Some(b)) => {
                                member.compute.run(|| add_floats(&mut a, &b));
                                Some(a)
                            }
                            (a, b) => a.or(b),
                        })
                    })?;
                }
            }
            let values = tree.into_sums().pop().and_then(|(_, sum)| sum).unwrap_or_default();
            let mut at = 0;
            for (name, range) in mine.into_iter().flatten() {
                let part = &values[at..at + range.len()];
                squares.extend(member.compute.run(|| block_squares(part)));
                sum.entry(name.clone()).or_default().extend_from_slice(part);
                at += range.len();
            }
        }
        Ok((Self { ranges, sum }, squares))
    }

    /// The global norm, from the sums of squares of every rank's blocks: added as for one process, block by block within a
    /// variable, and then variable by variable.
    pub fn norm(&self, squares: &[Vec<f64>]) -> f64 {
        let mut blocks: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for (ranges, squares) in self.ranges.iter().zip(squares) {
            let mut squares = squares.iter().copied();
            for (name, range) in ranges {
                blocks.entry(name).or_default().extend(squares.by_ref().take(range.len().div_ceil(BLOCK)));
            }
        }
        let total = blocks.values().fold(0.0, |total, blocks| total + blocks.iter().sum::<f64>());
        total.sqrt()
    }

    /// Updates the weights of all ranks by the sum, which is multiplied by `scale`.
    pub fn update(self, wire: &dyn Wire, member: &mut Member, learning_rate: f64, scale: f64) -> Result<()> {
        let Self { ranges, sum } = self;
        let sum =
            sum.into_iter().map(|(name, values)| Ok((name, flat(values)?))).collect::<Result<BTreeMap<_, _>>>()?;
        if member.ranges().is_some() {
            let updated = member.update_shard(&sum, learning_rate, scale)?;
            gather(wire, &ranges, &updated, |owner, name, range, values| {
                if owner == wire.rank() { Ok(()) } else { member.set_elements(name, range.start, &flat(values)?) }
            })?;
        } else {
            let mut whole = member.zeros()?;
            gather(wire, &ranges, &sum, |_, name, range, values| {
                let missing = || rehearsal_lm::Error::NoGradient(name.into());
                let gradient = whole.get_mut(name).ok_or_else(missing)?;
                Ok(gradient.flatten_all()?.slice_set(&flat(values)?, 0, range.start)?)
            })?;
            member.update(&whole, learning_rate, scale)?;
        }
        member.updated()
    }
}

/// Sends each rank's elements to all. `own` are this rank's, by variable; `set` takes those of each rank piece by piece.
fn gather(
    wire: &dyn Wire,
    ranges: &[Ranges],
    own: &BTreeMap<String, Tensor>,
    mut set: impl FnMut(usize, &str, Range<usize>, Vec<f32>) -> Result<()>,
) -> Result<()> {
    let all: Vec<Vec<Piece>> = ranges.iter().map(pieces).collect();
    let mine = &ranges[wire.rank()];
    for round in 0..all.iter().map(Vec::len).max().unwrap_or(0) {
        // Ranges count from the beginning of the variable, the rank's own tensors from the beginning of its part.
        let relative = |(name, range): &(String, Range<usize>)| {
            let start = mine[name].start;
            (name.clone(), range.start - start..range.end - start)
        };
        let piece: Option<Piece> = all[wire.rank()].get(round).map(|piece| piece.iter().map(relative).collect());
        let values = take(piece.as_ref(), own)?;
        let counts: Vec<usize> = all.iter().map(|pieces| elements(pieces.get(round))).collect();
        for (owner, values) in wire.all_gather(&values, &counts).into_iter().enumerate() {
            let mut at = 0;
            for (name, range) in all[owner].get(round).into_iter().flatten() {
                set(owner, name, range.clone(), values[at..at + range.len()].to_vec())?;
                at += range.len();
            }
        }
    }
    Ok(())
}
