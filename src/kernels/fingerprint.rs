use super::{KernelSpec, View, Work, read, write};

const SOURCE: &str = include_str!("../../shaders/fingerprint.wgsl");

/// Operations that [`arithmetic`] knows, numbered from 0.
pub const OPERATIONS: usize = 12;

/// `y[i]` = operation number `operation` of `a[i]`, `b[i]`, `c[i]`, for every element of `a`; the
/// numbers are explained in the shader. Writes `y`.
pub fn arithmetic(operation: usize, a: View, b: View, c: View, y: View) -> KernelSpec {
    let n = a.len;
    KernelSpec::new(
        "arithmetic",
        SOURCE,
        Work::Arithmetic { operation },
        &[("ELEMENTS", n as f64), ("OPERATION", operation as f64)],
        vec![
            read(0, "a", a, n),
            read(1, "b", b, n),
            read(2, "c", c, n),
            write(3, "y", y, n),
        ],
        n,
    )
}
