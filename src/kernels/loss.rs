//! `shaders/loss.wgsl`: the two losses with their gradients and predictions, and a step's sums.

use super::mix::MIX_WORDS;
use super::{KernelSpec, STEP_ELEMENTS, View, WORKGROUP_SIZE, Work, read, update, write};
use crate::model::Loss;

const SOURCE: &str = include_str!("../../shaders/loss.wgsl");

/// The loss of every sample, the gradient of the mean loss of its batch, and the prediction.
///
/// Softmax cross-entropy: `loss[i] = −log softmax(logits[i])[labels[i]]`,
/// `gradient[i] = (softmax(logits[i]) − onehot) / total`, where with `smoothing` the target is
/// `(1 − smoothing) onehot + smoothing / classes` instead of onehot; squared error (never smoothed):
/// `loss[i] = ½ Σ_k (logits[i,k] − onehot[k])²`, `gradient[i] = (logits[i] − onehot) / total`, where
/// `total` and `count` are those of row `counter[0]` of the step table `steps`. Samples from `count` on get loss 0
/// and gradient 0.
///
/// `logits` and `gradient` are `[batch,classes]`, `labels`, `loss` and `prediction` (argmax, of
/// equal logits the first) `[batch]`; the predictions that count go to
/// `predictions[first..first + count]` as well. Writes the last four.
pub fn loss(
    function: Loss,
    smoothing: f32,
    batch: usize,
    classes: usize,
    logits: View,
    labels: View,
    steps: View,
    counter: View,
    loss: View,
    gradient: View,
    prediction: View,
    predictions: View,
) -> KernelSpec {
    let entry = match function {
        Loss::SoftmaxCrossEntropy => "softmax_cross_entropy",
        Loss::SquaredError => "squared_error",
    };
    KernelSpec::new(
        entry,
        SOURCE,
        Work::Loss {
            loss: function,
            classes,
            smoothing,
        },
        &[
            ("BATCH", batch as f64),
            ("CLASSES", classes as f64),
            ("SMOOTHING", smoothing.into()),
        ],
        vec![
            read(0, "logits", logits, batch * classes),
            read(1, "labels", labels, batch),
            read(2, "steps", steps, STEP_ELEMENTS),
            read(3, "counter", counter, 1),
            write(4, "loss", loss, batch),
            write(5, "gradient", gradient, batch * classes),
            write(6, "prediction", prediction, batch),
            update(7, "predictions", predictions, 1),
        ],
        batch,
    )
}

/// Softmax cross-entropy as in [`loss`] with the target of class k times `class_weights[k]`, and the
/// gradient of the weighted mean where `total` is the sum of the weights of the batch's labels.
/// Writes `loss` and `gradient`; the predictions are [`predict`]'s.
pub fn weighted_softmax_cross_entropy(
    smoothing: f32,
    batch: usize,
    classes: usize,
    logits: View,
    labels: View,
    class_weights: View,
    steps: View,
    counter: View,
    loss: View,
    gradient: View,
) -> KernelSpec {
    KernelSpec::new(
        "weighted_softmax_cross_entropy",
        SOURCE,
        Work::WeightedLoss { smoothing },
        &[
            ("BATCH", batch as f64),
            ("CLASSES", classes as f64),
            ("SMOOTHING", smoothing.into()),
        ],
        vec![
            read(0, "logits", logits, batch * classes),
            read(1, "labels", labels, batch),
            read(2, "steps", steps, STEP_ELEMENTS),
            read(3, "counter", counter, 1),
            write(4, "loss", loss, batch),
            write(5, "gradient", gradient, batch * classes),
            read(11, "class_weights", class_weights, classes),
        ],
        batch,
    )
}

/// Softmax cross-entropy as in [`loss`], or with `class_weights` as in [`weighted_softmax_cross_entropy`], of
/// mixed samples: the target is the share of the label's and the rest of the second one's, as
/// [`super::mix::draw_mixes`] has written them into `mixes`. Writes `loss` and `gradient`; the predictions are
/// [`predict`]'s.
pub fn mixed_softmax_cross_entropy(
    smoothing: f32,
    batch: usize,
    classes: usize,
    logits: View,
    labels: View,
    mixes: View,
    class_weights: Option<View>,
    steps: View,
    counter: View,
    loss: View,
    gradient: View,
) -> KernelSpec {
    let weighted = class_weights.is_some();
    KernelSpec::new(
        "mixed_softmax_cross_entropy",
        SOURCE,
        Work::MixedLoss {
            smoothing,
            weighted,
        },
        &[
            ("BATCH", batch as f64),
            ("CLASSES", classes as f64),
            ("SMOOTHING", smoothing.into()),
            ("WEIGHTED", f64::from(weighted)),
        ],
        vec![
            read(0, "logits", logits, batch * classes),
            read(1, "labels", labels, batch),
            read(2, "steps", steps, STEP_ELEMENTS),
            read(3, "counter", counter, 1),
            write(4, "loss", loss, batch),
            write(5, "gradient", gradient, batch * classes),
            match class_weights {
                Some(weights) => read(11, "class_weights", weights, classes),
                // A binding must hold something.
                None => read(11, "class_weights", logits, 0),
            },
            read(12, "mixes", mixes, batch * MIX_WORDS),
        ],
        batch,
    )
}

/// `prediction[i]` = argmax of `logits[i]`, of equal ones the first; the predictions that count go to
/// `predictions[first..first + count]` as well, see [`loss`]. Writes both.
pub fn predict(
    batch: usize,
    classes: usize,
    logits: View,
    steps: View,
    counter: View,
    prediction: View,
    predictions: View,
) -> KernelSpec {
    KernelSpec::new(
        "predict",
        SOURCE,
        Work::Predict { classes },
        &[("BATCH", batch as f64), ("CLASSES", classes as f64)],
        vec![
            read(0, "logits", logits, batch * classes),
            read(2, "steps", steps, STEP_ELEMENTS),
            read(3, "counter", counter, 1),
            write(6, "prediction", prediction, batch),
            update(7, "predictions", predictions, 1),
        ],
        batch,
    )
}

/// `metrics[counter[0]]` = the sum of `loss` `[batch]` and the number of samples whose `prediction`
/// equals their label, over the samples that count. Writes that one row.
pub fn sum_metrics(
    batch: usize,
    loss: View,
    prediction: View,
    labels: View,
    steps: View,
    counter: View,
    metrics: View,
) -> KernelSpec {
    KernelSpec::new(
        "sum_metrics",
        SOURCE,
        Work::SumMetrics,
        // The class count is no concern of the sums, but every override wants a value.
        &[("BATCH", batch as f64), ("CLASSES", 1.0)],
        vec![
            read(8, "loss", loss, batch),
            read(9, "prediction", prediction, batch),
            read(1, "labels", labels, batch),
            read(2, "steps", steps, STEP_ELEMENTS),
            read(3, "counter", counter, 1),
            update(10, "metrics", metrics, 2),
        ],
        WORKGROUP_SIZE,
    )
}
