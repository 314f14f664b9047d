//! `shaders/half.wgsl`: mixed precision's way between floats and halves, and the loss scale.

use super::lanes::{lanes, with_lanes};
use super::{Argument, KernelSpec, STEP_ELEMENTS, View, Work, read, update, write};

const SOURCE: &str = include_str!("../../shaders/half.wgsl");

/// What the kept tensor `loss_scale[3]` of a plan in mixed precision holds before the first step: the scale, the
/// steps since it last changed, and the steps that were skipped so far.
pub const LOSS_SCALE: [f32; 3] = [65_536.0, 0.0, 0.0];

/// Steps without an overflow after which the scale doubles.
pub const INTERVAL: f32 = 2000.0;

/// From the smallest scale to the largest.
pub const SCALES: [f32; 2] = [1.0 / 16_384.0, 16_777_216.0];

fn elementwise(
    entry: &'static str,
    work: Work,
    elements: usize,
    arguments: Vec<Argument>,
) -> KernelSpec {
    let invocations = elements / lanes(elements);
    let constants = [("ELEMENTS", invocations as f64)];
    let text = with_lanes(SOURCE, elements);
    KernelSpec::new(entry, text, work, &constants, arguments, invocations)
}

/// `y[n] = x[n]`, floats rounded to halves. Writes `y`.
pub fn to_half(x: View, y: View) -> KernelSpec {
    let n = y.len;
    let arguments = vec![read(0, "x", x, n), write(1, "y", y, n)];
    elementwise("to_half", Work::ToHalf, n, arguments)
}

/// `y[n] = x[n]`, halves as floats. Writes `y`.
pub fn to_float(x: View, y: View) -> KernelSpec {
    let n = y.len;
    let arguments = vec![read(2, "x", x, n), write(3, "y", y, n)];
    elementwise("to_float", Work::ToFloat, n, arguments)
}

/// `y[n] = x[n] · loss_scale[0]`, floats rounded to halves. Writes `y`.
pub fn scale_to_half(x: View, loss_scale: View, y: View) -> KernelSpec {
    let n = y.len;
    let arguments = vec![
        read(0, "x", x, n),
        write(1, "y", y, n),
        read(4, "loss_scale", loss_scale, 1),
    ];
    elementwise("scale_to_half", Work::ScaleToHalf, n, arguments)
}

/// `gradients[n]` divided by `loss_scale[0]`. Changes `gradients` in place.
pub fn unscale_gradients(gradients: View, loss_scale: View) -> KernelSpec {
    let n = gradients.len;
    let arguments = vec![
        read(4, "loss_scale", loss_scale, 1),
        update(5, "gradients", gradients, n),
    ];
    elementwise("unscale_gradients", Work::UnscaleGradients, n, arguments)
}

/// The loss scale after a step whose scaled gradients have `norm[1]`: smaller, and the update of row `counter[0]`
/// of the step table is skipped, where that is no finite number; larger after [`INTERVAL`] steps where it is.
/// Changes `loss_scale[3]` and the row in place.
pub fn advance_loss_scale(norm: View, loss_scale: View, steps: View, counter: View) -> KernelSpec {
    let arguments = vec![
        read(6, "norm", norm, 1),
        update(7, "loss_scale", loss_scale, LOSS_SCALE.len()),
        update(8, "steps", steps, STEP_ELEMENTS),
        read(9, "counter", counter, 1),
    ];
    let work = Work::AdvanceLossScale;
    KernelSpec::new("advance_loss_scale", SOURCE, work, &[], arguments, 1)
}
