//! `shaders/pool.wgsl`: max- and mean-pooling.

use super::{KernelSpec, View, Work, mask, read, write};
use crate::model::Pool2d;

const SOURCE: &str = include_str!("../../shaders/pool.wgsl");

fn constants(pool: &Pool2d, batch: usize, masked: bool) -> [(&'static str, f64); 11] {
    [
        ("N", batch as f64),
        ("H", pool.input.height as f64),
        ("W", pool.input.width as f64),
        ("C", pool.input.channels as f64),
        ("OH", pool.output.height as f64),
        ("OW", pool.output.width as f64),
        ("KH", pool.kernel[0] as f64),
        ("KW", pool.kernel[1] as f64),
        ("SH", pool.stride[0] as f64),
        ("SW", pool.stride[1] as f64),
        ("MASK", f64::from(masked)),
    ]
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
    KernelSpec::new(
        "maxpool2d_forward",
        SOURCE,
        Work::MaxPoolForward(*pool),
        &constants(pool, batch, false),
        vec![
            read(0, "x", x, batch * pool.input.elements()),
            write(1, "y", y, n),
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
    } else if pool.output.channels.is_multiple_of(4) {
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
    let entry = "maxpool2d_backward_overlapping";
    let inputs = batch * pool.input.elements();
    maxpool_backward(
        entry,
        pool,
        batch,
        [3, 5, 6],
        [dy, index, dx],
        activation,
        inputs,
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

/// `y[N,OH,OW,C]` = the mean of each window of `x[N,H,W,C]`. Writes `y`.
pub fn meanpool2d_forward(pool: &Pool2d, batch: usize, x: View, y: View) -> KernelSpec {
    let n = batch * pool.output.elements();
    KernelSpec::new(
        "meanpool2d_forward",
        SOURCE,
        Work::MeanPoolForward(*pool),
        &constants(pool, batch, false),
        vec![
            read(0, "x", x, batch * pool.input.elements()),
            write(1, "y", y, n),
        ],
        n,
    )
}

/// `dx[N,H,W,C]`: every position gets 1/(KH·KW) of the gradients `dy[N,OH,OW,C]` of all windows
/// that contain it. With `activation` `[N,H,W,C]` (the layer's input `x`) the gradient passes only
/// where that is positive. Writes every element of `dx`.
pub fn meanpool2d_backward(
    pool: &Pool2d,
    batch: usize,
    dy: View,
    activation: Option<View>,
    dx: View,
) -> KernelSpec {
    let n = batch * pool.input.elements();
    KernelSpec::new(
        "meanpool2d_backward",
        SOURCE,
        Work::MeanPoolBackward {
            pool: *pool,
            masked: activation.is_some(),
        },
        &constants(pool, batch, activation.is_some()),
        vec![
            read(3, "dy", dy, batch * pool.output.elements()),
            mask(5, activation, n, dy),
            write(6, "dx", dx, n),
        ],
        n,
    )
}
