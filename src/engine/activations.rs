//! What every layer gives for one image: for pages and reports, on the CPU, which is fast enough for that.

use super::expect_dataset;
use crate::cpu::{Memory, Values, fast};
use crate::error::Result;
use crate::kernels::Step;
use crate::model::{Model, Shape};
use crate::plan::{Mode, Options, Plan, Target};

/// A layer's output for one image.
#[derive(Clone, Debug, PartialEq)]
pub struct Activation {
    /// The layer's name; `input` for the normalised image.
    pub layer: String,
    /// Of the values.
    pub shape: Shape,
    /// `[H, W, C]`.
    pub values: Vec<f32>,
}

/// The input and every layer's output (behind its activation function) for one image, as an evaluation
/// computes them. `parameters` and `running` are flat, see [`crate::model::Layer`]; `normalization` is a scale
/// per channel, then a shift per channel; `image` is H×W×C bytes.
///
/// # Errors
/// [`crate::Error::Shape`] where a length does not fit the model.
pub fn activations(
    model: &Model,
    parameters: &[f32],
    running: &[f32],
    normalization: &[f32],
    image: &[u8],
) -> Result<Vec<Activation>> {
    expect_dataset(model, image, &[0], normalization)?;
    let expect = |what, expected, found| super::expect_len("activations", what, expected, found);
    expect("parameters", model.parameter_elements, parameters.len())?;
    expect("running statistics", model.running_elements, running.len())?;
    // Nothing is computed along, and nothing takes the place of what was there before.
    let options = Options {
        unfused: true,
        unshared: true,
        ..Options::default()
    };
    let plan = Plan::new(model, 1, Mode::Evaluate, &options, Target::Cpu)?;
    let tensors = plan.tensors.iter();
    let values: Vec<Values<f32>> = tensors
        .map(|tensor| match tensor.name.as_str() {
            "images" => Values::Bytes(image.to_vec()),
            "steps" => Values::Words(bytemuck::cast_slice(&[Step::new(0, 1)]).to_vec()),
            "parameters" => Values::Floats(parameters.to_vec()),
            "running" => Values::Floats(running.to_vec()),
            "normalization" => Values::Floats(normalization.to_vec()),
            _ => Values::zeros(tensor.dtype, tensor.elements()),
        })
        .collect();
    let mut memory = Memory {
        places: (0..values.len()).collect(),
        offsets: vec![0; values.len()],
        values,
    };
    let scratch = fast::Scratch::default();
    for spec in plan.specs() {
        fast::run(spec, &mut memory, &scratch);
    }
    let names = model.layers.iter().map(|layer| layer.name.as_str());
    let named = std::iter::once("input").chain(names).enumerate();
    Ok(named
        .map(|(value, layer)| Activation {
            layer: layer.into(),
            shape: model.shape(value),
            values: memory.floats(plan.values[value]).to_vec(),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Engine, Split};
    use crate::model::recipe::Optimizer;
    use crate::model::{initial_parameters, initial_running, load};

    /// Of every model that ships: the last layer's values are the logits that an evaluation gives, and behind
    /// a ReLU none is negative.
    #[test]
    fn the_last_activations_are_the_logits_of_an_evaluation() {
        for (name, shape) in [
            ("default", Shape::new(28, 28, 1)),
            ("mlp-sigmoid", Shape::new(28, 28, 1)),
            ("resnet18-cifar", Shape::new(16, 16, 3)),
            ("mobilenet-small", Shape::new(32, 32, 3)),
        ] {
            let definition = load(name).unwrap();
            let model = definition.resolve(shape, 5).unwrap();
            let [parameters, running] = [initial_parameters(&model, 3), initial_running(&model)];
            let normalization =
                [vec![1.0 / 64.0; shape.channels], vec![-2.0; shape.channels]].concat();
            let image: Vec<u8> = (0..shape.elements())
                .map(|i| (i * 37 % 251) as u8)
                .collect();
            let found = activations(&model, &parameters, &running, &normalization, &image).unwrap();
            assert_eq!(found.len(), model.layers.len() + 1);
            for (value, activation) in found.iter().enumerate() {
                assert_eq!(activation.shape, model.shape(value), "{name}");
                assert_eq!(activation.values.len(), activation.shape.elements());
            }
            assert_eq!(found[0].values[1], f32::from(image[1]) / 64.0 - 2.0);

            let options = Options {
                keep_logits: true,
                ..Options::default()
            };
            let rule = Optimizer::Sgd {
                momentum: 0.0,
                nesterov: false,
                weight_decay: 0.0,
            };
            let mut engine = Engine::new(None, &model, 1, &rule, &options).unwrap();
            engine.set_parameters(&parameters).unwrap();
            engine.set_running(&running).unwrap();
            engine
                .upload_dataset(Split::Test, image, &[0], &normalization)
                .unwrap();
            let logits = engine
                .evaluate(Split::Test, &mut |_| std::ops::ControlFlow::Continue(()))
                .unwrap()
                .logits
                .unwrap();
            let last = &found.last().unwrap().values;
            for (a, b) in last.iter().zip(&logits) {
                assert!((a - b).abs() <= 1e-4 * (1.0 + b.abs()), "{name}: {a} {b}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let definition = load("default").unwrap();
        let model = definition.resolve(Shape::new(28, 28, 1), 10).unwrap();
        let parameters = initial_parameters(&model, 1);
        let run = |parameters: &[f32], running: &[f32], normalization: &[f32], image: &[u8]| {
            let error = activations(&model, parameters, running, normalization, image);
            error.unwrap_err().to_string()
        };
        let image = [0; 784];
        for (message, what) in [
            (
                run(&parameters[1..], &[], &[1.0, 0.0], &image),
                "parameters",
            ),
            (
                run(&parameters, &[0.0], &[1.0, 0.0], &image),
                "running statistics",
            ),
            (run(&parameters, &[], &[1.0], &image), "scale and a shift"),
            (run(&parameters, &[], &[1.0, 0.0], &image[1..]), "images of"),
        ] {
            assert!(message.contains(what), "{message}");
        }
    }
}
