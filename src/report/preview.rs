//! What a training step is shown: images as they are, and as the step's own kernels hand them on.

use crate::cpu::{self, Memory, Values};
use crate::data::Dataset;
use crate::error::Result;
use crate::gpu::{Buffer, Gpu};
use crate::kernels::KernelSpec;
use crate::kernels::mix::MIX_WORDS;
use crate::model::Model;
use crate::model::recipe::Recipe;
use crate::plan::{Mode, Options, Plan, Section, Target};
use crate::train::{sampled_order, step_table};
use std::collections::HashSet;

/// Images of an epoch, `[N][H][W][C]` as bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Preview {
    /// Their numbers in the dataset.
    pub samples: Vec<u32>,
    /// As they are in the dataset.
    pub before: Vec<u8>,
    /// What the network is given, with the normalisation undone.
    pub after: Vec<u8>,
    /// What it is to answer: two labels with their shares, the larger one first, as mix-up and cut-mix
    /// have them; without them the label alone.
    pub targets: Vec<[(u32, f32); 2]>,
}

/// Which images of a training are shown.
#[derive(Clone, Copy, Debug)]
pub struct Excerpt {
    /// Of the training.
    pub seed: u64,
    /// From 1.
    pub epoch: usize,
    /// The first ones of the epoch, at most as many as it has.
    pub count: usize,
}

/// The images of an `excerpt` of a training of `model` on `data`, made batch by batch by the kernels of its plan
/// on the GPU, or without one by their twins. `normalization`: scale per channel, then shift per channel.
///
/// # Errors
/// As [`Plan::new`], and what the device reports.
pub fn preview(
    gpu: Option<&Gpu>,
    model: &Model,
    recipe: &Recipe,
    data: &Dataset,
    normalization: &[f32],
    excerpt: Excerpt,
) -> Result<Preview> {
    let Excerpt { seed, epoch, count } = excerpt;
    // Each batch as a whole, whose images alone go to the device.
    let recipe = Recipe {
        micro_batch: None,
        shards: None,
        batch_size: recipe.batch_size.min(data.len()),
        ..recipe.clone()
    };
    let options = Options {
        streamed: true,
        unshared: true,
        ..Options::of(&recipe)
    };
    let target = match gpu {
        Some(gpu) => Target::Gpu(gpu.report()),
        None => Target::Cpu,
    };
    let mode = Mode::Train(recipe.optimizer);
    let plan = Plan::new(model, recipe.batch_size, mode, &options, target)?;
    let order = sampled_order(recipe.sampler, &data.labels, seed, epoch);
    let kernels: Vec<&KernelSpec> = plan
        .kernels
        .iter()
        .filter_map(|(section, spec)| (*section == Section::Gather).then_some(spec))
        .collect();
    let arguments = kernels.iter().flat_map(|spec| &spec.arguments);
    let used: HashSet<usize> = arguments.map(|a| a.view.tensor).collect();
    let wanted = ["input", "batch_labels", "mixes"].map(|name| plan.tensor(name));
    let wanted: Vec<usize> = wanted.into_iter().flatten().collect();
    let quantiles = options.quantiles().unwrap_or_default();
    let elements = model.input.elements();
    let (scale, shift) = normalization.split_at(model.input.channels);
    let byte = |(x, (scale, shift)): (f32, (&f32, &f32))| ((x - shift) / scale).round() as u8;

    let mut shown = Preview {
        samples: Vec::new(),
        before: Vec::new(),
        after: Vec::new(),
        targets: Vec::new(),
    };
    for mut row in step_table(&recipe, &order, &data.labels, seed, epoch) {
        let (first, images) = (row.first as usize, row.count as usize);
        // Of all images those of this batch are there.
        row.base = row.first;
        let samples = &order[first..first + images];
        let starts = samples.iter().map(|sample| *sample as usize * elements);
        let before: Vec<u8> = starts
            .flat_map(|start| &data.images[start..start + elements])
            .copied()
            .collect();
        let tensors = plan.tensors.iter().enumerate();
        let values: Vec<Values<f32>> = tensors
            .map(|(i, tensor)| match tensor.name.as_str() {
                _ if !used.contains(&i) => Values::zeros(tensor.dtype, 0),
                "images" => {
                    let mut bytes = before.clone();
                    // The last batch may be a smaller one.
                    bytes.resize(recipe.batch_size * elements, 0);
                    Values::Bytes(bytes)
                }
                "labels" => Values::Words(data.labels.clone()),
                "order" => Values::Words(order.clone()),
                "steps" => Values::Words(bytemuck::cast_slice(&[row]).to_vec()),
                "quantiles" => Values::Floats(quantiles.clone()),
                "normalization" => Values::Floats(normalization.to_vec()),
                _ => Values::zeros(tensor.dtype, tensor.elements()),
            })
            .collect();
        let found = match gpu {
            Some(gpu) => on_gpu(gpu, &kernels, &values, &wanted)?,
            None => {
                let mut memory = Memory {
                    places: (0..values.len()).collect(),
                    offsets: vec![0; values.len()],
                    values,
                };
                for spec in &kernels {
                    cpu::run(spec, &mut memory);
                }
                let words = |i: &usize| match &memory.values[*i] {
                    Values::Floats(values) => values.iter().map(|x| x.to_bits()).collect(),
                    Values::Words(words) => words.clone(),
                    Values::Bytes(bytes) => bytes.iter().map(|b| u32::from(*b)).collect(),
                };
                wanted.iter().map(words).collect()
            }
        };
        let x = found[0][..images * elements].iter();
        let x = x.map(|bits| f32::from_bits(*bits));
        let mixes = found.get(2).map(Vec::as_slice).unwrap_or_default();
        let mut mixes = mixes.chunks_exact(MIX_WORDS);
        shown.samples.extend_from_slice(samples);
        shown.before.extend(before);
        let normalization = scale.iter().zip(shift).cycle();
        shown.after.extend(x.zip(normalization).map(byte));
        shown.targets.extend(found[1][..images].iter().map(|label| {
            let (second, share) = match mixes.next() {
                Some([second, share, of, ..]) => (*second, *share as f32 / *of as f32),
                _ => (*label, 1.0),
            };
            [(*label, share), (second, 1.0 - share)]
        }));
        if shown.samples.len() >= count {
            break;
        }
    }
    let count = count.min(shown.samples.len());
    shown.samples.truncate(count);
    shown.targets.truncate(count);
    shown.before.truncate(count * elements);
    shown.after.truncate(count * elements);
    Ok(shown)
}

/// Runs the kernels on tensors that hold these values, and gives the words of some of them afterwards.
fn on_gpu(
    gpu: &Gpu,
    kernels: &[&KernelSpec],
    values: &[Values<f32>],
    wanted: &[usize],
) -> Result<Vec<Vec<u32>>> {
    let upload = |values: &Values<f32>| match values {
        Values::Floats(values) => gpu.upload("preview", values),
        Values::Words(values) => gpu.upload("preview", values),
        Values::Bytes(values) => {
            let mut padded = values.clone();
            padded.resize(values.len().next_multiple_of(4), 0);
            gpu.upload("preview", &padded)
        }
    };
    let empty = |values: &Values<f32>| match values {
        Values::Floats(values) => values.is_empty(),
        Values::Words(values) => values.is_empty(),
        Values::Bytes(values) => values.is_empty(),
    };
    let buffers: Vec<Option<Buffer>> = values
        .iter()
        .map(|values| (!empty(values)).then(|| upload(values)).transpose())
        .collect::<Result<_>>()?;
    let buffer = |tensor: usize| {
        buffers[tensor]
            .clone()
            .expect("what a kernel uses is there")
    };
    let dispatches = kernels
        .iter()
        .map(|spec| gpu.dispatch(spec, |argument| buffer(argument.view.tensor)))
        .collect::<Result<Vec<_>>>()?;
    gpu.submit("preview", &dispatches.iter().collect::<Vec<_>>(), 1)?;
    let words = wanted.iter().map(|i| gpu.read("preview", &buffer(*i)));
    words.collect()
}
