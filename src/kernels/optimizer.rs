//! `shaders/optimizer.wgsl`: the update rules over the flat parameter vector.

use super::{KernelSpec, STEP_ELEMENTS, View, Work, read, update};
use crate::model::recipe::Optimizer;

const SOURCE: &str = include_str!("../../shaders/optimizer.wgsl");

/// One update of every element of `gradients` by `optimizer`'s rule, with the learning rate (and
/// AdamW's bias corrections) of row `counter[0]` of the step table `steps`. Changes `parameters` and
/// the vectors of `state` in place.
///
/// SGD with momentum and L2 weight decay: `g = gradient + weight_decay·w; v = momentum·v + g;
/// w = w − lr·v`. AdamW: Loshchilov and Hutter (2019).
pub fn update_parameters(
    optimizer: &Optimizer,
    parameters: View,
    gradients: View,
    state: &[View],
    steps: View,
    counter: View,
) -> KernelSpec {
    let n = gradients.len;
    let elements = ("ELEMENTS", n as f64);
    let (entry, constants) = match *optimizer {
        Optimizer::Sgd {
            momentum,
            weight_decay,
        } => (
            "sgd_update",
            vec![
                elements,
                ("MOMENTUM", f64::from(momentum)),
                ("WEIGHT_DECAY", f64::from(weight_decay)),
            ],
        ),
        Optimizer::Adamw {
            beta1,
            beta2,
            epsilon,
            weight_decay,
        } => (
            "adamw_update",
            vec![
                elements,
                ("BETA1", f64::from(beta1)),
                ("BETA2", f64::from(beta2)),
                ("EPSILON", f64::from(epsilon)),
                ("WEIGHT_DECAY", f64::from(weight_decay)),
            ],
        ),
    };
    let mut arguments = vec![
        update(0, "parameters", parameters, n),
        read(1, "gradients", gradients, n),
    ];
    for (i, view) in state.iter().enumerate() {
        arguments.push(update(2 + i as u32, STATE_NAMES[i], *view, n));
    }
    arguments.push(read(4, "steps", steps, STEP_ELEMENTS));
    arguments.push(read(5, "counter", counter, 1));
    KernelSpec::new(
        entry,
        SOURCE,
        Work::Update(*optimizer),
        &constants,
        arguments,
        n,
    )
}

/// The optimiser's state vectors, in order: SGD has the first.
pub const STATE_NAMES: [&str; 2] = ["state1", "state2"];
