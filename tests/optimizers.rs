//! The update rules with all that goes with them (parameter groups, frozen parameters, clipping, the moving
//! average) in whole steps, on the software adapter and on the CPU: against PyTorch, see
//! `golden/make_optimizers.py`, and against what must hold of them.

use serde::Deserialize;
use std::ops::ControlFlow;
use std::sync::{Arc, LazyLock};
use wgrad::engine::{Engine, Split};
use wgrad::export::{Tensor, running_to_pytorch, to_pytorch};
use wgrad::gpu::{Choice, Gpu, NO_ADAPTER_HINT};
use wgrad::kernels::{AdapterReport, Step, Work};
use wgrad::model::recipe::{Groups, Optimizer, Recipe};
use wgrad::model::{self, Definition, Model, initial_running};
use wgrad::plan::{Mode, Options, Plan, Section, Target};

const COUNTS: [usize; 4] = [6, 6, 5, 6];
const RATES: [f32; 4] = [1.0, 2.0, 0.5, 1.0];
const SHARES: [f32; 4] = [0.1, 0.5, 0.9, 0.8];
const BATCH: usize = 6;
const CLASSES: usize = 3;

const NETWORK: &str = r#"name = "small"
input = [6, 5, 2]
classes = 3
loss = "softmax_cross_entropy"
recipe = { optimizer = "sgd", lr = 0.05, schedule = "constant", epochs = 1, batch_size = 6 }
layer = [
  { type = "conv2d", out_channels = 4, kernel = 3, padding = 1, bias = false },
  { type = "conv2d", out_channels = 12, kernel = 1, bias = false },
  { type = "batch_norm", activation = "gelu" },
  { type = "conv2d", groups = "depthwise", kernel = 3, bias = false, name = "depthwise" },
  { type = "global_average_pool2d" },
  { type = "dense", units = "classes" },
]
"#;

#[derive(Deserialize)]
struct Golden {
    sgd: Case,
    adamw: Case,
    lion: Case,
    muon: Case,
}

#[derive(Deserialize)]
struct Case {
    losses: Vec<f64>,
    /// Parameters, then running statistics.
    values: Vec<Values>,
    averages: Vec<Values>,
}

#[derive(Deserialize)]
struct Values {
    unit: f64,
    values: Vec<i32>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/optimizers.json")).unwrap()
}

const NESTEROV: Optimizer = Optimizer::Sgd {
    momentum: 0.9,
    nesterov: true,
    weight_decay: 0.05,
};
const ADAMW: Optimizer = Optimizer::Adamw {
    beta1: 0.7,
    beta2: 0.9,
    epsilon: 1e-8,
    weight_decay: 0.1,
};
const LION: Optimizer = Optimizer::Lion {
    beta1: 0.9,
    beta2: 0.99,
    weight_decay: 0.1,
};
const MUON: Optimizer = Optimizer::Muon {
    momentum: 0.6,
    weight_decay: 0.05,
    other_lr: 0.05,
    other_momentum: 0.85,
};

fn network() -> Model {
    let definition = Definition::parse(NETWORK, "small").unwrap();
    definition.resolve(definition.input, CLASSES).unwrap()
}

/// 32 well-mixed bits for a number.
fn mixed(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// The parameters that PyTorch starts from, each computed from its place in PyTorch's order.
fn parameters(model: &Model) -> Vec<f32> {
    let places: Vec<f32> = (0..model.parameter_elements).map(|i| i as f32).collect();
    let mut flat = vec![0.0; model.parameter_elements];
    for (t, places) in to_pytorch(model, &places).iter().enumerate() {
        for (i, place) in places.values.iter().enumerate() {
            let word = mixed(1_000_003 * (t as u32 + 1) + i as u32) >> 8;
            let value = word as f32 / (1 << 23) as f32 - 1.0;
            flat[*place as usize] = match places.shape.len() {
                1 if places.name == "batch_norm1.weight" => value * 0.25 + 1.0,
                1 => value * 0.25,
                _ => {
                    let inputs: usize = places.shape[1..].iter().product();
                    value * (1.0 / (inputs as f64).sqrt()) as f32
                }
            };
        }
    }
    flat
}

/// The CPU and the software adapter.
fn devices() -> [(&'static str, Option<Arc<Gpu>>); 2] {
    static GPU: LazyLock<Arc<Gpu>> = LazyLock::new(|| {
        let gpu = Gpu::open(&Choice::Best);
        Arc::new(gpu.unwrap_or_else(|e| panic!("expected an adapter: {e}; {NO_ADAPTER_HINT}")))
    });
    [("the CPU", None), ("the adapter", Some(GPU.clone()))]
}

/// An engine before its first step, with the data.
fn engine(gpu: Option<Arc<Gpu>>, model: &Model, rule: &Optimizer, options: &Options) -> Engine {
    let mut engine = Engine::new(gpu, model, BATCH, rule, options).unwrap();
    let len: usize = COUNTS.iter().sum();
    let pixel = |i: usize| (mixed(7 + i as u32) >> 24) as u8;
    let images = (0..len * model.input.elements()).map(pixel).collect();
    let labels: Vec<u32> = (0..len).map(|i| mixed(11 + i as u32) % 3).collect();
    let channels = model.input.channels;
    let normalization = [vec![1.0 / 64.0; channels], vec![-2.0; channels]].concat();
    engine
        .upload_dataset(Split::Train, images, &labels, &normalization)
        .unwrap();
    engine.set_parameters(&parameters(model)).unwrap();
    engine
}

fn steps(rule: &Optimizer, lr: f64) -> Vec<Step> {
    let mut first = 0;
    let step = |(i, count): (usize, &usize)| {
        first += count;
        let scalars = rule.step_scalars(lr * f64::from(RATES[i]), i as u64 + 1);
        Step {
            lr: scalars.lr,
            bias_correction1: scalars.bias_correction1,
            bias_correction2: scalars.bias_correction2,
            average: SHARES[i],
            ..Step::new(first - count, *count)
        }
    };
    COUNTS.iter().enumerate().map(step).collect()
}

/// Takes these steps and tells the mean loss of each.
fn train(engine: &mut Engine, steps: &[Step]) -> Vec<f64> {
    let order: Vec<u32> = (0..COUNTS.iter().sum::<usize>() as u32).collect();
    let metrics = engine.train_epoch(&order, steps, &mut |_| Ok(ControlFlow::Continue(())));
    let losses = metrics.unwrap().into_iter().zip(steps);
    losses
        .map(|(m, step)| f64::from(m.loss_sum) / f64::from(step.count))
        .collect()
}

fn expect_close(what: &str, found: &[Tensor], expected: &[Values]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        let largest = expected.values.iter().map(|v| v.abs()).max().unwrap_or(0);
        let bound = (1e-4 * f64::from(largest) + 0.5) * expected.unit;
        assert_eq!(found.values.len(), expected.values.len());
        for (i, (&found_value, value)) in found.values.iter().zip(&expected.values).enumerate() {
            let expected = f64::from(*value) * expected.unit;
            let error = (f64::from(found_value) - expected).abs();
            // Written so that NaN fails.
            assert!(
                error <= bound,
                "{what}, {}[{i}]: {found_value}, not {expected} ± {bound:.1e}",
                found.name
            );
        }
    }
}

fn check(name: &str, rule: Optimizer, lr: f64, mut options: Options, case: &Case) {
    let model = network();
    options.average = !case.averages.is_empty();
    options.lr = Some(lr);
    for (device, gpu) in devices() {
        let what = format!("{name} on {device}");
        let mut engine = engine(gpu, &model, &rule, &options);
        let losses = train(&mut engine, &steps(&rule, lr));
        for (found, expected) in losses.iter().zip(&case.losses) {
            assert!((found / expected - 1.0).abs() < 1e-5, "{what}: {losses:?}");
        }
        let all = |parameters: &[f32], running: &[f32]| {
            let mut all = to_pytorch(&model, parameters);
            all.extend(running_to_pytorch(&model, running));
            all
        };
        let (parameters, running) = (engine.parameters().unwrap(), engine.running().unwrap());
        expect_close(&what, &all(&parameters, &running), &case.values);
        match engine.average().unwrap() {
            None => assert!(case.averages.is_empty()),
            Some([parameters, running]) => {
                let what = format!("{what}, average");
                expect_close(&what, &all(&parameters, &running), &case.averages);
            }
        }
    }
}

#[test]
fn nesterov_groups_a_frozen_layer_and_clipping_are_those_of_pytorch() {
    let groups = Groups {
        bias_lr: 2.0,
        head_lr: 0.5,
        bias_decay: 0.0,
        freeze: vec!["conv2d1".into()],
    };
    let options = Options {
        groups,
        clip_norm: Some(0.2),
        ..Options::default()
    };
    check("SGD", NESTEROV, 0.05, options, &golden().sgd);
}

#[test]
fn adamw_with_groups_is_that_of_pytorch() {
    let groups = Groups {
        bias_lr: 0.5,
        head_lr: 2.0,
        bias_decay: 0.0,
        ..Groups::default()
    };
    let options = Options {
        groups,
        ..Options::default()
    };
    check("AdamW", ADAMW, 0.01, options, &golden().adamw);
}

#[test]
fn lion_with_groups_is_that_of_its_paper() {
    let groups = Groups {
        bias_lr: 2.0,
        head_lr: 0.5,
        bias_decay: 3.0,
        ..Groups::default()
    };
    let options = Options {
        groups,
        ..Options::default()
    };
    check("Lion", LION, 0.01, options, &golden().lion);
}

#[test]
fn muon_is_that_of_airbench() {
    let groups = Groups {
        bias_lr: 2.0,
        bias_decay: 0.25,
        ..Groups::default()
    };
    let options = Options {
        groups,
        clip_norm: Some(0.5),
        ..Options::default()
    };
    check("Muon", MUON, 0.1, options, &golden().muon);
}

/// Whatever the rule: not a bit of what is frozen changes, nor of its state; all else is trained.
#[test]
fn what_is_frozen_keeps_its_bits() {
    let model = network();
    let options = Options {
        groups: Groups {
            freeze: vec![
                "conv2d1".into(),
                "batch_norm1.bias".into(),
                "dense*.w*".into(),
            ],
            ..Groups::default()
        },
        clip_norm: Some(0.1),
        ..Options::default()
    };
    for (device, gpu) in devices() {
        for rule in [NESTEROV, ADAMW, LION, MUON] {
            let mut engine = engine(gpu.clone(), &model, &rule, &options);
            train(&mut engine, &steps(&rule, 0.01));
            let (before, after) = (parameters(&model), engine.parameters().unwrap());
            let state = engine.optimizer_state().unwrap();
            for p in model.layers.iter().flat_map(|l| &l.parameters) {
                let range = p.start..p.start + p.elements();
                let bits = |values: &[f32]| -> Vec<u32> {
                    values[range.clone()].iter().map(|v| v.to_bits()).collect()
                };
                let frozen =
                    ["conv2d1.weight", "batch_norm1.bias", "dense1.weight"].contains(&&*p.name);
                let what = format!("{} by {rule:?} on {device}", p.name);
                assert_eq!(bits(&before) == bits(&after), frozen, "{what}");
                for state in &state {
                    let still = bits(state).iter().all(|bits| *bits == 0);
                    assert_eq!(still, frozen, "state of {what}");
                }
            }
            // The running statistics go on.
            assert_ne!(
                engine.running().unwrap(),
                initial_running(&model),
                "{device}"
            );
        }
    }
}

/// Below the first layer that is trained there is no way back, and no gradient of a frozen weight.
#[test]
fn the_way_back_ends_where_nothing_is_trained() {
    let model = network();
    let adapter = AdapterReport::imagined(false);
    let kernels = |freeze: &[&str]| {
        let groups = Groups {
            freeze: freeze.iter().map(|f| f.to_string()).collect(),
            ..Groups::default()
        };
        let options = Options {
            groups,
            ..Options::default()
        };
        let plan = Plan::new(
            &model,
            3,
            Mode::Train(NESTEROV),
            &options,
            Target::Gpu(&adapter),
        );
        let plan = plan.unwrap();
        assert_eq!(plan.flaws(), [""; 0]);
        let back = plan.kernels.iter().filter(|(s, _)| *s == Section::Backward);
        back.map(|(_, spec)| format!("{} {}", spec.layer, spec.entry))
            .collect::<Vec<_>>()
    };
    let all = kernels(&[]);
    let has = |kernels: &[String], what: &str| kernels.iter().any(|k| k.starts_with(what));
    assert!(has(&all, "conv2d1 ") && has(&all, "conv2d2 ") && has(&all, "batch_norm1 "));
    let head_only = kernels(&["conv2d*", "batch_norm1", "depthwise"]);
    assert!(
        head_only.iter().all(|k| k.starts_with("dense1 ")),
        "{head_only:?}"
    );
    let middle = kernels(&["conv2d2"]);
    assert!(has(&middle, "conv2d1 conv2d_backward_weight"));
    assert!(has(&middle, "conv2d2 conv2d_backward_input"));
    assert!(!has(&middle, "conv2d2 conv2d_backward_weight"));

    // Where only the head is trained, a step is little more than its way there.
    let definition = model::load("resnet18-cifar").unwrap();
    let model = definition.resolve(definition.input, definition.classes);
    let model = model.unwrap();
    let layers = model.layers.iter().filter(|l| !l.parameters.is_empty());
    let names = layers.map(|l| l.name.clone());
    let freeze = names.filter(|name| *name != "dense1").collect();
    let groups = Groups {
        freeze,
        ..Groups::default()
    };
    let flops = |groups: Groups| -> f64 {
        let options = Options {
            groups,
            ..Options::default()
        };
        let plan = Plan::new(&model, 8, Mode::Train(NESTEROV), &options, Target::Cpu).unwrap();
        plan.specs().map(|spec| spec.cost.flops).sum()
    };
    let share = flops(groups) / flops(Groups::default());
    assert!(share < 0.34, "{share}");
}

/// A gradient shorter than the limit stays as it is, to the bit; one that is NaN makes all NaN.
#[test]
fn clipping_leaves_short_gradients_and_spreads_nan() {
    let model = network();
    for (device, gpu) in devices() {
        let hash = |clip_norm, spoil: bool| {
            let options = Options {
                clip_norm,
                ..Options::default()
            };
            let mut engine = engine(gpu.clone(), &model, &NESTEROV, &options);
            if spoil {
                let mut parameters = parameters(&model);
                let last = model.layers.last().unwrap().range().end - 1;
                parameters[last] = f32::NAN;
                engine.set_parameters(&parameters).unwrap();
            }
            train(&mut engine, &steps(&NESTEROV, 0.05)[..1]);
            engine.parameters().unwrap()
        };
        assert_eq!(hash(None, false), hash(Some(100.0), false), "{device}");
        assert_ne!(hash(None, false), hash(Some(0.1), false), "{device}");
        for layer in &model.layers {
            let spoiled = &hash(Some(100.0), true)[layer.range()];
            assert!(
                spoiled.iter().all(|w| w.is_nan()),
                "{} on {device}",
                layer.name
            );
        }
    }
}

/// The average against one made on the host, step by step; exchanged twice it is as before, to the bit.
#[test]
fn the_average_is_that_of_the_host_and_can_be_exchanged() {
    let model = network();
    let options = Options {
        average: true,
        ..Options::default()
    };
    let recipe = Recipe {
        average: Some(0.6),
        ..Recipe::default()
    };
    let shares: Vec<f32> = (0..5).map(|step| recipe.average_at(step)).collect();
    assert_eq!(shares, [0.1, 2.0 / 11.0, 0.25, 4.0 / 13.0, 5.0 / 14.0]);
    assert_eq!(recipe.average_at(1000), 0.6);
    assert_eq!(Recipe::default().average_at(1000), 0.0);
    for (device, gpu) in devices() {
        let mut engine = engine(gpu, &model, &NESTEROV, &options);
        let held = |engine: &Engine| [engine.parameters().unwrap(), engine.running().unwrap()];
        let mut expected = held(&engine);
        assert_eq!(engine.average().unwrap().unwrap(), expected, "{device}");
        for (i, share) in shares.iter().enumerate() {
            let step = Step {
                average: *share,
                ..steps(&NESTEROV, 0.05)[i % COUNTS.len()]
            };
            train(&mut engine, &[step]);
            for (average, value) in expected
                .iter_mut()
                .flatten()
                .zip(held(&engine).iter().flatten())
            {
                *average = share * *average + (1.0 - share) * value;
            }
        }
        let average = engine.average().unwrap().unwrap();
        for (found, expected) in average.iter().flatten().zip(expected.iter().flatten()) {
            assert!(
                (found - expected).abs() <= 1e-6 * (1.0 + expected.abs()),
                "{device}"
            );
        }
        let raw = held(&engine);
        assert_ne!(raw, average);
        engine.swap_average().unwrap();
        assert_eq!(held(&engine), average, "{device}");
        assert_eq!(engine.average().unwrap().unwrap(), raw, "{device}");
        engine.swap_average().unwrap();
        assert_eq!(held(&engine), raw, "{device}");
        // What a checkpoint does.
        engine.set_average(&raw).unwrap();
        assert_eq!(engine.average().unwrap().unwrap(), raw, "{device}");
    }
}

#[test]
fn without_an_average_there_is_none_to_exchange() {
    let model = network();
    let mut engine = engine(None, &model, &NESTEROV, &Options::default());
    assert_eq!(engine.average().unwrap(), None);
    let message = engine.swap_average().unwrap_err().to_string();
    assert!(message.contains("found none"), "{message}");
}

/// Stopped in the middle and carried on by another engine, a training has the bits of one that was not.
#[test]
fn what_goes_on_has_the_bits_of_what_was_not_interrupted() {
    let model = network();
    let options = Options {
        groups: Groups {
            bias_lr: 2.0,
            ..Groups::default()
        },
        clip_norm: Some(0.2),
        average: true,
        ..Options::default()
    };
    for (device, gpu) in devices() {
        for rule in [NESTEROV, ADAMW, LION, MUON] {
            let steps = steps(&rule, 0.02);
            let new = || engine(gpu.clone(), &model, &rule, &options);
            let held = |engine: &Engine| {
                let mut all = vec![engine.parameters().unwrap(), engine.running().unwrap()];
                all.extend(engine.optimizer_state().unwrap());
                all.extend(engine.average().unwrap().unwrap());
                let bits = all.into_iter().flatten().map(f32::to_bits);
                bits.collect::<Vec<_>>()
            };
            let mut whole = new();
            train(&mut whole, &steps);
            let mut first = new();
            train(&mut first, &steps[..2]);
            let mut second = new();
            second.set_parameters(&first.parameters().unwrap()).unwrap();
            second.set_running(&first.running().unwrap()).unwrap();
            let state = first.optimizer_state().unwrap();
            second.set_optimizer_state(&state).unwrap();
            let average = first.average().unwrap().unwrap();
            second.set_average(&average).unwrap();
            train(&mut second, &steps[2..]);
            assert_eq!(held(&second), held(&whole), "{rule:?} on {device}");
        }
    }
}

/// Clipping, Muon and the average see the gradients of a whole batch, in however many parts it comes.
#[test]
fn a_batch_in_parts_is_updated_once() {
    let text = NETWORK.replace("batch_norm", "layer_norm");
    let definition = Definition::parse(&text, "small").unwrap();
    let model = definition.resolve(definition.input, CLASSES).unwrap();
    let options = Options {
        clip_norm: Some(0.2),
        average: true,
        ..Options::default()
    };
    for (device, gpu) in devices() {
        for rule in [NESTEROV, MUON] {
            let whole_steps = &steps(&rule, 0.05)[..2];
            let mut whole = engine(gpu.clone(), &model, &rule, &options);
            train(&mut whole, whole_steps);
            let micro = Options {
                micro: true,
                ..options.clone()
            };
            let mut parts = engine(gpu.clone(), &model, &rule, &micro);
            let part = |step: &Step, micro: u32| Step {
                first: step.first + 2 * micro,
                count: [2, 4][micro as usize],
                micro,
                ..*step
            };
            let part_steps = whole_steps
                .iter()
                .flat_map(|step| [part(step, 0), part(step, 1)]);
            train(&mut parts, &part_steps.collect::<Vec<_>>());
            let held = |engine: &Engine| {
                let [average, _] = engine.average().unwrap().unwrap();
                [engine.parameters().unwrap(), average]
            };
            for (found, expected) in held(&parts).iter().zip(&held(&whole)) {
                assert_ne!(*found, parameters(&model));
                for (found, expected) in found.iter().zip(expected) {
                    let error = (found - expected).abs();
                    assert!(
                        error <= 2e-5 * (1.0 + expected.abs()),
                        "{rule:?} on {device}"
                    );
                }
            }
        }
    }
}

/// Three steps of Newton and Schulz bring singular values that were an order of magnitude apart near 1: of
/// the weights that start at 0, what is left after an update is the orthogonalised gradient.
#[test]
fn muon_makes_directions_nearly_orthogonal() {
    let model = network();
    for (device, gpu) in devices() {
        let mut engine = engine(gpu, &model, &MUON, &Options::default());
        let before = parameters(&model);
        train(&mut engine, &steps(&MUON, 1.0)[..1]);
        let after = engine.parameters().unwrap();
        for name in ["conv2d1.weight", "conv2d2.weight"] {
            let parameters = model.layers.iter().flat_map(|l| &l.parameters);
            let p = { parameters }.find(|p| p.name == name).unwrap();
            let outputs = p.shape[3];
            let range = p.start..p.start + p.elements();
            let norm = before[range.clone()]
                .iter()
                .map(|w| w * w)
                .sum::<f32>()
                .sqrt();
            let scale = (outputs as f32).sqrt() / norm;
            let moved: Vec<f64> = range
                .map(|i| f64::from(before[i] * scale - after[i]))
                .collect();
            for value in singular_values(&moved, outputs) {
                assert!((0.3..1.3).contains(&value), "{name} on {device}: {value}");
            }
        }
    }
}

/// Of a matrix `[rows, columns]`, the smaller of the two numbers of them: the roots of the eigenvalues of its
/// Gram matrix, by Jacobi's rotations.
fn singular_values(matrix: &[f64], columns: usize) -> Vec<f64> {
    let rows = matrix.len() / columns;
    let side = rows.min(columns);
    let at = |i: usize, t: usize| match side == columns {
        true => matrix[t * columns + i],
        false => matrix[i * columns + t],
    };
    let length = matrix.len() / side;
    let dot = |i: usize, j: usize| (0..length).map(|t| at(i, t) * at(j, t)).sum::<f64>();
    let mut a: Vec<f64> = (0..side * side).map(|i| dot(i / side, i % side)).collect();
    for _ in 0..50 {
        for i in 0..side {
            for j in 0..i {
                let angle = (2.0 * a[i * side + j]).atan2(a[j * side + j] - a[i * side + i]) / 2.0;
                let (sin, cos) = angle.sin_cos();
                for k in 0..side {
                    let (x, y) = (a[i * side + k], a[j * side + k]);
                    (a[i * side + k], a[j * side + k]) = (cos * x - sin * y, sin * x + cos * y);
                }
                for k in 0..side {
                    let (x, y) = (a[k * side + i], a[k * side + j]);
                    (a[k * side + i], a[k * side + j]) = (cos * x - sin * y, sin * x + cos * y);
                }
            }
        }
    }
    (0..side).map(|i| a[i * side + i].sqrt()).collect()
}

/// Muon's products are a small share of a step at a batch of some hundred images, and are products like all
/// others: they have tiles and are counted.
#[test]
fn muon_costs_little_beside_a_step() {
    let definition = model::load("resnet9").unwrap();
    let model = definition
        .resolve(definition.input, definition.classes)
        .unwrap();
    let adapter = AdapterReport::imagined(false);
    let options = Options::default();
    let plan = Plan::new(
        &model,
        256,
        Mode::Train(MUON),
        &options,
        Target::Gpu(&adapter),
    )
    .unwrap();
    let flops = |section: Option<Section>| -> f64 {
        let all = plan.kernels.iter();
        let such = all.filter(|(s, _)| section.is_none_or(|section| *s == section));
        such.map(|(_, spec)| spec.cost.flops).sum()
    };
    let share = flops(Some(Section::Update)) / flops(None);
    assert!(share > 0.0 && share < 0.08, "{share}");
    let untiled = plan.specs().filter(|spec| match &spec.work {
        Work::Product(product) => !product.tile.fits(&adapter),
        _ => false,
    });
    assert_eq!(untiled.count(), 0);
}
