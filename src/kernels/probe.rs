//! `shaders/probe.wgsl`: what operations cost on an adapter.

use super::{KernelSpec, View, Work, read, write};

const SOURCE: &str = include_str!("../../shaders/probe.wgsl");

/// What the shader does in a loop: multiply-adds, loads of four numbers, of four one by one, and reads of
/// workgroup memory; how many of them an invocation does in a round.
pub const PER_ROUND: [usize; 4] = [128, 2, 1, 2];

/// Elements of what is loaded.
pub const PROBE_ELEMENTS: usize = 1024;

/// `rounds[4]` rounds of each loop in each of `invocations` invocations; `y[invocations]` receives the sums of their
/// numbers. `factors` is `[scale, shift]`, `source` has [`PROBE_ELEMENTS`]. Writes `y`.
pub fn probe_prices(
    invocations: usize,
    rounds: View,
    factors: View,
    source: View,
    y: View,
) -> KernelSpec {
    KernelSpec::new(
        "probe_prices",
        SOURCE,
        Work::ProbePrices,
        &[("INVOCATIONS", invocations as f64)],
        vec![
            read(0, "rounds", rounds, PER_ROUND.len()),
            read(1, "factors", factors, 2),
            read(2, "source", source, PROBE_ELEMENTS),
            read(3, "numbers", source, PROBE_ELEMENTS),
            write(4, "y", y, invocations),
        ],
        invocations,
    )
}
