//! `shaders/gather.wgsl`: a batch out of the resident dataset.

use super::{STEP_ELEMENTS, dispatch};
use crate::error::Result;
use crate::gpu::{Buffer, Dispatch, Gpu};
use crate::model::Shape;

const SOURCE: &str = include_str!("../../shaders/gather.wgsl");

/// `x[batch,H,W,C] = image · scale + shift` for the samples `order[first..first + count]`, where
/// `first` and `count` are those of row `counter[0]` of the step table `steps`; a batch that is not
/// full repeats its last sample. Writes `x` and `batch_labels` `[batch]`.
///
/// `images` holds bytes `[samples,H,W,C]` packed four to a word without gaps, `labels` one class
/// per sample, `normalization` the scales of all channels, then their shifts.
///
/// # Errors
/// [`crate::Error::Shape`] for buffers that are too short, [`crate::Error::Gpu`] from the device.
pub fn gather_batch(
    gpu: &Gpu,
    shape: Shape,
    batch: usize,
    images: &Buffer,
    labels: &Buffer,
    order: &Buffer,
    steps: &Buffer,
    counter: &Buffer,
    normalization: &Buffer,
    x: &Buffer,
    batch_labels: &Buffer,
) -> Result<Dispatch> {
    let elements = shape.elements();
    dispatch(
        gpu,
        "gather_batch",
        SOURCE,
        &[
            ("BATCH", batch as f64),
            ("ELEMENTS", elements as f64),
            ("CHANNELS", shape.channels as f64),
        ],
        &[
            (0, "images", images, (labels.len() * elements).div_ceil(4)),
            (1, "labels", labels, 1),
            (2, "order", order, 1),
            (3, "steps", steps, STEP_ELEMENTS),
            (4, "counter", counter, 1),
            (5, "normalization", normalization, 2 * shape.channels),
            (6, "x", x, batch * elements),
            (7, "batch_labels", batch_labels, batch),
        ],
        batch * elements,
    )
}
