//! Whole steps of training and evaluation, in every way that the adapter can plan them: every tensor
//! after every kernel, and ten steps on end.

use super::parity::{
    BEYOND, BEYOND_FINITE, Comparison, Expected, GUARD, GUARD_WORDS, Outcome, POISON, Tolerance,
    WORD_POISON, compare_elements, pack_halves, unpack_halves,
};
use crate::cpu::{self, Memory, Twins, Values, fast};
use crate::engine::{Engine, Split};
use crate::error::Result;
use crate::gpu::{AdapterReport, Buffer, Dispatch, Gpu};
use crate::kernels::conv2d::{Family, Product};
use crate::kernels::half::LOSS_SCALE;
use crate::kernels::{Access, Argument, Dtype, KernelSpec, Step, Work};
use crate::model::augment::{Augment, Border, Flip};
use crate::model::recipe::{Groups, Optimizer, Precision, Views};
use crate::model::{Definition, Model, initial_parameters, initial_running};
use crate::plan::{self, Lifetime, Mode, Options, Plan, Section, Target};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

const STEPS: usize = 10;
const BATCH: usize = 6;
/// Neither of the evaluation's batches divides it.
const TEST_IMAGES: usize = 5 * BATCH + 2;
const CLASSES: usize = 5;
const VALID: &str = "the models of this list are valid";

/// Every kind of layer in every kind of neighbourhood, in small.
fn models() -> Vec<Model> {
    let model = |name, input: [usize; 3], loss, layers| {
        let text = format!(
            "name = \"{name}\"\ninput = {input:?}\nclasses = {CLASSES}\nloss = \"{loss}\"\n
             recipe = {{ optimizer = \"sgd\", lr = 0.05, schedule = \"constant\", epochs = 1, batch_size = {BATCH} }}\n
             layer = [{layers}]"
        );
        let definition = Definition::parse(&text, name).expect(VALID);
        definition.resolve(definition.input, CLASSES).expect(VALID)
    };
    vec![
        model(
            "residual",
            [9, 10, 3],
            "softmax_cross_entropy",
            r#"{ type = "conv2d", out_channels = 8, kernel = 3, padding = "same", bias = false },
               { type = "batch_norm", activation = "relu", name = "stem" },
               { type = "conv2d", out_channels = 8, kernel = 3, dilation = 2, padding = 2, bias = false },
               { type = "batch_norm", name = "main" },
               { type = "add", inputs = ["main", "stem"], activation = "relu" },
               { type = "max_pool2d", kernel = 3, stride = 2, padding = 1 },
               { type = "conv2d", out_channels = 12, kernel = 3, groups = 4, padding = 1, activation = "leaky_relu" },
               { type = "group_norm", groups = 3, activation = "gelu", name = "normed" },
               { type = "conv2d", groups = "depthwise", kernel = 3, padding = 1, activation = "tanh", name = "depthwise" },
               { type = "concat", inputs = ["normed", "depthwise"] },
               { type = "dropout", probability = 0.3 },
               { type = "mean_pool2d", kernel = 3, stride = 2, padding = 1, count_include_pad = false },
               { type = "dense", units = "classes" }"#,
        ),
        model(
            "squeezed",
            [8, 7, 2],
            "softmax_cross_entropy",
            r#"{ type = "conv2d", out_channels = 6, kernel = 1, activation = "gelu_tanh" },
               { type = "layer_norm", activation = "silu", name = "map" },
               { type = "global_average_pool2d" },
               { type = "dense", units = 4, activation = "relu" },
               { type = "dense", units = 6, activation = "sigmoid", name = "factors" },
               { type = "scale", inputs = ["map", "factors"], activation = "hard_swish" },
               { type = "conv2d", groups = "depthwise", kernel = [3, 2], stride = 2, bias = false, activation = "relu" },
               { type = "flatten" },
               { type = "dense", units = 9, bias = false },
               { type = "dense", units = "classes" }"#,
        ),
        // Elements and channels in fours where the models above have them otherwise, and the other way round.
        model(
            "odd",
            [5, 7, 3],
            "softmax_cross_entropy",
            r#"{ type = "conv2d", out_channels = 3, kernel = 3, padding = 1, activation = "leaky_relu", slope = -0.2, name = "leaky" },
               { type = "conv2d", out_channels = 3, kernel = 1, activation = "hard_swish", name = "hard" },
               { type = "add", inputs = ["leaky", "hard", "leaky"] },
               { type = "conv2d", out_channels = 4, kernel = 1, name = "map" },
               { type = "global_average_pool2d" },
               { type = "dense", units = 4, activation = "sigmoid", name = "factors" },
               { type = "scale", inputs = ["map", "factors"] },
               { type = "mean_pool2d", kernel = 2, ceil_mode = true },
               { type = "dense", units = "classes" }"#,
        ),
        model(
            "fused",
            [14, 13, 1],
            "softmax_cross_entropy",
            r#"{ type = "conv2d", out_channels = 8, kernel = 3, padding = 1, activation = "relu" },
               { type = "max_pool2d", kernel = 2 },
               { type = "conv2d", out_channels = 12, kernel = [3, 2] },
               { type = "max_pool2d", kernel = 2 },
               { type = "dense", units = 20, activation = "relu" },
               { type = "dense", units = "classes" }"#,
        ),
        model(
            "uneven",
            [13, 15, 3],
            "softmax_cross_entropy",
            r#"{ type = "conv2d", out_channels = 5, kernel = 3, stride = 2, padding = 1 },
               { type = "relu" },
               { type = "max_pool2d", kernel = 3, stride = 2 },
               { type = "conv2d", out_channels = 7, kernel = 2, padding = 1, activation = "relu" },
               { type = "mean_pool2d", kernel = 2 },
               { type = "dense", units = "classes" }"#,
        ),
        model(
            "sigmoid",
            [9, 8, 1],
            "squared_error",
            r#"{ type = "conv2d", out_channels = 6, kernel = 3, padding = 1, activation = "relu" },
               { type = "sigmoid" },
               { type = "max_pool2d", kernel = 2 },
               { type = "dense", units = 11, activation = "relu" },
               { type = "relu" },
               { type = "dense", units = "classes" },
               { type = "sigmoid" }"#,
        ),
    ]
}

/// A way to plan a step, and what to call it.
struct Way<'a> {
    name: String,
    options: Options,
    /// `None`: for the CPU.
    adapter: Option<&'a AdapterReport>,
}

impl Way<'_> {
    fn plan(&self, model: &Model, mode: Mode) -> Result<Plan> {
        let target = self.adapter.map_or(Target::Cpu, Target::Gpu);
        Plan::new(model, BATCH, mode, &apart(&self.options), target)
    }
}

/// The same with every tensor in memory of its own, where it can be looked at after each kernel. How
/// tensors share memory is for [`Plan::flaws`] to judge, and for the steps that run in one go.
fn apart(options: &Options) -> Options {
    Options {
        unshared: true,
        ..options.clone()
    }
}

/// What all plans of a model have in common: some train on a loss that is smoothed and weighted, and on parts of
/// batches or on shards, some on images that are changed at random or mixed, in groups, with clipped gradients and a moving average;
/// some are evaluated in several views, and keep their logits.
fn options(model: &Model) -> Options {
    let weighted = model.name == "squeezed";
    let grouped = model.name == "uneven";
    let sharded = model.name == "residual";
    let groups = Groups {
        bias_lr: 2.0,
        head_lr: 0.5,
        bias_decay: 0.25,
        freeze: vec!["conv2d2.weight".into()],
    };
    let augment = Augment {
        rotate: 20.0,
        scale: 0.2,
        flip: Flip::Alternating,
        crop: 1,
        border: Border::Reflect,
        erase: 0.5,
        saturation: 0.5,
        elastic: 0.5,
        ..Augment::default()
    };
    Options {
        augment: match model.name.as_str() {
            "uneven" => augment,
            "odd" => Augment {
                mix_up: 0.4,
                cut_mix: 1.0,
                ..Augment::default()
            },
            _ => Augment::default(),
        },
        label_smoothing: if weighted { 0.1 } else { 0.0 },
        class_weights: weighted.then(|| vec![1.5, 0.5, 1.0, 2.0, 0.25]),
        views: match model.name.as_str() {
            "odd" => Views::Six,
            "residual" => Views::Mirror,
            _ => Views::One,
        },
        keep_logits: model.name == "odd",
        large_evaluation: Some(false),
        micro: weighted || sharded,
        shards: sharded.then_some(3),
        groups: if grouped { groups } else { Groups::default() },
        clip_norm: grouped.then_some(0.5),
        average: grouped,
        ..Options::default()
    }
}

/// The modes in which every kernel of a model's steps is looked at.
fn modes(model: &Model) -> Vec<Mode> {
    let mut modes = vec![ADAMW, Mode::Evaluate];
    match model.name.as_str() {
        "odd" => modes.push(Mode::Train(MUON)),
        "uneven" => modes.push(LION),
        _ => {}
    }
    modes
}

/// The rules by which a model is trained in one go.
fn rules(model: &Model) -> Vec<Optimizer> {
    let muon = (model.name == "odd").then_some(MUON);
    std::iter::once(RULE).chain(muon).collect()
}

/// The ways in which a step of `model` can be planned for the CPU and for `adapter`, as far as they differ.
fn ways<'a>(model: &Model, adapter: Option<&'a AdapterReport>) -> Result<Vec<Way<'a>>> {
    let families = Family::ALL.into_iter();
    let families = families.filter(|f| adapter.is_some_and(|adapter| f.supported(adapter)));
    let devices = families.map(|family| (family.to_string(), Some(family), adapter));
    let mut ways: Vec<Way> = Vec::new();
    for (device, family, adapter) in std::iter::once(("cpu".into(), None, None)).chain(devices) {
        let options = Options {
            family,
            ..options(model)
        };
        let unfused = Options {
            unfused: true,
            ..options.clone()
        };
        let explicit = Options {
            explicit_conv: true,
            ..options.clone()
        };
        let mixed = Options {
            precision: Precision::Mixed,
            ..options.clone()
        };
        let synced = |options: &Options| Options {
            sync_batch_norm: true,
            ..options.clone()
        };
        let (synced, synced_mixed) = (synced(&options), synced(&mixed));
        let can_mix = adapter.is_none_or(|adapter| adapter.shader_f16);
        let can_float = family != Some(Family::Matrix);
        let mut seen: Vec<Plan> = Vec::new();
        for (options, name) in [
            (options, "fused"),
            (unfused, "unfused"),
            (explicit, "explicit convolution"),
            (mixed, "mixed precision"),
            (synced, "synced batch-norm"),
            (synced_mixed, "synced batch-norm in mixed precision"),
        ] {
            let can = match options.precision {
                Precision::F32 => can_float,
                Precision::Mixed => can_mix,
            };
            if !can {
                continue;
            }
            let way = Way {
                name: format!("model '{}', {device}, {name}", model.name),
                options,
                adapter,
            };
            let plan = way.plan(model, SGD)?;
            if seen.iter().all(|other| other.kernels != plan.kernels) {
                ways.push(way);
            }
            seen.push(plan);
        }
    }
    Ok(ways)
}

/// Runs a few small models in every way that they can be planned: for the CPU, and on `gpu` by every
/// family, fused and not, with the im2col matrix computed and stored.
///
/// First kernel by kernel, training and evaluating: every tensor that a kernel writes is held against
/// what its twin makes in f64 of the same inputs, and nothing else may have changed in the memory, which
/// was poisoned before and has guard words behind every tensor. The first kernel that is out is named.
///
/// Then in one go: ten steps of plain SGD (one model's by Muon, too) (whose steps are as large as the gradients, so that a wrong
/// scale shows; Adam would hide it) from the same parameters on the same samples as the twins carry out
/// the simplest plan, and an evaluation afterwards, in small and in large batches. Compares all losses, all
/// gradients of the first step and of the last, the evaluation's loss and every prediction.
///
/// `progress` hears what comes next.
///
/// # Errors
/// What the device reports; a difference out of tolerance is an [`Outcome`], not an error.
pub fn steps(gpu: Option<&Arc<Gpu>>, progress: &mut dyn FnMut(&str)) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for model in models() {
        let data = Data::of(&model);
        let mut references: Vec<Reference> = Vec::new();
        for way in ways(&model, gpu.map(|gpu| gpu.report()))? {
            progress(&way.name);
            let gpu = gpu.filter(|_| way.adapter.is_some());
            for mode in modes(&model) {
                let plan = way.plan(&model, mode)?;
                let device = |twins: &_| -> Result<Box<dyn Device>> {
                    Ok(match gpu {
                        Some(gpu) => Box::new(OnGpu::of(gpu, twins)?),
                        None => Box::new(Fast::of(twins)),
                    })
                };
                outcomes.push(each_kernel(&data, plan, mode, &way.name, device)?);
            }
            let kind = Kind {
                precision: way.options.precision,
                synced: way.options.sync_batch_norm,
            };
            if references.iter().all(|r| r.kind != kind) {
                for rule in rules(&model) {
                    references.push(Reference::of(&data, rule, kind)?);
                }
            }
            for reference in references.iter().filter(|r| r.kind == kind) {
                outcomes.extend(in_one_go(reference, &way, gpu)?);
            }
        }
    }
    Ok(outcomes)
}

/// A training step of `model` as `options` have it planned for `gpu`, kernel by kernel as in [`steps`], on a
/// batch of a few images.
///
/// # Errors
/// As [`steps`], and as [`Plan::new`].
pub fn step_of(gpu: &Arc<Gpu>, model: &Model, options: &Options) -> Result<Outcome> {
    let data = Data {
        class_weights: options.class_weights.clone(),
        quantiles: options.quantiles(),
        ..Data::of(model)
    };
    let (options, target) = (apart(options), Target::Gpu(gpu.report()));
    let plan = Plan::new(model, BATCH, ADAMW, &options, target)?;
    each_kernel(&data, plan, ADAMW, &model.name, |twins| {
        Ok(Box::new(OnGpu::of(gpu, twins)?))
    })
}

const SGD: Mode = Mode::Train(RULE);
const RULE: Optimizer = Optimizer::Sgd {
    momentum: 0.0,
    nesterov: false,
    weight_decay: 0.0,
};
const MUON: Optimizer = Optimizer::Muon {
    momentum: 0.6,
    weight_decay: 0.01,
    other_lr: 0.05,
    other_momentum: 0.85,
};
const LION: Mode = Mode::Train(Optimizer::Lion {
    beta1: 0.7,
    beta2: 0.9,
    weight_decay: 0.01,
});
const ADAMW: Mode = Mode::Train(Optimizer::Adamw {
    beta1: 0.7,
    beta2: 0.9,
    epsilon: 1e-8,
    weight_decay: 0.01,
});

/// Images that are random bytes, and their labels.
struct Images {
    images: Vec<u8>,
    labels: Vec<u32>,
}

impl Images {
    fn draw(rng: &mut ChaCha8Rng, model: &Model, len: usize) -> Images {
        Images {
            images: (0..len * model.input.elements())
                .map(|_| rng.random())
                .collect(),
            labels: (0..len)
                .map(|_| rng.random_range(0..model.classes as u32))
                .collect(),
        }
    }
}

/// What a training of `model` starts from.
struct Data<'a> {
    model: &'a Model,
    train: Images,
    test: Images,
    order: Vec<u32>,
    /// Batches of one step, or of as many as a model has shards; the last is not full, and has one.
    steps: Vec<Step>,
    /// Scale and shift of every channel.
    normalization: Vec<f32>,
    class_weights: Option<Vec<f32>>,
    quantiles: Option<Vec<f32>>,
    parameters: Vec<f32>,
}

impl Data<'_> {
    fn of(model: &Model) -> Data<'_> {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let len = STEPS * BATCH - 2;
        let shards = options(model).shards.unwrap_or(1);
        let count = |row| BATCH.min(len - row * BATCH);
        let normalization = [1.0 / 128.0, -1.0].map(|value| vec![value; model.input.channels]);
        Data {
            model,
            train: Images::draw(&mut rng, model, len),
            test: Images::draw(&mut rng, model, TEST_IMAGES),
            order: (0..len as u32).rev().collect(),
            steps: (0..STEPS)
                .map(|i| {
                    let first = i / shards * shards;
                    let rows = first..STEPS.min(first + shards);
                    Step {
                        lr: 0.05,
                        seed: 11,
                        epoch: 2,
                        average: 0.7,
                        micro: (i - first) as u32,
                        shards: rows.len() as u32,
                        share: 1.0 / rows.len() as f32,
                        total: rows.map(count).sum::<usize>() as f32,
                        ..Step::new(i * BATCH, count(i))
                    }
                })
                .collect(),
            normalization: normalization.concat(),
            class_weights: options(model).class_weights,
            quantiles: options(model).quantiles(),
            parameters: initial_parameters(model, 3),
        }
    }

    fn upload(&self, engine: &mut Engine, split: Split, images: &Images) -> Result<()> {
        let (labels, images) = (&images.labels, images.images.clone());
        engine.upload_dataset(split, images, labels, &self.normalization)
    }

    /// The twins of `plan` before their first step, on some steps.
    fn twins(&self, plan: Plan, images: &Images, order: &[u32], steps: &[Step]) -> Twins<f64> {
        let mut twins = Twins::new(plan, order.len());
        *twins.values("images") = Values::Bytes(images.images.clone());
        *twins.words("labels") = images.labels.clone();
        *twins.words("order") = order.to_vec();
        *twins.words("steps") = bytemuck::cast_slice(steps).to_vec();
        *twins.floats("normalization") = wide(&self.normalization);
        *twins.floats("parameters") = wide(&self.parameters);
        *twins.floats("running") = wide(&initial_running(self.model));
        let given = [
            ("class_weights", &self.class_weights),
            ("quantiles", &self.quantiles),
        ];
        for (name, values) in given {
            if let Some(values) = values
                && twins.plan.tensor(name).is_some()
            {
                *twins.floats(name) = wide(values);
            }
        }
        // Of all rules only Muon asks for other ones than the rest.
        let is_muon = |spec: &KernelSpec| spec.work == Work::MuonScale;
        let rule = match twins.plan.specs().any(is_muon) {
            true => MUON,
            false => RULE,
        };
        if twins.plan.tensor("factors").is_some() {
            let factors = plan::factors(self.model, &rule, &options(self.model));
            let factors = factors.expect(VALID).unwrap_or_default();
            *twins.floats("factors") = wide(&factors);
        }
        if twins.plan.tensor("loss_scale").is_some() {
            *twins.floats("loss_scale") = wide(&LOSS_SCALE);
        }
        if twins.plan.tensor("average_parameters").is_some() {
            *twins.floats("average_parameters") = wide(&self.parameters);
            *twins.floats("average_running") = wide(&initial_running(self.model));
        }
        twins
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

/// What carries out the kernels of a plan, in memory whose places are those of the twins, as words with
/// the guard behind them; halves as the floats that they are.
trait Device {
    fn write(&mut self, place: usize, words: &[u32]) -> Result<()>;
    fn read(&mut self, place: usize, words: &mut Vec<u32>) -> Result<()>;
    /// The kernel of that number in the plan.
    fn run(&mut self, number: usize, spec: &KernelSpec) -> Result<()>;
}

/// Every kernel is bound to its tensors with everything that lies behind them.
struct OnGpu<'a> {
    gpu: &'a Gpu,
    buffers: Vec<Buffer>,
    /// Elements of those that hold halves.
    halves: Vec<Option<usize>>,
    dispatches: Vec<Dispatch>,
}

impl OnGpu<'_> {
    fn of<'a>(gpu: &'a Gpu, twins: &Twins<f64>) -> Result<OnGpu<'a>> {
        let plan = &twins.plan;
        let mut halves = vec![None; twins.memory.values.len()];
        for (tensor, place) in plan.tensors.iter().zip(&twins.memory.places) {
            if tensor.dtype == Dtype::F16 {
                halves[*place] = Some(words(&twins.memory.values[*place]).len());
            }
        }
        let values = twins.memory.values.iter().zip(&halves);
        let buffers = values.map(|(v, halves)| {
            let words = halves.map_or_else(|| words(v).len(), |len| Dtype::F16.words(len));
            gpu.buffer("verify step", words + GUARD_WORDS)
        });
        let buffers: Vec<_> = buffers.collect::<Result<_>>()?;
        let dispatches = plan.specs().map(|spec| {
            gpu.dispatch(spec, |argument| {
                let view = argument.view;
                let buffer = &buffers[twins.memory.places[view.tensor]];
                // A dataset is longer than a step knows.
                match plan.tensors[view.tensor].lifetime {
                    Lifetime::Data => buffer.clone(),
                    _ => buffer
                        .slice(view.start, buffer.len() - view.start)
                        .head(view.dtype.words(view.len)),
                }
            })
        });
        Ok(OnGpu {
            dispatches: dispatches.collect::<Result<_>>()?,
            gpu,
            buffers,
            halves,
        })
    }
}

impl Device for OnGpu<'_> {
    fn write(&mut self, place: usize, words: &[u32]) -> Result<()> {
        let buffer = &self.buffers[place];
        match self.halves[place] {
            None => self.gpu.write("verify step", buffer, words),
            Some(len) => {
                let (floats, behind) = words.split_at(len);
                let words = [&pack_halves(floats)[..], behind].concat();
                self.gpu.write("verify step", buffer, &words)
            }
        }
    }

    fn read(&mut self, place: usize, words: &mut Vec<u32>) -> Result<()> {
        *words = self.gpu.read("verify step", &self.buffers[place])?;
        if let Some(len) = self.halves[place] {
            *words = unpack_halves(words, len);
        }
        Ok(())
    }

    fn run(&mut self, number: usize, spec: &KernelSpec) -> Result<()> {
        let dispatch = &self.dispatches[number];
        self.gpu.submit(spec.entry, &[dispatch], 1).map(|_| ())
    }
}

/// The faster functions of the CPU, which cannot write to a guard.
struct Fast {
    memory: Memory<f32>,
    scratch: fast::Scratch,
}

impl Fast {
    fn of(twins: &Twins<f64>) -> Fast {
        let narrow = |values: &Values<f64>| match values {
            Values::Floats(v) => Values::Floats(v.iter().map(|v| *v as f32).collect()),
            Values::Words(v) => Values::Words(v.clone()),
            Values::Bytes(v) => Values::Bytes(v.clone()),
        };
        Fast {
            memory: Memory {
                places: twins.memory.places.clone(),
                offsets: twins.memory.offsets.clone(),
                values: twins.memory.values.iter().map(narrow).collect(),
            },
            scratch: fast::Scratch::default(),
        }
    }
}

impl Device for Fast {
    fn write(&mut self, place: usize, words: &[u32]) -> Result<()> {
        set(&mut self.memory.values[place], 0, words);
        Ok(())
    }

    fn read(&mut self, place: usize, found: &mut Vec<u32>) -> Result<()> {
        let elements = words(&self.memory.values[place]);
        found[..elements.len()].copy_from_slice(&elements);
        Ok(())
    }

    fn run(&mut self, _: usize, spec: &KernelSpec) -> Result<()> {
        fast::run(spec, &mut self.memory, &self.scratch);
        Ok(())
    }
}

/// As they lie on a device, without a guard.
fn words<T: cpu::Float>(values: &Values<T>) -> Vec<u32> {
    match values {
        Values::Floats(values) => {
            let bits = |v: &T| (<T as Into<f64>>::into(*v) as f32).to_bits();
            values.iter().map(bits).collect()
        }
        Values::Words(words) => words.clone(),
        Values::Bytes(bytes) => {
            let mut padded = bytes.clone();
            padded.resize(bytes.len().next_multiple_of(4), 0);
            bytemuck::pod_collect_to_vec(&padded)
        }
    }
}

/// Puts `words` into the values from that word on, as far as these reach.
fn set<T: cpu::Float>(values: &mut Values<T>, start: usize, words: &[u32]) {
    match values {
        Values::Floats(values) => {
            let floats = words
                .iter()
                .map(|w| <T as From<f32>>::from(f32::from_bits(*w)));
            values[start..]
                .iter_mut()
                .zip(floats)
                .for_each(|(v, new)| *v = new);
        }
        Values::Words(values) => {
            let new = words.iter();
            values[start..]
                .iter_mut()
                .zip(new)
                .for_each(|(v, new)| *v = *new);
        }
        Values::Bytes(values) => {
            let new = bytemuck::cast_slice::<u32, u8>(words);
            values[4 * start..]
                .iter_mut()
                .zip(new)
                .for_each(|(v, new)| *v = *new);
        }
    }
}

/// How far an element may be from its reference, as a share of the tensor's largest: the cases hold each
/// kernel to more; here the right tensors must meet.
const SHARE: f64 = 2e-5;

/// Two steps, kernel by kernel: a full batch, and one that is not.
fn each_kernel<'a>(
    data: &Data,
    plan: Plan,
    mode: Mode,
    variant: &str,
    device: impl FnOnce(&Twins<f64>) -> Result<Box<dyn Device + 'a>>,
) -> Result<Outcome> {
    let mut steps = [data.steps[0], data.steps[STEPS - 1]];
    if plan.tensor("accumulated").is_some() {
        for (i, step) in steps.iter_mut().enumerate() {
            (step.micro, step.shards, step.total) = (i as u32, i as u32 + 1, step.count as f32);
            step.share = 1.0 / step.shards as f32;
        }
    }
    let name = match mode {
        Mode::Train(rule) => {
            for (i, step) in steps.iter_mut().enumerate() {
                let scalars = rule.step_scalars(f64::from(step.lr), i as u64 + 1);
                step.bias_correction1 = scalars.bias_correction1;
                step.bias_correction2 = scalars.bias_correction2;
            }
            "training, each kernel"
        }
        Mode::Evaluate => "evaluation, each kernel",
    };
    let twins = data.twins(plan, &data.train, &data.order, &steps);
    let device = device(&twins)?;
    let mut run = Run::new(twins, device)?;
    let kernels = run.twins.plan.kernels.clone();
    let mut worst: Option<Comparison> = None;
    let mut tensors = 0;
    'steps: for step in 1..=steps.len() {
        for (number, (_, spec)) in kernels.iter().enumerate() {
            for mut comparison in run.kernel(number, spec)? {
                tensors += 1;
                comparison.failure = comparison.failure.map(|what| {
                    let of = match spec.layer.as_str() {
                        "" => String::new(),
                        layer => format!(" of '{layer}'"),
                    };
                    format!("step {step}, kernel {number}, {}{of}: {what}", spec.entry)
                });
                if worst.as_ref().is_none_or(|w| comparison.worse_than(w)) {
                    worst = Some(comparison);
                }
            }
            // What comes after it is of no interest.
            if worst.as_ref().is_some_and(|w| w.failure.is_some()) {
                break 'steps;
            }
        }
    }
    let worst = worst.unwrap_or_else(|| Comparison::failed("no tensor to compare".into()));
    Ok(Outcome {
        kernel: name.into(),
        variant: format!("{variant}, {tensors} tensors"),
        worst: worst.worst,
        tolerance: worst.tolerance,
        passed: worst.failure.is_none(),
        detail: worst.failure,
    })
}

/// A plan that a device and the twins carry out side by side.
struct Run<'a> {
    device: Box<dyn Device + 'a>,
    twins: Twins<f64>,
    /// What the device's memory holds, place by place.
    held: Vec<Vec<u32>>,
}

impl Run<'_> {
    /// The memory of the step starts poisoned.
    fn new(twins: Twins<f64>, mut device: Box<dyn Device + '_>) -> Result<Run<'_>> {
        let mut held: Vec<Vec<u32>> = twins.memory.values.iter().map(words).collect();
        for words in &mut held[..twins.plan.slots.len()] {
            words.fill(POISON);
        }
        for (place, words) in held.iter_mut().enumerate() {
            words.extend([GUARD; GUARD_WORDS]);
            device.write(place, words)?;
        }
        Ok(Run {
            device,
            twins,
            held,
        })
    }

    /// Runs a kernel on both sides and compares what it wrote. Afterwards both hold what the device made
    /// of it, so that the next kernel is judged on its own.
    fn kernel(&mut self, number: usize, spec: &KernelSpec) -> Result<Vec<Comparison>> {
        let beyond = match &spec.work {
            Work::Product(product) if product.redoes_nan() => BEYOND_FINITE,
            _ => BEYOND,
        };
        for argument in spec.arguments.iter().filter(|a| a.elements > 0) {
            self.surround(argument, beyond)?;
        }
        self.device.run(number, spec)?;
        // The same inputs; what a product wrote in parts, or which of two maxima that are as good as
        // equal is the larger, is asked of them later.
        let inputs = self.twins.memory.clone();
        cpu::run(spec, &mut self.twins.memory);
        let written = spec.arguments.iter().filter(|a| a.access != Access::Read);
        written
            .map(|argument| self.compare(spec, argument, &inputs))
            .collect()
    }

    /// The words of a place that an argument is about: all of them where it is a tensor of the dataset,
    /// which is longer than a step knows.
    fn range(&self, argument: &Argument) -> (usize, Range<usize>) {
        let view = argument.view;
        let place = self.twins.memory.places[view.tensor];
        let words = |elements| words_of(view.dtype, elements);
        match self.twins.plan.tensors[view.tensor].lifetime {
            Lifetime::Data => (place, 0..self.held[place].len() - GUARD_WORDS),
            _ => (place, words(view.start)..words(view.start + view.len)),
        }
    }

    /// Poisons what a kernel is to write, and puts a guard behind its tensors in what others left there.
    fn surround(&mut self, argument: &Argument, beyond: u32) -> Result<()> {
        let (place, range) = self.range(argument);
        let mut words = self.held[place].clone();
        if argument.access == Access::Write {
            words[range].fill(match self.twins.memory.values[place] {
                Values::Floats(_) => POISON,
                _ => WORD_POISON,
            });
        }
        let tensor = &self.twins.plan.tensors[argument.view.tensor];
        if tensor.slot.is_some() {
            let end = words_of(tensor.dtype, tensor.elements());
            words[end..].fill(match argument.access {
                Access::Read => beyond,
                _ => GUARD,
            });
        }
        if words != self.held[place] {
            self.device.write(place, &words)?;
            self.held[place] = words;
        }
        Ok(())
    }

    fn compare(
        &mut self,
        spec: &KernelSpec,
        argument: &Argument,
        inputs: &Memory<f64>,
    ) -> Result<Comparison> {
        let (place, range) = self.range(argument);
        let mut all = self.held[place].clone();
        self.device.read(place, &mut all)?;
        let outside = |i: &usize| !range.contains(i) && all[*i] != self.held[place][*i];
        if let Some(at) = (0..all.len()).find(outside) {
            return Ok(Comparison::failed(format!(
                "{}: expected nothing to be written outside its elements {range:?}, found {:#010x} at {at}",
                argument.name, all[at]
            )));
        }
        let found = &all[range.clone()];
        let expected = match &self.twins.memory.values[place] {
            Values::Floats(values) => Expected::Floats(values[range.clone()].to_vec(), SAME),
            other => Expected::Words(words(other)[range.clone()].to_vec()),
        };
        let comparison = compare_tensor(spec, argument, found, expected, inputs);
        set(&mut self.twins.memory.values[place], range.start, found);
        self.held[place] = all;
        Ok(comparison)
    }
}

/// Words that a [`Device`] has of so many elements.
fn words_of(dtype: Dtype, elements: usize) -> usize {
    match dtype {
        Dtype::F16 => elements,
        other => other.words(elements),
    }
}

const SAME: Tolerance = Tolerance::EXACT;

/// Compares an output, in words, with what the twin made of the same inputs.
fn compare_tensor(
    spec: &KernelSpec,
    argument: &Argument,
    found: &[u32],
    expected: Expected,
    inputs: &Memory<f64>,
) -> Comparison {
    let name = argument.name;
    match (expected, &spec.work) {
        (Expected::Floats(mut values, _), work) => {
            let mut found = found.to_vec();
            if let (Work::Product(product), "partials") = (work, name) {
                // The sums over all parts; the twin has them in the first one.
                values.truncate(values.len() / product.splits());
                found = sum_parts(&found, values.len());
            }
            let largest = values.iter().fold(0.0f64, |m, v| m.max(v.abs()));
            let mut tolerance = Tolerance {
                absolute: SHARE * largest,
                relative: 0.0,
            };
            if argument.view.dtype == Dtype::F16 {
                tolerance = tolerance.of_halves();
            }
            compare_elements(name, &found, &Expected::Floats(values, tolerance))
        }
        (Expected::Words(mut words), work) => {
            match work {
                Work::SumMetrics => settle_losses(&mut words, found),
                Work::Product(Product { pool: Some(_), .. }) => {
                    settle_maxima(spec, &mut words, found, inputs)
                }
                _ => {}
            }
            compare_elements(name, found, &Expected::Words(words))
        }
    }
}

/// The sums over parts of `len` floats each.
fn sum_parts(parts: &[u32], len: usize) -> Vec<u32> {
    let float = |word: &u32| f64::from(f32::from_bits(*word));
    let sum = |i: usize| parts[i..].iter().step_by(len).map(float).sum::<f64>();
    // A poison that was left is one of the sum too.
    let bits = |i: usize| match parts[i..].iter().step_by(len).find(|w| **w == POISON) {
        Some(poison) => *poison,
        None => (sum(i) as f32).to_bits(),
    };
    (0..len).map(bits).collect()
}

/// Takes the sums of the losses as they were found, where they are within tolerance; any NaN is as good as another.
fn settle_losses(expected: &mut [u32], found: &[u32]) {
    for (expected, found) in expected.iter_mut().zip(found).step_by(2) {
        let [e, f] = [*expected, *found].map(f32::from_bits);
        let both_nan = e.is_nan() && f.is_nan() && *found != WORD_POISON;
        if both_nan || (e - f).abs() <= SHARE as f32 * e.abs() {
            *expected = *found;
        }
    }
}

/// Takes the places of the maxima as they were found where the product has values there that rounding
/// alone tells from the maxima.
fn settle_maxima(spec: &KernelSpec, expected: &mut [u32], found: &[u32], inputs: &Memory<f64>) {
    let Work::Product(
        product @ Product {
            pool: Some(pool), ..
        },
    ) = &spec.work
    else {
        return;
    };
    let (x, parameters) = (spec.view("x"), spec.view("parameters"));
    let (x, parameters) = (inputs.floats(x), inputs.floats(parameters));
    let y = cpu::conv2d_forward(&product.geometry, product.relu, x, parameters);
    let largest = y.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    let (input, output) = (pool.input, pool.output);
    // The element of y that stands at that place of the window of element i.
    let at = |i: usize, place: u8| {
        let place = usize::from(place) % (pool.kernel[0] * pool.kernel[1]);
        let (position, c) = (i / output.channels, i % output.channels);
        let (row, ow) = (position / output.width, position % output.width);
        let (n, oh) = (row / output.height, row % output.height);
        let h = oh * pool.stride[0] + place / pool.kernel[1];
        let w = ow * pool.stride[1] + place % pool.kernel[1];
        y[((n * input.height + h) * input.width + w) * input.channels + c]
    };
    let expected: &mut [u8] = bytemuck::cast_slice_mut(expected);
    let found: &[u8] = bytemuck::cast_slice(found);
    let pairs = expected.iter_mut().zip(found).enumerate();
    for (i, (e, f)) in pairs.take(y.len()).filter(|(_, (e, f))| e != f) {
        let in_window = usize::from(*f) < pool.kernel[0] * pool.kernel[1];
        if in_window && at(i, *e) - at(i, *f) <= SHARE * largest {
            *e = *f;
        }
    }
}

/// What the twins make of a training, by the simplest plan: one kernel for each thing, no sum cut.
struct Reference<'a> {
    data: &'a Data<'a>,
    rule: Optimizer,
    kind: Kind,
    /// Of every step.
    losses: Vec<f64>,
    first_gradients: Vec<f64>,
    last_gradients: Vec<f64>,
}

fn simplest(model: &Model, batch: usize, mode: Mode, kind: Kind) -> Result<Plan> {
    let Kind { precision, synced } = kind;
    let options = Options {
        // In mixed precision a kernel that is fused rounds once, where each by itself rounds.
        unfused: precision == Precision::F32,
        precision,
        sync_batch_norm: synced,
        ..apart(&options(model))
    };
    Plan::new(model, batch, mode, &options, Target::Cpu)
}

/// What changes the results of a training.
#[derive(Clone, Copy, PartialEq)]
struct Kind {
    precision: Precision,
    synced: bool,
}

impl Reference<'_> {
    fn of<'a>(data: &'a Data, rule: Optimizer, kind: Kind) -> Result<Reference<'a>> {
        let plan = simplest(data.model, BATCH, Mode::Train(rule), kind)?;
        let mut twins = data.twins(plan, &data.train, &data.order, &data.steps);
        // Those of a batch, where a step may be a part of one.
        let name = match twins.plan.tensor("accumulated") {
            Some(_) => "accumulated",
            None => "gradients",
        };
        let mut gradients = Vec::new();
        for batch in data.steps.iter().filter(|step| step.begins()) {
            twins.run_phases(batch.shards as usize);
            gradients.push(twins.floats(name).clone());
        }
        let metrics = twins.words("metrics").chunks_exact(2).take(STEPS);
        Ok(Reference {
            data,
            rule,
            kind,
            losses: metrics.map(|m| f64::from(f32::from_bits(m[0]))).collect(),
            last_gradients: gradients.pop().unwrap_or_default(),
            first_gradients: gradients.swap_remove(0),
        })
    }
}

/// The training and the evaluations of one way to plan them.
fn in_one_go(reference: &Reference, way: &Way, gpu: Option<&Arc<Gpu>>) -> Result<Vec<Outcome>> {
    let Data {
        model,
        train,
        order,
        steps,
        parameters,
        ..
    } = reference.data;
    let rule = &reference.rule;
    let mut engine = Engine::new(gpu.cloned(), model, BATCH, rule, &way.options)?;
    engine.set_parameters(parameters)?;
    reference.data.upload(&mut engine, Split::Train, train)?;
    // One epoch of a single batch first: its gradients are those of the initial parameters.
    let batch = &steps[..steps[0].shards as usize];
    engine.train_epoch(order, batch, &mut |_| Ok(ControlFlow::Continue(())))?;
    let first_gradients = engine.gradients()?;
    engine.set_parameters(parameters)?;
    engine.set_running(&initial_running(model))?;
    let state = vec![vec![0.0; parameters.len()]; rule.state_vectors()];
    engine.set_optimizer_state(&state)?;
    let metrics = engine.train_epoch(order, steps, &mut |_| Ok(ControlFlow::Continue(())))?;
    let last_gradients = engine.gradients()?;

    let margin = margin(reference.kind.precision);
    // What is rounded otherwise grows from step to step, and in halves it is not small.
    let last = if margin > 1.0 { 1e-3 } else { 2e-4 };
    let mut worst = Worst::default();
    for (which, tolerance, found, expected) in [
        ("first", 2e-5, first_gradients, &reference.first_gradients),
        ("last", last, last_gradients, &reference.last_gradients),
    ] {
        // A gradient is a sum of products of sums: the error scales with the largest of them.
        let largest = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let tolerance = margin * tolerance * largest.max(1e-3);
        worst.expect_count("gradients", found.len(), expected.len());
        for (a, (found, expected)) in found.iter().zip(expected).enumerate() {
            let place = || format!("gradient {a} of the {which} step");
            worst.see(f64::from(*found), *expected, tolerance, place);
        }
    }
    worst.expect_count("losses", metrics.len(), STEPS);
    for (i, (found, expected)) in metrics.iter().zip(&reference.losses).enumerate() {
        let place = || format!("the loss of step {}", i + 1);
        let tolerance = margin * 1e-4 * expected.abs().max(0.1);
        worst.see(f64::from(found.loss_sum), *expected, tolerance, place);
    }
    let by = match rule {
        Optimizer::Muon { .. } => " of Muon",
        _ => "",
    };
    let variant = format!("{}, {STEPS} steps{by}", way.name);
    let mut outcomes = vec![worst.outcome("training", variant)];

    outcomes.push(evaluate(&mut engine, reference, &way.name)?);
    let (parameters, running) = (engine.parameters()?, engine.running()?);
    let large = Options {
        large_evaluation: Some(true),
        ..way.options.clone()
    };
    let small = evaluation_batch(&mut engine);
    let mut engine = Engine::new(gpu.cloned(), model, BATCH, rule, &large)?;
    // Where the memory holds no larger batch it is the same plan again.
    if evaluation_batch(&mut engine) > small {
        engine.set_parameters(&parameters)?;
        engine.set_running(&running)?;
        outcomes.push(evaluate(&mut engine, reference, &way.name)?);
    }
    Ok(outcomes)
}

/// How much farther than in floats results may lie from their references: a value between two halves may be
/// rounded to either, and a few of them differ by 2⁻¹¹.
fn margin(precision: Precision) -> f64 {
    match precision {
        Precision::F32 => 1.0,
        Precision::Mixed => 100.0,
    }
}

fn evaluation_batch(engine: &mut Engine) -> usize {
    engine.on_gpu().map_or(BATCH, |e| e.evaluation_batch())
}

/// The evaluation of the parameters that `engine` has.
fn evaluate(engine: &mut Engine, reference: &Reference, name: &str) -> Result<Outcome> {
    let Reference { data, kind, .. } = reference;
    let (test, margin) = (&data.test, margin(kind.precision));
    data.upload(engine, Split::Test, test)?;
    let found = engine.evaluate(Split::Test, &mut |_| ControlFlow::Continue(()))?;

    let plan = simplest(data.model, TEST_IMAGES, Mode::Evaluate, *kind)?;
    let all: Vec<u32> = (0..TEST_IMAGES as u32).collect();
    let step = Step {
        seed: data.steps[0].seed,
        epoch: data.steps[0].epoch,
        ..Step::new(0, TEST_IMAGES)
    };
    let mut twins = data.twins(plan, test, &all, &[step]);
    *twins.floats("parameters") = wide(&engine.parameters()?);
    *twins.floats("running") = wide(&engine.running()?);
    twins.run(&[Section::Gather, Section::Forward, Section::Loss]);
    let loss = twins
        .plan
        .specs()
        .find(|spec| matches!(spec.work, Work::Loss { .. }));
    let outputs = loss.expect("a plan has a loss").view("logits");
    let outputs = twins.memory.floats(outputs).to_vec();
    let expected: f64 = twins.floats("losses")[..TEST_IMAGES].iter().sum();

    let mut worst = Worst::default();
    let tolerance = margin * 1e-5 * expected.abs().max(0.1);
    worst.see(found.loss_sum, expected, tolerance, || "the loss".into());
    worst.expect_count("predictions", found.predictions.len(), TEST_IMAGES);
    let predicted = found.predictions.iter().zip(outputs.chunks(CLASSES));
    for (i, (class, outputs)) in predicted.enumerate() {
        // Rounding may decide between two classes that are as good as equal.
        let largest = outputs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let chosen = outputs.get(*class as usize).copied().unwrap_or(f64::NAN);
        let place = || format!("the output of class {class}, predicted for image {i}");
        worst.see(
            chosen,
            largest,
            margin * 1e-5 * largest.abs().max(1.0),
            place,
        );
    }
    if let Some(logits) = &found.logits {
        worst.expect_count("logits", logits.len(), outputs.len());
        for (i, (found, expected)) in logits.iter().zip(&outputs).enumerate() {
            let place = || format!("logit {i}");
            let tolerance = margin * 1e-5 * expected.abs().max(1.0);
            worst.see(f64::from(*found), *expected, tolerance, place);
        }
    }
    let batch = evaluation_batch(engine);
    Ok(worst.outcome("evaluation", format!("{name}, batches of {batch}")))
}

/// The largest error by its tolerance, and the first one that is out.
#[derive(Default)]
struct Worst {
    error: f64,
    tolerance: f64,
    failure: Option<String>,
}

impl Worst {
    fn outcome(self, kernel: &str, variant: String) -> Outcome {
        Outcome {
            kernel: kernel.into(),
            variant,
            worst: self.error,
            tolerance: self.tolerance,
            passed: self.failure.is_none(),
            detail: self.failure,
        }
    }

    fn expect_count(&mut self, what: &str, found: usize, expected: usize) {
        let place = || format!("the number of {what}");
        self.see(found as f64, expected as f64, 0.0, place);
    }

    fn see(&mut self, found: f64, expected: f64, tolerance: f64, place: impl Fn() -> String) {
        let error = (found - expected).abs();
        let within = error <= tolerance; // false for NaN
        if !within && self.failure.is_none() {
            self.failure = Some(format!(
                "{}: expected {expected} ± {tolerance:.1e}, found {found}",
                place()
            ));
        }
        if !within && error.is_nan()
            || self.tolerance == 0.0
            || error / tolerance > self.error / self.tolerance
        {
            (self.error, self.tolerance) = (error, tolerance);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// What a device does wrong in one kernel.
    #[derive(Clone, Copy, Debug)]
    enum Mistake {
        /// Adds a thousandth of the largest to the first element of a place.
        Changes(usize),
        /// Runs nothing.
        Skips,
        /// Writes to the first word behind a place.
        Strays(usize),
    }

    struct Wrong {
        right: Fast,
        kernel: usize,
        mistake: Mistake,
        strayed: bool,
    }

    impl Device for Wrong {
        fn write(&mut self, place: usize, words: &[u32]) -> Result<()> {
            self.right.write(place, words)
        }

        fn read(&mut self, place: usize, words: &mut Vec<u32>) -> Result<()> {
            self.right.read(place, words)?;
            if let (true, Mistake::Strays(at)) = (self.strayed, self.mistake)
                && at == place
            {
                let guard = words.len() - GUARD_WORDS;
                words[guard] = 0;
            }
            Ok(())
        }

        fn run(&mut self, number: usize, spec: &KernelSpec) -> Result<()> {
            if number != self.kernel {
                return self.right.run(number, spec);
            }
            match self.mistake {
                Mistake::Skips => return Ok(()),
                Mistake::Strays(_) => self.strayed = true,
                Mistake::Changes(_) => {}
            }
            self.right.run(number, spec)?;
            if let Mistake::Changes(place) = self.mistake {
                match &mut self.right.memory.values[place] {
                    Values::Floats(values) => {
                        let largest = values.iter().filter(|v| v.is_finite());
                        values[0] += 1e-3 * largest.fold(0.0f32, |m, v| m.max(v.abs()));
                    }
                    Values::Words(words) => words[0] ^= 1 << 20,
                    Values::Bytes(bytes) => bytes[0] ^= 1,
                }
            }
            Ok(())
        }
    }

    /// Every tensor of every kernel of a step: a number that is a little off, an output that nobody wrote
    /// and a write behind it are noticed at once, and the kernel is named.
    #[test]
    fn a_wrong_kernel_is_named() {
        let models = models();
        let trained = |mode: &Mode| matches!(mode, Mode::Train(_));
        let all = models.iter().flat_map(|model| {
            let modes = modes(model).into_iter().filter(trained);
            modes.flat_map(move |mode| [false, true].map(|synced| (model, mode, synced)))
        });
        for (model, mode, synced) in all {
            let data = Data::of(model);
            let kind = Kind {
                precision: Precision::F32,
                synced,
            };
            let plan = simplest(model, BATCH, mode, kind).unwrap();
            if plan.syncs() != synced {
                continue;
            }
            let outcome = |kernel, mistake: Option<Mistake>| {
                let device = |twins: &Twins<f64>| -> Result<Box<dyn Device>> {
                    Ok(match mistake {
                        None => Box::new(Fast::of(twins)),
                        Some(mistake) => Box::new(Wrong {
                            right: Fast::of(twins),
                            kernel,
                            mistake,
                            strayed: false,
                        }),
                    })
                };
                each_kernel(&data, plan.clone(), mode, "test", device).unwrap()
            };
            assert_eq!(outcome(0, None).detail, None);
            let places = data.twins(plan.clone(), &data.train, &data.order, &[]);
            let places = places.memory.places;
            for (number, spec) in plan.specs().enumerate() {
                for argument in spec.arguments.iter().filter(|a| a.access != Access::Read) {
                    let place = places[argument.view.tensor];
                    let mut mistakes = vec![Mistake::Changes(place), Mistake::Strays(place)];
                    // The first metrics are those of the first step.
                    mistakes.extend((argument.access == Access::Write).then_some(Mistake::Skips));
                    for mistake in mistakes {
                        let found = outcome(number, Some(mistake));
                        let detail = found.detail.unwrap_or_default();
                        let named = format!("step 1, kernel {number}, {}", spec.entry);
                        assert!(
                            detail.starts_with(&named) && !found.passed,
                            "{mistake:?} in {named} of '{}': {detail}",
                            argument.name
                        );
                    }
                }
            }
        }
    }

    /// Some GPUs make their NaNs of other bits than the processor.
    #[test]
    fn losses_may_be_another_nan_but_no_other_number() {
        let settled = |expected: u32, found: u32| {
            let mut words = [expected, 3];
            settle_losses(&mut words, &[found, 4]);
            assert_eq!(words[1], 3);
            words[0] == found
        };
        let one = 1.0f32.to_bits();
        assert!(settled(0x7fc0_0000, 0x7fff_ffff) && settled(one, one + 1));
        assert!(!settled(0x7fc0_0000, one) && !settled(one, 0x7fff_ffff));
        assert!(!settled(0x7fc0_0000, WORD_POISON) && !settled(one, 2.0f32.to_bits()));
    }

    /// A kernel without a model that has it would go without this proof.
    #[test]
    fn the_models_have_every_kernel() {
        let adapter = AdapterReport::imagined(true);
        let mut missing: BTreeSet<_> = super::super::kernels(&adapter)
            .unwrap()
            .into_iter()
            .map(|kernel| kernel.entry)
            // What measures a device, or runs between steps.
            .filter(|entry| {
                ![
                    "peak_multiply_add",
                    "peak_copy",
                    "probe_prices",
                    "arithmetic",
                    "swap_values",
                ]
                .contains(entry)
            })
            .collect();
        for model in models() {
            for way in ways(&model, Some(&adapter)).unwrap() {
                for mode in std::iter::once(SGD).chain(modes(&model)) {
                    for spec in way.plan(&model, mode).unwrap().specs() {
                        missing.remove(spec.entry);
                    }
                }
            }
        }
        assert!(missing.is_empty(), "{missing:?}");
    }
}
