//! `shaders/muon.wgsl`: what Muon needs besides matrix products.

use super::{KernelSpec, STEP_ELEMENTS, View, Work, read, update, write};

const SOURCE: &str = include_str!("../../shaders/muon.wgsl");

/// How often a step of Newton and Schulz is made.
pub const NEWTON_SCHULZ_STEPS: usize = 3;

/// `velocity = momentum·velocity + gradients; x = gradients + momentum·velocity`, all `[n]`. Changes
/// `velocity` in place, writes `x`; where row `counter[0]` of the step table skips the update, `x` is 0.
pub fn muon_momentum(
    momentum: f32,
    gradients: View,
    velocity: View,
    x: View,
    steps: View,
    counter: View,
) -> KernelSpec {
    let n = gradients.len;
    KernelSpec::new(
        "muon_momentum",
        SOURCE,
        Work::MuonMomentum { momentum },
        &[("ELEMENTS", n as f64), ("MOMENTUM", f64::from(momentum))],
        vec![
            read(0, "gradients", gradients, n),
            update(1, "velocity", velocity, n),
            write(2, "x", x, n),
            read(9, "steps", steps, STEP_ELEMENTS),
            read(10, "counter", counter, 1),
        ],
        n,
    )
}

/// `x[n]` divided by `norm[1] + 1e-7`. Changes `x` in place.
pub fn muon_scale(x: View, norm: View) -> KernelSpec {
    let n = x.len;
    KernelSpec::new(
        "muon_scale",
        SOURCE,
        Work::MuonScale,
        &[("ELEMENTS", n as f64)],
        vec![update(2, "x", x, n), read(3, "norm", norm, 1)],
        n,
    )
}

/// `p = 3.4445·I − 4.775·a + 2.0315·aa`, all `[side, side]`. Writes `p`.
pub fn muon_polynomial(side: usize, a: View, aa: View, p: View) -> KernelSpec {
    let n = side * side;
    KernelSpec::new(
        "muon_polynomial",
        SOURCE,
        Work::MuonPolynomial { side },
        &[("ELEMENTS", n as f64), ("SIDE", side as f64)],
        vec![
            read(4, "a", a, n),
            read(5, "aa", aa, n),
            write(6, "p", p, n),
        ],
        n,
    )
}

/// `parameters = parameters·size/norm − lr·rate·direction`, `[n]`, where lr is that of row `counter[0]` of
/// the step table and `norm[1]` that of the parameters. Changes `parameters` in place.
pub fn muon_update(
    size: f32,
    rate: f32,
    parameters: View,
    norm: View,
    direction: View,
    steps: View,
    counter: View,
) -> KernelSpec {
    let n = parameters.len;
    KernelSpec::new(
        "muon_update",
        SOURCE,
        Work::MuonUpdate { size, rate },
        &[
            ("ELEMENTS", n as f64),
            ("SIZE", f64::from(size)),
            ("RATE", f64::from(rate)),
        ],
        vec![
            read(3, "norm", norm, 1),
            update(7, "parameters", parameters, n),
            read(8, "direction", direction, n),
            read(9, "steps", steps, STEP_ELEMENTS),
            read(10, "counter", counter, 1),
        ],
        n,
    )
}
