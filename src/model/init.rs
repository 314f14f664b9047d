//! The parameters that training starts from.

use super::{Init, Model, Parameter};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sha2::{Digest, Sha256};

/// What is hashed before a parameter's name, so that no other use of the same seed (shuffling, for
/// one) draws the same numbers.
const PURPOSE: &[u8] = b"wgrad initial parameters";

/// The flat parameter vector of `model` ([`Model::parameter_elements`] long, gaps zero) before the
/// first step.
///
/// A parameter's values depend on the seed, its name (`conv2d1.weight`, as in the exported files), its
/// shape and its [`Init`] alone, so that a layer more or less elsewhere changes none of them, and are
/// the same bits on every machine.
pub fn initial_parameters(model: &Model, seed: u64) -> Vec<f32> {
    let mut parameters = vec![0.0; model.parameter_elements];
    for parameter in model.layers.iter().flat_map(|layer| &layer.parameters) {
        let values = &mut parameters[parameter.start..][..parameter.elements()];
        fill(parameter, seed, values);
    }
    parameters
}

/// The running statistics of `model` ([`Model::running_elements`] long, gaps zero) before the first step.
pub fn initial_running(model: &Model) -> Vec<f32> {
    let mut running = vec![0.0; model.running_elements];
    for parameter in model.layers.iter().flat_map(|layer| &layer.running) {
        let values = &mut running[parameter.start..][..parameter.elements()];
        fill(parameter, 0, values);
    }
    running
}

/// The initial values of one parameter, scaled as in PyTorch's `torch.nn.init`: He et al. (2015) for
/// Kaiming's, by the inputs and with the gain √2 of ReLU, Glorot and Bengio (2010) for Xavier's.
fn fill(parameter: &Parameter, seed: u64, values: &mut [f32]) {
    let [inputs, outputs] = parameter.fans.map(|fan| fan as f64);
    let mut generator = generator(seed, &parameter.name);
    match parameter.init {
        Init::Constant(value) => values.fill(value),
        Init::Dirac => {
            values.fill(0.0);
            dirac(parameter, values);
        }
        Init::PartialDirac => {
            uniform(&mut generator, (1.0 / inputs.sqrt()) as f32, values);
            dirac(parameter, values);
        }
        Init::Uniform(bound) => uniform(&mut generator, bound, values),
        // Until the images are known.
        Init::FanIn | Init::Whitening => {
            uniform(&mut generator, (1.0 / inputs.sqrt()) as f32, values)
        }
        Init::KaimingUniform => uniform(&mut generator, (6.0 / inputs).sqrt() as f32, values),
        Init::KaimingNormal => normal(&mut generator, (2.0 / inputs).sqrt(), values),
        Init::XavierUniform => {
            uniform(
                &mut generator,
                (6.0 / (inputs + outputs)).sqrt() as f32,
                values,
            );
        }
        Init::XavierNormal => normal(&mut generator, (2.0 / (inputs + outputs)).sqrt(), values),
    }
}

/// In ±`bound`.
fn uniform(generator: &mut ChaCha8Rng, bound: f32, values: &mut [f32]) {
    for value in values {
        *value = bound * signed_unit(generator.next_u32());
    }
}

/// Of mean 0 and this standard deviation (Box and Muller, 1958), two at a time. Logarithm, sine and
/// cosine are those of the crate `libm`, because every system's own differ in their last bits.
fn normal(generator: &mut ChaCha8Rng, deviation: f64, values: &mut [f32]) {
    let mut unit = || (f64::from(generator.next_u32()) + 1.0) / (1u64 << 32) as f64;
    for pair in values.chunks_mut(2) {
        let radius = deviation * (-2.0 * libm::log(unit())).sqrt();
        let (sine, cosine) = libm::sincos(2.0 * std::f64::consts::PI * unit());
        for (value, coordinate) in pair.iter_mut().zip([cosine, sine]) {
            *value = (radius * coordinate) as f32;
        }
    }
}

/// Makes each of a group's outputs that has an input of the same number that input: a 1 in the middle
/// of the kernel, 0 elsewhere. Further outputs stay as they are.
fn dirac(parameter: &Parameter, values: &mut [f32]) {
    let &[height, width, channels, outputs] = &parameter.shape[..] else {
        return;
    };
    let middle = height / 2 * width + width / 2;
    let per_group = outputs / parameter.groups;
    for group in 0..parameter.groups {
        for c in 0..channels.min(per_group) {
            let output = group * per_group + c;
            values
                .iter_mut()
                .skip(output)
                .step_by(outputs)
                .for_each(|v| *v = 0.0);
            values[(middle * channels + c) * outputs + output] = 1.0;
        }
    }
}

/// The generator of one parameter's values. Keyed by hand, with the seed and the first 24 bytes of
/// a hash: `seed_from_u64` may change between versions of rand.
fn generator(seed: u64, name: &str) -> ChaCha8Rng {
    let hash = Sha256::new()
        .chain_update(PURPOSE)
        .chain_update(name)
        .finalize();
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..].copy_from_slice(&hash[..24]);
    ChaCha8Rng::from_seed(key)
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
        // 5×5 weights of 24 filters, then their biases.
        let bits = |at: usize| parameters[at..].iter().map(|x| x.to_bits());
        // From a ChaCha8 written in Python for the purpose.
        let weight = [3_187_235_088, 3_188_543_855, 3_183_490_026, 1_042_327_944];
        assert!(bits(0).take(4).eq(weight), "{:?}", &parameters[..4]);
        let bias = [1_040_875_511, 1_042_505_205];
        assert!(bits(600).take(2).eq(bias), "{:?}", &parameters[600..602]);
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
            if layer.parameters.is_empty() {
                continue;
            }
            let values = &parameters[layer.range()];
            trained[layer.range()].fill(true);
            let patch = layer.op.product().unwrap().patch() as f64;
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
    fn a_parameter_depends_on_seed_name_and_its_own_shape() {
        // The first dense layer differs between the two inputs; the convolutions do not.
        let (small, large) = (
            model("default", Shape::new(28, 28, 1)),
            model("default", Shape::new(32, 32, 1)),
        );
        let (a, b) = (initial_parameters(&small, 1), initial_parameters(&large, 1));
        let dense = small.layers[4].range().start;
        assert_eq!(a[..dense], b[..dense]);
        let last = |model: &Model, all: &[f32]| all[model.layers[5].range()].to_vec();
        assert_eq!(last(&small, &a), last(&large, &b));
        let second = small.layers[2].range().start;
        assert_ne!(a[0] * 5.0, a[second] * 600f32.sqrt());
        assert_ne!(a, initial_parameters(&small, 2));
    }

    /// The same network with a standalone ReLU behind the convolution, or with no pooling.
    #[test]
    fn layers_without_parameters_change_no_initial_value() {
        let layers = |between: &str| {
            let text = format!(
                "name = \"x\"\ninput = [8, 8, 1]\nclasses = 3\nloss = \"softmax_cross_entropy\"\n[recipe]\noptimizer = \"adamw\"\nlr = 0.1\nschedule = \"constant\"\nepochs = 1\nbatch_size = 4\n[[layer]]\ntype = \"conv2d\"\nout_channels = 4\nkernel = 3\n{between}[[layer]]\ntype = \"conv2d\"\nout_channels = 3\nkernel = 3\n[[layer]]\ntype = \"dense\"\nunits = \"classes\"\n"
            );
            let definition = crate::model::Definition::parse(&text, "x.toml").unwrap();
            let model = definition.resolve(Shape::new(8, 8, 1), 3).unwrap();
            (initial_parameters(&model, 1), model)
        };
        let (fused, _) = layers("activation = \"relu\"\n");
        let (standalone, _) = layers("[[layer]]\ntype = \"relu\"\n");
        assert_eq!(fused, standalone);
        let (pooled, model) = layers("[[layer]]\ntype = \"max_pool2d\"\nkernel = 2\n");
        let dense = model.layers.last().unwrap().range().start;
        assert_eq!(fused[..dense], pooled[..dense]);
        assert!(dense > 64);
    }

    /// A model of one layer of that `type`, of 64 channels in and 96 out, with these keys, and a dense
    /// layer behind it.
    fn with_init(keys: &str) -> Model {
        let text = format!(
            "name = \"x\"\ninput = [8, 8, 64]\nclasses = 3\nloss = \"softmax_cross_entropy\"\n[recipe]\noptimizer = \"adamw\"\nlr = 0.1\nschedule = \"constant\"\nepochs = 1\nbatch_size = 4\n[[layer]]\n{keys}\n[[layer]]\ntype = \"dense\"\nunits = \"classes\"\n"
        );
        let definition = crate::model::Definition::parse(&text, "x.toml").unwrap();
        definition.resolve(definition.input, 3).unwrap()
    }

    /// Against the standard deviations and bounds of `torch.nn.init` for a weight `[96, 64, 3, 3]` and,
    /// in two groups, `[96, 32, 3, 3]`, whose fans are (288, 864).
    #[test]
    fn weights_have_the_variance_that_their_init_promises() {
        let cases: [(&str, usize, f64, Option<f64>); 6] = [
            ("kaiming_normal", 1, 2.0 / 576.0, None),
            (
                "kaiming_uniform",
                1,
                2.0 / 576.0,
                Some((6.0f64 / 576.0).sqrt()),
            ),
            ("xavier_normal", 1, 2.0 / (576.0 + 864.0), None),
            (
                "xavier_uniform",
                1,
                2.0 / (576.0 + 864.0),
                Some((6.0f64 / 1440.0).sqrt()),
            ),
            ("kaiming_normal", 2, 2.0 / 288.0, None),
            ("xavier_normal", 2, 2.0 / (288.0 + 864.0), None),
        ];
        for (init, groups, variance, bound) in cases {
            let model = with_init(&format!(
                "type = \"conv2d\"\nout_channels = 96\nkernel = 3\ninit = \"{init}\"\ngroups = {groups}"
            ));
            let weight = &model.layers[0].parameters[0];
            let parameters = initial_parameters(&model, 4);
            let values = &parameters[weight.start..][..weight.elements()];
            let n = values.len() as f64;
            let moment = |k: i32| values.iter().map(|v| f64::from(*v).powi(k)).sum::<f64>() / n;
            let name = format!("{init} in {groups} groups");
            assert!(
                moment(1).abs() < 5.0 * (variance / n).sqrt(),
                "{name}: mean"
            );
            // The fourth moment of a normal distribution is 3 σ⁴, that of a uniform one 1.8 σ⁴.
            let kurtosis = if bound.is_some() { 1.8 } else { 3.0 };
            let slack = 5.0 * ((kurtosis - 1.0) / n).sqrt();
            let found = moment(2) / variance;
            assert!(
                (found - 1.0).abs() < slack,
                "{name}: {found} of the variance"
            );
            let found = moment(4) / (variance * variance);
            assert!(
                (found / kurtosis - 1.0).abs() < 0.1,
                "{name}: fourth moment {found}"
            );
            let largest = values.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
            match bound {
                Some(bound) => assert!(largest <= bound * (1.0 + 1e-7), "{name}: {largest}"),
                None => assert!(largest > 3.5 * variance.sqrt(), "{name}: {largest}"),
            }
        }
    }

    /// From a ChaCha8 and Box and Muller's formula written in Python for the purpose, rounded to f32.
    #[test]
    fn the_first_normal_numbers_of_a_seed_never_change() {
        let model = with_init("type = \"dense\"\nunits = 5\ninit = \"kaiming_normal\"");
        let values = &initial_parameters(&model, 1)[..4];
        let bits: Vec<u32> = values.iter().map(|v| v.to_bits()).collect();
        assert_eq!(
            bits,
            [3_153_321_047, 3_115_436_872, 1_025_486_938, 3_169_460_960]
        );
    }

    #[test]
    fn dirac_hands_its_input_on() {
        for (groups, kernel) in [(1, [3, 3]), (2, [1, 5])] {
            let [height, width] = kernel;
            let model = with_init(&format!(
                "type = \"conv2d\"\nout_channels = 96\nkernel = [{height}, {width}]\ninit = \"dirac\"\ngroups = {groups}"
            ));
            let values = &initial_parameters(&model, 1);
            let (channels, outputs) = (64 / groups, 96 / groups);
            for p in 0..height * width {
                for c in 0..channels {
                    for o in 0..96 {
                        let middle = p == height / 2 * width + width / 2;
                        let expected = if middle && o % outputs == c { 1.0 } else { 0.0 };
                        let found = values[(p * channels + c) * 96 + o];
                        assert_eq!(found, expected, "tap {p}, channel {c}, output {o}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_partial_dirac_hands_its_input_on_and_draws_the_rest() {
        let model = |init: &str| {
            with_init(&format!(
                "type = \"conv2d\"\nout_channels = 96\nkernel = 3{init}"
            ))
        };
        let dirac = initial_parameters(&model("\ninit = \"dirac\""), 1);
        let plain = initial_parameters(&model(""), 1);
        let partial = initial_parameters(&model("\ninit = \"partial_dirac\""), 1);
        for i in 0..9 * 64 * 96 {
            let expected = if i % 96 < 64 { dirac[i] } else { plain[i] };
            assert_eq!(partial[i], expected, "{i}");
        }
    }

    #[test]
    fn a_uniform_init_fills_its_bound() {
        let model = with_init(
            "type = \"conv2d\"\nout_channels = 96\nkernel = 3\ninit = { uniform = 0.25 }",
        );
        let parameters = initial_parameters(&model, 1);
        let largest = parameters[..9 * 64 * 96]
            .iter()
            .fold(0f32, |a, b| a.max(b.abs()));
        assert!((0.249..=0.25).contains(&largest), "{largest}");
    }

    #[test]
    fn normalisations_start_from_ones_and_zeros_or_what_the_file_says() {
        for (init, expected) in [
            ("", 1.0),
            ("init = \"zeros\"", 0.0),
            ("init = { constant = 0.25 }", 0.25),
        ] {
            let model = with_init(&format!("type = \"batch_norm\"\n{init}"));
            let parameters = initial_parameters(&model, 1);
            assert!(parameters[..64].iter().all(|v| *v == expected), "{init}");
            assert!(parameters[64..128].iter().all(|v| *v == 0.0));
            let running = initial_running(&model);
            assert_eq!(running.len(), 128);
            assert!(running[..64].iter().all(|v| *v == 0.0));
            assert!(running[64..].iter().all(|v| *v == 1.0));
        }
    }
}
