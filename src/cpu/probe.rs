//! Twin of `shaders/probe.wgsl`.

use super::Float;
use crate::kernels::WORKGROUP_SIZE;

/// The sums `y[invocations]` of the 32 numbers of an invocation after so many rounds of each loop; `source` has four
/// elements in each of its places.
pub fn probe_prices<T: Float>(
    invocations: usize,
    rounds: [u32; 4],
    [scale, shift]: [T; 2],
    source: &[T],
) -> Vec<T> {
    let places = source.len() / 4;
    let one = |i: usize| {
        let local = i % WORKGROUP_SIZE;
        let first = |n: usize| -> T { (local as f32 + n as f32 / 4.0).into() };
        let mut numbers: [T; 32] = std::array::from_fn(first);
        for _ in 0..4 * rounds[0] {
            numbers = numbers.map(|x| x * scale + shift);
        }
        let place = |r: u32| r as usize * WORKGROUP_SIZE + local;
        let mut add = |which: usize, at: usize| {
            for e in 0..4 {
                numbers[4 * which + e] += source[at % places * 4 + e];
            }
        };
        for r in 0..rounds[1] {
            add(0, place(r));
            add(1, place(r) + places / 2);
        }
        for r in 0..rounds[2] {
            add(2, place(r));
        }
        for r in 0..rounds[3] {
            for (which, kept) in [(3, r % 4), (0, (r + 1) % 4)] {
                for e in 0..4 {
                    let kept: T = (kept as f32).into();
                    numbers[4 * which + e] += first(e) + kept;
                }
            }
        }
        numbers.into_iter().sum()
    };
    (0..invocations).map(one).collect()
}
