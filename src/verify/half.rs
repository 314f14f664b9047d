//! The cases of mixed precision: the ways between floats and halves, the loss scale, updates that are skipped; and
//! every other case that stores activations once more in halves.

use super::cases::{samples, step_table};
use super::parity::{Case, Tolerance};
use crate::kernels::half::{INTERVAL, SCALES};
use crate::kernels::{Step, half, muon, optimizer};
use crate::model::recipe::Optimizer;

/// Every case; in halves, which is what most of them are about, they come with all the others.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in [to_half_case, to_float_case, scale_case, unscale_case] {
        cases.extend([1, 63, 1000].map(kind));
        cases.push(kind(200).nonfinite());
    }
    let [smallest, largest] = SCALES;
    for (norm, scale, good) in [
        (3.0, 65_536.0, 7.0),
        (0.0, 1024.0, INTERVAL - 1.0),
        (0.5, largest, INTERVAL - 1.0),
        (f32::INFINITY, 65_536.0, 7.0),
        (f32::NAN, 65_536.0, 0.0),
        (f32::NAN, smallest, 7.0),
    ] {
        cases.push(advance_case(norm, scale, good));
    }
    let rules = [
        Optimizer::Sgd {
            momentum: 0.9,
            nesterov: false,
            weight_decay: 0.01,
        },
        Optimizer::Adamw {
            beta1: 0.7,
            beta2: 0.9,
            epsilon: 1e-8,
            weight_decay: 0.1,
        },
        Optimizer::Lion {
            beta1: 0.5,
            beta2: 0.9,
            weight_decay: 0.1,
        },
    ];
    cases.extend(rules.map(|rule| skipped_update_case(200, rule)));
    cases.push(skipped_muon_case(200));
    cases
}

fn to_half_case(n: usize) -> Case {
    Case::new("to_half", format!("{n} elements"), move |b| {
        let x = b.values(n);
        let (x, y) = (b.input(&x), b.output("y", n, Tolerance::EXACT));
        vec![half::to_half(x, y)]
    })
}

fn to_float_case(n: usize) -> Case {
    Case::new("to_float", format!("{n} elements"), move |b| {
        let x = b.values(n);
        let (x, y) = (b.input(&x), b.output("y", n, Tolerance::EXACT));
        vec![half::to_float(x, y)]
    })
}

fn scale_case(n: usize) -> Case {
    Case::new("scale_to_half", format!("{n} elements"), move |b| {
        let x = b.values(n);
        let (x, scale) = (b.input(&x), b.input(&[1024.0f32, 3.0, 0.0]));
        let y = b.output("y", n, Tolerance::EXACT);
        vec![half::scale_to_half(x, scale, y)]
    })
}

fn unscale_case(n: usize) -> Case {
    Case::new("unscale_gradients", format!("{n} elements"), move |b| {
        let (gradients, scale) = (b.values(n), b.input(&[1024.0f32, 3.0, 0.0]));
        let gradients = b.updated("gradients", &gradients, Tolerance::EXACT);
        vec![half::unscale_gradients(gradients, scale)]
    })
}

fn advance_case(norm: f32, scale: f32, good: f32) -> Case {
    let variant = format!("norm {norm}, scale {scale}, {good} good steps");
    Case::new("advance_loss_scale", variant, move |b| {
        // Three rows, of which the middle one is the current; it says the opposite of what it is to say.
        let row = Step {
            skip: u32::from(norm.is_finite()),
            ..samples(1, 1)
        };
        let rows = [samples(0, 1), row, samples(2, 1)];
        let steps = b.updated_words("steps", bytemuck::cast_slice(&rows));
        let (counter, norm) = (b.input(&[1u32]), b.input(&[norm]));
        let scale = b.updated("loss_scale", &[scale, good, 5.0], Tolerance::EXACT);
        vec![half::advance_loss_scale(norm, scale, steps, counter)]
    })
}

/// A row whose update is skipped.
fn skipped() -> Step {
    Step {
        lr: 0.25,
        skip: 1,
        ..samples(0, 1)
    }
}

fn skipped_update_case(n: usize, rule: Optimizer) -> Case {
    let kernel = match rule {
        Optimizer::Adamw { .. } => "adamw_update",
        Optimizer::Lion { .. } => "lion_update",
        _ => "sgd_update",
    };
    Case::new(kernel, format!("{n} parameters, skipped"), move |b| {
        let [steps, counter] = step_table(b, skipped());
        let (w, gradients) = (b.values(n), vec![f32::NAN; n]);
        let parameters = b.updated("parameters", &w, Tolerance::EXACT);
        let gradients = b.input(&gradients);
        let state = (0..rule.state_vectors()).map(|i| {
            let values = b.values(n);
            b.updated(["state1", "state2"][i], &values, Tolerance::EXACT)
        });
        let state: Vec<_> = state.collect();
        vec![optimizer::update_parameters(
            &rule, parameters, gradients, None, &state, steps, counter,
        )]
    })
}

fn skipped_muon_case(n: usize) -> Case {
    Case::new(
        "muon_momentum",
        format!("{n} elements, skipped"),
        move |b| {
            let [steps, counter] = step_table(b, skipped());
            let (w, v) = (b.values(n), b.values(n));
            let gradients = b.input(&vec![f32::NAN; n]);
            let velocity = b.updated("velocity", &v, Tolerance::EXACT);
            let x = b.output("x", n, Tolerance::EXACT);
            let parameters = b.updated("parameters", &w, Tolerance::EXACT);
            let norm = b.input(&[f32::NAN]);
            vec![
                muon::muon_momentum(0.6, gradients, velocity, x, steps, counter),
                muon::muon_update(3.0, 0.5, parameters, norm, x, steps, counter),
            ]
        },
    )
}
