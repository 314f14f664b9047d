//! The list of cases: every kernel on shapes that are odd, non-square and uneven, with channels
//! that are no multiple of four, more than one workgroup, ties and negative values.

use super::parity::{Bench, Case, Tolerance};
use super::products::unusual;
use crate::cpu;
use crate::kernels::activation::{activation_backward, activation_forward};
use crate::kernels::{
    KernelSpec, Metrics, Step, View, WORKGROUP_SIZE, gather, im2col, loss, optimizer, peak, pool,
    probe, reduce, shards, step,
};
use crate::model::recipe::Optimizer;
use crate::model::{Activation, Conv2d, Loss, Pool2d, Shape};

/// Every case, kernel by kernel.
pub fn cases() -> Vec<Case> {
    let lists = [
        gather_cases(),
        im2col_cases(),
        activation_cases(),
        maxpool_cases(),
        meanpool_cases(),
        loss_cases(),
        metrics_cases(),
        optimizer_cases(),
        reduce_cases(),
        super::norm::cases(),
        vec![step_case()],
        peak_cases(),
        probe_cases(),
    ];
    lists.into_iter().flatten().collect()
}

const VALID: &str = "the geometries of this list are valid";

/// A step table whose current row is `step`, between rows that are all different, and the counter
/// that says so.
pub(super) fn step_table(bench: &mut Bench, step: Step) -> [View; 2] {
    let other = Step {
        lr: 7.0,
        bias_correction1: 0.5,
        bias_correction2: 0.25,
        seed: 3,
        epoch: 5,
        ..Step::new(1, 1)
    };
    [
        bench.input(&[other, other, step, other]),
        bench.input(&[2u32]),
    ]
}

/// A row that trains on `count` samples from `first` on.
pub(super) fn samples(first: usize, count: usize) -> Step {
    Step::new(first, count)
}

/// The same where these are a part of a batch, or have weights: the loss is the mean over something else.
pub(super) fn part(first: usize, count: usize) -> Step {
    Step {
        total: 1.75 * count as f32,
        ..samples(first, count)
    }
}

pub(crate) fn gather_case(shape: Shape, batch: usize, count: usize, streamed: bool) -> Case {
    let how = if streamed { ", streamed" } else { "" };
    let variant = format!("{shape}, {count} of batch {batch}{how}");
    Case::new("gather_batch", variant, move |b| {
        // Images of odd sizes start anywhere inside a word, and the order ends with the batch.
        let (dataset, first) = (19, 6);
        let images = b.below(256, dataset * shape.elements());
        let images: Vec<u8> = images.into_iter().map(|byte| byte as u8).collect();
        let labels = b.below(10, dataset);
        let order = b.below(dataset as u32, first + count);
        let (scale, shift) = (b.values(shape.channels), b.values(shape.channels));
        let scale: Vec<f32> = scale.iter().map(|s| s / 255.0).collect();
        let (images, labels, order) = (b.input(&images), b.input(&labels), b.input(&order));
        // A slab that begins before the batch does.
        let base = if streamed { 4 } else { 0 };
        let row = Step {
            base,
            ..samples(first, count)
        };
        let [steps, counter] = step_table(b, row);
        let normalization = b.input(&[scale, shift].concat());
        let x = b.output("x", batch * shape.elements(), Tolerance::sum(2));
        let batch_labels = b.output_words("batch_labels", batch);
        vec![gather::gather_batch(
            shape,
            batch,
            streamed,
            images,
            labels,
            order,
            steps,
            counter,
            normalization,
            x,
            batch_labels,
        )]
    })
}

fn gather_cases() -> Vec<Case> {
    vec![
        gather_case(Shape::new(1, 1, 1), 1, 1, false),
        gather_case(Shape::new(28, 28, 1), 7, 7, false),
        gather_case(Shape::new(5, 7, 3), 7, 4, false),
        gather_case(Shape::new(3, 3, 5), 7, 1, false),
        gather_case(Shape::new(4, 3, 33), 1, 1, false),
        gather_case(Shape::new(28, 28, 1), 7, 7, true),
        gather_case(Shape::new(5, 7, 3), 7, 4, true),
    ]
}

fn window_text(g: &Conv2d, n: usize) -> String {
    format!(
        "{n}×{}, kernel {:?}, stride {:?}, padding {:?}{}",
        g.input,
        g.kernel,
        g.stride,
        g.padding,
        unusual(g)
    )
}

pub(crate) fn im2col_case(g: Conv2d, n: usize) -> Case {
    Case::new("im2col", window_text(&g, n), move |b| {
        let x = b.values(n * g.input.elements());
        let x = b.input(&x);
        let columns = b.output("columns", n * g.positions() * g.patch(), Tolerance::EXACT);
        vec![im2col::im2col(&g, n, x, columns)]
    })
}

pub(crate) fn col2im_case(g: Conv2d, n: usize, masked: bool) -> Case {
    let variant = mask_text(&window_text(&g, n), masked);
    Case::new("col2im", variant, move |b| {
        let columns = b.values(n * g.positions() * g.patch());
        let columns = b.input(&columns);
        let mask = masked.then(|| activation(b, n * g.input.elements()));
        let tolerance = Tolerance::sum(g.kernel[0] * g.kernel[1]);
        let dx = b.output("dx", n * g.input.elements(), tolerance);
        vec![im2col::col2im(&g, n, columns, mask, dx)]
    })
}

/// What a mask looks at.
fn activation(b: &mut Bench, n: usize) -> View {
    let x = b.ties(n);
    b.input(&x)
}

fn im2col_cases() -> Vec<Case> {
    let geometry = |h, w, c, kernel, stride, padding| {
        Conv2d::new(Shape::new(h, w, c), 1, kernel, stride, padding).expect(VALID)
    };
    let dilated = |h, w, c, kernel, stride, padding, dilation| {
        let input = Shape::new(h, w, c);
        Conv2d::dilated(input, 1, kernel, stride, padding, dilation).expect(VALID)
    };
    let geometries = [
        geometry(5, 7, 1, [3, 3], [1, 1], [1, 1]),
        geometry(8, 6, 3, [5, 3], [2, 1], [2, 0]),
        geometry(9, 10, 5, [2, 4], [3, 2], [1, 3]),
        geometry(7, 5, 8, [1, 1], [1, 1], [0, 0]),
        geometry(6, 9, 33, [3, 2], [1, 2], [2, 1]),
        // Pixels that no window reaches.
        geometry(9, 8, 3, [2, 3], [4, 5], [0, 0]),
        Conv2d::dense(33, 1),
        dilated(7, 8, 4, [3, 3], [1, 1], [[2, 2]; 2], [2, 2]),
        dilated(8, 9, 3, [3, 2], [2, 3], [[0, 3], [2, 0]], [2, 3]),
    ];
    let mut cases = Vec::new();
    for g in geometries {
        for n in [1, 7] {
            cases.push(im2col_case(g, n));
            cases.extend([false, true].map(|masked| col2im_case(g, n, masked)));
        }
    }
    cases
}

fn mask_text(variant: &str, masked: bool) -> String {
    format!("{variant}{}", if masked { ", masked" } else { "" })
}

pub(crate) fn relu_forward_case(n: usize) -> Case {
    Case::new("relu_forward", elements_text(n), move |b| {
        let x = b.ties(n);
        let (x, y) = (b.input(&x), b.output("y", n, Tolerance::EXACT));
        vec![activation_forward(Activation::Relu, x, y)]
    })
}

pub(crate) fn relu_backward_case(n: usize) -> Case {
    Case::new("relu_backward", elements_text(n), move |b| {
        let (y, dy) = (cpu::relu_forward(&b.ties(n)), b.values(n));
        let (y, dy) = (b.input(&y), b.input(&dy));
        let dx = b.output("dx", n, Tolerance::EXACT);
        vec![activation_backward(Activation::Relu, y, dy, dx)]
    })
}

/// The inputs reach up to ± 1.5 · `factor`.
pub(crate) fn sigmoid_forward_case(n: usize, factor: f32) -> Case {
    let variant = format!("{} up to ±{factor}", elements_text(n));
    Case::new("sigmoid_forward", variant, move |b| {
        let x: Vec<f32> = b.ties(n).iter().map(|x| x * factor).collect();
        let (x, y) = (b.input(&x), b.output("y", n, Tolerance::TRANSCENDENTAL));
        vec![activation_forward(Activation::Sigmoid, x, y)]
    })
}

pub(crate) fn sigmoid_backward_case(n: usize) -> Case {
    Case::new("sigmoid_backward", elements_text(n), move |b| {
        let (y, dy) = (cpu::sigmoid_forward(&b.values(n)), b.values(n));
        let (y, dy) = (b.input(&y), b.input(&dy));
        let dx = b.output("dx", n, Tolerance::sum(1));
        vec![activation_backward(Activation::Sigmoid, y, dy, dx)]
    })
}

fn elements_text(n: usize) -> String {
    format!("{n} elements")
}

fn activation_cases() -> Vec<Case> {
    // This one needs more workgroups than one dimension of a dispatch holds.
    let mut cases = vec![relu_forward_case(2 * 65_535 * WORKGROUP_SIZE + 65)];
    for n in [1, 63, 200] {
        cases.push(relu_forward_case(n));
        cases.push(relu_backward_case(n));
        cases.extend([1.0, 60.0].map(|factor| sigmoid_forward_case(n, factor)));
        cases.push(sigmoid_backward_case(n));
    }
    cases
}

/// Windows side by side, with remainders and gaps, and windows that overlap.
pub(super) fn pools() -> Vec<Pool2d> {
    let pool =
        |h, w, c, kernel, stride| Pool2d::new(Shape::new(h, w, c), kernel, stride).expect(VALID);
    vec![
        pool(4, 6, 3, [2, 2], [2, 2]),
        pool(7, 5, 5, [2, 3], [2, 3]),
        pool(9, 11, 1, [2, 2], [3, 4]),
        pool(5, 9, 8, [3, 2], [4, 2]),
        pool(13, 7, 33, [2, 2], [2, 2]),
        pool(7, 9, 12, [2, 2], [2, 2]),
        pool(5, 7, 4, [2, 3], [2, 3]),
        // The largest window whose places fit a byte.
        pool(17, 35, 1, [16, 16], [16, 17]),
        pool(7, 6, 3, [3, 3], [1, 1]),
        pool(8, 9, 5, [3, 2], [2, 1]),
        pool(10, 7, 33, [3, 3], [2, 2]),
        pool(6, 11, 8, [2, 5], [3, 2]),
        pool(5, 6, 1, [5, 5], [1, 1]),
    ]
}

fn pool_text(p: &Pool2d, n: usize) -> String {
    let beyond = if p.inside() {
        String::new()
    } else {
        let counted = if p.count_include_pad { ", counted" } else { "" };
        format!(
            ", padding {:?} and {:?}{counted}, output {}",
            p.padding, p.padding_after, p.output
        )
    };
    format!(
        "{n}×{}, window {:?}, stride {:?}{beyond}",
        p.input, p.kernel, p.stride
    )
}

/// The kernel that handles this geometry.
fn in_fours(p: &Pool2d, name: &'static str, name4: &'static str) -> &'static str {
    if p.input.channels.is_multiple_of(4) {
        name4
    } else {
        name
    }
}

fn maxpool_forward(p: Pool2d, n: usize, x: Vec<f32>, b: &mut Bench) -> Vec<KernelSpec> {
    let outputs = n * p.output.elements();
    let x = b.input(&x);
    let y = b.output("y", outputs, Tolerance::EXACT);
    let index = b.output_bytes("index", outputs);
    vec![pool::maxpool2d_forward(&p, n, x, y, index)]
}

pub(crate) fn maxpool_forward_case(p: Pool2d, n: usize) -> Case {
    let name = in_fours(&p, "maxpool2d_forward", "maxpool2d_forward4");
    Case::new(name, pool_text(&p, n), move |b| {
        let x = b.ties(n * p.input.elements());
        maxpool_forward(p, n, x, b)
    })
}

/// By the scatter, or by the gather form, which takes any windows.
pub(crate) fn maxpool_backward_case(p: Pool2d, n: usize, masked: bool, gathered: bool) -> Case {
    let name = if gathered {
        let name4 = "maxpool2d_backward_overlapping4";
        in_fours(&p, "maxpool2d_backward_overlapping", name4)
    } else {
        in_fours(&p, "maxpool2d_backward", "maxpool2d_backward4")
    };
    Case::new(name, mask_text(&pool_text(&p, n), masked), move |b| {
        let x = b.ties(n * p.input.elements());
        let (y, index) = cpu::maxpool2d_forward(&p, &x);
        let dy = b.values(y.len());
        let (dy, index) = (b.input(&dy), b.input(&index));
        let mask = masked.then(|| b.input(&y));
        let tolerance = Tolerance::sum(p.kernel[0] * p.kernel[1]);
        let dx = b.output("dx", x.len(), tolerance);
        let kernel = if gathered {
            pool::maxpool2d_backward_overlapping
        } else {
            pool::maxpool2d_backward
        };
        vec![kernel(&p, n, dy, index, mask, dx)]
    })
}

fn maxpool_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for p in pools() {
        for n in [1, 7] {
            cases.push(maxpool_forward_case(p, n));
            cases.push(Case::new(
                in_fours(&p, "maxpool2d_forward", "maxpool2d_forward4"),
                format!("{}, every fifth NaN", pool_text(&p, n)),
                move |b| {
                    let mut x = b.ties(n * p.input.elements());
                    x.iter_mut().step_by(5).for_each(|x| *x = f32::NAN);
                    maxpool_forward(p, n, x, b)
                },
            ));
            for masked in [false, true] {
                if !p.overlapping() {
                    cases.push(maxpool_backward_case(p, n, masked, false));
                }
                cases.push(maxpool_backward_case(p, n, masked, true));
            }
        }
    }
    cases
}

pub(crate) fn meanpool_forward_case(p: Pool2d, n: usize) -> Case {
    let name = in_fours(&p, "meanpool2d_forward", "meanpool2d_forward4");
    Case::new(name, pool_text(&p, n), move |b| {
        let x = b.values(n * p.input.elements());
        let x = b.input(&x);
        let tolerance = Tolerance::sum(p.kernel[0] * p.kernel[1]);
        let y = b.output("y", n * p.output.elements(), tolerance);
        vec![pool::meanpool2d_forward(&p, n, x, y)]
    })
}

pub(crate) fn meanpool_backward_case(p: Pool2d, n: usize, masked: bool) -> Case {
    let variant = mask_text(&pool_text(&p, n), masked);
    let name = in_fours(&p, "meanpool2d_backward", "meanpool2d_backward4");
    Case::new(name, variant, move |b| {
        let dy = b.values(n * p.output.elements());
        let dy = b.input(&dy);
        let mask = masked.then(|| activation(b, n * p.input.elements()));
        let tolerance = Tolerance::sum(p.kernel[0] * p.kernel[1]);
        let dx = b.output("dx", n * p.input.elements(), tolerance);
        vec![pool::meanpool2d_backward(&p, n, dy, mask, dx)]
    })
}

fn meanpool_cases() -> Vec<Case> {
    // This one needs more workgroups than one dimension of a dispatch holds.
    let wide = Pool2d::new(Shape::new(256, 256, 1), [1, 2], [1, 2]).expect(VALID);
    let mut cases = vec![meanpool_forward_case(wide, 129)];
    for p in pools() {
        for n in [1, 7] {
            cases.push(meanpool_forward_case(p, n));
            cases.extend([false, true].map(|masked| meanpool_backward_case(p, n, masked)));
        }
    }
    cases
}

/// The outputs are `classes` values per sample, up to ± 1.5 · `factor`.
pub(crate) fn loss_case(
    kind: Loss,
    batch: usize,
    count: usize,
    classes: usize,
    factor: f32,
) -> Case {
    let (kernel, tolerance) = match kind {
        Loss::SquaredError => ("squared_error", Tolerance::sum(classes)),
        Loss::SoftmaxCrossEntropy => ("softmax_cross_entropy", Tolerance::TRANSCENDENTAL),
    };
    let variant = format!("{count} of batch {batch}, {classes} classes, up to ±{factor}");
    Case::new(kernel, variant, move |b| {
        let first = 3;
        let logits: Vec<f32> = b.ties(batch * classes).iter().map(|z| z * factor).collect();
        let labels = b.below(classes as u32, batch);
        // What the step does not cover must stay as it was.
        let before = b.below(1000, first + batch + 5);
        let (logits, labels) = (b.input(&logits), b.input(&labels));
        let [steps, counter] = step_table(b, part(first, count));
        let losses = b.output("loss", batch, tolerance);
        let gradient = b.output("gradient", batch * classes, tolerance);
        let prediction = b.output_words("prediction", batch);
        let predictions = b.updated_words("predictions", &before);
        vec![loss::loss(
            kind,
            0.0,
            batch,
            classes,
            logits,
            labels,
            steps,
            counter,
            losses,
            gradient,
            prediction,
            predictions,
        )]
    })
}

fn loss_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in [Loss::SoftmaxCrossEntropy, Loss::SquaredError] {
        cases.push(loss_case(kind, 1, 1, 10, 1.0));
        cases.push(loss_case(kind, 7, 7, 1, 1.0));
        cases.push(loss_case(kind, 7, 3, 3, 1.0));
        cases.push(loss_case(kind, 130, 129, 10, 4.0));
        cases.push(loss_case(kind, 70, 70, 33, 1.0));
    }
    // Where e^z would overflow.
    cases.push(loss_case(Loss::SoftmaxCrossEntropy, 70, 66, 5, 100.0));
    cases
}

pub(crate) fn metrics_case(batch: usize, count: usize) -> Case {
    let variant = format!("{count} of batch {batch}");
    Case::new("sum_metrics", variant, move |b| {
        // Multiples of 1/256, which any order of additions sums up exactly.
        let losses = b.below(1000, batch);
        let mut losses: Vec<f32> = losses.iter().map(|l| *l as f32 / 256.0).collect();
        b.spoil(&mut losses);
        let (prediction, labels) = (b.below(3, batch), b.below(3, batch));
        let before = Metrics {
            loss_sum: 0.5,
            correct: 9,
        };
        let [steps, counter] = step_table(b, samples(0, count));
        let (losses, prediction) = (b.input(&losses), b.input(&prediction));
        let labels = b.input(&labels);
        let metrics = b.updated_metrics("metrics", &[before; 4]);
        vec![loss::sum_metrics(
            batch, losses, prediction, labels, steps, counter, metrics,
        )]
    })
}

fn metrics_cases() -> Vec<Case> {
    vec![
        metrics_case(1, 1),
        metrics_case(7, 3),
        metrics_case(64, 64),
        metrics_case(130, 129),
        metrics_case(300, 300),
    ]
}

pub(crate) fn update_case(n: usize, rule: Optimizer, grouped: bool) -> Case {
    let (kernel, what) = match rule {
        Optimizer::Sgd {
            momentum,
            nesterov,
            weight_decay,
        } => {
            let nesterov = if nesterov { " (Nesterov)" } else { "" };
            let what = format!("momentum {momentum}{nesterov}, weight decay {weight_decay}");
            ("sgd_update", what)
        }
        Optimizer::Adamw {
            beta1,
            beta2,
            weight_decay,
            ..
        } => (
            "adamw_update",
            format!("betas {beta1} {beta2}, weight decay {weight_decay}"),
        ),
        Optimizer::Lion {
            beta1,
            beta2,
            weight_decay,
        } => (
            "lion_update",
            format!("betas {beta1} {beta2}, weight decay {weight_decay}"),
        ),
        Optimizer::Muon { .. } => unreachable!("it leaves elements to SGD"),
    };
    let groups = if grouped { ", factors" } else { "" };
    Case::new(
        kernel,
        format!("{n} parameters, {what}{groups}"),
        move |b| {
            let scalars = rule.step_scalars(0.05, 3);
            let row = Step {
                lr: scalars.lr,
                bias_correction1: scalars.bias_correction1,
                bias_correction2: scalars.bias_correction2,
                ..samples(0, 1)
            };
            let [steps, counter] = step_table(b, row);
            let tolerance = Tolerance::sum(8);
            // Gradients of 0 among them: alignment gaps must stay 0 and divide nothing by 0. All are
            // multiples of 1/4, and Lion's first beta is too, so that no rounding decides a sign.
            let (w, gradients, first) = (b.ties(n), b.ties(n), b.ties(n));
            let parameters = b.updated("parameters", &w, tolerance);
            let gradients = b.input(&gradients);
            let mut state = vec![b.updated("first moment", &first, tolerance)];
            if rule.state_vectors() > 1 {
                let second: Vec<f32> = first.iter().map(|m| 2.0 * m * m).collect();
                state.push(b.updated("second moment", &second, tolerance));
            }
            // Some twice as fast, some without decay, some not at all.
            let pairs = [[1.0f32, 1.0], [2.0, 0.0], [0.0, 1.0], [-1.0, 1.0]];
            let factors = [0, 1].map(|which| (0..n).map(|i| pairs[i % 4][which]).collect());
            let factors: [Vec<f32>; 2] = factors;
            let factors = factors.concat();
            let factors = grouped.then(|| b.input(&factors));
            vec![optimizer::update_parameters(
                &rule, parameters, gradients, factors, &state, steps, counter,
            )]
        },
    )
}

fn optimizer_cases() -> Vec<Case> {
    let sgd = |momentum, nesterov, weight_decay| Optimizer::Sgd {
        momentum,
        nesterov,
        weight_decay,
    };
    let adamw = |beta1, beta2, weight_decay| Optimizer::Adamw {
        beta1,
        beta2,
        epsilon: 1e-8,
        weight_decay,
    };
    let lion = |beta2, weight_decay| Optimizer::Lion {
        beta1: 0.5,
        beta2,
        weight_decay,
    };
    vec![
        update_case(1, sgd(0.0, false, 0.0), false),
        update_case(63, sgd(0.9, false, 0.0), false),
        update_case(1000, sgd(0.9, false, 0.01), false),
        update_case(1000, sgd(0.9, true, 0.01), false),
        update_case(1000, sgd(0.9, true, 0.01), true),
        update_case(1001, sgd(0.9, true, 0.01), true),
        update_case(1, adamw(0.7, 0.9, 0.0), false),
        update_case(63, adamw(0.9, 0.999, 0.01), false),
        update_case(1000, adamw(0.7, 0.9, 0.1), false),
        update_case(1000, adamw(0.7, 0.9, 0.1), true),
        update_case(1001, adamw(0.7, 0.9, 0.1), true),
        update_case(1, lion(0.99, 0.0), false),
        update_case(1000, lion(0.9, 0.1), false),
        update_case(1000, lion(0.9, 0.1), true),
        update_case(1001, lion(0.9, 0.1), true),
    ]
}

pub(crate) fn reduce_case(splits: usize, n: usize) -> Case {
    Case::new("reduce_splits", format!("{splits}×{n}"), move |b| {
        let partials = b.values(splits * n);
        let partials = b.input(&partials);
        let result = b.output("result", n, Tolerance::sum(splits));
        vec![reduce::reduce_splits(splits, partials, result)]
    })
}

fn reduce_cases() -> Vec<Case> {
    vec![
        reduce_case(1, 1),
        reduce_case(5, 100),
        reduce_case(37, 333),
        reduce_case(200, 65),
        reduce_case(201, 68),
        accumulate_case(1, 0),
        accumulate_case(333, 0),
        accumulate_case(333, 1),
        accumulate_case(1000, 7),
        sum_shards_case(1, 0, 0, 1),
        sum_shards_case(333, 0, 5, 6),
        sum_shards_case(333, 2, 7, 8),
        sum_shards_case(332, 3, 3, 8),
        sum_shards_case(332, 8, 8, 8),
        fold_shards_case(1, 1, false),
        fold_shards_case(333, 7, true),
        fold_shards_case(332, 6, false),
        fold_shards_case(332, 8, true),
    ]
}

/// Shard number `shard` of `shards`, of which those from `first` on are computed here.
pub(crate) fn sum_shards_case(n: usize, first: u32, shard: u32, shards: u32) -> Case {
    let variant = format!("{n} elements, shard {shard} from {first} of {shards}");
    Case::new("sum_shards", variant, move |b| {
        let rows = shards::rows(shards as usize, true);
        let (mut x, mut before) = (b.values(n), b.values(rows * n));
        // What devices differ in, as a term and as a sum.
        x[0] = 1e-40;
        if let (Some(x), Some(before)) = (x.get_mut(1), before.get_mut(1)) {
            *x = 1.5 * f32::MIN_POSITIVE;
            *before = -f32::MIN_POSITIVE;
        }
        let row = Step {
            micro: shard,
            first_shard: first,
            shards,
            ..samples(0, 1)
        };
        let [steps, counter] = step_table(b, row);
        let x = b.input(&x);
        let nodes = b.updated("nodes", &before, Tolerance::sum(4));
        vec![shards::sum_shards(
            shards as usize,
            x,
            nodes,
            steps,
            counter,
        )]
    })
}

/// All of `shards`, where a batch may have more.
pub(crate) fn fold_shards_case(n: usize, shards: u32, scaled: bool) -> Case {
    let mean = if scaled { ", mean" } else { "" };
    let variant = format!("{n} elements, {shards} shards{mean}");
    Case::new("fold_shards", variant, move |b| {
        let most = 2 * shards as usize;
        let nodes = b.values(shards::rows(most, false) * n);
        let row = Step {
            shards,
            share: 1.0 / shards as f32,
            ..samples(0, 1)
        };
        let [steps, counter] = step_table(b, row);
        let nodes = b.input(&nodes);
        let result = b.output("result", n, Tolerance::sum(4));
        vec![shards::fold_shards(
            most, scaled, nodes, steps, counter, result,
        )]
    })
}

/// Part `micro` of a batch.
pub(crate) fn accumulate_case(n: usize, micro: u32) -> Case {
    let variant = format!("{n} elements, part {micro}");
    Case::new("accumulate", variant, move |b| {
        let (gradients, before) = (b.values(n), b.values(n));
        let row = Step {
            micro,
            ..samples(0, 1)
        };
        let gradients = b.input(&gradients);
        let accumulated = b.updated("accumulated", &before, Tolerance::sum(2));
        let [steps, counter] = step_table(b, row);
        vec![reduce::accumulate(gradients, accumulated, steps, counter)]
    })
}

pub(crate) fn step_case() -> Case {
    Case::new("advance_step", "from 41", |b| {
        vec![step::advance_step(b.updated_words("counter", &[41]))]
    })
}

/// So few rounds that the first numbers still show in the sums.
fn peak_cases() -> Vec<Case> {
    [(1, 1), (200, 20)]
        .map(|(invocations, rounds)| multiply_add_case(invocations, rounds))
        .into_iter()
        .chain([4, 260].map(copy_case))
        .collect()
}

/// `8 · rounds` multiply-adds for each of 16 numbers an invocation.
pub(crate) fn multiply_add_case(invocations: usize, rounds: usize) -> Case {
    let variant = format!("{invocations} invocations, {rounds} rounds");
    Case::new("peak_multiply_add", variant, move |b| {
        let mut factors = PEAK_FACTORS;
        b.spoil(&mut factors);
        let factors = b.input(&factors);
        // Rounding errors of up to half an ulp each, of which the scale lets none grow.
        let y = b.output("y", invocations, Tolerance::sum(16 * 8 * rounds));
        vec![peak::peak_multiply_add(invocations, rounds, factors, y)]
    })
}

/// Scale and shift of the peak kernel's multiply-adds: a slow decay from any start towards 1.
pub(crate) const PEAK_FACTORS: [f32; 2] = [1.0 - 1.0 / 1024.0, 1.0 / 1024.0];

/// Each loop by itself, and all of them.
fn probe_cases() -> Vec<Case> {
    let rounds = [[3, 0, 0, 0], [0, 7, 0, 0], [0, 0, 7, 0], [0, 0, 0, 7]];
    let each = rounds.map(|rounds| probe_case(64, rounds));
    let all = [probe_case(1, [1, 2, 3, 4]), probe_case(150, [4, 3, 2, 5])];
    each.into_iter().chain(all).collect()
}

/// So many rounds of each loop.
pub(crate) fn probe_case(invocations: usize, rounds: [u32; 4]) -> Case {
    let variant = format!("{invocations} invocations, {rounds:?} rounds");
    Case::new("probe_prices", variant, move |b| {
        let source = b.values(probe::PROBE_ELEMENTS);
        let (factors, source) = (b.input(&PEAK_FACTORS), b.input(&source));
        let rounds_view = b.input(&rounds);
        let [multiply_adds, others @ ..] = rounds;
        // As for the peak; of the others rounds add up to eight numbers of up to 70 each.
        let terms = 32 * 4 * multiply_adds + 32 * 70 * others.iter().sum::<u32>();
        let y = b.output("y", invocations, Tolerance::sum(terms as usize));
        vec![probe::probe_prices(
            invocations,
            rounds_view,
            factors,
            source,
            y,
        )]
    })
}

pub(crate) fn copy_case(n: usize) -> Case {
    Case::new("peak_copy", elements_text(n), move |b| {
        let src = b.values(n);
        let (src, dst) = (b.input(&src), b.output("dst", n, Tolerance::EXACT));
        vec![peak::peak_copy(src, dst)]
    })
}
