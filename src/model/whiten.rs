//! The first convolution as a whitening of the images' patches: its outputs are uncorrelated and of equal
//! variance, so that what follows learns faster. Source: Page, "How to train your ResNet 8" (2019); Jordan,
//! arXiv 2404.00498 (2024), section 3.2.

use super::{Conv2d, Init, Model};
use nalgebra::{DMatrix, SymmetricEigen};
use rayon::prelude::*;

/// Added to every variance, so that directions in which patches hardly vary are not blown up.
const EPSILON: f64 = 5e-4;

/// Most images that the statistics are taken from, and most multiply-adds that they may cost.
const MOST_IMAGES: usize = 5000;
const MOST_COST: usize = 4_000_000_000;

/// Sets the weights in `parameters` (flat, see [`super::Layer::parameters`]) that start as
/// [`Init::Whitening`] to what whitens the patches of `images` (`[N][H][W][C]` bytes, of which some
/// 5,000, evenly spaced, are looked at), normalised by `normalization` (scale per channel, then shift).
///
/// Output i is the patch's share of the i-th principal direction over the root of its variance, output
/// K + i the negative of it, for patches of K values; outputs from 2 K on stay as they are.
pub fn whiten(model: &Model, images: &[u8], normalization: &[f32], parameters: &mut [f32]) {
    for layer in &model.layers {
        let weight = layer.parameters.first();
        let (Some(weight), Some(geometry)) = (weight, layer.op.product()) else {
            continue;
        };
        if weight.init == Init::Whitening {
            let directions = directions(geometry, images, normalization);
            let values = &mut parameters[weight.start..][..weight.elements()];
            fill(&directions, geometry.output.channels, values);
        }
    }
}

/// Weight `[K, OC]` of the directions and their negatives.
fn fill(directions: &[Vec<f64>], outputs: usize, values: &mut [f32]) {
    let signed = [1.0, -1.0];
    let all = signed
        .iter()
        .flat_map(|sign| directions.iter().map(move |d| (sign, d)));
    for (o, (sign, direction)) in all.take(outputs).enumerate() {
        for (k, value) in direction.iter().enumerate() {
            values[k * outputs + o] = (sign * value) as f32;
        }
    }
}

/// The principal directions of the images' patches, of the greatest variance first, each over the root
/// of its variance.
fn directions(geometry: &Conv2d, images: &[u8], normalization: &[f32]) -> Vec<Vec<f64>> {
    let size = geometry.patch();
    let moments = DMatrix::from_vec(size, size, second_moments(geometry, images, normalization));
    let eigen = SymmetricEigen::new(moments);
    let mut pairs: Vec<(f64, Vec<f64>)> = (0..size)
        .map(|i| {
            let vector: Vec<f64> = eigen.eigenvectors.column(i).iter().copied().collect();
            // Of the two signs the one that makes the greatest entry positive.
            let greatest = vector
                .iter()
                .fold(0.0, |a: f64, b| if b.abs() > a.abs() { *b } else { a });
            let scale = greatest.signum() / (eigen.eigenvalues[i].max(0.0) + EPSILON).sqrt();
            (
                eigen.eigenvalues[i],
                vector.iter().map(|v| v * scale).collect(),
            )
        })
        .collect();
    pairs.sort_by(|a, b| b.0.total_cmp(&a.0));
    pairs.into_iter().map(|(_, direction)| direction).collect()
}

/// Mean of the products of every two values of a patch, `[K, K]`. Images are added up in a fixed order.
fn second_moments(geometry: &Conv2d, images: &[u8], normalization: &[f32]) -> Vec<f64> {
    let (input, [height, width]) = (geometry.input, geometry.kernel);
    let [down, right] = geometry.dilation;
    let size = geometry.patch();
    let span = [(height - 1) * down + 1, (width - 1) * right + 1];
    // A patch that reaches into the padding says nothing of the images, unless all do.
    let rows = (input.height + 1).saturating_sub(span[0]);
    let columns = (input.width + 1).saturating_sub(span[1]);
    let elements = input.elements();
    let count = images.len() / elements;
    let affordable = MOST_COST / (rows * columns * size * size).max(1);
    let looked_at = count.min(MOST_IMAGES).min(affordable.max(1));
    let (scale, shift) = normalization.split_at(input.channels);
    let of_image = |number: usize| {
        let image = &images[number * elements..][..elements];
        let x: Vec<f64> = image
            .iter()
            .enumerate()
            .map(|(i, byte)| {
                let c = i % input.channels;
                f64::from(*byte) * f64::from(scale[c]) + f64::from(shift[c])
            })
            .collect();
        let mut sum = vec![0.0; size * size];
        let mut patch = vec![0.0; size];
        for row in 0..rows {
            for column in 0..columns {
                for (k, value) in patch.iter_mut().enumerate() {
                    let (c, tap) = (k % input.channels, k / input.channels);
                    let (y, x_at) = (row + tap / width * down, column + tap % width * right);
                    *value = x[(y * input.width + x_at) * input.channels + c];
                }
                for (sums, a) in sum.chunks_exact_mut(size).zip(&patch) {
                    for (sum, b) in sums.iter_mut().zip(&patch) {
                        *sum += a * b;
                    }
                }
            }
        }
        sum
    };
    let mut total = vec![0.0; size * size];
    let numbers: Vec<usize> = (0..looked_at).map(|i| i * count / looked_at).collect();
    for chunk in numbers.chunks(64) {
        let sums: Vec<Vec<f64>> = chunk.par_iter().map(|number| of_image(*number)).collect();
        for sum in sums {
            total
                .iter_mut()
                .zip(sum)
                .for_each(|(total, sum)| *total += sum);
        }
    }
    let patches = (looked_at * rows * columns).max(1) as f64;
    total.iter_mut().for_each(|sum| *sum /= patches);
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Definition, initial_parameters};
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    const TEXT: &str = "name = \"x\"\ninput = [9, 7, 2]\nclasses = 3\nloss = \"softmax_cross_entropy\"\n[recipe]\noptimizer = \"adamw\"\nlr = 0.1\nschedule = \"constant\"\nepochs = 1\nbatch_size = 4\n[[layer]]\ntype = \"conv2d\"\nout_channels = 20\nkernel = 2\ninit = \"whitening\"\n[[layer]]\ntype = \"dense\"\nunits = \"classes\"\n";

    /// Neighbours alike, as in photographs.
    fn images(elements: usize, count: usize) -> Vec<u8> {
        let mut generator = ChaCha8Rng::seed_from_u64(5);
        let mut level = 128i32;
        (0..elements * count)
            .map(|_| {
                level = (level + (generator.next_u32() % 31) as i32 - 15).clamp(0, 255);
                level as u8
            })
            .collect()
    }

    #[test]
    fn outputs_are_uncorrelated_and_of_variance_one() {
        let definition = Definition::parse(TEXT, "x.toml").unwrap();
        let model = definition.resolve(definition.input, 3).unwrap();
        let images = images(model.input.elements(), 300);
        let normalization = [0.05, 0.1, -5.0, -12.5];
        let before = initial_parameters(&model, 1);
        let mut parameters = before.clone();
        whiten(&model, &images, &normalization, &mut parameters);
        let geometry = model.layers[0].op.product().unwrap();
        let (size, outputs) = (geometry.patch(), 20);
        let moments = second_moments(geometry, &images, &normalization);
        let weight = |k: usize, o: usize| f64::from(parameters[k * outputs + o]);
        for a in 0..size {
            for b in 0..size {
                let product: f64 = (0..size * size)
                    .map(|i| weight(i / size, a) * moments[i] * weight(i % size, b))
                    .sum();
                // Variance v over v + ε on the diagonal, and these images vary in every direction.
                let expected = if a == b { 1.0 } else { 0.0 };
                assert!((product - expected).abs() < 0.05, "{a} {b}: {product}");
                assert_eq!(weight(a, b), -weight(a, size + b));
            }
        }
        // Outputs beyond both signs, the bias and all other layers are as they were.
        for o in 2 * size..outputs {
            assert!((0..size).all(|k| parameters[k * outputs + o] == before[k * outputs + o]));
        }
        assert_eq!(parameters[size * outputs..], before[size * outputs..]);
    }

    #[test]
    fn only_the_images_can_be_whitened() {
        let second = "[[layer]]\ntype = \"conv2d\"\nout_channels = 4\nkernel = 2\ninit = \"whitening\"\n[[layer]]\ntype = \"dense\"";
        let text = TEXT.replace("[[layer]]\ntype = \"dense\"", second);
        let definition = Definition::parse(&text, "x.toml").unwrap();
        let error = definition
            .resolve(definition.input, 3)
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("x.toml:16: conv2d2: expected init = \"whitening\""),
            "{error}"
        );
    }
}
