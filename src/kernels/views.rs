//! `shaders/views.wgsl`: an evaluation on several views of each image.

use super::{KernelSpec, STEP_ELEMENTS, View, Work, read, write};
use crate::model::Shape;
use crate::model::recipe::Views;

const SOURCE: &str = include_str!("../../shaders/views.wgsl");

/// [`super::gather::gather_batch`] for all views of every sample: `x` is `[views,batch,H,W,C]`, the images
/// as they are first, then mirrored, then both moved down and right by a pixel, then up and left, with the
/// border reflected. Writes `x` and `batch_labels` `[batch]`.
pub fn gather_views(
    shape: Shape,
    batch: usize,
    views: Views,
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
    let all = views.count() * batch * shape.elements();
    KernelSpec::new(
        "gather_views",
        SOURCE,
        Work::GatherViews {
            shape,
            views,
            streamed,
        },
        &[
            ("BATCH", batch as f64),
            ("VIEWS", views.count() as f64),
            ("HEIGHT", shape.height as f64),
            ("WIDTH", shape.width as f64),
            ("CHANNELS", shape.channels as f64),
            ("STREAMED", f64::from(streamed)),
        ],
        vec![
            // As many as a batch has: what is read of a larger set.
            read(0, "images", images, batch * shape.elements()),
            read(1, "labels", labels, batch),
            read(2, "order", order, batch),
            read(3, "steps", steps, STEP_ELEMENTS),
            read(4, "counter", counter, 1),
            read(5, "normalization", normalization, 2 * shape.channels),
            write(6, "x", x, all),
            write(7, "batch_labels", batch_labels, batch),
        ],
        all,
    )
}

/// `y[batch,classes]` = the mean of `z[views,batch,classes]` over the views by their weights: ½ each of two;
/// of six ¼ each for the image as it is and mirrored, ⅛ each for the others. Writes `y`.
pub fn average_views(views: Views, batch: usize, classes: usize, z: View, y: View) -> KernelSpec {
    KernelSpec::new(
        "average_views",
        SOURCE,
        Work::AverageViews(views),
        &[
            ("BATCH", batch as f64),
            ("VIEWS", views.count() as f64),
            ("CLASSES", classes as f64),
        ],
        vec![
            read(8, "z", z, views.count() * batch * classes),
            write(9, "y", y, batch * classes),
        ],
        batch * classes,
    )
}
