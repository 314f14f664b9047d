//! `shaders/join.wgsl`: what joins two values, and the ways back.

use super::{KernelSpec, View, WORKGROUP_SIZE, Work, read, write};

const SOURCE: &str = include_str!("../../shaders/join.wgsl");

/// Channels that a workgroup of [`scale_backward_factors`] handles.
const CHANNELS: usize = 8;

/// `y = a + b`, element by element, all of one length. Writes `y`.
pub fn add(a: View, b: View, y: View) -> KernelSpec {
    let n = y.len;
    let (entry, [a_at, b_at, y_at], invocations) = if n.is_multiple_of(4) {
        ("add4", [7, 8, 11], n / 4)
    } else {
        ("add", [0, 1, 5], n)
    };
    KernelSpec::new(
        entry,
        SOURCE,
        Work::Add,
        &[("ELEMENTS", n as f64)],
        vec![
            read(a_at, "a", a, n),
            read(b_at, "b", b, n),
            write(y_at, "y", y, n),
        ],
        invocations,
    )
}

/// `y[r] = a[r]` and then `b[r]`: a `[rows,ca]`, b `[rows,cb]`, y `[rows,ca+cb]`. Writes `y`.
pub fn concat(rows: usize, ca: usize, cb: usize, a: View, b: View, y: View) -> KernelSpec {
    let n = rows * (ca + cb);
    KernelSpec::new(
        "concat",
        SOURCE,
        Work::Concat { rows },
        &[("ELEMENTS", n as f64), ("CA", ca as f64), ("CB", cb as f64)],
        vec![
            read(0, "a", a, rows * ca),
            read(1, "b", b, rows * cb),
            write(5, "y", y, n),
        ],
        n,
    )
}

/// `y[r,k] = x[r,first+k]` for k below `count`: x `[rows,c]`, y `[rows,count]`; the gradient of
/// [`fn@concat`]. Writes `y`.
pub fn slice_channels(
    rows: usize,
    c: usize,
    first: usize,
    count: usize,
    x: View,
    y: View,
) -> KernelSpec {
    let n = rows * count;
    KernelSpec::new(
        "slice_channels",
        SOURCE,
        Work::SliceChannels { rows, first, count },
        &[
            ("ELEMENTS", n as f64),
            ("C", c as f64),
            ("FIRST", first as f64),
            ("COUNT", count as f64),
        ],
        vec![read(2, "x", x, rows * c), write(5, "y", y, n)],
        n,
    )
}

/// `y[n,p,c] = x[n,p,c] · factors[n,c]`: x and y `[batch,positions,c]`, factors `[batch,c]`. The gradient
/// by x is the same of dy. Writes `y`.
pub fn scale_forward(
    batch: usize,
    positions: usize,
    c: usize,
    x: View,
    factors: View,
    y: View,
) -> KernelSpec {
    let n = batch * positions * c;
    let (entry, [x_at, factors_at, y_at], invocations) = if c.is_multiple_of(4) {
        ("scale_forward4", [9, 10, 11], n / 4)
    } else {
        ("scale_forward", [2, 3, 5], n)
    };
    KernelSpec::new(
        entry,
        SOURCE,
        Work::Scale { channels: c },
        &[
            ("ELEMENTS", n as f64),
            ("P", positions as f64),
            ("C", c as f64),
        ],
        vec![
            read(x_at, "x", x, n),
            read(factors_at, "factors", factors, batch * c),
            write(y_at, "y", y, n),
        ],
        invocations,
    )
}

/// `df[n,c] = Σ_p x[n,p,c] · dy[n,p,c]`: x and dy `[batch,positions,c]`. Writes `df` `[batch,c]`.
pub fn scale_backward_factors(
    batch: usize,
    positions: usize,
    c: usize,
    x: View,
    dy: View,
    df: View,
) -> KernelSpec {
    let n = batch * positions * c;
    KernelSpec::new(
        "scale_backward_factors",
        SOURCE,
        Work::ScaleFactors {
            positions,
            channels: c,
        },
        &[
            ("N", batch as f64),
            ("P", positions as f64),
            ("C", c as f64),
        ],
        vec![
            read(2, "x", x, n),
            read(4, "dy", dy, n),
            write(6, "df", df, batch * c),
        ],
        batch * c.div_ceil(CHANNELS) * WORKGROUP_SIZE,
    )
}
