//! The cases of what surrounds the update rules: norms and clipping, Muon besides its products, the moving
//! average.

use super::cases::*;
use super::parity::{Case, Tolerance};
use crate::kernels::{Step, average, clip, muon};

/// Every case.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for n in [1, 63, 5000, 300_001, 300_004] {
        cases.extend([false, true].map(|grouped| sum_squares_case(n, grouped)));
    }
    // The longest run is a little over the shortest.
    cases.push(sum_squares_case((4096 << 10) + 1, false));
    cases.extend([1, 63, 1000].map(norm_case));
    cases.extend([0.5, 2.5].map(|norm| clip_case(1000, norm)));
    cases.extend([1, 63, 1000].map(momentum_case));
    cases.extend([1, 1000].map(scale_case));
    cases.extend([1, 3, 17, 64].map(polynomial_case));
    cases.extend([2.5, 0.0].map(|norm| muon_update_case(1000, norm)));
    cases.extend([1, 63, 1000].map(average_case));
    cases.extend([1, 63, 1000].map(swap_case));
    cases
}

/// Those that are worth running on NaN and infinities, with these among what they draw.
pub fn nonfinite_cases() -> Vec<Case> {
    let cases = vec![
        sum_squares_case(5000, true),
        norm_case(200),
        clip_case(200, 2.5),
        clip_case(200, f32::NAN),
        momentum_case(200),
        scale_case(200),
        polynomial_case(17),
        muon_update_case(200, 2.5),
        average_case(200),
        swap_case(200),
    ];
    cases.into_iter().map(Case::nonfinite).collect()
}

fn sum_squares_case(n: usize, grouped: bool) -> Case {
    let what = if grouped { ", factors" } else { "" };
    Case::new("sum_squares", format!("{n} elements{what}"), move |b| {
        let x = b.values(n);
        let x = b.input(&x);
        // The second of each, which nothing looks at, is left out.
        let factors: Vec<f32> = (0..n).map(|i| [1.0, 0.0, -1.0][i % 3]).collect();
        let factors = grouped.then(|| b.input(&factors));
        let runs = clip::runs(n);
        let result = b.output("result", runs, Tolerance::sum(n.div_ceil(runs)));
        vec![clip::sum_squares(x, factors, result)]
    })
}

fn norm_case(n: usize) -> Case {
    Case::new("norm", format!("{n} sums"), move |b| {
        let sums: Vec<f32> = b.values(n).iter().map(|x| x * x).collect();
        let (sums, result) = (b.input(&sums), b.output("result", 1, Tolerance::sum(n)));
        vec![clip::norm(sums, result)]
    })
}

fn clip_case(n: usize, norm: f32) -> Case {
    Case::new(
        "clip_gradients",
        format!("{n} elements, norm {norm}"),
        move |b| {
            let gradients = b.values(n);
            let gradients = b.updated("gradients", &gradients, Tolerance::sum(2));
            vec![clip::clip_gradients(1.0, gradients, b.input(&[norm]))]
        },
    )
}

fn momentum_case(n: usize) -> Case {
    Case::new("muon_momentum", format!("{n} elements"), move |b| {
        let (gradients, velocity) = (b.values(n), b.values(n));
        let gradients = b.input(&gradients);
        let velocity = b.updated("velocity", &velocity, Tolerance::sum(2));
        let x = b.output("x", n, Tolerance::sum(4));
        let [steps, counter] = step_table(b, samples(0, 1));
        vec![muon::muon_momentum(
            0.6, gradients, velocity, x, steps, counter,
        )]
    })
}

fn scale_case(n: usize) -> Case {
    Case::new("muon_scale", format!("{n} elements"), move |b| {
        let x = b.values(n);
        let x = b.updated("x", &x, Tolerance::sum(2));
        vec![muon::muon_scale(x, b.input(&[2.5f32]))]
    })
}

fn polynomial_case(side: usize) -> Case {
    Case::new("muon_polynomial", format!("{side}×{side}"), move |b| {
        let (a, aa) = (b.values(side * side), b.values(side * side));
        let (a, aa) = (b.input(&a), b.input(&aa));
        let p = b.output("p", side * side, Tolerance::sum(8));
        vec![muon::muon_polynomial(side, a, aa, p)]
    })
}

fn muon_update_case(n: usize, norm: f32) -> Case {
    Case::new(
        "muon_update",
        format!("{n} elements, norm {norm}"),
        move |b| {
            let row = Step {
                lr: 0.24,
                ..samples(0, 1)
            };
            let [steps, counter] = step_table(b, row);
            let (w, direction) = (b.values(n), b.values(n));
            let parameters = b.updated("parameters", &w, Tolerance::sum(8));
            let (norm, direction) = (b.input(&[norm]), b.input(&direction));
            vec![muon::muon_update(
                3.0, 0.5, parameters, norm, direction, steps, counter,
            )]
        },
    )
}

fn average_case(n: usize) -> Case {
    Case::new("average_values", format!("{n} elements"), move |b| {
        let row = Step {
            average: 0.7,
            ..samples(0, 1)
        };
        let [steps, counter] = step_table(b, row);
        let (average, values) = (b.values(n), b.values(n));
        let average = b.updated("average", &average, Tolerance::sum(3));
        let values = b.input(&values);
        vec![average::average_values(average, values, steps, counter)]
    })
}

fn swap_case(n: usize) -> Case {
    Case::new("swap_values", format!("{n} elements"), move |b| {
        let (one, other) = (b.values(n), b.values(n));
        let one = b.updated("a", &one, Tolerance::EXACT);
        let other = b.updated("b", &other, Tolerance::EXACT);
        vec![average::swap_values(one, other)]
    })
}
