//! `shaders/shards.wgsl`: the sum over the shards of a batch, by a fixed tree.
//!
//! Node (l, j) of the tree is the sum over the shards from j·2^l on, 2^l of them, of its left half and its right
//! half. So whoever computes some shards on end has whole nodes, which can be added up with those of others to the
//! very bits that one alone would have.

use super::lanes::{lanes, with_lanes};
use super::{KernelSpec, STEP_ELEMENTS, View, Work, read, update, write};
use std::ops::Range;

const SOURCE: &str = include_str!("../../shaders/shards.wgsl");

/// Levels of the tree over `shards` shards that have whole nodes.
pub const fn levels(shards: usize) -> usize {
    (usize::BITS - shards.leading_zeros()) as usize
}

/// Rows of the tensor of nodes: where all shards are computed in one place, and where they are `spread`.
pub const fn rows(shards: usize, spread: bool) -> usize {
    let levels = levels(shards);
    if spread { 2 * levels - 1 } else { levels }
}

/// A node of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    pub level: usize,
    /// Among those of its level.
    pub index: usize,
}

impl Node {
    /// Its row in the tensor of nodes, of a tree of so many levels.
    pub fn row(self, levels: usize) -> usize {
        // A right one waits for a sibling that is computed elsewhere; otherwise it would be part of their sum.
        self.level + if self.index % 2 == 1 { levels } else { 0 }
    }
}

/// The largest nodes that make up some shards on end: what [`sum_shards`] leaves of them, in their order.
pub fn nodes(shards: Range<usize>) -> Vec<Node> {
    let (mut first, end) = (shards.start, shards.end);
    let mut nodes = Vec::new();
    while first < end {
        let mut level = 0;
        while first % (2 << level) == 0 && first + (2 << level) <= end {
            level += 1;
        }
        let index = first >> level;
        nodes.push(Node { level, index });
        first += 1 << level;
    }
    nodes
}

/// Adds `x[n]`, of the shard that row `counter[0]` of the step table `steps` is, to `nodes[rows(shards),n]`, where
/// `shards` is the most that a batch has. Changes `nodes` in place.
pub fn sum_shards(shards: usize, x: View, nodes: View, steps: View, counter: View) -> KernelSpec {
    let n = x.len;
    let levels = levels(shards);
    let mut spec = KernelSpec::new(
        "sum_shards",
        with_lanes(SOURCE, n),
        Work::SumShards { levels },
        &[("WIDTH", (n / lanes(n)) as f64), ("LEVELS", levels as f64)],
        vec![
            read(0, "x", x, n),
            update(1, "nodes", nodes, nodes.len),
            read(2, "steps", steps, STEP_ELEMENTS),
            read(3, "counter", counter, 1),
        ],
        n / lanes(n),
    );
    // In the mean over all shards: x once, one node read and one written.
    spec.cost.bytes = 12.0 * n as f64;
    spec
}

/// `result[n]` = the sum over all shards of the batch, from what [`sum_shards`] left of them in the rows of
/// `nodes` that are of one place; `scaled` by their share, to the mean. Writes `result`.
pub fn fold_shards(
    shards: usize,
    scaled: bool,
    nodes: View,
    steps: View,
    counter: View,
    result: View,
) -> KernelSpec {
    let n = result.len;
    let levels = levels(shards);
    KernelSpec::new(
        "fold_shards",
        with_lanes(SOURCE, n),
        Work::FoldShards { levels, scaled },
        &[
            ("WIDTH", (n / lanes(n)) as f64),
            ("LEVELS", levels as f64),
            ("SCALED", f64::from(u8::from(scaled))),
        ],
        vec![
            read(4, "nodes", nodes, levels * n),
            read(2, "steps", steps, STEP_ELEMENTS),
            read(3, "counter", counter, 1),
            write(5, "result", result, n),
        ],
        n / lanes(n),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_on_end_are_whole_nodes() {
        let of = |range: Range<usize>| -> Vec<[usize; 2]> {
            let nodes = nodes(range).into_iter();
            nodes.map(|n| [n.level, n.index]).collect()
        };
        assert_eq!(of(0..8), [[3, 0]]);
        assert_eq!(of(0..5), [[2, 0], [0, 4]]);
        assert_eq!(of(3..8), [[0, 3], [2, 1]]);
        assert_eq!(of(1..7), [[0, 1], [1, 1], [1, 2], [0, 6]]);
        assert_eq!(of(4..4), [[0; 2]; 0]);
        // Each has a row of its own, and all rows are there.
        for end in 1..=33 {
            for first in 0..end {
                let mut taken = vec![false; rows(end, true)];
                for node in nodes(first..end) {
                    let row = &mut taken[node.row(levels(end))];
                    assert!(!std::mem::replace(row, true), "{first}..{end}");
                }
                assert!(first > 0 || !taken[levels(end)..].contains(&true));
            }
        }
    }
}
