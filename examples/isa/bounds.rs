//! What every kernel must keep: no register spilled, no scratch memory, and in products a share of
//! multiply-adds, no branch among the unrolled terms and so many waves at a time.

use crate::assembly::Loops;
use crate::driver::Compiled;
use wgrad::kernels::conv2d::{Pass, Product, Tile};

/// Multiply-adds of the vector instructions in the unrolled terms.
const HOT: f64 = 0.92;

/// What holds for the tiles of one kind.
struct Class {
    /// Whether both operands are loaded four elements at a time, so their channels are multiples of four.
    vectors: bool,
    /// An invocation's.
    sums: usize,
    /// Multiply-adds of the vector instructions in the loop over blocks of terms.
    block: f64,
    /// Waves that a SIMD unit of vega10, navi21 and gfx1100 holds.
    waves: [u64; 3],
}

/// Loading a block takes an invocation of a small tile as many instructions as one of a large tile, for a half
/// or a quarter of the multiply-adds; without vectors it takes four times as many, as does each element's own
/// place in the image. Such products have few columns or come first in a network: they are short.
const CLASSES: [Class; 6] = [
    class(true, 64, 0.88, [2, 8, 8]),
    class(true, 32, 0.80, [3, 10, 10]),
    class(true, 16, 0.64, [2, 10, 10]),
    class(false, 64, 0.82, [2, 8, 8]),
    class(false, 32, 0.70, [3, 10, 10]),
    class(false, 16, 0.50, [2, 10, 10]),
];

const fn class(vectors: bool, sums: usize, block: f64, waves: [u64; 3]) -> Class {
    Class {
        vectors,
        sums,
        block,
        waves,
    }
}

/// A line for each bound that a kernel misses.
pub fn misses(
    chip: &str,
    product: Option<&Product>,
    loops: Option<&Loops>,
    found: &Compiled,
) -> Vec<String> {
    let mut misses = Vec::new();
    let spilled = found.spilled();
    if spilled > 0 {
        misses.push(format!("expected no spilled register, found {spilled}"));
    }
    let scratch = found.number("Scratch size");
    if scratch > 0 {
        misses.push(format!("expected no scratch memory, found {scratch} bytes"));
    }
    if let (Some(product), Some(loops)) = (product, loops)
        && let Some(class) = class_of(product)
    {
        // Of two blocks of terms a compiler may leave no loop.
        let unrolled = loops.block.multiply_adds == 0 && product.dimensions()[2] <= 32;
        if !unrolled {
            misses.extend(misses_of_product(chip, class, loops, found));
        }
    }
    misses
}

fn class_of(product: &Product) -> Option<&'static Class> {
    // The bounds are the workgroup family's.
    let Tile::Workgroup { rows, cols, .. } = product.tile else {
        return None;
    };
    let geometry = &product.geometry;
    let channels = match product.pass {
        Pass::Forward | Pass::BackwardWeight => geometry.input.channels,
        Pass::BackwardInput => geometry.output.channels,
    };
    let both = [channels, geometry.output.channels];
    let vectors = both.iter().all(|channels| channels.is_multiple_of(4));
    let fits = |class: &&Class| class.vectors == vectors && class.sums == 4 * rows * cols;
    Some(CLASSES.iter().find(fits).expect("every tile has a class"))
}

fn misses_of_product(chip: &str, class: &Class, loops: &Loops, found: &Compiled) -> Vec<String> {
    let mut misses = Vec::new();
    let shares = [
        ("the unrolled terms", loops.hot.share(), HOT),
        ("a block of terms", loops.block.share(), class.block),
    ];
    for (place, share, least) in shares {
        if share < least {
            misses.push(format!("expected multiply-adds to be {least} of the vector instructions in {place}, found {share:.3}"));
        }
    }
    if loops.hot.branches > 0 {
        let branches = loops.hot.branches;
        misses.push(format!(
            "expected no branch in the unrolled terms, found {branches}"
        ));
    }
    let chips = crate::CHIPS.iter().zip(class.waves);
    for (_, least) in chips.filter(|(known, _)| **known == chip) {
        let waves = found.number("Subgroups per SIMD");
        if waves < least {
            misses.push(format!("expected {least} waves at a time, found {waves}"));
        }
    }
    misses
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assembly::Count;
    use serde_json::json;

    /// The misses of a product in large tiles on navi21 after `change`.
    fn after(
        change: impl Fn(&mut Loops, &mut serde_json::Map<String, serde_json::Value>),
    ) -> String {
        let statistics = json!({
            "Spilled VGPRs": 0, "Spilled SGPRs": 0, "Scratch size": 0, "Subgroups per SIMD": 8,
        });
        let mut statistics = statistics.as_object().unwrap().clone();
        let count = |vector| Count {
            multiply_adds: 1024,
            vector,
            ..Count::default()
        };
        let mut loops = Loops {
            hot: count(1030),
            block: count(1100),
            turns: true,
        };
        change(&mut loops, &mut statistics);
        let found = Compiled(statistics);
        let mut misses = misses("navi21", None, None, &found);
        misses.extend(misses_of_product("navi21", &CLASSES[0], &loops, &found));
        misses.join("\n")
    }

    #[test]
    fn every_bound_can_be_missed() {
        assert_eq!(after(|_, _| ()), "");
        let cases = [
            (
                after(|_, found| found["Spilled VGPRs"] = 1.into()),
                "no spilled register, found 1",
            ),
            (
                after(|_, found| found["Spilled SGPRs"] = 2.into()),
                "no spilled register, found 2",
            ),
            (
                after(|_, found| found["Scratch size"] = 64.into()),
                "no scratch memory, found 64",
            ),
            (
                after(|_, found| found["Subgroups per SIMD"] = 7.into()),
                "8 waves at a time, found 7",
            ),
            (
                after(|loops, _| loops.hot.vector = 1200),
                "0.92 of the vector instructions in the unrolled terms, found 0.853",
            ),
            (
                after(|loops, _| loops.block.vector = 1200),
                "0.88 of the vector instructions in a block of terms, found 0.853",
            ),
            (
                after(|loops, _| loops.hot.branches = 1),
                "no branch in the unrolled terms, found 1",
            ),
        ];
        for (found, expected) in cases {
            assert!(
                found.contains(expected) && found.lines().count() == 1,
                "{found:?}, {expected}"
            );
        }
    }
}
