//! `shaders/pool.wgsl`: max- and mean-pooling.

use super::{KernelSpec, View, Work, mask, read, write};
use crate::model::Pool2d;

const SOURCE: &str = include_str!("../../shaders/pool.wgsl");

fn constants(pool: &Pool2d, batch: usize, masked: bool) -> Vec<(&'static str, f64)> {
    let (rows, columns) = (pool.counted(0), pool.counted(1));
    [
        ("N", batch),
        ("H", pool.input.height),
        ("W", pool.input.width),
        ("C", pool.input.channels),
        ("OH", pool.output.height),
        ("OW", pool.output.width),
        ("KH", pool.kernel[0]),
        ("KW", pool.kernel[1]),
        ("SH", pool.stride[0]),
        ("SW", pool.stride[1]),
        ("PADDED", usize::from(!pool.inside())),
        ("PH", pool.padding[0]),
        ("PW", pool.padding[1]),
        ("FH", rows.start),
        ("LH", rows.end),
        ("FW", columns.start),
        ("LW", columns.end),
        ("DIVISOR", pool.common_divisor().unwrap_or(0)),
        ("MASK", usize::from(masked)),
    ]
    .map(|(name, value)| (name, value as f64))
    .to_vec()
}

/// Whether channels come in fours, of which an invocation then handles four.
fn in_fours(pool: &Pool2d) -> bool {
    pool.input.channels.is_multiple_of(4)
}

/// `y[N,OH,OW,C]` = the maximum of each window of `x[N,H,W,C]`, and `index`: its place kh·KW + kw
/// inside the window (of at most 256), one byte per element of `y`; of equal values the first in
/// row-major order, and a NaN before every number. Writes `y` and `index`.
///
/// # Panics
/// For a larger window; a model file that has one is refused where it is read.
pub fn maxpool2d_forward(pool: &Pool2d, batch: usize, x: View, y: View, index: View) -> KernelSpec {
    let n = batch * pool.output.elements();
    assert!(pool.kernel[0] * pool.kernel[1] <= 256, "{pool:?}");
    let (entry, [x_at, y_at]) = if in_fours(pool) {
        ("maxpool2d_forward4", [10, 11])
    } else {
        ("maxpool2d_forward", [0, 1])
    };
    KernelSpec::new(
        entry,
        SOURCE,
        Work::MaxPoolForward(*pool),
        &constants(pool, batch, false),
        vec![
            read(x_at, "x", x, batch * pool.input.elements()),
            write(y_at, "y", y, n),
            write(2, "index", index, n),
        ],
        n.div_ceil(4),
    )
}

/// `dx[N,H,W,C]`: the gradient `dy[N,OH,OW,C]` of each window at the place that `index` recorded,
/// 0 elsewhere; where windows overlap, a position gets the sum over all windows that it won. With
/// `activation` the gradient passes only where that is positive, the ReLU before the pooling:
/// `[N,OH,OW,C]`, the pooled output. Writes every element of `dx`.
pub fn maxpool2d_backward(
    pool: &Pool2d,
    batch: usize,
    dy: View,
    index: View,
    activation: Option<View>,
    dx: View,
) -> KernelSpec {
    let outputs = batch * pool.output.elements();
    // Four channels an invocation where they come in fours.
    let (entry, bindings, invocations) = if pool.overlapping() {
        return maxpool2d_backward_overlapping(pool, batch, dy, index, activation, dx);
    } else if in_fours(pool) {
        ("maxpool2d_backward4", [7, 8, 9], outputs / 4)
    } else {
        ("maxpool2d_backward", [3, 5, 6], outputs)
    };
    let operands = [dy, index, dx];
    maxpool_backward(
        entry,
        pool,
        batch,
        bindings,
        operands,
        activation,
        invocations,
    )
}

/// The same by an invocation for each element of `dx`, which looks at all windows that hold it.
pub fn maxpool2d_backward_overlapping(
    pool: &Pool2d,
    batch: usize,
    dy: View,
    index: View,
    activation: Option<View>,
    dx: View,
) -> KernelSpec {
    let inputs = batch * pool.input.elements();
    let (entry, bindings, invocations) = if in_fours(pool) {
        ("maxpool2d_backward_overlapping4", [7, 8, 9], inputs / 4)
    } else {
        ("maxpool2d_backward_overlapping", [3, 5, 6], inputs)
    };
    let operands = [dy, index, dx];
    maxpool_backward(
        entry,
        pool,
        batch,
        bindings,
        operands,
        activation,
        invocations,
    )
}

fn maxpool_backward(
    entry: &'static str,
    pool: &Pool2d,
    batch: usize,
    [dy_at, activation_at, dx_at]: [u32; 3],
    [dy, index, dx]: [View; 3],
    activation: Option<View>,
    invocations: usize,
) -> KernelSpec {
    let n = batch * pool.output.elements();
    KernelSpec::new(
        entry,
        SOURCE,
        Work::MaxPoolBackward {
            pool: *pool,
            masked: activation.is_some(),
        },
        &constants(pool, batch, activation.is_some()),
        vec![
            read(dy_at, "dy", dy, n),
            read(4, "index", index, n),
            mask(activation_at, activation, n, dy),
            write(dx_at, "dx", dx, batch * pool.input.elements()),
        ],
        invocations,
    )
}

/// `y[N,OH,OW,C]` = the mean of each window of `x[N,H,W,C]`: the sum over the places on the image by what
/// [`Pool2d::divisor`] says. Writes `y`.
pub fn meanpool2d_forward(pool: &Pool2d, batch: usize, x: View, y: View) -> KernelSpec {
    let n = batch * pool.output.elements();
    let (entry, [x_at, y_at], invocations) = if in_fours(pool) {
        ("meanpool2d_forward4", [10, 11], n / 4)
    } else {
        ("meanpool2d_forward", [0, 1], n)
    };
    KernelSpec::new(
        entry,
        SOURCE,
        Work::MeanPoolForward(*pool),
        &constants(pool, batch, false),
        vec![
            read(x_at, "x", x, batch * pool.input.elements()),
            write(y_at, "y", y, n),
        ],
        invocations,
    )
}

/// `dx[N,H,W,C]`: every position gets the gradients `dy[N,OH,OW,C]` of all windows that contain it, each
/// by its divisor. With `activation` `[N,H,W,C]` (the layer's input `x`) the gradient passes only where
/// that is positive. Writes every element of `dx`.
pub fn meanpool2d_backward(
    pool: &Pool2d,
    batch: usize,
    dy: View,
    activation: Option<View>,
    dx: View,
) -> KernelSpec {
    let n = batch * pool.input.elements();
    let (entry, [dy_at, activation_at, dx_at], invocations) = if in_fours(pool) {
        ("meanpool2d_backward4", [7, 8, 9], n / 4)
    } else {
        ("meanpool2d_backward", [3, 5, 6], n)
    };
    KernelSpec::new(
        entry,
        SOURCE,
        Work::MeanPoolBackward {
            pool: *pool,
            masked: activation.is_some(),
        },
        &constants(pool, batch, activation.is_some()),
        vec![
            read(dy_at, "dy", dy, batch * pool.output.elements()),
            mask(activation_at, activation, n, dy),
            write(dx_at, "dx", dx, n),
        ],
        invocations,
    )
}
