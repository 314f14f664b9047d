//! `shaders/average.wgsl`: the moving average of what is trained.

use super::lanes::{lanes, with_lanes};
use super::{KernelSpec, STEP_ELEMENTS, View, Work, read, update};

const SOURCE: &str = include_str!("../../shaders/average.wgsl");

/// `average = share·average + (1 − share)·values`, `[n]`, with the share of row `counter[0]` of the step
/// table. Changes `average` in place.
pub fn average_values(average: View, values: View, steps: View, counter: View) -> KernelSpec {
    let n = values.len;
    KernelSpec::new(
        "average_values",
        with_lanes(SOURCE, n),
        Work::AverageValues,
        &[("ELEMENTS", n as f64)],
        vec![
            update(0, "average", average, n),
            read(1, "values", values, n),
            read(2, "steps", steps, STEP_ELEMENTS),
            read(3, "counter", counter, 1),
        ],
        n / lanes(n),
    )
}

/// Exchanges `a[n]` and `b[n]` in place. Stands in no plan: it runs between steps.
pub fn swap_values(a: View, b: View) -> KernelSpec {
    let n = a.len;
    KernelSpec::new(
        "swap_values",
        with_lanes(SOURCE, n),
        Work::SwapValues,
        &[("ELEMENTS", n as f64)],
        vec![update(4, "a", a, n), update(5, "b", b, n)],
        n / lanes(n),
    )
}
