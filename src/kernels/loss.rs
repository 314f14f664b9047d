//! `shaders/loss.wgsl`: the two losses with their gradients and predictions, and a step's sums.

use super::{STEP_ELEMENTS, WORKGROUP_SIZE, dispatch};
use crate::error::Result;
use crate::gpu::{Buffer, Dispatch, Gpu};

const SOURCE: &str = include_str!("../../shaders/loss.wgsl");

fn loss_kernel(
    gpu: &Gpu,
    name: &'static str,
    batch: usize,
    classes: usize,
    [logits, labels, steps, counter]: [&Buffer; 4],
    [loss, gradient, prediction, predictions]: [&Buffer; 4],
) -> Result<Dispatch> {
    dispatch(
        gpu,
        name,
        SOURCE,
        &[("BATCH", batch as f64), ("CLASSES", classes as f64)],
        &[
            (0, "logits", logits, batch * classes),
            (1, "labels", labels, batch),
            (2, "steps", steps, STEP_ELEMENTS),
            (3, "counter", counter, 1),
            (4, "loss", loss, batch),
            (5, "gradient", gradient, batch * classes),
            (6, "prediction", prediction, batch),
            (7, "predictions", predictions, 1),
        ],
        batch,
    )
}

/// `loss[i] = −log softmax(logits[i])[labels[i]]` and the gradient of the mean loss,
/// `gradient[i] = (softmax(logits[i]) − onehot) / count`, where `count` is that of row `counter[0]`
/// of the step table `steps`. Samples from `count` on get loss 0 and gradient 0.
///
/// `logits` and `gradient` are `[batch,classes]`, `labels`, `loss` and `prediction` (argmax, of
/// equal logits the first) `[batch]`; the predictions that count go to
/// `predictions[first..first + count]` as well. Writes the last four.
///
/// # Errors
/// [`crate::Error::Shape`] for buffers that are too short, [`crate::Error::Gpu`] from the device;
/// so for every wrapper here.
pub fn softmax_cross_entropy(
    gpu: &Gpu,
    batch: usize,
    classes: usize,
    logits: &Buffer,
    labels: &Buffer,
    steps: &Buffer,
    counter: &Buffer,
    loss: &Buffer,
    gradient: &Buffer,
    prediction: &Buffer,
    predictions: &Buffer,
) -> Result<Dispatch> {
    loss_kernel(
        gpu,
        "softmax_cross_entropy",
        batch,
        classes,
        [logits, labels, steps, counter],
        [loss, gradient, prediction, predictions],
    )
}

/// `loss[i] = ½ Σ_k (outputs[i,k] − onehot[k])²` and the gradient of the mean loss,
/// `gradient[i] = (outputs[i] − onehot) / count`; otherwise as [`softmax_cross_entropy`].
pub fn squared_error(
    gpu: &Gpu,
    batch: usize,
    classes: usize,
    outputs: &Buffer,
    labels: &Buffer,
    steps: &Buffer,
    counter: &Buffer,
    loss: &Buffer,
    gradient: &Buffer,
    prediction: &Buffer,
    predictions: &Buffer,
) -> Result<Dispatch> {
    loss_kernel(
        gpu,
        "squared_error",
        batch,
        classes,
        [outputs, labels, steps, counter],
        [loss, gradient, prediction, predictions],
    )
}

/// `metrics[counter[0]]` = the sum of `loss` `[batch]` and the number of samples whose `prediction`
/// equals their label, over the samples that count. Writes that one row.
pub fn sum_metrics(
    gpu: &Gpu,
    batch: usize,
    loss: &Buffer,
    prediction: &Buffer,
    labels: &Buffer,
    steps: &Buffer,
    counter: &Buffer,
    metrics: &Buffer,
) -> Result<Dispatch> {
    dispatch(
        gpu,
        "sum_metrics",
        SOURCE,
        // The class count is no concern of the sums, but every override wants a value.
        &[("BATCH", batch as f64), ("CLASSES", 1.0)],
        &[
            (8, "loss", loss, batch),
            (9, "prediction", prediction, batch),
            (1, "labels", labels, batch),
            (2, "steps", steps, STEP_ELEMENTS),
            (3, "counter", counter, 1),
            (10, "metrics", metrics, 2),
        ],
        WORKGROUP_SIZE,
    )
}
