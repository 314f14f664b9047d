//! The parameters that training starts from.

use super::Model;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What the generator's key holds behind the seed, so that no other use of the same seed (shuffling,
/// for one) draws the same numbers.
const PURPOSE: &[u8; 24] = b"wgrad initial parameters";

/// The flat parameter vector of `model` ([`Model::parameter_elements`] long, each layer's
/// `[KH][KW][C][OC]` weight and `[OC]` bias at [`super::Layer::parameters`], gaps zero) before the
/// first step.
///
/// Weight and bias are uniform in ±1/√fan_in with fan_in = KH·KW·C, which is what PyTorch's
/// `Conv2d` and `Linear` start from (He et al., 2015, with a = √5). A layer's values depend on the
/// seed, the layer's index and its shape alone, and are the same bits on every machine.
pub fn initial_parameters(model: &Model, seed: u64) -> Vec<f32> {
    // Keyed by hand: `seed_from_u64` may change between versions of rand.
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..].copy_from_slice(PURPOSE);

    let mut parameters = vec![0.0; model.parameter_elements];
    for (index, layer) in model.layers.iter().enumerate() {
        let (Some(start), Some((geometry, _))) = (layer.parameters, layer.op.product()) else {
            continue;
        };
        let bound = (1.0 / (geometry.patch() as f64).sqrt()) as f32;
        let mut generator = ChaCha8Rng::from_seed(key);
        generator.set_stream(index as u64);
        for parameter in &mut parameters[start..start + layer.parameter_count()] {
            *parameter = bound * signed_unit(generator.next_u32());
        }
    }
    parameters
}

/// Uniform in [−1, 1) in steps of 2⁻²³, exact in f32.
fn signed_unit(bits: u32) -> f32 {
    (bits >> 8) as f32 / (1 << 23) as f32 - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Shape, load};

    fn model(name: &str, input: Shape) -> Model {
        load(name).unwrap().resolve(input, 10).unwrap()
    }

    #[test]
    fn the_first_values_of_a_seed_never_change() {
        let parameters = initial_parameters(&model("default", Shape::new(28, 28, 1)), 1);
        let bits = parameters[..4].iter().map(|x| x.to_bits());
        // From a ChaCha8 written in Python for the purpose.
        let expected = [969_837_773, 1_042_946_899, 1_036_649_415, 1_036_549_639];
        assert!(bits.eq(expected), "{:?}", &parameters[..4]);
    }

    #[test]
    fn the_steps_of_the_unit_are_exact() {
        assert_eq!(signed_unit(0), -1.0);
        assert_eq!(signed_unit(1 << 31), 0.0);
        assert_eq!(signed_unit(u32::MAX), 1.0 - (-23f32).exp2());
    }

    #[test]
    fn every_layer_fills_its_bound_and_gaps_stay_zero() {
        let model = model("lenet5", Shape::new(28, 28, 1));
        let parameters = initial_parameters(&model, 3);
        assert_eq!(parameters.len(), model.parameter_elements);
        let mut trained = vec![false; parameters.len()];
        for layer in &model.layers {
            let Some(start) = layer.parameters else {
                continue;
            };
            let values = &parameters[start..start + layer.parameter_count()];
            trained[start..start + values.len()].fill(true);
            let patch = layer.op.product().unwrap().0.patch() as f64;
            let (mut largest, mut sum, mut squares) = (0f64, 0.0, 0.0);
            for &value in values {
                let scaled = f64::from(value) * patch.sqrt();
                largest = largest.max(scaled.abs());
                sum += scaled;
                squares += scaled * scaled;
            }
            // Uniform in ±1: mean 0, variance 1/3; five standard errors of slack.
            let n = values.len() as f64;
            assert!((0.95..1.0 + 1e-6).contains(&largest), "{largest}");
            assert!((sum / n).abs() < 5.0 / (3.0 * n).sqrt(), "{}", layer.name);
            assert!(
                (squares / n - 1.0 / 3.0).abs() < 5.0 * (4.0 / 45.0 / n).sqrt(),
                "{}",
                layer.name
            );
        }
        assert!(trained.contains(&false), "no gap to look at");
        for (value, trained) in parameters.iter().zip(trained) {
            assert!(trained || value.to_bits() == 0);
        }
    }

    #[test]
    fn a_layer_depends_on_seed_index_and_its_own_shape() {
        // The first dense layer differs between the two inputs; the convolutions do not.
        let (small, large) = (
            model("default", Shape::new(28, 28, 1)),
            model("default", Shape::new(32, 32, 1)),
        );
        let (a, b) = (initial_parameters(&small, 1), initial_parameters(&large, 1));
        let dense = small.layers[4].parameters.unwrap();
        assert_eq!(a[..dense], b[..dense]);
        let last = |model: &Model, all: &[f32]| {
            let layer = &model.layers[5];
            let start = layer.parameters.unwrap();
            all[start..start + layer.parameter_count()].to_vec()
        };
        assert_eq!(last(&small, &a), last(&large, &b));
        let second = small.layers[2].parameters.unwrap();
        assert_ne!(a[0] * 5.0, a[second] * 600f32.sqrt());
        assert_ne!(a, initial_parameters(&small, 2));
    }
}
