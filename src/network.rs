//! A model on the GPU: resident buffers and the list of dispatches that is a training step.
//!
//! Everything is allocated and compiled once. An epoch uploads its shuffle and its step table, then
//! only says how many steps to run; losses come back in a small read-back that stalls nothing.

use crate::error::{Error, Result};
use crate::gpu::{AdapterReport, Buffer, Dispatch, Gpu, Metrics, Readback, Step, Ticket};
use crate::host::fitting_batch;
pub use crate::kernels::conv2d::{Family, Pass, Product, Tile};
use crate::kernels::{activation, conv2d, gather, im2col, loss, optimizer, pool, reduce, step};
use crate::model::recipe::Optimizer;
use crate::model::{Conv2d, Layer, Loss, MAX_ELEMENTS, Model, Op, Pool2d};
use indicatif::BinaryBytes;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Which part of a dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    Train,
    Test,
}

/// How the plan is made.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Kernel family to use instead of the one that suits the adapter.
    pub family: Option<Family>,
    /// Store the im2col matrix instead of computing its index in the product.
    pub explicit_conv: bool,
    /// Max-pooling as a kernel of its own even where the convolution before it could compute it along.
    pub unfused_pooling: bool,
    /// Choices of tile that were made before (by an earlier run or by measurement); used for the
    /// products they fit, in place of the built-in choice. The result's bits do not depend on them.
    pub choices: Vec<Product>,
    /// Whether an evaluation takes larger batches than a training step, as many samples as fit into
    /// the buffers of the activation gradients, which it does not need otherwise. Chosen by the
    /// adapter unless given: a GPU is better filled that way, a software adapter gains nothing and
    /// would have to compile the forward pass twice.
    pub large_evaluation: Option<bool>,
}

/// The matrix products of a training step with the name of their layer, in the order of the layers:
/// the plan's part that can be chosen, known before anything is allocated.
///
/// # Errors
/// [`Error::Usage`] when `options` force a family that the adapter cannot run, and as
/// [`expect_batch`].
pub fn products(
    model: &Model,
    batch_size: usize,
    options: &Options,
    adapter: &AdapterReport,
) -> Result<Vec<(String, Product)>> {
    expect_batch(model, batch_size, options.explicit_conv)?;
    let family = Family::select(adapter, options.family)?;
    let first = model.layers.iter().position(|l| l.parameters.is_some());
    let layers = model.layers.iter().filter(|l| l.op.product().is_some());
    let most = Pass::ALL.len() * layers.count();
    let mut products = Vec::new();
    for (i, layer) in model.layers.iter().enumerate() {
        let Some((geometry, relu)) = layer.op.product() else {
            continue;
        };
        let stored = options.explicit_conv && is_conv(layer);
        let (geometry, batch) = if stored {
            as_matrix(geometry, batch_size)
        } else {
            (*geometry, batch_size)
        };
        let mut add = |pass, relu, pool| {
            let product = Product::new(geometry, batch, pass, relu, pool, family, adapter)?;
            let built_in = product.in_model_of(most);
            let chosen = options.choices.iter().find(|c| built_in.takes(c, adapter));
            let tile = chosen.unwrap_or(&built_in).tile;
            products.push((layer.name.clone(), built_in.with_tile(tile)));
            Ok::<_, Error>(())
        };
        let pool = fused_pool(model, i, options, family);
        add(Pass::Forward, relu, pool)?;
        add(Pass::BackwardWeight, false, None)?;
        if Some(i) != first {
            // A stored column matrix is masked when it is added back onto the image.
            let masked = !stored && i > 0 && ends_in_relu(&model.layers[i - 1]);
            add(Pass::BackwardInput, masked, None)?;
        }
    }
    Ok(products)
}

/// Refuses a batch that is empty or has more elements in a tensor than the kernels can index.
///
/// # Errors
/// [`Error::Usage`] with the largest batch size.
pub fn expect_batch(model: &Model, batch_size: usize, explicit_conv: bool) -> Result<()> {
    let mut largest = ("the input batch", model.input.elements());
    for layer in &model.layers {
        let columns = match &layer.op {
            Op::Conv2d { geometry, .. } if explicit_conv => {
                geometry.positions().saturating_mul(geometry.patch())
            }
            _ => 0,
        };
        let elements = layer.output.elements().max(columns);
        if elements > largest.1 {
            largest = (&layer.name, elements);
        }
    }
    let (name, elements) = largest;
    let most = MAX_ELEMENTS / elements as u128;
    if (1..=most).contains(&(batch_size as u128)) {
        return Ok(());
    }
    Err(Error::Usage(match most {
        0 => format!(
            "expected at most {MAX_ELEMENTS} elements in a tensor, found {elements} an image in the columns of {name}; leave --conv explicit out"
        ),
        _ => format!(
            "expected --batch-size from 1 to {most} ({name} has {elements} elements an image, and a tensor holds {MAX_ELEMENTS} at most), found {batch_size}; use --batch-size {most} or smaller"
        ),
    }))
}

/// Refuses a network with a buffer that `adapter` does not bind, with the flag that helps.
///
/// # Errors
/// [`Error::Usage`] with the largest power of two that fits as batch size, where the batch is what
/// does not fit; and as [`products`].
fn expect_bindings(
    model: &Model,
    batch_size: usize,
    options: &Options,
    adapter: &AdapterReport,
) -> Result<()> {
    let limit = binding_limit(adapter);
    let bytes = |elements: usize| 4 * elements as u64;
    if bytes(model.parameter_elements) > limit {
        let largest = model.layers.iter().max_by_key(|l| l.parameter_count());
        let largest = largest.map_or(String::new(), |l| format!(" (most of them in {})", l.name));
        return Err(Error::Usage(format!(
            "expected parameters of at most {} on {}, which binds no more in one buffer, found {}{largest}; make the layer smaller, or choose another --device: cpu has no such limit",
            BinaryBytes(limit),
            adapter.name,
            BinaryBytes(bytes(model.parameter_elements))
        )));
    }
    let family = Family::select(adapter, options.family)?;
    // The largest buffer that depends on the batch.
    let largest = |batch: usize| -> Result<(String, u64)> {
        let sizes = Sizes::of(model, batch, options, family);
        let columns = ("im2col columns".to_string(), sizes.columns);
        let partials = products(model, batch, options, adapter)?
            .into_iter()
            .filter(|(_, p)| p.splits() > 1)
            .map(|(name, p)| (format!("partial gradients of {name}"), p.result_elements()));
        let all = sizes
            .activations
            .into_iter()
            .chain([columns])
            .chain(partials);
        let (name, elements) = all.max_by_key(|(_, n)| *n).unwrap_or_default();
        Ok((name, bytes(elements)))
    };
    let (name, size) = largest(batch_size)?;
    if size <= limit {
        return Ok(());
    }
    let advice = match fitting_batch(batch_size, |batch| Ok(largest(batch)?.1 <= limit))? {
        Some(batch) => format!("use --batch-size {batch} or smaller"),
        None => "even one image is too large; use a smaller model or smaller images, or another --device: cpu has no such limit".into(),
    };
    Err(Error::Usage(format!(
        "expected tensors of at most {} on {}, which binds no more in one buffer, found {} for '{name}' at batch size {batch_size}; {advice}",
        BinaryBytes(limit),
        adapter.name,
        BinaryBytes(size)
    )))
}

/// Bytes that a kernel can be given in one buffer.
fn binding_limit(adapter: &AdapterReport) -> u64 {
    adapter
        .max_storage_binding_bytes
        .min(adapter.max_buffer_bytes)
}

/// Refuses a split that `adapter` cannot bind or the kernel that gathers batches cannot index.
///
/// # Errors
/// [`Error::Usage`] with the number of images that fit.
fn expect_images(
    split: Split,
    images: usize,
    elements: usize,
    adapter: &AdapterReport,
) -> Result<()> {
    // Bytes are indexed with 32 bits.
    let limit = binding_limit(adapter).min(u64::from(u32::MAX));
    let size = images as u128 * elements as u128;
    if size <= u128::from(limit) {
        return Ok(());
    }
    let what = match split {
        Split::Train => "training",
        Split::Test => "test",
    };
    let advice = match (limit / elements as u64, split) {
        (0, _) => "use smaller images, or".into(),
        (most, Split::Train) => format!("use --limit {most} or fewer, or"),
        (most, Split::Test) => format!("use at most {most} of them, or"),
    };
    Err(Error::Usage(format!(
        "expected {what} images of at most {limit} bytes on {}, found {size}; {advice} another --device: cpu has no such limit",
        adapter.name
    )))
}

/// Result of running a split through the network.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// Sum of the per-sample losses.
    pub loss_sum: f64,
    /// Predicted class of every sample that was done, in the split's order.
    pub predictions: Vec<u32>,
}

/// What one submission may take at most; far below the two seconds after which Windows resets a
/// GPU, and short enough for a smooth progress bar.
const SUBMISSION: Duration = Duration::from_millis(100);

/// A model with its parameters, its optimiser state and its plan on the GPU.
pub struct Network {
    gpu: Arc<Gpu>,
    model: Model,
    batch: usize,
    buffers: Buffers,
    /// From the batch to the logits.
    forward: Vec<Dispatch>,
    /// From the loss gradient to the parameter gradients.
    backward: Vec<Dispatch>,
    /// A forward pass of its own for larger evaluation batches.
    evaluation: Option<(Lane, Vec<Dispatch>)>,
    optimizer: Optimizer,
    products: Vec<(String, Product)>,
    train: Option<Resident>,
    test: Option<Resident>,
}

/// The buffers that live as long as the network.
struct Buffers {
    parameters: Buffer,
    gradients: Buffer,
    state: Vec<Buffer>,
    lane: Lane,
    /// The gradient that a layer receives and the one it hands on, taking turns.
    gradient: [Buffer; 2],
}

/// What a batch passes through on its way forward.
struct Lane {
    batch: usize,
    /// The batch, then the output of every layer.
    activations: Vec<Buffer>,
    labels: Buffer,
    losses: Buffer,
    predictions: Buffer,
    /// Where the loss leaves its gradient.
    gradient: Buffer,
    /// Max-pool indices by layer name.
    indices: Vec<(String, Buffer)>,
}

/// One split of the dataset with the dispatches that begin and end its steps.
struct Resident {
    len: usize,
    /// Samples per step.
    batch: usize,
    order: Buffer,
    steps: Buffer,
    counter: Buffer,
    metrics: Buffer,
    predictions: Buffer,
    begin: Vec<Dispatch>,
    end: Vec<Dispatch>,
}

/// The max-pooling that layer `i`, a convolution, computes along in its forward pass.
fn fused_pool(model: &Model, i: usize, options: &Options, family: Family) -> Option<Pool2d> {
    let fused = !options.explicit_conv && !options.unfused_pooling;
    match (&model.layers[i].op, model.layers.get(i + 1).map(|l| &l.op)) {
        (Op::Conv2d { geometry, .. }, Some(Op::MaxPool2d(pool)))
            if fused && Product::can_pool(geometry, pool, family) =>
        {
            Some(*pool)
        }
        _ => None,
    }
}

/// Lengths of the large buffers in elements, known without a GPU.
struct Sizes {
    activations: Vec<(String, usize)>,
    pool_indices: Vec<(String, usize)>,
    gradient: usize,
    columns: usize,
}

impl Sizes {
    fn of(model: &Model, batch: usize, options: &Options, family: Family) -> Sizes {
        let mut activations = vec![("input batch".to_string(), batch * model.input.elements())];
        let mut pool_indices = Vec::new();
        let mut columns = 0;
        let mut gradient = 1;
        for (i, layer) in model.layers.iter().enumerate() {
            let elements = batch * layer.output.elements();
            gradient = gradient.max(elements);
            // What only the pooling behind it would read is never stored.
            let fused = fused_pool(model, i, options, family).is_some();
            activations.push((layer.name.clone(), if fused { 0 } else { elements }));
            match &layer.op {
                Op::MaxPool2d(pool) => pool_indices.push((
                    layer.name.clone(),
                    (batch * pool.output.elements()).div_ceil(4),
                )),
                Op::Conv2d { geometry, .. } if options.explicit_conv => {
                    columns = columns.max(batch * geometry.positions() * geometry.patch());
                }
                _ => {}
            }
        }
        Sizes {
            activations,
            pool_indices,
            gradient,
            columns,
        }
    }
}

/// Samples of an evaluation batch where that is more than a training batch.
fn evaluation_batch(
    sizes: &Sizes,
    batch: usize,
    options: &Options,
    adapter: &AdapterReport,
) -> Option<usize> {
    let wanted = options.large_evaluation.unwrap_or(!adapter.software);
    let largest = sizes.activations.iter().map(|(_, len)| len / batch).max()?;
    // Bounded, so that even a tiny model's evaluation comes in several short submissions.
    let fits = (sizes.gradient / largest.max(1)).min(1 << 14);
    (wanted && !options.explicit_conv && fits > batch).then_some(fits)
}

/// Elements of the partial sums of one weight gradient at a time; 0 where none is cut.
fn partial_elements(products: &[(String, Product)]) -> usize {
    let products = products.iter().map(|(_, product)| product);
    let cut = products.filter(|product| product.splits() > 1);
    cut.map(Product::result_elements).max().unwrap_or(0)
}

/// GPU memory of a training step by purpose, in bytes, on an adapter like `adapter`, without touching
/// a GPU; the dataset comes on top.
///
/// # Errors
/// As [`products`].
pub fn memory(
    model: &Model,
    batch_size: usize,
    optimizer: &Optimizer,
    options: &Options,
    adapter: &AdapterReport,
) -> Result<Vec<(String, u64)>> {
    let family = Family::select(adapter, options.family)?;
    let sizes = Sizes::of(model, batch_size, options, family);
    let products = products(model, batch_size, options, adapter)?;
    let partials = partial_elements(&products);
    let total = |list: &[(String, usize)]| list.iter().map(|(_, n)| n).sum::<usize>();
    let evaluation = evaluation_batch(&sizes, batch_size, options, adapter).map_or(0, |larger| {
        // Indices and a label, a loss and a prediction per sample.
        let larger_sizes = Sizes::of(model, larger, options, family);
        total(&larger_sizes.pool_indices) + 3 * larger
    });
    let rows = [
        ("parameters", model.parameter_elements),
        ("gradients", model.parameter_elements),
        (
            "optimiser state",
            model.parameter_elements * optimizer.state_vectors(),
        ),
        ("activations", total(&sizes.activations)),
        ("max-pool indices", total(&sizes.pool_indices)),
        ("activation gradients", 2 * sizes.gradient),
        ("partial weight gradients", partials),
        ("im2col columns", 2 * sizes.columns),
        ("evaluation", evaluation),
    ];
    Ok(rows
        .into_iter()
        .filter(|(_, elements)| *elements > 0)
        .map(|(name, elements)| (name.to_string(), 4 * elements as u64))
        .collect())
}

impl Network {
    /// Allocates the buffers and compiles the plan of `model` for batches of `batch_size`.
    /// Parameters start at zero; see [`Network::set_parameters`].
    ///
    /// # Errors
    /// [`Error::Usage`] for a batch size of 0, a family the adapter cannot run or tensors it cannot
    /// bind (with the flag that helps), [`Error::OutOfMemory`] (with the batch size that fits) and
    /// [`Error::Gpu`] with the label of what was being made.
    pub fn new(
        gpu: Arc<Gpu>,
        model: &Model,
        batch_size: usize,
        optimizer: &Optimizer,
        options: &Options,
    ) -> Result<Network> {
        expect_bindings(model, batch_size, options, gpu.report())?;
        let adapter = gpu.report().clone();
        Network::build(gpu, model, batch_size, optimizer, options).map_err(|e| match e {
            Error::OutOfMemory {
                label,
                what,
                allocated,
            } => {
                let total = |batch| -> Result<u64> {
                    let rows = memory(model, batch, optimizer, options, &adapter)?;
                    Ok(rows.iter().map(|(_, bytes)| bytes).sum())
                };
                // Where the driver does not tell what it gave: half of what was asked for.
                let room = match allocated {
                    0 => total(batch_size).unwrap_or(0) / 2,
                    bytes => bytes,
                };
                let batch = fitting_batch(batch_size, |batch| Ok(total(batch)? <= room));
                let advice = match batch.ok().flatten() {
                    Some(batch) => format!("use --batch-size {batch}"),
                    None => "use a smaller model, or --device cpu".into(),
                };
                Error::OutOfMemory {
                    label,
                    what: format!("{what} after {}; {advice}", BinaryBytes(allocated)),
                    allocated,
                }
            }
            other => other,
        })
    }

    fn build(
        gpu: Arc<Gpu>,
        model: &Model,
        batch_size: usize,
        optimizer: &Optimizer,
        options: &Options,
    ) -> Result<Network> {
        let family = Family::select(gpu.report(), options.family)?;
        let products = products(model, batch_size, options, gpu.report())?;
        let sizes = Sizes::of(model, batch_size, options, family);
        let gradient = [
            gpu.buffer("activation gradient", sizes.gradient)?,
            gpu.buffer("activation gradient", sizes.gradient)?,
        ];
        let state_names = ["optimiser state 1", "optimiser state 2"];
        let buffers = Buffers {
            parameters: gpu.buffer("parameters", model.parameter_elements)?,
            gradients: gpu.buffer("gradients", model.parameter_elements)?,
            state: state_names[..optimizer.state_vectors()]
                .iter()
                .map(|name| gpu.buffer(name, model.parameter_elements))
                .collect::<Result<_>>()?,
            lane: Lane::new(
                &gpu,
                batch_size,
                sizes
                    .activations
                    .iter()
                    .map(|(name, len)| gpu.buffer(&format!("activation of {name}"), *len))
                    .collect::<Result<_>>()?,
                gradient[0].clone(),
                &sizes,
            )?,
            gradient,
        };
        let partials = gpu.buffer("partial gradients", partial_elements(&products))?;
        let mut planner = Planner {
            gpu: &gpu,
            model,
            products: &products,
            buffers: &buffers,
            lane: &buffers.lane,
            partials: partials.clone(),
            columns: if sizes.columns > 0 {
                Some([
                    gpu.buffer("im2col columns", sizes.columns)?,
                    gpu.buffer("im2col column gradients", sizes.columns)?,
                ])
            } else {
                None
            },
            dispatches: Vec::new(),
        };
        let forward = planner.forward()?;
        let backward = planner.backward()?;
        let evaluation = match evaluation_batch(&sizes, batch_size, options, gpu.report()) {
            None => None,
            Some(larger) => {
                let sizes = Sizes::of(model, larger, options, family);
                let lane = Lane::between(&gpu, larger, &sizes, &buffers.gradient)?;
                let products = self::products(model, larger, options, gpu.report())?;
                let mut planner = Planner {
                    gpu: &gpu,
                    model,
                    products: &products,
                    buffers: &buffers,
                    lane: &lane,
                    partials: partials.clone(),
                    columns: None,
                    dispatches: Vec::new(),
                };
                let forward = planner.forward()?;
                Some((lane, forward))
            }
        };
        Ok(Network {
            model: model.clone(),
            batch: batch_size,
            forward,
            backward,
            evaluation,
            optimizer: *optimizer,
            products,
            train: None,
            test: None,
            buffers,
            gpu,
        })
    }

    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Samples per step of an evaluation, see [`Options::large_evaluation`].
    pub fn evaluation_batch(&self) -> usize {
        let lane = self.evaluation.as_ref().map(|(lane, _)| lane);
        lane.map_or(self.batch, |lane| lane.batch)
    }

    /// The matrix products of a step, as chosen, with the name of their layer.
    pub fn products(&self) -> &[(String, Product)] {
        &self.products
    }

    /// Puts a split on the GPU: `images` as N×H×W×C bytes, one label per image, and
    /// `normalization` as scale per channel, then shift per channel.
    ///
    /// # Errors
    /// [`Error::Shape`] when the lengths do not fit the model, [`Error::Usage`] when the images exceed
    /// what the adapter binds at once or 4 GiB, [`Error::OutOfMemory`].
    pub fn upload_dataset(
        &mut self,
        split: Split,
        images: &[u8],
        labels: &[u32],
        normalization: &[f32],
    ) -> Result<()> {
        let (len, model) = (labels.len(), &self.model);
        let elements = model.input.elements();
        if images.len() != len * elements || len == 0 {
            return Err(Error::Shape {
                operation: "upload_dataset",
                what: format!(
                    "expected {len} images of {} ({} bytes), found {} bytes",
                    model.input,
                    len * elements,
                    images.len()
                ),
            });
        }
        if let Some(label) = labels.iter().find(|l| **l as usize >= model.classes) {
            return Err(Error::Shape {
                operation: "upload_dataset",
                what: format!("expected labels below {}, found {label}", model.classes),
            });
        }
        if normalization.len() != 2 * model.input.channels {
            return Err(Error::Shape {
                operation: "upload_dataset",
                what: format!(
                    "expected a scale and a shift for each of {} channels, found {} numbers",
                    model.input.channels,
                    normalization.len()
                ),
            });
        }
        expect_images(split, len, elements, self.gpu.report())?;
        let gpu = &self.gpu;
        let b = &self.buffers;
        let lane = match (split, &self.evaluation) {
            (Split::Test, Some((lane, _))) => lane,
            _ => &b.lane,
        };
        let batch = lane.batch;
        let row_count = len.div_ceil(batch);
        let row_len = size_of::<Step>() / 4;
        let images = gpu.upload("dataset images", images).map_err(|e| match e {
            Error::OutOfMemory {
                label,
                what,
                allocated,
            } => Error::OutOfMemory {
                label,
                what: format!(
                    "{what} after {}; use {}a smaller --batch-size",
                    BinaryBytes(allocated),
                    match split {
                        Split::Train => format!("a smaller --limit (these are {len} images) or "),
                        Split::Test => String::new(),
                    }
                ),
                allocated,
            },
            other => other,
        })?;
        let label_buffer = gpu.upload("dataset labels", labels)?;
        let normalization = gpu.upload("normalisation", normalization)?;
        let order = gpu.buffer("order", len)?;
        let steps = gpu.buffer("step table", row_count * row_len)?;
        let counter = gpu.buffer("step counter", 1)?;
        let metrics = gpu.buffer("metrics", row_count * 2)?;
        let predictions = gpu.buffer("predictions", len)?;
        let logits = &lane.activations[lane.activations.len() - 1];
        let loss_kernel = match model.loss {
            Loss::SoftmaxCrossEntropy => loss::softmax_cross_entropy,
            Loss::SquaredError => loss::squared_error,
        };
        let begin = vec![gather::gather_batch(
            gpu,
            model.input,
            batch,
            &images,
            &label_buffer,
            &order,
            &steps,
            &counter,
            &normalization,
            &lane.activations[0],
            &lane.labels,
        )?];
        let mut end = vec![
            loss_kernel(
                gpu,
                batch,
                model.classes,
                logits,
                &lane.labels,
                &steps,
                &counter,
                &lane.losses,
                &lane.gradient,
                &lane.predictions,
                &predictions,
            )?,
            loss::sum_metrics(
                gpu,
                batch,
                &lane.losses,
                &lane.predictions,
                &lane.labels,
                &steps,
                &counter,
                &metrics,
            )?,
        ];
        if split == Split::Train {
            end.push(match self.optimizer {
                Optimizer::Sgd { .. } => optimizer::sgd_update(
                    gpu,
                    &self.optimizer,
                    &b.parameters,
                    &b.gradients,
                    &b.state[0],
                    &steps,
                    &counter,
                )?,
                Optimizer::Adamw { .. } => optimizer::adamw_update(
                    gpu,
                    &self.optimizer,
                    &b.parameters,
                    &b.gradients,
                    &b.state[0],
                    &b.state[1],
                    &steps,
                    &counter,
                )?,
            });
        }
        end.push(step::advance_step(gpu, &counter)?);
        let resident = Resident {
            len,
            batch,
            order,
            steps,
            counter,
            metrics,
            predictions,
            begin,
            end,
        };
        match split {
            Split::Train => self.train = Some(resident),
            Split::Test => {
                let order: Vec<u32> = (0..len as u32).collect();
                let rows: Vec<Step> = (0..row_count)
                    .map(|i| Step {
                        first: (i * batch) as u32,
                        count: batch.min(len - i * batch) as u32,
                        lr: 0.0,
                        bias_correction1: 1.0,
                        bias_correction2: 1.0,
                        padding: [0; 3],
                    })
                    .collect();
                gpu.write("order", &resident.order, &order)?;
                gpu.write("step table", &resident.steps, &rows)?;
                self.test = Some(resident);
            }
        }
        Ok(())
    }

    /// Trains on the samples of the training split in the given `order`, one step per row of
    /// `steps`. `progress` gets the metrics of newly finished steps (maybe of none), in order, now
    /// and then. When it says break, no further step is submitted; the metrics of those in flight
    /// still go through it, and those of all that were done are returned. An error of its own stops
    /// the epoch.
    ///
    /// # Errors
    /// [`Error::Shape`] when order or table do not fit the split, or what the device reports.
    pub fn train_epoch(
        &mut self,
        order: &[u32],
        steps: &[Step],
        progress: &mut dyn FnMut(&[Metrics]) -> Result<ControlFlow<()>>,
    ) -> Result<Vec<Metrics>> {
        let resident = self.resident(Split::Train)?;
        let fits = order.len() == resident.len
            && order.iter().all(|i| (*i as usize) < resident.len)
            && steps.len() <= resident.metrics.len() / 2
            && steps.iter().all(|s| {
                s.count as usize <= self.batch
                    && s.count > 0
                    && s.first as usize + s.count as usize <= resident.len
            });
        if !fits {
            return Err(Error::Shape {
                operation: "train_epoch",
                what: format!(
                    "expected an order of {} samples and steps of 1 to {} of them, found {} samples and {} steps that reach elsewhere",
                    resident.len,
                    self.batch,
                    order.len(),
                    steps.len()
                ),
            });
        }
        self.gpu.write("order", &resident.order, order)?;
        self.gpu.write("step table", &resident.steps, steps)?;
        let plan = self.step_plan(resident);
        self.run(resident, &plan, steps.len(), progress)
    }

    /// Runs the whole split forward. `progress` gets the number of samples done; when it says break,
    /// the evaluation ends early and has fewer predictions than the split has samples.
    ///
    /// # Errors
    /// [`Error::Shape`] when the split was not uploaded, or what the device reports.
    pub fn evaluate(
        &mut self,
        split: Split,
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Evaluation> {
        if split == Split::Train {
            return Err(Error::Usage(
                "expected the test split: the training split's steps also update the parameters; upload the images as a test split to evaluate them".into(),
            ));
        }
        let resident = self.resident(split)?;
        let forward = self.evaluation.as_ref().map_or(&self.forward, |(_, f)| f);
        let plan: Vec<&Dispatch> = resident
            .begin
            .iter()
            .chain(forward)
            .chain(&resident.end)
            .collect();
        let row_count = resident.len.div_ceil(resident.batch);
        let mut done = 0;
        let metrics = self.run(resident, &plan, row_count, &mut |new| {
            done += new.len();
            Ok(progress((done * resident.batch).min(resident.len)))
        })?;
        let mut predictions: Vec<u32> = self.gpu.read("predictions", &resident.predictions)?;
        predictions.truncate(metrics.len() * resident.batch);
        Ok(Evaluation {
            loss_sum: metrics.iter().map(|m| f64::from(m.loss_sum)).sum(),
            predictions,
        })
    }

    /// Runs one training step (the first of the last epoch's table, again) and tells how long each
    /// of its dispatches took, in order. The step counts: it updates the parameters.
    ///
    /// # Errors
    /// [`Error::Shape`] before the first epoch, [`Error::Usage`] without timestamp queries.
    pub fn profile_step(&mut self) -> Result<Vec<crate::gpu::Span>> {
        self.gpu.profile(&self.plan()?)
    }

    /// The dispatches of a training step in their order, to be run by hand (see [`Gpu::submit`]); the
    /// first row of the last epoch's table is the current one again.
    ///
    /// # Errors
    /// [`Error::Shape`] before the training split was uploaded, or what the device reports.
    pub fn plan(&self) -> Result<Vec<&Dispatch>> {
        let resident = self.resident(Split::Train)?;
        self.gpu.write("step counter", &resident.counter, &[0u32])?;
        Ok(self.step_plan(resident))
    }

    /// The dispatches of a training step.
    fn step_plan<'a>(&'a self, resident: &'a Resident) -> Vec<&'a Dispatch> {
        // The gradients are computed between the loss and the update.
        let (loss, update) = resident.end.split_at(2);
        resident
            .begin
            .iter()
            .chain(&self.forward)
            .chain(loss)
            .chain(&self.backward)
            .chain(update)
            .collect()
    }

    fn resident(&self, split: Split) -> Result<&Resident> {
        match split {
            Split::Train => self.train.as_ref(),
            Split::Test => self.test.as_ref(),
        }
        .ok_or_else(|| Error::Shape {
            operation: "network",
            what: format!("expected {split:?} data on the GPU, found none; call upload_dataset"),
        })
    }

    /// Runs `plan` once per row of the step table, a few steps per submission, at most two
    /// submissions ahead of the GPU, and collects the metrics without stalling it. When `progress`
    /// says break, what is in flight is the end.
    fn run(
        &self,
        resident: &Resident,
        plan: &[&Dispatch],
        rows: usize,
        progress: &mut dyn FnMut(&[Metrics]) -> Result<ControlFlow<()>>,
    ) -> Result<Vec<Metrics>> {
        let gpu = &self.gpu;
        gpu.write("step counter", &resident.counter, &[0u32])?;
        let mut metrics: Vec<Metrics> = Vec::with_capacity(rows);
        let mut in_flight: std::collections::VecDeque<(Ticket, usize)> = Default::default();
        let mut readback: Option<Readback> = None;
        let (mut submitted, mut completed, mut fetched) = (0, 0, 0);
        // Start with single steps, then as many as fit the time a submission may take.
        let mut per_submission = 1;
        let mut last_wait = Instant::now();
        let mut last_readback = Instant::now();
        let mut rows = rows;
        while submitted < rows || !in_flight.is_empty() {
            if submitted < rows && in_flight.len() < 2 {
                let repeat = per_submission.min(rows - submitted);
                let ticket = gpu.submit("step", plan, repeat)?;
                submitted += repeat;
                in_flight.push_back((ticket, repeat));
                if last_readback.elapsed() > Duration::from_millis(250) && readback.is_none() {
                    let new = resident
                        .metrics
                        .slice(2 * fetched, 2 * (submitted - fetched));
                    fetched = submitted;
                    readback = Some(gpu.start_readback("metrics", &new)?);
                    last_readback = Instant::now();
                }
                continue;
            }
            if let Some((ticket, repeat)) = in_flight.pop_front() {
                gpu.wait(&ticket)?;
                completed += repeat;
                let step_time = last_wait.elapsed().div_f64(repeat as f64);
                last_wait = Instant::now();
                per_submission = (SUBMISSION.as_secs_f64() / step_time.as_secs_f64().max(1e-6))
                    .clamp(1.0, 64.0)
                    .min(2.0 * per_submission as f64) as usize;
            }
            // A submission behind the copy has finished, so the copy has: this does not wait.
            let new: Vec<Metrics> = match readback.take_if(|_| completed > fetched) {
                Some(readback) => readback.finish(gpu)?,
                None => Vec::new(),
            };
            if progress(&new)?.is_break() {
                rows = submitted;
            }
            metrics.extend(new);
        }
        if let Some(readback) = readback {
            let new: Vec<Metrics> = readback.finish(gpu)?;
            let _ = progress(&new)?;
            metrics.extend(new);
        }
        if fetched < rows {
            let rest = resident.metrics.slice(2 * fetched, 2 * (rows - fetched));
            let new: Vec<Metrics> = gpu.read("metrics", &rest)?;
            let _ = progress(&new)?;
            metrics.extend(new);
        }
        Ok(metrics)
    }

    /// The flat parameter vector, see [`crate::model::Layer::parameters`].
    pub fn parameters(&self) -> Result<Vec<f32>> {
        self.gpu.read("parameters", &self.buffers.parameters)
    }

    /// Gradients of the last training step, laid out like the parameters.
    pub fn gradients(&self) -> Result<Vec<f32>> {
        self.gpu.read("gradients", &self.buffers.gradients)
    }

    /// # Errors
    /// [`Error::Shape`] when the length is not the model's.
    pub fn set_parameters(&mut self, parameters: &[f32]) -> Result<()> {
        self.fill("parameters", &self.buffers.parameters, parameters)
    }

    /// The optimiser's state vectors (velocity, or first and second moment).
    pub fn optimizer_state(&self) -> Result<Vec<Vec<f32>>> {
        self.buffers
            .state
            .iter()
            .map(|s| self.gpu.read("optimiser state", s))
            .collect()
    }

    /// # Errors
    /// [`Error::Shape`] when the number or length of the vectors is not the optimiser's.
    pub fn set_optimizer_state(&mut self, state: &[Vec<f32>]) -> Result<()> {
        if state.len() != self.buffers.state.len() {
            return Err(Error::Shape {
                operation: "set_optimizer_state",
                what: format!(
                    "expected {} state vectors, found {}",
                    self.buffers.state.len(),
                    state.len()
                ),
            });
        }
        for (buffer, values) in self.buffers.state.iter().zip(state) {
            self.fill("optimiser state", buffer, values)?;
        }
        Ok(())
    }

    fn fill(&self, what: &'static str, buffer: &Buffer, values: &[f32]) -> Result<()> {
        if values.len() != buffer.len() {
            return Err(Error::Shape {
                operation: what,
                what: format!("expected {} values, found {}", buffer.len(), values.len()),
            });
        }
        self.gpu.write(what, buffer, values)
    }
}

/// Turns the layers into dispatches.
struct Planner<'a> {
    gpu: &'a Gpu,
    model: &'a Model,
    products: &'a [(String, Product)],
    buffers: &'a Buffers,
    lane: &'a Lane,
    /// Of one weight gradient after the other.
    partials: Buffer,
    /// im2col columns and their gradient, for explicit convolution.
    columns: Option<[Buffer; 2]>,
    dispatches: Vec<Dispatch>,
}

impl Lane {
    fn new(
        gpu: &Gpu,
        batch: usize,
        activations: Vec<Buffer>,
        gradient: Buffer,
        sizes: &Sizes,
    ) -> Result<Lane> {
        Ok(Lane {
            batch,
            activations,
            labels: gpu.buffer("batch labels", batch)?,
            losses: gpu.buffer("losses", batch)?,
            predictions: gpu.buffer("batch predictions", batch)?,
            gradient,
            indices: sizes
                .pool_indices
                .iter()
                .map(|(name, len)| {
                    let label = format!("index of {name}");
                    Ok((name.clone(), gpu.buffer(&label, *len)?))
                })
                .collect::<Result<_>>()?,
        })
    }

    /// A lane whose activations take turns in two buffers, since no way back will read them.
    fn between(gpu: &Gpu, batch: usize, sizes: &Sizes, buffers: &[Buffer; 2]) -> Result<Lane> {
        let mut turn = 0;
        let activations = sizes
            .activations
            .iter()
            .map(|(_, len)| {
                let here = buffers[turn].slice(0, (*len).max(1));
                // An activation that is never stored does not take a turn.
                if *len > 0 {
                    turn = 1 - turn;
                }
                here
            })
            .collect();
        // The last activation, the logits, does not lie in the buffer whose turn it is.
        Lane::new(gpu, batch, activations, buffers[turn].clone(), sizes)
    }
}

impl Planner<'_> {
    fn forward(&mut self) -> Result<Vec<Dispatch>> {
        let (model, buffers, lane) = (self.model, self.buffers, self.lane);
        let mut pooled_already = false;
        for (i, layer) in model.layers.iter().enumerate() {
            if std::mem::take(&mut pooled_already) {
                continue;
            }
            let (x, y) = (&lane.activations[i], &lane.activations[i + 1]);
            match &layer.op {
                Op::Conv2d { geometry, .. } | Op::Dense { geometry, .. } => {
                    let parameters = self.slice(&buffers.parameters, layer);
                    let product = self.product(layer, Pass::Forward);
                    let (y, index) = match product.pool {
                        Some(_) => {
                            pooled_already = true;
                            let index = self.index(&model.layers[i + 1]);
                            (&lane.activations[i + 2], Some(index))
                        }
                        None => (y, None),
                    };
                    let x = self.left_operand(layer, geometry, x)?;
                    self.dispatches.push(conv2d::conv2d_forward(
                        self.gpu,
                        &product,
                        &x,
                        &parameters,
                        y,
                        index.as_ref(),
                    )?);
                }
                Op::MaxPool2d(p) => {
                    let index = self.index(layer);
                    self.dispatches.push(pool::maxpool2d_forward(
                        self.gpu,
                        p,
                        self.lane.batch,
                        x,
                        y,
                        &index,
                    )?);
                }
                Op::MeanPool2d(p) => self.dispatches.push(pool::meanpool2d_forward(
                    self.gpu,
                    p,
                    self.lane.batch,
                    x,
                    y,
                )?),
                Op::Relu => self
                    .dispatches
                    .push(activation::relu_forward(self.gpu, x, y)?),
                Op::Sigmoid => self
                    .dispatches
                    .push(activation::sigmoid_forward(self.gpu, x, y)?),
            }
            self.attribute(layer);
        }
        Ok(std::mem::take(&mut self.dispatches))
    }

    fn backward(&mut self) -> Result<Vec<Dispatch>> {
        let (buffers, lane) = (self.buffers, self.lane);
        let layers = &self.model.layers;
        // Nothing before the first layer with parameters needs a gradient.
        let first = layers.iter().position(|l| l.parameters.is_some());
        let Some(first) = first else {
            return Ok(Vec::new());
        };
        // The loss kernels leave their gradient in the first of the two buffers.
        let [mut dy, mut dx] = buffers.gradient.clone();
        let last = layers.len() - 1;
        if ends_in_relu(&layers[last]) {
            let y = &lane.activations[last + 1];
            let masked = activation::relu_backward(self.gpu, y, &dy.slice(0, y.len()), &dx)?;
            self.dispatches.push(masked);
            std::mem::swap(&mut dy, &mut dx);
        }
        for (i, layer) in layers.iter().enumerate().skip(first).rev() {
            let (x, y) = (&lane.activations[i], &lane.activations[i + 1]);
            // The gradient handed on must stop where the ReLU fused into the layer before did.
            let masked = i > 0 && ends_in_relu(&layers[i - 1]);
            let hand_on = i > first;
            match &layer.op {
                Op::Conv2d { geometry, .. } | Op::Dense { geometry, .. } => {
                    self.backward_weight(layer, geometry, x, &dy)?;
                    if hand_on {
                        self.backward_input(layer, geometry, &dy, &dx, masked.then_some(x))?;
                    }
                }
                Op::MaxPool2d(p) => {
                    self.max_pool_backward(layer, p, &dy, &dx, masked.then_some(y))?;
                }
                Op::MeanPool2d(p) => {
                    let backward = pool::meanpool2d_backward(
                        self.gpu,
                        p,
                        self.lane.batch,
                        &dy,
                        masked.then_some(x),
                        &dx,
                    )?;
                    self.dispatches.push(backward);
                }
                Op::Relu | Op::Sigmoid => {
                    let kernel = match layer.op {
                        Op::Relu => activation::relu_backward,
                        _ => activation::sigmoid_backward,
                    };
                    let backward = kernel(self.gpu, y, &dy.slice(0, y.len()), &dx)?;
                    self.dispatches.push(backward);
                    if masked {
                        std::mem::swap(&mut dy, &mut dx);
                        let mask =
                            activation::relu_backward(self.gpu, x, &dy.slice(0, x.len()), &dx)?;
                        self.dispatches.push(mask);
                    }
                }
            }
            self.attribute(layer);
            std::mem::swap(&mut dy, &mut dx);
        }
        Ok(std::mem::take(&mut self.dispatches))
    }

    /// What was planned since the last call is for `layer`.
    fn attribute(&mut self, layer: &Layer) {
        let new = self.dispatches.iter_mut().filter(|d| d.layer().is_empty());
        new.for_each(|dispatch| dispatch.set_layer(&layer.name));
    }

    fn backward_weight(
        &mut self,
        layer: &Layer,
        geometry: &Conv2d,
        x: &Buffer,
        dy: &Buffer,
    ) -> Result<()> {
        let gradients = self.slice(&self.buffers.gradients, layer);
        let product = self.product(layer, Pass::BackwardWeight);
        let x = self.left_operand(layer, geometry, x)?;
        if product.splits() == 1 {
            let whole = conv2d::conv2d_backward_weight(self.gpu, &product, &x, dy, &gradients)?;
            self.dispatches.push(whole);
            return Ok(());
        }
        let partials = self.partials.slice(0, product.result_elements());
        self.dispatches.push(conv2d::conv2d_backward_weight(
            self.gpu, &product, &x, dy, &partials,
        )?);
        self.dispatches.push(reduce::reduce_splits(
            self.gpu,
            product.splits(),
            &partials,
            &gradients,
        )?);
        Ok(())
    }

    fn backward_input(
        &mut self,
        layer: &Layer,
        geometry: &Conv2d,
        dy: &Buffer,
        dx: &Buffer,
        mask: Option<&Buffer>,
    ) -> Result<()> {
        let parameters = self.slice(&self.buffers.parameters, layer);
        let product = self.product(layer, Pass::BackwardInput);
        let columns = self.columns.clone().filter(|_| is_conv(layer));
        let Some([_, columns]) = columns else {
            self.dispatches.push(conv2d::conv2d_backward_input(
                self.gpu,
                &product,
                dy,
                &parameters,
                dx,
                mask,
            )?);
            return Ok(());
        };
        // Explicit: the gradient of the columns first, then added back onto the image.
        let to_columns =
            conv2d::conv2d_backward_input(self.gpu, &product, dy, &parameters, &columns, None)?;
        self.dispatches.push(to_columns);
        self.dispatches.push(im2col::col2im(
            self.gpu,
            geometry,
            self.lane.batch,
            &columns,
            mask,
            dx,
        )?);
        Ok(())
    }

    fn max_pool_backward(
        &mut self,
        layer: &Layer,
        p: &Pool2d,
        dy: &Buffer,
        dx: &Buffer,
        mask: Option<&Buffer>,
    ) -> Result<()> {
        let index = self.index(layer);
        let kernel = if p.overlapping() {
            pool::maxpool2d_backward_overlapping
        } else {
            pool::maxpool2d_backward
        };
        self.dispatches
            .push(kernel(self.gpu, p, self.lane.batch, dy, &index, mask, dx)?);
        Ok(())
    }

    /// What a layer's product takes from the left: its input, or the explicit im2col columns of it.
    fn left_operand(&mut self, layer: &Layer, geometry: &Conv2d, x: &Buffer) -> Result<Buffer> {
        match self.columns.clone().filter(|_| is_conv(layer)) {
            None => Ok(x.clone()),
            Some([columns, _]) => {
                let unfold = im2col::im2col(self.gpu, geometry, self.lane.batch, x, &columns)?;
                self.dispatches.push(unfold);
                Ok(columns)
            }
        }
    }

    fn product(&self, layer: &Layer, pass: Pass) -> Product {
        let mut products = self.products.iter();
        let found = products.find(|(name, p)| *name == layer.name && p.pass == pass);
        found
            .expect("every layer with parameters has its products")
            .1
    }

    fn slice(&self, whole: &Buffer, layer: &Layer) -> Buffer {
        // Only layers with parameters come here.
        whole.slice(layer.parameters.unwrap_or(0), layer.parameter_count())
    }

    fn index(&self, layer: &Layer) -> Buffer {
        let found = self
            .lane
            .indices
            .iter()
            .find(|(name, _)| *name == layer.name);
        found.expect("every max-pool layer has an index").1.clone()
    }
}

/// A convolution whose im2col matrix is stored is a dense layer over its rows.
fn as_matrix(geometry: &Conv2d, batch: usize) -> (Conv2d, usize) {
    (
        Conv2d::dense(geometry.patch(), geometry.output.channels),
        batch * geometry.positions(),
    )
}

fn is_conv(layer: &Layer) -> bool {
    matches!(layer.op, Op::Conv2d { .. })
}

fn ends_in_relu(layer: &Layer) -> bool {
    layer.op.product().is_some_and(|(_, relu)| relu)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::load;

    fn model(name: &str) -> Model {
        let definition = load(name).unwrap();
        definition
            .resolve(definition.input, definition.classes)
            .unwrap()
    }

    fn refusal(result: Result<()>) -> String {
        match result {
            Err(Error::Usage(message)) => message,
            other => panic!("expected a refusal, found {other:?}"),
        }
    }

    #[test]
    fn a_batch_that_32_bits_do_not_index_is_refused() {
        // conv2d1 of default: 24·24·24 = 13,824 elements an image; 2³¹ / 13,824 = 155,344.6.
        let default = model("default");
        expect_batch(&default, 155_344, false).unwrap();
        for batch in [0, 155_345, usize::MAX] {
            let message = refusal(expect_batch(&default, batch, false));
            assert!(message.contains("1 to 155344"), "{message}");
            assert!(message.contains("conv2d1"), "{message}");
            assert!(message.contains(&format!("found {batch}")), "{message}");
            let memory = memory(
                &default,
                batch,
                &Optimizer::Sgd {
                    momentum: 0.0,
                    weight_decay: 0.0,
                },
                &Options::default(),
                &AdapterReport::imagined(true),
            );
            assert_eq!(refusal(memory.map(|_| ())), message);
        }
        // The columns of conv2d2: 8·8 positions of 5·5·24.
        let message = refusal(expect_batch(&default, 60_000, true));
        assert!(message.contains("conv2d2 has 38400"), "{message}");
    }

    #[test]
    fn what_an_adapter_does_not_bind_is_refused_with_the_flag_that_helps() {
        let adapter = |mebibytes: u64| AdapterReport {
            max_storage_binding_bytes: mebibytes << 20,
            ..AdapterReport::imagined(true)
        };
        let options = Options::default();
        let default = model("default");
        let check = |batch, mebibytes| {
            refusal(expect_bindings(
                &default,
                batch,
                &options,
                &adapter(mebibytes),
            ))
        };
        expect_bindings(&default, 4096, &options, &adapter(128)).unwrap();
        // The pooled convolution's output is not stored: its pooling's 12·12·24 floats are the
        // largest, 13.5 KiB an image.
        let message = check(100_000, 128);
        assert!(message.contains("--batch-size 8192 or"), "{message}");
        // The fused tensors aside, 600 KiB of parameters do not fit whatever the batch.
        let mut small = adapter(1);
        small.max_buffer_bytes = 500 << 10;
        let message = refusal(expect_bindings(&default, 1, &options, &small));
        assert!(message.contains("dense1"), "{message}");
        assert!(!message.contains("--batch-size"), "{message}");
        // One image, 512×512×4 floats, takes 4 MiB; the parameters take some hundred bytes.
        let text = crate::model::SHIPPED[1].1;
        let head = text.split("[[layer]]").next().unwrap();
        let layers = [
            "conv2d\"\nout_channels = 4\nkernel = 3\npadding = 1",
            "mean_pool2d\"\nkernel = 256",
            "dense\"\nunits = \"classes\"",
        ];
        let layers = layers.map(|l| format!("[[layer]]\ntype = \"{l}\n\n"));
        let text = format!("{head}{}", layers.concat());
        let wide = crate::model::Definition::parse(&text, "wide.toml").unwrap();
        let wide = wide
            .resolve(crate::model::Shape::new(512, 512, 1), 10)
            .unwrap();
        let message = refusal(expect_bindings(&wide, 64, &options, &adapter(3)));
        assert!(message.contains("even one image"), "{message}");
        assert!(message.contains("conv2d1"), "{message}");
        assert!(!message.contains("--batch-size"), "{message}");
    }

    #[test]
    fn images_are_counted_to_4_gib_and_no_further() {
        let mut adapter = AdapterReport::imagined(false);
        adapter.max_storage_binding_bytes = 16 << 30;
        adapter.max_buffer_bytes = 16 << 30;
        let elements = 1 << 20;
        expect_images(Split::Train, 4095, elements, &adapter).unwrap();
        let message = refusal(expect_images(Split::Train, 4096, elements, &adapter));
        assert!(message.contains("4294967296"), "{message}");
        assert!(message.contains("--limit 4095 or"), "{message}");
        adapter.max_storage_binding_bytes = 128 << 20;
        let message = refusal(expect_images(Split::Test, 129, elements, &adapter));
        assert!(message.contains("at most 128 of"), "{message}");
        assert!(!message.contains("--limit"), "{message}");
        let message = refusal(expect_images(Split::Test, 1, 1 << 28, &adapter));
        assert!(message.contains("smaller images"), "{message}");
        assert!(!message.contains("--limit"), "{message}");
    }
}
