//! `shaders/dropout.wgsl`: dropout while training.

use super::{KernelSpec, STEP_ELEMENTS, View, Work, read, write};

const SOURCE: &str = include_str!("../../shaders/dropout.wgsl");

/// `y = x · mask`: 0 with `probability` (at least 0 and less than 1), the others divided by
/// 1 − probability. Which elements become 0 follows from seed and epoch in row `counter[0]` of the step
/// table `steps`, the sample's number in the dataset (`order`), the layer, for which `key` stands (see
/// [`key`]), and the element's place in its sample. The gradient is the same of dy. x and y hold `batch`
/// samples of any shape. Writes `y`.
pub fn dropout(
    probability: f32,
    key: u32,
    batch: usize,
    x: View,
    order: View,
    steps: View,
    counter: View,
    y: View,
) -> KernelSpec {
    let n = y.len;
    let (dropped, scale) = threshold(probability);
    KernelSpec::new(
        "dropout",
        SOURCE,
        Work::Dropout {
            probability,
            key,
            batch,
        },
        &[
            ("BATCH", batch as f64),
            ("ELEMENTS", (n / batch) as f64),
            ("KEY", f64::from(key)),
            ("DROPPED", f64::from(dropped)),
            ("SCALE", f64::from(scale)),
        ],
        vec![
            read(0, "x", x, n),
            read(1, "order", order, batch),
            read(2, "steps", steps, STEP_ELEMENTS),
            read(3, "counter", counter, 1),
            write(4, "y", y, n),
        ],
        batch * (n / batch).div_ceil(4),
    )
}

/// What stands for a layer when random numbers are drawn: its name's FNV-1a hash, so that other layers
/// added to a network change nothing.
pub fn key(layer: &str) -> u32 {
    layer.bytes().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

/// Below which random word an element is dropped, and what the others are multiplied by.
pub fn threshold(probability: f32) -> (u32, f32) {
    let probability = f64::from(probability);
    let dropped = (probability * 2f64.powi(32)) as u32;
    (dropped, (1.0 / (1.0 - probability)) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_those_of_fnv() {
        // From the table of the hash's authors.
        assert_eq!(key(""), 0x811c_9dc5);
        assert_eq!(key("foobar"), 0xbf9c_f968);
    }

    #[test]
    fn thresholds() {
        assert_eq!(threshold(0.0), (0, 1.0));
        assert_eq!(threshold(0.5), (1 << 31, 2.0));
        assert_eq!(threshold(0.75), (3 << 30, 4.0));
    }
}
