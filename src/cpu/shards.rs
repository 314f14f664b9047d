//! Twins of `shaders/shards.wgsl`, and what adds up the nodes of several places.

use super::Float;
use crate::kernels::shards::Node;

/// The value, or 0 where it is subnormal as an f32.
pub fn flushed<T: Float>(value: T) -> T {
    let least: T = f32::MIN_POSITIVE.into();
    if value.abs() < least {
        T::zero()
    } else {
        value
    }
}

/// Adds `x`, of shard number `shard`, to the nodes `[rows, x's length]` of the shards from `first` on, by a tree of
/// `levels`.
pub fn sum_shards<T: Float>(levels: usize, first: usize, shard: usize, x: &[T], nodes: &mut [T]) {
    let n = x.len();
    let mut level = 0;
    while level + 1 < levels {
        let node = shard >> level;
        if node.is_multiple_of(2) || (node - 1) << level < first {
            break;
        }
        level += 1;
    }
    let row = Node {
        level,
        index: shard >> level,
    }
    .row(levels);
    // What is added to it lies before it.
    let (before, own) = nodes.split_at_mut(row * n);
    let own = &mut own[..n];
    own.iter_mut()
        .zip(x)
        .for_each(|(own, x)| *own = flushed(*x));
    for node in before.chunks_exact(n).take(level) {
        add_node(own, node);
    }
}

/// `sum = node + sum`.
fn add_node<T: Float>(sum: &mut [T], node: &[T]) {
    for (sum, node) in sum.iter_mut().zip(node) {
        *sum = flushed(*node + *sum);
    }
}

/// The sum over all `shards` of the nodes `[rows, result's length]` that they left in one place, times `share`
/// where there is one.
pub fn fold_shards<T: Float>(shards: usize, share: Option<T>, nodes: &[T], result: &mut [T]) {
    let n = result.len();
    let rows = nodes.chunks_exact(n).take(usize::BITS as usize).enumerate();
    let mut wanted = rows.filter(|(level, _)| shards >> level & 1 == 1);
    let (_, last) = wanted.next().expect("a batch has shards");
    result.copy_from_slice(last);
    wanted.for_each(|(_, node)| add_node(result, node));
    if let Some(share) = share {
        result
            .iter_mut()
            .for_each(|sum| *sum = flushed(*sum * share));
    }
}

/// The sum over `shards` shards, from nodes that are whole and in their order, with `node(i)` the values of the one
/// of that number.
pub fn root<'a>(shards: usize, nodes: &[Node], node: &impl Fn(usize) -> &'a [f32]) -> Vec<f32> {
    let top = Node {
        level: shards.next_power_of_two().trailing_zeros() as usize,
        index: 0,
    };
    below(top, shards, nodes, node).unwrap_or_default()
}

/// The sum of the shards below `top`; `None` where there are none.
fn below<'a>(
    top: Node,
    shards: usize,
    nodes: &[Node],
    node: &impl Fn(usize) -> &'a [f32],
) -> Option<Vec<f32>> {
    if top.index << top.level >= shards {
        return None;
    }
    if let Some(at) = nodes.iter().position(|n| *n == top) {
        return Some(node(at).to_vec());
    }
    let child = |right| Node {
        level: top
            .level
            .checked_sub(1)
            .expect("nodes that make up all shards"),
        index: 2 * top.index + right,
    };
    let mut sum = below(child(0), shards, nodes, node)?;
    if let Some(right) = below(child(1), shards, nodes, node) {
        add_node(&mut sum, &right);
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::shards::{levels, nodes, rows};

    /// Of very different sizes, so that the order shows; some are subnormal, some cancel to that.
    fn terms(shards: usize, n: usize) -> Vec<Vec<f32>> {
        let mut state = 7u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let sign = if state & 1 == 0 { 1.0 } else { -1.0 };
            sign * 2f32.powi((state >> 24) as i32 / 2 - 64) * (state >> 8) as f32
        };
        let mut terms: Vec<Vec<f32>> = (0..shards)
            .map(|_| (0..n).map(|_| next()).collect())
            .collect();
        for term in &mut terms {
            term[0] = 1e-40;
        }
        if shards > 1 {
            terms[0][1] = f32::MIN_POSITIVE * 1.5;
            terms[1][1] = -f32::MIN_POSITIVE;
        }
        terms
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|v| v.to_bits()).collect()
    }

    #[test]
    fn however_shards_are_dealt_their_sum_has_the_same_bits() {
        let n = 5;
        for shards in 1..=17 {
            let (terms, most) = (terms(shards, n), 17);
            let computed = |first: usize, end: usize| {
                let mut all = vec![f32::NAN; rows(most, true) * n];
                for (shard, x) in terms.iter().enumerate().take(end).skip(first) {
                    sum_shards(levels(most), first, shard, x, &mut all);
                }
                all
            };
            let mut whole = vec![0.0; n];
            fold_shards(shards, None, &computed(0, shards), &mut whole);
            assert_eq!(whole[..1], [0.0]);
            for one in 0..=shards {
                for two in one..=shards {
                    let mut all = Vec::new();
                    let mut values = Vec::new();
                    for (first, end) in [(0, one), (one, two), (two, shards)] {
                        let computed = computed(first, end);
                        for node in nodes(first..end) {
                            let row = node.row(levels(most));
                            values.push(computed[row * n..][..n].to_vec());
                            all.push(node);
                        }
                    }
                    let sum = root(shards, &all, &|at| &values[at]);
                    assert_eq!(bits(&sum), bits(&whole), "{shards}: 0..{one}..{two}");
                }
            }
            if shards == 1 {
                continue;
            }
            // By a chain it would be another sum.
            let chain = (1..shards).fold(terms[0].clone(), |sum, shard| {
                sum.iter().zip(&terms[shard]).map(|(a, b)| a + b).collect()
            });
            assert!(shards < 4 || bits(&chain) != bits(&whole));
            assert_eq!(whole[1].to_bits() == 0, shards == 2, "{}", whole[1]);
        }
    }
}
