//! The cases of the activations, of what joins two values, of dropout, of pooling beyond the image, and
//! of the loss with smoothing and weights.

use super::cases::*;
use super::parity::{Case, Tolerance};
use crate::cpu;
use crate::kernels::activation::{activation_backward, activation_forward};
use crate::kernels::{Dtype, Step, View, dropout, join, loss, outputs};
use crate::model::{Activation, Loss, Pool2d, Shape};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Every case.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for activation in ACTIVATIONS {
        for n in [1, 63, 200] {
            for factor in [1.0, 4.0, 60.0] {
                cases.push(forward_case(activation, n, factor));
                cases.push(backward_case(activation, n, factor));
            }
        }
        // More than a workgroup handles, in fours and not.
        for n in [391, 1004] {
            cases.push(forward_case(activation, n, 4.0));
            cases.push(backward_case(activation, n, 4.0));
        }
        cases.push(ends_case(activation, false));
        cases.push(ends_case(activation, true));
    }
    cases.extend([Activation::Gelu, Activation::GeluTanh, Activation::Silu].map(tail_case));
    cases.push(small_tanh_case());
    cases.extend([1, 63, 1000].map(add_case));
    for (rows, ca, cb) in [(1, 1, 1), (7, 3, 5), (37, 8, 4), (65, 33, 1)] {
        cases.push(concat_case(rows, ca, cb));
        cases.push(slice_case(rows, ca + cb, 0, ca));
        cases.push(slice_case(rows, ca + cb, ca, cb));
    }
    for (batch, positions, c) in [(1, 1, 1), (7, 9, 5), (3, 35, 8), (2, 200, 33), (7, 4, 12)] {
        cases.push(scale_case(batch, positions, c));
        cases.push(scale_factors_case(batch, positions, c));
    }
    for (batch, count, elements) in [(1, 1, 1), (7, 4, 5), (7, 7, 64), (3, 1, 333)] {
        cases.extend([0.0, 0.1, 0.5].map(|p| dropout_case(p, batch, count, elements)));
    }
    for pool in padded_pools() {
        for n in [1, 7] {
            cases.extend(pool_cases(pool, n));
        }
    }
    for smoothing in [0.0, 0.1, 0.5] {
        for (batch, count, classes, factor) in SAMPLES {
            if smoothing > 0.0 {
                cases.push(smoothed_case(smoothing, batch, count, classes, factor));
            }
            cases.push(weighted_case(smoothing, batch, count, classes, factor));
        }
    }
    for (batch, count, classes, factor) in SAMPLES {
        cases.push(predict_case(batch, count, classes, factor));
        cases.push(store_case(batch, count, classes, factor));
    }
    cases
}

/// Those that are worth running on NaN and infinities, with these among what they draw.
pub fn nonfinite_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for activation in ACTIVATIONS {
        cases.push(forward_case(activation, 200, 1.0));
        cases.push(backward_case(activation, 200, 1.0));
    }
    cases.push(add_case(200));
    cases.push(concat_case(37, 8, 4));
    cases.push(slice_case(37, 12, 8, 4));
    cases.push(scale_case(7, 9, 5));
    cases.push(scale_factors_case(7, 9, 5));
    cases.push(dropout_case(0.5, 7, 4, 63));
    for pool in padded_pools() {
        cases.extend(pool_cases(pool, 3));
    }
    for smoothing in [0.0, 0.1] {
        cases.push(smoothed_case(smoothing, 130, 129, 10, 4.0));
        cases.push(weighted_case(smoothing, 7, 3, 3, 1.0));
        cases.push(weighted_case(smoothing, 130, 129, 10, 4.0));
    }
    cases.push(predict_case(130, 129, 10, 4.0));
    cases.push(store_case(130, 129, 10, 4.0));
    cases.into_iter().map(Case::nonfinite).collect()
}

const VALID: &str = "the geometries of this list are valid";

/// Those that [`super::cases`] has no cases for.
const ACTIVATIONS: [Activation; 7] = [
    Activation::LeakyRelu { slope: 0.1 },
    Activation::LeakyRelu { slope: -0.3 },
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Silu,
    Activation::Tanh,
    Activation::HardSwish,
];

/// Batch, samples that count, classes, and how far the logits reach.
const SAMPLES: [(usize, usize, usize, f32); 5] = [
    (1, 1, 10, 1.0),
    (7, 3, 3, 1.0),
    (130, 129, 10, 4.0),
    (70, 70, 33, 1.0),
    // Where e^z would overflow.
    (70, 66, 5, 100.0),
];

/// Which of its kind, where there are several.
fn kind(activation: Activation) -> String {
    match activation {
        Activation::LeakyRelu { slope } => format!(", slope {slope}"),
        _ => String::new(),
    }
}

/// Of the kernels for `n` elements.
fn names(activation: Activation, n: usize) -> [&'static str; 2] {
    let v = View::whole(0, Dtype::F32, n);
    [
        activation_forward(activation, v, v).entry,
        activation_backward(activation, v, v, v).entry,
    ]
}

fn tolerance(activation: Activation) -> Tolerance {
    match activation {
        Activation::LeakyRelu { .. } | Activation::HardSwish => Tolerance::sum(2),
        _ => Tolerance::TRANSCENDENTAL,
    }
}

/// The inputs reach up to ± 1.5 · `factor`.
fn forward_case(activation: Activation, n: usize, factor: f32) -> Case {
    let [name, _] = names(activation, n);
    let variant = format!("{n} elements up to ±{factor}{}", kind(activation));
    Case::new(name, variant, move |b| {
        let x: Vec<f32> = b.values(n).iter().map(|x| x * factor).collect();
        let (x, y) = (b.input(&x), b.output("y", n, tolerance(activation)));
        vec![activation_forward(activation, x, y)]
    })
}

fn backward_case(activation: Activation, n: usize, factor: f32) -> Case {
    let [_, name] = names(activation, n);
    let variant = format!("{n} elements up to ±{factor}{}", kind(activation));
    Case::new(name, variant, move |b| {
        let x: Vec<f32> = b.values(n).iter().map(|x| x * factor).collect();
        let saved = match activation.by_output() {
            true => cpu::activation_forward(activation, &x),
            false => x,
        };
        let dy = b.values(n);
        let (saved, dy) = (b.input(&saved), b.input(&dy));
        let dx = b.output("dx", n, tolerance(activation));
        vec![activation_backward(activation, saved, dy, dx)]
    })
}

/// Where something might overflow, and where the pieces of a function meet.
fn ends_case(activation: Activation, backward: bool) -> Case {
    let name = names(activation, 4)[usize::from(backward)];
    let variant = format!("at the ends{}", kind(activation));
    Case::new(name, variant, move |b| {
        let mut x = vec![
            0.0, 0.1, 0.62, 0.63, 3.0, 8.0, 9.99, 10.01, 12.99, 13.01, 30.0,
        ];
        x.extend([
            86.9, 87.1, 89.0, 104.0, 1e3, 1e5, 1e10, 1e19, 1e20, 1e30, 3e38,
        ]);
        let x: Vec<f32> = x.iter().flat_map(|x| [*x, -x]).collect();
        let n = x.len();
        let dy = b.input(&vec![1.0f32; n]);
        if !backward {
            let (x, y) = (b.input(&x), b.output("y", n, tolerance(activation)));
            return vec![activation_forward(activation, x, y)];
        }
        let saved = match activation.by_output() {
            true => cpu::activation_forward(activation, &x),
            false => x,
        };
        let (saved, dx) = (b.input(&saved), b.output("dx", n, tolerance(activation)));
        vec![activation_backward(activation, saved, dy, dx)]
    })
}

/// Left of 0 the functions die away; what is left there must be right in its leading digits, however
/// small it is.
fn tail_case(activation: Activation) -> Case {
    let [name, _] = names(activation, 1);
    Case::new(name, "−6 to 0, to a relative 1e-4", move |b| {
        let x: Vec<f32> = (1..=600).map(|i| -0.01 * i as f32).collect();
        let tail = Tolerance {
            absolute: 0.0,
            relative: 1e-4,
        };
        let (x, y) = (b.input(&x), b.output("y", x.len(), tail));
        vec![activation_forward(activation, x, y)]
    })
}

/// tanh x is x itself there.
fn small_tanh_case() -> Case {
    Case::new("tanh_forward", "1e-20 to 1, to a relative 2e-6", |b| {
        let x: Vec<f32> = (0..400).map(|i| 10f32.powf(-0.05 * i as f32)).collect();
        let small = Tolerance {
            absolute: 0.0,
            relative: 2e-6,
        };
        let (x, y) = (b.input(&x), b.output("y", x.len(), small));
        vec![activation_forward(Activation::Tanh, x, y)]
    })
}

fn add_case(n: usize) -> Case {
    let name = if n.is_multiple_of(4) { "add4" } else { "add" };
    Case::new(name, format!("{n} elements"), move |b| {
        let (u, v) = (b.values(n), b.values(n));
        let (u, v) = (b.input(&u), b.input(&v));
        let y = b.output("y", n, Tolerance::sum(1));
        vec![join::add(u, v, y)]
    })
}

fn concat_case(rows: usize, ca: usize, cb: usize) -> Case {
    Case::new(
        "concat",
        format!("{rows} rows of {ca} and {cb}"),
        move |b| {
            let (u, v) = (b.values(rows * ca), b.values(rows * cb));
            let (u, v) = (b.input(&u), b.input(&v));
            let y = b.output("y", rows * (ca + cb), Tolerance::EXACT);
            vec![join::concat(rows, ca, cb, u, v, y)]
        },
    )
}

fn slice_case(rows: usize, c: usize, first: usize, count: usize) -> Case {
    let variant = format!("{rows} rows of {c}, {count} from {first} on");
    Case::new("slice_channels", variant, move |b| {
        let x = b.values(rows * c);
        let x = b.input(&x);
        let y = b.output("y", rows * count, Tolerance::EXACT);
        vec![join::slice_channels(rows, c, first, count, x, y)]
    })
}

fn scale_text(batch: usize, positions: usize, c: usize) -> String {
    format!("{batch} samples of {positions} positions, {c} channels")
}

fn scale_case(batch: usize, positions: usize, c: usize) -> Case {
    let variant = scale_text(batch, positions, c);
    let name = if c.is_multiple_of(4) {
        "scale_forward4"
    } else {
        "scale_forward"
    };
    Case::new(name, variant, move |b| {
        let (x, factors) = (b.values(batch * positions * c), b.values(batch * c));
        let (x, factors) = (b.input(&x), b.input(&factors));
        let y = b.output("y", batch * positions * c, Tolerance::sum(1));
        vec![join::scale_forward(batch, positions, c, x, factors, y)]
    })
}

fn scale_factors_case(batch: usize, positions: usize, c: usize) -> Case {
    let variant = scale_text(batch, positions, c);
    Case::new("scale_backward_factors", variant, move |b| {
        let n = batch * positions * c;
        let (x, dy) = (b.values(n), b.values(n));
        let (x, dy) = (b.input(&x), b.input(&dy));
        let df = b.output("df", batch * c, Tolerance::sum(positions));
        vec![join::scale_backward_factors(batch, positions, c, x, dy, df)]
    })
}

fn dropout_case(probability: f32, batch: usize, count: usize, elements: usize) -> Case {
    let variant =
        format!("{count} of batch {batch}, {elements} elements each, probability {probability}");
    Case::new("dropout", variant, move |b| {
        let first = 3;
        let x = b.values(batch * elements);
        let order = b.below(1 << 20, first + count);
        let (x, order) = (b.input(&x), b.input(&order));
        let row = Step {
            seed: 0x9e37_79b9,
            epoch: 11,
            ..samples(first, count)
        };
        let [steps, counter] = step_table(b, row);
        let y = b.output("y", batch * elements, Tolerance::sum(1));
        let key = dropout::key("dropout1");
        vec![dropout::dropout(
            probability,
            key,
            batch,
            x,
            order,
            steps,
            counter,
            y,
        )]
    })
}

/// Windows that reach beyond the image on some sides or on all: overlapping or not, in ceil mode or not,
/// with one divisor or several, channels in fours or not; some of them drawn.
fn padded_pools() -> Vec<Pool2d> {
    let pool = |[h, w, c]: [usize; 3], kernel, stride, padding, ceil, counted| {
        Pool2d::padded(Shape::new(h, w, c), kernel, stride, padding, ceil, counted)
    };
    let mut pools: Vec<Pool2d> = [
        pool([7, 6, 3], [3, 3], [2, 2], [[1; 2]; 2], false, true),
        pool([8, 8, 8], [3, 3], [2, 2], [[1; 2]; 2], false, false),
        pool([7, 5, 4], [2, 2], [2, 2], [[0; 2]; 2], true, true),
        pool([5, 6, 12], [3, 2], [3, 4], [[1, 2], [0, 1]], true, true),
        pool([9, 7, 5], [2, 3], [2, 3], [[1; 2]; 2], true, false),
        pool([1, 1, 33], [3, 3], [1, 1], [[1; 2]; 2], false, true),
        pool([4, 5, 7], [4, 5], [4, 5], [[0; 2]; 2], false, true),
        pool([4, 5, 16], [4, 5], [4, 5], [[0; 2]; 2], false, true),
    ]
    .map(|pool| pool.expect(VALID))
    .to_vec();
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    while pools.len() < 20 {
        let mut pair = |least, most| [(); 2].map(|()| rng.random_range(least..=most));
        let ([h, w], kernel, stride) = (pair(1, 9), pair(1, 4), pair(1, 4));
        let (padding, [c, fours]) = ([pair(0, 3), pair(0, 3)], pair(1, 9));
        let c = if fours > 4 { 4 * c } else { c };
        let drawn = pool(
            [h, w, c],
            kernel,
            stride,
            padding,
            rng.random(),
            rng.random(),
        );
        // A padding as large as the window is drawn again, and what has none.
        pools.extend(drawn.ok().filter(|pool| !pool.inside()));
    }
    pools
}

fn pool_cases(pool: Pool2d, n: usize) -> Vec<Case> {
    let mut cases = vec![
        maxpool_forward_case(pool, n),
        meanpool_forward_case(pool, n),
    ];
    for masked in [false, true] {
        if !pool.overlapping() {
            cases.push(maxpool_backward_case(pool, n, masked, false));
        }
        cases.push(maxpool_backward_case(pool, n, masked, true));
        cases.push(meanpool_backward_case(pool, n, masked));
    }
    cases
}

fn samples_text(batch: usize, count: usize, classes: usize, factor: f32) -> String {
    format!("{count} of batch {batch}, {classes} classes, up to ±{factor}")
}

fn smoothed_case(smoothing: f32, batch: usize, count: usize, classes: usize, factor: f32) -> Case {
    let variant = samples_text(batch, count, classes, factor);
    let variant = format!("{variant}, smoothing {smoothing}");
    Case::new("softmax_cross_entropy", variant, move |b| {
        let first = 3;
        let logits: Vec<f32> = b
            .values(batch * classes)
            .iter()
            .map(|z| z * factor)
            .collect();
        let labels = b.below(classes as u32, batch);
        let before = b.below(1000, first + batch + 5);
        let (logits, labels) = (b.input(&logits), b.input(&labels));
        let [steps, counter] = step_table(b, part(first, count));
        vec![loss::loss(
            Loss::SoftmaxCrossEntropy,
            smoothing,
            batch,
            classes,
            logits,
            labels,
            steps,
            counter,
            b.output("loss", batch, Tolerance::TRANSCENDENTAL),
            b.output("gradient", batch * classes, Tolerance::TRANSCENDENTAL),
            b.output_words("prediction", batch),
            b.updated_words("predictions", &before),
        )]
    })
}

fn weighted_case(smoothing: f32, batch: usize, count: usize, classes: usize, factor: f32) -> Case {
    let variant = samples_text(batch, count, classes, factor);
    let variant = format!("{variant}, smoothing {smoothing}");
    Case::new("weighted_softmax_cross_entropy", variant, move |b| {
        let logits: Vec<f32> = b
            .values(batch * classes)
            .iter()
            .map(|z| z * factor)
            .collect();
        let labels = b.below(classes as u32, batch);
        // ¼ to 3, none of them 0: the labels of the batch may all be of one class.
        let weights: Vec<f32> = b
            .below(12, classes)
            .iter()
            .map(|w| 0.25 + *w as f32 / 4.0)
            .collect();
        let (logits, labels) = (b.input(&logits), b.input(&labels));
        let weights = b.input(&weights);
        let [steps, counter] = step_table(b, part(3, count));
        vec![loss::weighted_softmax_cross_entropy(
            smoothing,
            batch,
            classes,
            logits,
            labels,
            weights,
            steps,
            counter,
            b.output("loss", batch, Tolerance::TRANSCENDENTAL),
            b.output("gradient", batch * classes, Tolerance::TRANSCENDENTAL),
        )]
    })
}

fn predict_case(batch: usize, count: usize, classes: usize, factor: f32) -> Case {
    let variant = samples_text(batch, count, classes, factor);
    Case::new("predict", variant, move |b| {
        let first = 3;
        let logits: Vec<f32> = b.ties(batch * classes).iter().map(|z| z * factor).collect();
        let before = b.below(1000, first + batch + 5);
        let logits = b.input(&logits);
        let [steps, counter] = step_table(b, samples(first, count));
        let prediction = b.output_words("prediction", batch);
        let predictions = b.updated_words("predictions", &before);
        vec![loss::predict(
            batch,
            classes,
            logits,
            steps,
            counter,
            prediction,
            predictions,
        )]
    })
}

fn store_case(batch: usize, count: usize, classes: usize, factor: f32) -> Case {
    let variant = samples_text(batch, count, classes, factor);
    Case::new("store_logits", variant, move |b| {
        let first = 3;
        let logits: Vec<f32> = b.values(batch * classes);
        let logits: Vec<f32> = logits.iter().map(|z| z * factor).collect();
        let before = b.values((first + batch + 5) * classes);
        let logits = b.input(&logits);
        let [steps, counter] = step_table(b, samples(first, count));
        let outputs = b.updated("outputs", &before, Tolerance::EXACT);
        vec![outputs::store_logits(
            batch, classes, logits, steps, counter, outputs,
        )]
    })
}
