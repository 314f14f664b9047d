//! `shaders/gather.wgsl`: a batch out of the dataset.

use super::{KernelSpec, STEP_ELEMENTS, View, Work, read, write};
use crate::model::Shape;

const SOURCE: &str = include_str!("../../shaders/gather.wgsl");

/// `x[batch,H,W,C] = image · scale + shift` for the samples `order[first..first + count]`, where
/// `first` and `count` are those of row `counter[0]` of the step table `steps`; a batch that is not
/// full repeats its last sample. Writes `x` and `batch_labels` `[batch]`.
///
/// `images` holds bytes `[samples,H,W,C]` without gaps; where `streamed`, only those from place `base` of
/// the order on, in that order. `labels` has one class per sample,
/// `normalization` the scales of all channels, then their shifts.
pub fn gather_batch(
    shape: Shape,
    batch: usize,
    streamed: bool,
    images: View,
    labels: View,
    order: View,
    steps: View,
    counter: View,
    normalization: View,
    x: View,
    batch_labels: View,
) -> KernelSpec {
    let elements = shape.elements();
    KernelSpec::new(
        "gather_batch",
        SOURCE,
        Work::GatherBatch { shape, streamed },
        &[
            ("BATCH", batch as f64),
            ("ELEMENTS", elements as f64),
            ("CHANNELS", shape.channels as f64),
            ("STREAMED", f64::from(u8::from(streamed))),
        ],
        vec![
            // As many as a batch has: what is read of a larger set.
            read(0, "images", images, batch * elements),
            read(1, "labels", labels, batch),
            read(2, "order", order, batch),
            read(3, "steps", steps, STEP_ELEMENTS),
            read(4, "counter", counter, 1),
            read(5, "normalization", normalization, 2 * shape.channels),
            write(6, "x", x, batch * elements),
            write(7, "batch_labels", batch_labels, batch),
        ],
        batch * elements,
    )
}
