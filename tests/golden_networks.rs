//! Whole networks against PyTorch, see `golden/make_networks.py`: three steps of SGD on the software
//! adapter and on the CPU, and the number of parameters of the shipped models.

use serde::Deserialize;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use wgrad::engine::{Engine, Split};
use wgrad::export::{Tensor, running_to_pytorch, to_pytorch};
use wgrad::gpu::{Choice, Gpu, NO_ADAPTER_HINT};
use wgrad::kernels::Step;
use wgrad::model::recipe::Optimizer;
use wgrad::model::{self, Definition, Model, Role, Shape, initial_running};
use wgrad::plan::Options;

const STEPS: [usize; 3] = [6, 6, 5];
const OPTIMIZER: Optimizer = Optimizer::Sgd {
    momentum: 0.9,
    nesterov: false,
    weight_decay: 5e-4,
};

#[derive(Deserialize)]
struct Golden {
    parameters: BTreeMap<String, usize>,
    resnet9: Network,
    #[serde(rename = "mobilenet-small")]
    mobilenet_small: Network,
}

#[derive(Deserialize)]
struct Network {
    input: [usize; 3],
    losses: Vec<f64>,
    gradients: Vec<Values>,
    running: Vec<Values>,
}

#[derive(Deserialize)]
struct Values {
    shape: Vec<usize>,
    unit: f64,
    values: Vec<i32>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/networks.json")).unwrap()
}

/// 32 well-mixed bits for a number.
fn mixed(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// A number in [−1, 1).
fn unit(x: u32) -> f32 {
    (mixed(x) >> 8) as f32 / (1 << 23) as f32 - 1.0
}

/// The shipped model with these edits, each of which must find something.
fn edited(name: &str, edits: &[(&str, &str)], [height, width, channels]: [usize; 3]) -> Model {
    let mut text = model::load(name).unwrap().text;
    for (old, new) in edits {
        assert!(text.contains(old), "{name} has no {old}");
        text = text.replace(old, new);
    }
    let definition = Definition::parse(&text, name).unwrap();
    let input = Shape::new(height, width, channels);
    definition.resolve(input, 10).unwrap()
}

/// The parameters that PyTorch starts from, each computed from its place in PyTorch's order.
fn parameters(model: &Model) -> Vec<f32> {
    let places: Vec<f32> = (0..model.parameter_elements).map(|i| i as f32).collect();
    let all = model.layers.iter().flat_map(|layer| &layer.parameters);
    let mut flat = vec![0.0; model.parameter_elements];
    for (t, (places, parameter)) in to_pytorch(model, &places).iter().zip(all).enumerate() {
        for (i, place) in places.values.iter().enumerate() {
            let value = unit(1_000_003 * (t as u32 + 1) + i as u32);
            let weight_of_norm = parameter.role == Role::Weight && parameter.shape.len() == 1;
            flat[*place as usize] = match parameter.shape.len() {
                1 => value * 0.25 + if weight_of_norm { 1.0 } else { 0.0 },
                _ => {
                    let inputs: usize = places.shape[1..].iter().product();
                    value * (1.0 / (inputs as f64).sqrt()) as f32
                }
            };
        }
    }
    flat
}

/// What is further off than 10⁻⁴ of the largest value of its tensor, NaN included. (Some gradients are 0
/// but for rounding: those of a shift that a normalisation takes away again. There it is 10⁻⁶ of the
/// largest value of all.)
fn compare(what: &str, found: &[Tensor], expected: &[Values]) -> Vec<String> {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = |values: &Values| {
        let values = values
            .values
            .iter()
            .map(|v| f64::from(v.abs()) * values.unit);
        values.fold(0.0, f64::max)
    };
    let floor = 1e-6 * expected.iter().map(largest).fold(0.0, f64::max);
    let mut failures = Vec::new();
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found.shape, expected.shape, "{what} {}", found.name);
        // Rounding to whole units takes half of one.
        let bound = floor.max(1e-4 * largest(expected)) + 0.5 * expected.unit;
        let pairs = found.values.iter().zip(&expected.values);
        let worst = pairs
            .map(|(found, value)| (f64::from(*found) - f64::from(*value) * expected.unit).abs())
            .fold(
                0.0,
                |worst, e| if e > worst || e.is_nan() { e } else { worst },
            );
        if worst.is_nan() || worst > bound {
            failures.push(format!(
                "{what} {}: {worst} off, more than {bound}",
                found.name
            ));
        }
    }
    failures
}

fn check(device: &str, gpu: Option<Arc<Gpu>>, name: &str, model: &Model, golden: &Network) {
    let options = Options::default();
    let mut engine = Engine::new(gpu, model, STEPS[0], &OPTIMIZER, &options).unwrap();
    let len: usize = STEPS.iter().sum();
    let pixel = |i: usize| (mixed(7 + i as u32) >> 24) as u8;
    let images = (0..len * model.input.elements()).map(pixel).collect();
    let labels: Vec<u32> = (0..len).map(|i| mixed(11 + i as u32) % 10).collect();
    let channels = model.input.channels;
    let normalization = [vec![1.0 / 64.0; channels], vec![-2.0; channels]].concat();
    engine
        .upload_dataset(Split::Train, images, &labels, &normalization)
        .unwrap();
    engine.set_parameters(&parameters(model)).unwrap();
    engine.set_running(&initial_running(model)).unwrap();

    let mut first = 0;
    let steps = STEPS.map(|count| {
        first += count;
        Step {
            lr: 0.05,
            seed: 1,
            ..Step::new(first - count, count)
        }
    });
    let order: Vec<u32> = (0..len as u32).collect();
    let metrics = engine.train_epoch(&order, &steps, &mut |_| Ok(ControlFlow::Continue(())));
    let mut failures = Vec::new();
    for (i, (metrics, expected)) in metrics.unwrap().iter().zip(&golden.losses).enumerate() {
        let loss = f64::from(metrics.loss_sum) / STEPS[i] as f64;
        let error = (loss / expected - 1.0).abs();
        if error.is_nan() || error > 1e-4 {
            failures.push(format!("loss of step {i}: {loss}, not {expected}"));
        }
    }
    let gradients = to_pytorch(model, &engine.gradients().unwrap());
    failures.extend(compare("gradient of", &gradients, &golden.gradients));
    let running = running_to_pytorch(model, &engine.running().unwrap());
    failures.extend(compare("statistic", &running, &golden.running));
    assert!(
        failures.is_empty(),
        "{name} on {device}:\n{}",
        failures.join("\n")
    );
}

fn check_on_both(name: &str, model: &Model, golden: &Network) {
    check("the CPU", None, name, model, golden);
    let gpu = Gpu::open(&Choice::Best);
    let gpu = gpu.unwrap_or_else(|e| panic!("this test needs an adapter: {e}; {NO_ADAPTER_HINT}"));
    check("the adapter", Some(Arc::new(gpu)), name, model, golden);
}

#[test]
fn three_steps_of_resnet9_are_those_of_pytorch() {
    let golden = golden().resnet9;
    let edits = [
        ("channels = 64 ", "channels = 4 "),
        ("channels = 128 ", "channels = 8 "),
        ("channels = 256 ", "channels = 12 "),
        ("channels = 512 ", "channels = 16 "),
        ("kernel = 4", "kernel = 2"),
    ];
    let model = edited("resnet9", &edits, golden.input);
    check_on_both("resnet9", &model, &golden);
}

#[test]
fn three_steps_of_mobilenet_small_are_those_of_pytorch() {
    let golden = golden().mobilenet_small;
    let edits = [
        ("channels = 16, kernel", "channels = 4, kernel"),
        (
            "wide = 48, squeeze = 12, channels = 24",
            "wide = 8, squeeze = 4, channels = 4",
        ),
        (
            "wide = 72, squeeze = 18, channels = 24",
            "wide = 12, squeeze = 4, channels = 4",
        ),
        (
            "wide = 96, squeeze = 24, channels = 40",
            "wide = 12, squeeze = 4, channels = 8",
        ),
        (
            "wide = 120, squeeze = 30, channels = 40",
            "wide = 16, squeeze = 6, channels = 8",
        ),
        (
            "wide = 160, squeeze = 40, channels = 64",
            "wide = 20, squeeze = 6, channels = 8",
        ),
        (
            "wide = 192, squeeze = 48, channels = 64",
            "wide = 24, squeeze = 6, channels = 8",
        ),
        ("channels = 192 }", "channels = 24 }"),
        // Its random numbers are not PyTorch's.
        ("probability = 0.2", "probability = 0.0"),
    ];
    let model = edited("mobilenet-small", &edits, golden.input);
    check_on_both("mobilenet-small", &model, &golden);
}

#[test]
fn shipped_models_have_as_many_parameters_as_in_pytorch() {
    for (name, count) in golden().parameters {
        let definition = model::load(&name).unwrap();
        let model = definition
            .resolve(definition.input, definition.classes)
            .unwrap();
        assert_eq!(model.parameter_count(), count, "{name}");
    }
}

/// A thousandth more, or no number at all, is noticed.
#[test]
fn a_comparison_notices_what_is_off() {
    let golden = golden().resnet9;
    let of = |factor: f64| Tensor {
        name: "x".into(),
        shape: golden.gradients[0].shape.clone(),
        values: golden.gradients[0]
            .values
            .iter()
            .map(|v| (f64::from(*v) * golden.gradients[0].unit * factor) as f32)
            .collect(),
    };
    let expected = &golden.gradients[..1];
    assert!(compare("x", &[of(1.0)], expected).is_empty());
    assert_eq!(compare("x", &[of(1.001)], expected).len(), 1);
    assert_eq!(compare("x", &[of(f64::NAN)], expected).len(), 1);
}
