//! `shaders/optimizer.wgsl`: the update rules over the flat parameter vector.

use super::lanes::{lanes, with_lanes};
use super::{KernelSpec, STEP_ELEMENTS, View, Work, read, update};
use crate::model::recipe::Optimizer;

const SOURCE: &str = include_str!("../../shaders/optimizer.wgsl");

/// One update of every element of `gradients` by `optimizer`'s rule, with the learning rate (and
/// AdamW's bias corrections) of row `counter[0]` of the step table `steps`. Changes `parameters` and
/// the vectors of `state` in place. `factors[2,n]`, where there are any, are a parameter's own on learning
/// rate and weight decay; one whose first is not above 0 stays as it is.
///
/// SGD with momentum and L2 weight decay: `g = gradient + weight_decay·w; v = momentum·v + g;
/// w = w − lr·v`, with Nesterov's momentum `w − lr·(g + momentum·v)`. AdamW: Loshchilov and Hutter (2019).
/// Lion: Chen et al. (2023). Muon: what it leaves to SGD.
pub fn update_parameters(
    optimizer: &Optimizer,
    parameters: View,
    gradients: View,
    factors: Option<View>,
    state: &[View],
    steps: View,
    counter: View,
) -> KernelSpec {
    let n = gradients.len;
    let rule = optimizer.elementwise();
    let (entry, mut constants) = match rule {
        Optimizer::Adamw {
            beta1,
            beta2,
            epsilon,
            weight_decay,
        } => (
            "adamw_update",
            vec![
                ("BETA1", f64::from(beta1)),
                ("BETA2", f64::from(beta2)),
                ("EPSILON", f64::from(epsilon)),
                ("WEIGHT_DECAY", f64::from(weight_decay)),
            ],
        ),
        Optimizer::Lion {
            beta1,
            beta2,
            weight_decay,
        } => (
            "lion_update",
            vec![
                ("BETA1", f64::from(beta1)),
                ("BETA2", f64::from(beta2)),
                ("WEIGHT_DECAY", f64::from(weight_decay)),
            ],
        ),
        Optimizer::Sgd {
            momentum,
            weight_decay,
            ..
        }
        | Optimizer::Muon {
            other_momentum: momentum,
            weight_decay,
            ..
        } => (
            "sgd_update",
            vec![
                ("MOMENTUM", f64::from(momentum)),
                ("WEIGHT_DECAY", f64::from(weight_decay)),
            ],
        ),
    };
    constants.push(("WIDTH", (n / lanes(n)) as f64));
    if let Optimizer::Sgd { nesterov: true, .. } = rule {
        constants.push(("NESTEROV", 1.0));
    }
    if factors.is_some() {
        constants.push(("GROUPED", 1.0));
    }
    let mut arguments = vec![
        update(0, "parameters", parameters, n),
        read(1, "gradients", gradients, n),
    ];
    for (i, view) in state.iter().enumerate() {
        arguments.push(update(2 + i as u32, STATE_NAMES[i], *view, n));
    }
    arguments.push(read(4, "steps", steps, STEP_ELEMENTS));
    arguments.push(read(5, "counter", counter, 1));
    arguments.push(match factors {
        Some(factors) => read(6, "factors", factors, 2 * n),
        // A binding must hold something even where nothing looks at it.
        None => read(6, "factors", gradients, 0),
    });
    let work = Work::Update {
        rule,
        grouped: factors.is_some(),
    };
    let source = with_lanes(SOURCE, n);
    KernelSpec::new(entry, source, work, &constants, arguments, n / lanes(n))
}

/// The optimiser's state vectors, in order: all rules but AdamW have the first only.
pub const STATE_NAMES: [&str; 2] = ["state1", "state2"];
