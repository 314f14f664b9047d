//! Batch normalisations as part of the layers before them.

use super::safetensors::{from_pytorch, running_to_pytorch, to_pytorch};
use crate::error::Result;
use crate::model::{Conv2d, Model, Op};
use std::collections::HashMap;

/// A network that gives the same with fewer batch normalisations.
#[derive(Clone, Debug, PartialEq)]
pub struct Folded {
    /// Without them.
    pub model: Model,
    /// Its flat parameter vector.
    pub parameters: Vec<f32>,
    /// Its flat vector of running statistics.
    pub running: Vec<f32>,
    /// Normalisations that are gone.
    pub folded: usize,
    /// Normalisations that stand behind something else than a convolution or a dense layer.
    pub left: usize,
}

/// Multiplies every batch normalisation, with its running statistics, into the convolution or dense layer
/// right before it: `w·f` and `(b − mean)·f + bias` with `f = weight / √(variance + ε)`, in f64, rounded
/// once, so that what the network gives differs by rounding alone. One behind a pooling, behind an
/// activation, or behind what another layer takes too stays.
///
/// # Errors
/// [`crate::Error::Shape`] for vectors that are not as long as the model's.
pub fn fold_batch_norm(model: &Model, parameters: &[f32], running: &[f32]) -> Result<Folded> {
    let mut tensors: HashMap<String, Vec<f32>> = to_pytorch(model, parameters)
        .into_iter()
        .chain(running_to_pytorch(model, running))
        .map(|tensor| (tensor.name, tensor.values))
        .collect();
    let mut take = |layer: &str, what: &str| tensors.remove(&format!("{layer}.{what}"));

    let takers = |value: usize| {
        let inputs = model.layers.iter().flat_map(|layer| &layer.inputs);
        inputs.filter(|input| **input == value).count()
    };
    // For each layer the normalisation that goes into it.
    let mut into = HashMap::new();
    let mut left = 0;
    for (i, layer) in model.layers.iter().enumerate() {
        if let Op::BatchNorm { epsilon, .. } = layer.op {
            let value = layer.inputs[0];
            let before = value.checked_sub(1).map(|i| &model.layers[i]);
            let folds = before.is_some_and(|before| {
                before.op.product().is_some() && before.activation.is_none() && takers(value) == 1
            });
            match folds {
                true => drop(into.insert(value - 1, (i, epsilon))),
                false => left += 1,
            }
        }
    }

    let mut folded = Model::new(&model.name, model.input, model.classes, model.loss);
    let mut kept = Vec::new();
    // For each value of the network the folded one's.
    let mut values = vec![0];
    for (i, layer) in model.layers.iter().enumerate() {
        if into.values().any(|(normalisation, _)| *normalisation == i) {
            values.push(values[layer.inputs[0]]);
            continue;
        }
        let inputs: Vec<usize> = layer.inputs.iter().map(|value| values[*value]).collect();
        let name = Some(layer.name.clone());
        let Some((normalisation, epsilon)) = into.get(&i) else {
            for parameter in layer.parameters.iter().chain(&layer.running) {
                let what = &parameter.name[layer.name.len() + 1..];
                kept.extend(take(&layer.name, what).map(|values| (parameter.name.clone(), values)));
            }
            values.push(folded.push(name, layer.op, layer.activation, None, &inputs)?);
            continue;
        };
        let normalisation = &model.layers[*normalisation];
        let op = match layer.op {
            Op::Conv2d(g) => Op::Conv2d(Conv2d { bias: true, ..g }),
            Op::Dense(g) => Op::Dense(Conv2d { bias: true, ..g }),
            op => op,
        };
        values.push(folded.push(name, op, normalisation.activation, None, &inputs)?);

        let outputs = layer.output.channels;
        let mut of = |layer: &str, what: &str, default: f64| match take(layer, what) {
            Some(values) => values.into_iter().map(f64::from).collect(),
            None => vec![default; outputs],
        };
        let [scale, shift, mean, variance] = [
            ("weight", 1.0),
            ("bias", 0.0),
            ("running_mean", 0.0),
            ("running_var", 1.0),
        ]
        .map(|(what, default)| of(&normalisation.name, what, default));
        let bias = of(&layer.name, "bias", 0.0);
        let mut weight = of(&layer.name, "weight", 0.0);
        let factor = |o: usize| scale[o] / (variance[o] + f64::from(*epsilon)).sqrt();
        let row = weight.len() / outputs;
        for (o, row) in weight.chunks_mut(row).enumerate() {
            row.iter_mut().for_each(|w| *w *= factor(o));
        }
        let bias = (0..outputs).map(|o| (bias[o] - mean[o]) * factor(o) + shift[o]);
        let narrow = |values: Vec<f64>| values.into_iter().map(|v| v as f32).collect();
        kept.push((format!("{}.weight", layer.name), narrow(weight)));
        kept.push((format!("{}.bias", layer.name), narrow(bias.collect())));
    }
    let folded = folded.finish()?;
    let [parameters, running] = from_pytorch(&folded, &kept)?;
    Ok(Folded {
        model: folded,
        parameters,
        running,
        folded: into.len(),
        left,
    })
}
