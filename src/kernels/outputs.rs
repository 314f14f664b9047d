//! `shaders/outputs.wgsl`: what the network gives for a batch, kept for the whole split.

use super::{KernelSpec, STEP_ELEMENTS, View, Work, read, update};

const SOURCE: &str = include_str!("../../shaders/outputs.wgsl");

/// `outputs[first + i] = logits[i]` for the samples that count, where `first` and their `count` are those
/// of row `counter[0]` of the step table `steps`. `logits` is `[batch,classes]`, `outputs`
/// `[samples,classes]`. Writes the rows `first..first + count` of `outputs`.
pub fn store_logits(
    batch: usize,
    classes: usize,
    logits: View,
    steps: View,
    counter: View,
    outputs: View,
) -> KernelSpec {
    KernelSpec::new(
        "store_logits",
        SOURCE,
        Work::StoreLogits { classes },
        &[("BATCH", batch as f64), ("CLASSES", classes as f64)],
        vec![
            read(0, "logits", logits, batch * classes),
            read(1, "steps", steps, STEP_ELEMENTS),
            read(2, "counter", counter, 1),
            update(3, "outputs", outputs, classes),
        ],
        batch * classes,
    )
}
