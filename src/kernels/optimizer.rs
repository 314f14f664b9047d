//! `shaders/optimizer.wgsl`: the update rules over the flat parameter vector.

use super::{STEP_ELEMENTS, dispatch};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Dispatch, Gpu};
use crate::model::recipe::Optimizer;

const SOURCE: &str = include_str!("../../shaders/optimizer.wgsl");

fn wrong_rule(operation: &'static str, optimizer: &Optimizer) -> Error {
    Error::Shape {
        operation,
        what: format!("expected the constants of this update rule, found {optimizer:?}"),
    }
}

/// SGD with momentum and L2 weight decay, one update of every element of `gradients`:
/// `g = gradient + weight_decay·w; v = momentum·v + g; w = w − lr·v`, where `lr` is that of row
/// `counter[0]` of the step table `steps`. Updates `parameters` and `velocity` in place.
///
/// # Errors
/// [`Error::Shape`] for buffers that are too short or the constants of another rule,
/// [`Error::Gpu`] from the device.
pub fn sgd_update(
    gpu: &Gpu,
    optimizer: &Optimizer,
    parameters: &Buffer,
    gradients: &Buffer,
    velocity: &Buffer,
    steps: &Buffer,
    counter: &Buffer,
) -> Result<Dispatch> {
    let Optimizer::Sgd {
        momentum,
        weight_decay,
    } = *optimizer
    else {
        return Err(wrong_rule("sgd_update", optimizer));
    };
    let n = gradients.len();
    dispatch(
        gpu,
        "sgd_update",
        SOURCE,
        &[
            ("ELEMENTS", n as f64),
            ("MOMENTUM", f64::from(momentum)),
            ("WEIGHT_DECAY", f64::from(weight_decay)),
        ],
        &[
            (0, "parameters", parameters, n),
            (1, "gradients", gradients, n),
            (2, "velocity", velocity, n),
            (4, "steps", steps, STEP_ELEMENTS),
            (5, "counter", counter, 1),
        ],
        n,
    )
}

/// AdamW, one update of every element of `gradients`, with `lr` and the bias corrections of row
/// `counter[0]` of the step table `steps`. Updates `parameters` and the two moments in place.
///
/// # Errors
/// As [`sgd_update`].
pub fn adamw_update(
    gpu: &Gpu,
    optimizer: &Optimizer,
    parameters: &Buffer,
    gradients: &Buffer,
    first_moment: &Buffer,
    second_moment: &Buffer,
    steps: &Buffer,
    counter: &Buffer,
) -> Result<Dispatch> {
    let Optimizer::Adamw {
        beta1,
        beta2,
        epsilon,
        weight_decay,
    } = *optimizer
    else {
        return Err(wrong_rule("adamw_update", optimizer));
    };
    let n = gradients.len();
    dispatch(
        gpu,
        "adamw_update",
        SOURCE,
        &[
            ("ELEMENTS", n as f64),
            ("BETA1", f64::from(beta1)),
            ("BETA2", f64::from(beta2)),
            ("EPSILON", f64::from(epsilon)),
            ("WEIGHT_DECAY", f64::from(weight_decay)),
        ],
        &[
            (0, "parameters", parameters, n),
            (1, "gradients", gradients, n),
            (2, "first moment", first_moment, n),
            (3, "second moment", second_moment, n),
            (4, "steps", steps, STEP_ELEMENTS),
            (5, "counter", counter, 1),
        ],
        n,
    )
}
