//! Carries out the kernels of a plan by calling their twins.

use super::*;
use crate::kernels::conv2d::{Pass, Product};
use crate::kernels::mix::MIX_WORDS;
use crate::kernels::{Access, Dtype, KernelSpec, Metrics, STEP_ELEMENTS, Step, View, Work};
use crate::model::Loss;
use crate::model::recipe::{Optimizer, StepScalars};
use crate::plan::{Lifetime, Plan, Section};
use rayon::prelude::*;
use std::ops::Range;

/// What a tensor holds.
#[derive(Clone, Debug)]
pub enum Values<T> {
    Floats(Vec<T>),
    Words(Vec<u32>),
    Bytes(Vec<u8>),
}

impl<T: Float> Values<T> {
    /// So many zeros.
    pub fn zeros(dtype: Dtype, len: usize) -> Self {
        match dtype {
            Dtype::F32 | Dtype::F16 => Values::Floats(vec![T::zero(); len]),
            Dtype::U32 => Values::Words(vec![0; len]),
            Dtype::U8 => Values::Bytes(vec![0; len]),
        }
    }

    /// At least `len` elements, new ones 0.
    pub fn grow(&mut self, len: usize) {
        match self {
            Values::Floats(values) => values.resize(len.max(values.len()), T::zero()),
            Values::Words(values) => values.resize(len.max(values.len()), 0),
            Values::Bytes(values) => values.resize(len.max(values.len()), 0),
        }
    }
}

/// The tensors of a plan; several may share a place, but none that one kernel is bound to and writes.
#[derive(Clone, Debug, Default)]
pub struct Memory<T> {
    /// The place of each tensor, and where it begins there.
    pub places: Vec<usize>,
    pub offsets: Vec<usize>,
    pub values: Vec<Values<T>>,
}

impl<T: Float> Memory<T> {
    fn at(&self, view: View) -> &Values<T> {
        &self.values[self.places[view.tensor]]
    }

    /// Where in its place a view lies.
    fn range(&self, view: View) -> Range<usize> {
        let start = self.offsets[view.tensor] + view.start;
        start..start + view.len
    }

    /// The floats that `view` shows; like the others a mistake in this program where they are none.
    pub fn floats(&self, view: View) -> &[T] {
        match self.at(view) {
            Values::Floats(values) => &values[self.range(view)],
            other => panic!("expected floats, found {other:?}"),
        }
    }

    pub fn words(&self, view: View) -> &[u32] {
        match self.at(view) {
            Values::Words(values) => &values[self.range(view)],
            other => panic!("expected words, found {other:?}"),
        }
    }

    pub fn bytes(&self, view: View) -> &[u8] {
        match self.at(view) {
            Values::Bytes(values) => &values[self.range(view)],
            other => panic!("expected bytes, found {other:?}"),
        }
    }

    /// Runs `change` on what `view` shows while it may look at all tensors in other places.
    pub fn change(&mut self, view: View, change: impl FnOnce(&Self, &mut Values<T>)) {
        let place = self.places[view.tensor];
        let mut values = std::mem::replace(&mut self.values[place], Values::Words(Vec::new()));
        change(self, &mut values);
        self.values[place] = values;
    }

    /// The same on floats.
    pub fn change_floats(&mut self, view: View, change: impl FnOnce(&Self, &mut [T])) {
        self.change(view, |memory, values| match values {
            Values::Floats(values) => change(memory, &mut values[memory.range(view)]),
            other => panic!("expected floats, found {other:?}"),
        });
    }

    /// Runs `change` on floats and bytes that two views show.
    pub fn change_both(
        &mut self,
        floats: View,
        bytes: View,
        change: impl FnOnce(&Self, &mut [T], &mut [u8]),
    ) {
        let (place, range) = (self.places[bytes.tensor], self.range(bytes));
        let mut taken = std::mem::replace(&mut self.values[place], Values::Words(Vec::new()));
        self.change_floats(floats, |memory, floats| match &mut taken {
            Values::Bytes(values) => change(memory, floats, &mut values[range]),
            other => panic!("expected bytes, found {other:?}"),
        });
        self.values[place] = taken;
    }

    /// Puts floats where `view` shows; those that it has more keep what they held.
    pub fn put(&mut self, view: View, new: Vec<T>) {
        let start = self.range(view).start;
        self.change(view, |_, values| match values {
            Values::Floats(values) if values.len() == new.len() => *values = new,
            Values::Floats(values) => values[start..][..new.len()].copy_from_slice(&new),
            other => panic!("expected floats, found {other:?}"),
        });
    }

    /// Has what a kernel wrote to tensors of halves rounded, as it does itself.
    pub fn round_halves(&mut self, spec: &KernelSpec, round: impl Fn(&mut [T])) {
        let written = spec.arguments.iter().filter(|a| a.access != Access::Read);
        for argument in written.filter(|a| a.view.dtype == Dtype::F16) {
            self.change_floats(argument.view, |_, values| round(values));
        }
    }

    pub fn put_words(&mut self, view: View, new: &[u32]) {
        let start = self.range(view).start;
        self.change(view, |_, values| match values {
            Values::Words(values) => values[start..][..new.len()].copy_from_slice(new),
            other => panic!("expected words, found {other:?}"),
        });
    }

    pub fn put_bytes(&mut self, view: View, new: &[u8]) {
        let start = self.range(view).start;
        self.change(view, |_, values| match values {
            Values::Bytes(values) => values[start..][..new.len()].copy_from_slice(new),
            other => panic!("expected bytes, found {other:?}"),
        });
    }

    /// The current row of the step table, and its number.
    fn step(&self, spec: &KernelSpec) -> (Step, usize) {
        let row = self.words(spec.view("counter"))[0] as usize;
        let view = spec.view("steps");
        // The table is as long as an epoch, whatever the plan takes it to be.
        let table: &[Step] = match self.at(view) {
            Values::Words(words) => bytemuck::cast_slice(words),
            other => panic!("expected words, found {other:?}"),
        };
        (table[row], row)
    }

    /// What the shards of the batch left, `rows` rows of C each, and C.
    fn of_shards(&self, spec: &KernelSpec, rows: usize) -> (&[T], usize) {
        let c = spec
            .arguments
            .last()
            .map_or(0, |result| result.view.len / 2);
        let shards = self.step(spec).0.shards as usize;
        (&self.floats(spec.view("of_shards"))[..shards * rows * c], c)
    }

    /// The numbers of the batch's samples in the dataset; one that is not full repeats its last.
    fn batch_samples(&self, spec: &KernelSpec, batch: usize) -> Vec<u32> {
        let (step, _) = self.step(spec);
        let order = self.all_words(spec.view("order"));
        let last = step.count as usize - 1;
        (0..batch)
            .map(|i| order[step.first as usize + i.min(last)])
            .collect()
    }

    /// Where the batch's images lie among those at hand.
    fn batch_places(&self, spec: &KernelSpec, batch: usize, streamed: bool) -> Vec<u32> {
        if !streamed {
            return self.batch_samples(spec, batch);
        }
        let (step, _) = self.step(spec);
        let first = step.first - step.base;
        (0..batch as u32)
            .map(|i| first + i.min(step.count - 1))
            .collect()
    }

    /// All of the tensor that an argument belongs to: a dataset is longer than its plan knows.
    fn all_words(&self, view: View) -> &[u32] {
        match self.at(view) {
            Values::Words(values) => values,
            other => panic!("expected words, found {other:?}"),
        }
    }

    fn all_bytes(&self, view: View) -> &[u8] {
        match self.at(view) {
            Values::Bytes(values) => values,
            other => panic!("expected bytes, found {other:?}"),
        }
    }
}

/// Carries out one kernel by its twin.
pub fn run<T: Float>(spec: &KernelSpec, memory: &mut Memory<T>) {
    run_in_floats(spec, memory);
    memory.round_halves(spec, |values| {
        values.par_iter_mut().for_each(|v| *v = round_to_half(*v));
    });
}

fn run_in_floats<T: Float>(spec: &KernelSpec, memory: &mut Memory<T>) {
    let view = |name| spec.view(name);
    let floats = |name| memory.floats(view(name));
    match &spec.work {
        Work::GatherBatch { shape, streamed } => {
            let (x, batch_labels) = (view("x"), view("batch_labels"));
            let samples = memory.batch_samples(spec, batch_labels.len);
            let places = memory.batch_places(spec, batch_labels.len, *streamed);
            let (images, labels) = (view("images"), view("labels"));
            let normalization = memory.at(view("normalization"));
            let Values::Floats(normalization) = normalization else {
                panic!("expected floats, found {normalization:?}");
            };
            let (scale, shift) = normalization.split_at(shape.channels);
            let (values, labels) = gather_batch(
                memory.all_bytes(images),
                &places,
                memory.all_words(labels),
                &samples,
                *shape,
                scale,
                shift,
            );
            memory.put(x, values);
            memory.put_words(batch_labels, &labels);
        }
        Work::GatherViews {
            shape,
            views,
            streamed,
        } => {
            let batch_labels = view("batch_labels");
            let samples = memory.batch_samples(spec, batch_labels.len);
            let places = memory.batch_places(spec, batch_labels.len, *streamed);
            let images = memory.all_bytes(view("images"));
            let labels = memory.all_words(view("labels"));
            let (scale, shift) = floats("normalization").split_at(shape.channels);
            let (x, labels) = gather_views(
                images, &places, labels, &samples, *shape, *views, scale, shift,
            );
            memory.put(view("x"), x);
            memory.put_words(batch_labels, &labels);
        }
        Work::AverageViews(views) => {
            let y = average_views(*views, floats("z"));
            memory.put(view("y"), y);
        }
        Work::DrawMixes(mix) => {
            let (step, _) = memory.step(spec);
            let (labels, mixes) = draw_mixes(
                *mix,
                [step.seed, step.epoch],
                step.first,
                step.count as usize,
                memory.words(view("labels")),
                floats("quantiles"),
            );
            memory.put_words(view("batch_labels"), &labels);
            memory.put_words(view("mixes"), &mixes);
        }
        Work::MixBatch(shape) => {
            let y = mix_batch(*shape, floats("x"), memory.words(view("mixes")));
            memory.put(view("y"), y);
        }
        Work::DrawAugmentation { augment, shape } => {
            let (step, _) = memory.step(spec);
            let batch_labels = view("batch_labels");
            let batch = batch_labels.len as u32;
            let positions: Vec<u32> = (0..batch)
                .map(|i| step.first + i.min(step.count - 1))
                .collect();
            let samples = memory.batch_samples(spec, batch_labels.len);
            let drawn = augment::draw_augmentation(
                augment,
                *shape,
                [step.seed, step.epoch],
                &positions,
                &samples,
                floats("normalization"),
            );
            let labels = memory.all_words(view("labels"));
            let labels: Vec<u32> = samples.iter().map(|s| labels[*s as usize]).collect();
            memory.put(view("drawn"), drawn);
            memory.put_words(batch_labels, &labels);
        }
        Work::AugmentBatch {
            augment,
            shape,
            streamed,
        } => {
            let x = view("x");
            let places = memory.batch_places(spec, x.len / shape.elements(), *streamed);
            memory.change_floats(x, |memory, x| {
                augment::augment_batch(
                    augment,
                    *shape,
                    memory.all_bytes(view("images")),
                    &places,
                    memory.floats(view("augmentation")),
                    memory.floats(view("normalization")),
                    x,
                );
            });
        }
        Work::Im2col(g) => {
            let columns = im2col(g, floats("x"));
            memory.put(view("columns"), columns);
        }
        Work::Col2im { geometry, masked } => {
            let mut dx = col2im(geometry, floats("dcolumns"));
            if *masked {
                dx = relu_backward(floats("activation"), &dx);
            }
            memory.put(view("dx"), dx);
        }
        Work::Product(product) => run_product(spec, product, memory),
        Work::GroupedForward { geometry, relu } => {
            let y = grouped_forward(geometry, *relu, floats("x"), floats("parameters"));
            memory.put(view("y"), y);
        }
        Work::GroupedBackwardWeight { geometry, chunks } => {
            let partials = grouped_backward_weight(geometry, *chunks, floats("x"), floats("dy"));
            memory.put(view("partials"), partials);
        }
        Work::GroupedBackwardInput { geometry, masked } => {
            let mut dx = grouped_backward_input(geometry, floats("dy"), floats("parameters"));
            if *masked {
                dx = relu_backward(floats("activation"), &dx);
            }
            memory.put(view("dx"), dx);
        }
        Work::ReduceSplits { splits } => {
            let sums = reduce_splits(floats("partials"), *splits);
            memory.put(view("result"), sums);
        }
        Work::ReduceChunks { chunks } => {
            let sums = reduce_chunks(floats("partials"), *chunks);
            memory.put(view("result"), sums);
        }
        Work::Accumulate => {
            let first = memory.step(spec).0.micro == 0;
            let gradients = view("gradients");
            memory.change_floats(view("accumulated"), |memory, accumulated| {
                accumulate(memory.floats(gradients), first, accumulated);
            });
        }
        Work::SumShards { levels } => {
            let (step, _) = memory.step(spec);
            if step.micro < step.shards {
                let (first, shard) = (step.first_shard as usize, step.micro as usize);
                memory.change_floats(view("nodes"), |memory, nodes| {
                    sum_shards(*levels, first, shard, memory.floats(view("x")), nodes);
                });
            }
        }
        Work::FoldShards { scaled, .. } => {
            let (step, _) = memory.step(spec);
            let share = scaled.then(|| step.share.into());
            memory.change_floats(view("result"), |memory, result| {
                let nodes = memory.floats(view("nodes"));
                fold_shards(step.shards as usize, share, nodes, result);
            });
        }
        Work::MaxPoolForward(pool) => {
            let (y, index) = maxpool2d_forward(pool, floats("x"));
            memory.put(view("y"), y);
            memory.put_bytes(view("index"), &index);
        }
        Work::MaxPoolBackward { pool, masked } => {
            let index = memory.bytes(view("index"));
            let mut dy = floats("dy").to_vec();
            if *masked {
                dy = relu_backward(floats("activation"), &dy);
            }
            let dx = if pool.overlapping() {
                maxpool2d_backward_overlapping(pool, &dy, index)
            } else {
                maxpool2d_backward(pool, &dy, index)
            };
            memory.put(view("dx"), dx);
        }
        Work::MeanPoolForward(pool) => {
            let y = meanpool2d_forward(pool, floats("x"));
            memory.put(view("y"), y);
        }
        Work::MeanPoolBackward { pool, masked } => {
            let mut dx = meanpool2d_backward(pool, floats("dy"));
            if *masked {
                dx = relu_backward(floats("activation"), &dx);
            }
            memory.put(view("dx"), dx);
        }
        Work::ActivationForward(activation) => {
            let y = activation_forward(*activation, floats("x"));
            memory.put(view("y"), y);
        }
        Work::ActivationBackward(activation) => {
            let dx = activation_backward(*activation, floats("saved"), floats("dy"));
            memory.put(view("dx"), dx);
        }
        Work::BatchNormMoments(_)
        | Work::BatchNormStatistics { .. }
        | Work::BatchNormForward { .. }
        | Work::BatchNormBackwardSums(_)
        | Work::BatchNormBackwardInput { .. }
        | Work::BatchNormShardMoments(_)
        | Work::BatchNormSyncStatistics { .. }
        | Work::BatchNormShardSums(_)
        | Work::BatchNormSyncGradients
        | Work::BatchNormEvaluate { .. }
        | Work::BatchNormFold { .. } => run_batch_norm(spec, memory),
        Work::GroupNormMoments(_)
        | Work::GroupNormStatistics { .. }
        | Work::GroupNormForward(_)
        | Work::GroupNormBackwardSums(_)
        | Work::GroupNormBackwardInput(_)
        | Work::GroupNormBackwardAffine(_) => run_group_norm(spec, memory),
        Work::Add => {
            let y = join::add(floats("a"), floats("b"));
            memory.put(view("y"), y);
        }
        Work::Concat { rows } => {
            let y = join::concat(*rows, floats("a"), floats("b"));
            memory.put(view("y"), y);
        }
        Work::SliceChannels { rows, first, count } => {
            let y = join::slice_channels(*rows, *first, *count, floats("x"));
            memory.put(view("y"), y);
        }
        Work::Scale { channels } => {
            let y = join::scale_forward(*channels, floats("x"), floats("factors"));
            memory.put(view("y"), y);
        }
        Work::ScaleFactors {
            positions,
            channels,
        } => {
            let df = join::scale_backward_factors(*positions, *channels, floats("x"), floats("dy"));
            memory.put(view("df"), df);
        }
        Work::Dropout {
            probability,
            key,
            batch,
        } => {
            let (step, _) = memory.step(spec);
            let samples = memory.batch_samples(spec, *batch);
            let stream = [step.seed, step.epoch];
            let y = dropout::dropout(*probability, *key, stream, &samples, floats("x"));
            memory.put(view("y"), y);
        }
        Work::Loss {
            loss,
            classes,
            smoothing,
        } => {
            run_loss(spec, memory, |logits, labels, total| match loss {
                Loss::SoftmaxCrossEntropy => {
                    softmax_cross_entropy(logits, labels, *classes, *smoothing, total)
                }
                Loss::SquaredError => squared_error(logits, labels, *classes, total),
            });
            run_predict(spec, *classes, memory);
        }
        Work::WeightedLoss { smoothing } => {
            let weights = floats("class_weights").to_vec();
            run_loss(spec, memory, |logits, labels, total| {
                weighted_softmax_cross_entropy(logits, labels, &weights, *smoothing, total)
            });
        }
        Work::MixedLoss {
            smoothing,
            weighted,
        } => {
            let weights = weighted.then(|| floats("class_weights").to_vec());
            let mixes = memory.words(view("mixes")).to_vec();
            let classes = view("gradient").len / view("loss").len;
            run_loss(spec, memory, |logits, labels, total| {
                let weights = weights.as_deref();
                let mixes = &mixes[..labels.len() * MIX_WORDS];
                mixed_softmax_cross_entropy(
                    logits, labels, classes, mixes, weights, *smoothing, total,
                )
            });
        }
        Work::Predict { classes } => run_predict(spec, *classes, memory),
        Work::StoreLogits { classes } => {
            let (step, _) = memory.step(spec);
            let (first, count) = (step.first as usize, step.count as usize);
            let all = view("outputs");
            memory.change(all, |memory, outputs| match outputs {
                // As long as the split, whatever the plan takes it to be.
                Values::Floats(outputs) => {
                    store_logits(
                        memory.floats(view("logits")),
                        *classes,
                        first,
                        count,
                        outputs,
                    );
                }
                other => panic!("expected floats, found {other:?}"),
            });
        }
        Work::SumMetrics => {
            let (step, row) = memory.step(spec);
            let count = step.count as usize;
            let prediction = &memory.words(view("prediction"))[..count];
            let labels = memory.words(view("labels"));
            let hits = prediction.iter().zip(labels);
            let correct: Vec<u32> = hits.map(|(p, l)| u32::from(p == l)).collect();
            let (loss_sum, correct) = sum_metrics(&floats("loss")[..count], &correct);
            let loss_sum: f64 = loss_sum.into();
            let metrics = Metrics {
                loss_sum: loss_sum as f32,
                correct,
            };
            let all = view("metrics");
            let at = View {
                start: all.start + 2 * row,
                len: 2,
                ..all
            };
            memory.put_words(at, bytemuck::cast_slice(&[metrics]));
        }
        Work::Update { rule, grouped } => run_update(spec, rule, *grouped, memory),
        Work::SumSquares { run, grouped } => {
            let factors = grouped.then(|| floats("factors"));
            let sums = sum_squares(floats("x"), factors, *run);
            memory.put(view("result"), sums);
        }
        Work::Norm => {
            let norm = norm(floats("x"));
            memory.put(view("result"), vec![norm]);
        }
        Work::ClipGradients { limit } => {
            let norm = floats("norm_of_all")[0];
            memory.change_floats(view("gradients"), |_, g| clip_gradients(*limit, g, norm));
        }
        Work::MuonMomentum { momentum } => {
            let mut x = vec![T::zero(); view("x").len];
            if memory.step(spec).0.skip == 0 {
                memory.change_floats(view("velocity"), |memory, v| {
                    x = muon_momentum(*momentum, memory.floats(view("gradients")), v);
                });
            }
            memory.put(view("x"), x);
        }
        Work::MuonScale => {
            let norm = floats("norm")[0];
            memory.change_floats(view("x"), |_, x| muon_scale(x, norm));
        }
        Work::MuonPolynomial { side } => {
            let p = muon_polynomial(*side, floats("a"), floats("aa"));
            memory.put(view("p"), p);
        }
        Work::MuonUpdate { size, rate } => {
            let ((step, _), norm) = (memory.step(spec), floats("norm")[0]);
            if step.skip == 0 {
                memory.change_floats(view("parameters"), |memory, w| {
                    let direction = memory.floats(view("direction"));
                    muon_update(*size, *rate, step.lr, w, norm, direction);
                });
            }
        }
        Work::ToHalf => {
            let y = to_half(floats("x"));
            memory.put(view("y"), y);
        }
        Work::ToFloat => {
            let y = to_float(floats("x"));
            memory.put(view("y"), y);
        }
        Work::ScaleToHalf => {
            let y = scale_to_half(floats("x"), floats("loss_scale")[0]);
            memory.put(view("y"), y);
        }
        Work::UnscaleGradients => {
            let scale = floats("loss_scale")[0];
            memory.change_floats(view("gradients"), |_, g| unscale_gradients(g, scale));
        }
        Work::AdvanceLossScale => {
            let ((mut step, row), norm) = (memory.step(spec), floats("norm")[0]);
            memory.change_floats(view("loss_scale"), |_, scale| {
                step.skip = u32::from(advance_loss_scale(norm, scale));
            });
            let all = view("steps");
            let at = View {
                start: all.start + row * STEP_ELEMENTS,
                len: STEP_ELEMENTS,
                ..all
            };
            memory.put_words(at, bytemuck::cast_slice(&[step]));
        }
        Work::AverageValues => {
            let (step, _) = memory.step(spec);
            memory.change_floats(view("average"), |memory, average| {
                average_values(step.average, average, memory.floats(view("values")));
            });
        }
        Work::SwapValues => {
            let mut a = floats("a").to_vec();
            memory.change_floats(view("b"), |_, b| swap_values(&mut a, b));
            memory.put(view("a"), a);
        }
        Work::AdvanceStep => {
            let counter = view("counter");
            let row = memory.words(counter)[0];
            memory.put_words(counter, &[row + 1]);
        }
        Work::PeakMultiplyAdd { rounds } => {
            let factors = floats("factors");
            let y = view("y");
            let values = peak_multiply_add(y.len, *rounds, [factors[0], factors[1]]);
            memory.put(y, values);
        }
        Work::PeakCopy => {
            let values = peak_copy(floats("src"));
            memory.put(view("dst"), values);
        }
        Work::ProbePrices => {
            let (rounds, factors) = (memory.words(view("rounds")), floats("factors"));
            let rounds = [0, 1, 2, 3].map(|i| rounds[i]);
            let y = view("y");
            let values = probe_prices(y.len, rounds, [factors[0], factors[1]], floats("source"));
            memory.put(y, values);
        }
        Work::Arithmetic { operation } => {
            let y = arithmetic(*operation, floats("a"), floats("b"), floats("c"));
            memory.put(view("y"), y);
        }
    }
}

fn run_product<T: Float>(spec: &KernelSpec, product: &Product, memory: &mut Memory<T>) {
    let view = |name| spec.view(name);
    let floats = |name| memory.floats(view(name));
    let g = &product.geometry;
    match product.pass {
        Pass::Forward => {
            let y = conv2d_forward(g, product.relu, floats("x"), floats("parameters"));
            match &product.pool {
                None => memory.put(view("y"), y),
                Some(pool) => {
                    let (y, index) = maxpool2d_forward(pool, &y);
                    memory.put(view("y"), y);
                    memory.put_bytes(view("index"), &index);
                }
            }
        }
        Pass::BackwardWeight => {
            // Where the sums are cut, all of them stand in the first part: who compares adds the parts up.
            let gradient = conv2d_backward_weight(g, floats("x"), floats("dy"));
            let partials = view("partials");
            let mut all = vec![T::zero(); partials.len];
            all[..gradient.len()].copy_from_slice(&gradient);
            memory.put(partials, all);
        }
        Pass::BackwardInput => {
            let mut dx = conv2d_backward_input(g, floats("dy"), floats("parameters"));
            if product.relu {
                dx = relu_backward(floats("activation"), &dx);
            }
            memory.put(view("dx"), dx);
        }
    }
}

fn run_batch_norm<T: Float>(spec: &KernelSpec, memory: &mut Memory<T>) {
    let view = |name| spec.view(name);
    let floats = |name| memory.floats(view(name));
    let count = || memory.step(spec).0.count as usize;
    match &spec.work {
        Work::BatchNormMoments(g) => {
            let partials = batch_norm_moments(g, floats("x"), count());
            memory.put(view("partials"), partials);
        }
        Work::BatchNormStatistics {
            geometry,
            momentum,
            epsilon,
        } => {
            let mut running = floats("running").to_vec();
            let statistics = batch_norm_statistics(
                geometry,
                [*momentum, *epsilon],
                floats("x"),
                floats("partials"),
                count(),
                &mut running,
            );
            memory.put(view("running"), running);
            memory.put(view("statistics"), statistics);
        }
        Work::BatchNormForward { relu, .. } => memory.change_floats(view("y"), |memory, y| {
            let floats = |name| memory.floats(view(name));
            let (x, statistics, affine) = (floats("x"), floats("statistics"), floats("affine"));
            batch_norm_forward(*relu, x, statistics, affine, y);
        }),
        Work::BatchNormBackwardSums(g) => {
            let (x, dy, statistics) = (floats("x"), floats("dy"), floats("statistics"));
            let partials = batch_norm_backward_sums(g, x, dy, statistics, count());
            memory.put(view("partials"), partials);
        }
        Work::BatchNormBackwardInput { geometry, divided } => {
            memory.change_floats(view("dx"), |memory, dx| {
                let floats = |name| memory.floats(view(name));
                batch_norm_backward_input(
                    geometry,
                    *divided,
                    floats("x"),
                    floats("dy"),
                    floats("statistics"),
                    floats("affine"),
                    floats("gradient"),
                    memory.step(spec).0.count as usize,
                    dx,
                );
            });
        }
        Work::BatchNormShardMoments(g) => {
            let row = batch_norm_shard_moments(g, floats("x"), floats("partials"), count());
            put_row(spec, "shard_moments", row, memory);
        }
        Work::BatchNormSyncStatistics { momentum, epsilon } => {
            let [statistics, next_running] = batch_norm_sync_statistics(
                [*momentum, *epsilon],
                memory.of_shards(spec, 4),
                floats("running"),
            );
            memory.put(view("statistics"), statistics);
            memory.put(view("next_running"), next_running);
        }
        Work::BatchNormShardSums(g) => {
            let row = batch_norm_shard_sums(g, floats("gradient"), count());
            put_row(spec, "shard_sums", row, memory);
        }
        Work::BatchNormSyncGradients => {
            let means = batch_norm_sync_gradients(memory.of_shards(spec, 3));
            memory.put(view("mean_gradients"), means);
        }
        Work::BatchNormEvaluate { epsilon, relu, .. } => {
            memory.change_floats(view("y"), |memory, y| {
                let floats = |name| memory.floats(view(name));
                let (x, running, affine) = (floats("x"), floats("running"), floats("affine"));
                batch_norm_evaluate(*epsilon, *relu, x, running, affine, y);
            });
        }
        Work::BatchNormFold { bias, epsilon } => {
            let folded = batch_norm_fold(
                *bias,
                *epsilon,
                floats("parameters"),
                floats("running"),
                floats("affine"),
            );
            memory.put(view("folded"), folded);
        }
        other => unreachable!("{other:?}"),
    }
}

/// Puts the row of the shard that the step is, if it is one.
fn put_row<T: Float>(spec: &KernelSpec, rows: &str, row: Vec<T>, memory: &mut Memory<T>) {
    let (step, _) = memory.step(spec);
    if step.micro < step.shards {
        let start = step.micro as usize * row.len();
        memory.change_floats(spec.view(rows), |_, rows| {
            rows[start..][..row.len()].copy_from_slice(&row);
        });
    }
}

fn run_group_norm<T: Float>(spec: &KernelSpec, memory: &mut Memory<T>) {
    let view = |name| spec.view(name);
    let floats = |name| memory.floats(view(name));
    match &spec.work {
        Work::GroupNormMoments(g) => {
            let partials = group_norm_moments(g, floats("x"));
            memory.put(view("partials"), partials);
        }
        Work::GroupNormStatistics { geometry, epsilon } => {
            let (x, partials) = (floats("x"), floats("partials"));
            let statistics = group_norm_statistics(geometry, *epsilon, x, partials);
            memory.put(view("statistics"), statistics);
        }
        Work::GroupNormForward(g) => memory.change_floats(view("y"), |memory, y| {
            let floats = |name| memory.floats(view(name));
            group_norm_forward(g, floats("x"), floats("statistics"), floats("affine"), y);
        }),
        Work::GroupNormBackwardSums(g) => {
            let partials = group_norm_backward_sums(
                g,
                floats("x"),
                floats("dy"),
                floats("statistics"),
                floats("affine"),
            );
            memory.put(view("partials"), partials);
        }
        Work::GroupNormBackwardInput(g) => memory.change_floats(view("dx"), |memory, dx| {
            let floats = |name| memory.floats(view(name));
            group_norm_backward_input(
                g,
                floats("x"),
                floats("dy"),
                floats("statistics"),
                floats("affine"),
                floats("sums"),
                dx,
            );
        }),
        Work::GroupNormBackwardAffine(g) => {
            let (x, dy, statistics) = (floats("x"), floats("dy"), floats("statistics"));
            let partials = group_norm_backward_affine(g, x, dy, statistics);
            memory.put(view("partials"), partials);
        }
        other => unreachable!("{other:?}"),
    }
}

fn run_loss<T: Float>(
    spec: &KernelSpec,
    memory: &mut Memory<T>,
    function: impl Fn(&[T], &[u32], f32) -> LossOutput<T>,
) {
    let view = |name| spec.view(name);
    let (step, _) = memory.step(spec);
    let count = step.count as usize;
    let (losses, gradient) = (view("loss"), view("gradient"));
    let logits = &memory.floats(view("logits"))[..count * (gradient.len / losses.len)];
    let labels = &memory.words(view("labels"))[..count];
    let mut output = function(logits, labels, step.total);
    output.loss.resize(losses.len, T::zero());
    output.gradient.resize(gradient.len, T::zero());
    memory.put(losses, output.loss);
    memory.put(gradient, output.gradient);
}

fn run_predict<T: Float>(spec: &KernelSpec, classes: usize, memory: &mut Memory<T>) {
    let view = |name| spec.view(name);
    let (step, _) = memory.step(spec);
    let (first, count) = (step.first as usize, step.count as usize);
    let prediction = predict(memory.floats(view("logits")), classes);
    memory.put_words(view("prediction"), &prediction);
    let all = view("predictions");
    let at = View {
        start: all.start + first,
        len: count,
        ..all
    };
    memory.put_words(at, &prediction[..count]);
}

fn run_update<T: Float>(
    spec: &KernelSpec,
    rule: &Optimizer,
    grouped: bool,
    memory: &mut Memory<T>,
) {
    let (step, _) = memory.step(spec);
    if step.skip != 0 {
        return;
    }
    let scalars = StepScalars {
        lr: step.lr,
        bias_correction1: step.bias_correction1,
        bias_correction2: step.bias_correction2,
    };
    let view = |name| spec.view(name);
    let mut take = |name| {
        let values = &mut memory.values[memory.places[spec.view(name).tensor]];
        std::mem::replace(values, Values::Words(Vec::new()))
    };
    let (mut parameters, mut first) = (take("parameters"), take("state1"));
    let mut second = match rule.state_vectors() {
        1 => Values::Floats(Vec::new()),
        _ => take("state2"),
    };
    let gradients = memory.floats(view("gradients"));
    let factors = grouped.then(|| memory.floats(view("factors")));
    let (Values::Floats(w), Values::Floats(m), Values::Floats(v)) =
        (&mut parameters, &mut first, &mut second)
    else {
        panic!("expected parameters and state of floats");
    };
    match *rule {
        Optimizer::Sgd {
            momentum,
            nesterov,
            weight_decay: decay,
        } => sgd_update(
            w,
            gradients,
            m,
            factors,
            (momentum, nesterov),
            decay,
            scalars,
        ),
        Optimizer::Adamw {
            beta1,
            beta2,
            epsilon,
            weight_decay,
        } => adamw_update(
            w,
            gradients,
            [m, v],
            factors,
            [beta1, beta2],
            epsilon,
            weight_decay,
            scalars,
        ),
        Optimizer::Lion {
            beta1,
            beta2,
            weight_decay: decay,
        } => lion_update(w, gradients, m, factors, [beta1, beta2], decay, scalars),
        Optimizer::Muon { .. } => unreachable!("it leaves elements to SGD"),
    }
    let mut give = |name, values| memory.values[memory.places[spec.view(name).tensor]] = values;
    give("parameters", parameters);
    give("state1", first);
    if rule.state_vectors() > 1 {
        give("state2", second);
    }
}

/// A plan that the twins carry out, with memory of its own.
#[derive(Clone, Debug)]
pub struct Twins<T> {
    pub plan: Plan,
    pub memory: Memory<T>,
}

impl<T: Float> Twins<T> {
    /// All zeros, with room for `samples` samples of a dataset and as many steps.
    pub fn new(plan: Plan, samples: usize) -> Twins<T> {
        let mut values: Vec<_> = plan
            .slots
            .iter()
            .map(|slot| Values::zeros(slot.dtype, slot.elements))
            .collect();
        let mut places = Vec::with_capacity(plan.tensors.len());
        for tensor in &plan.tensors {
            let each = tensor.elements();
            let len = match (tensor.lifetime, tensor.per_sample, tensor.name.as_str()) {
                (Lifetime::Data, true, _) => each / plan.batch * samples.max(plan.batch),
                (Lifetime::Data, _, "steps" | "metrics") => each * samples,
                _ => each,
            };
            places.push(tensor.slot.unwrap_or_else(|| {
                values.push(Values::zeros(tensor.dtype, len));
                values.len() - 1
            }));
        }
        let offsets = plan.tensors.iter().map(|tensor| tensor.offset).collect();
        Twins {
            plan,
            memory: Memory {
                places,
                offsets,
                values,
            },
        }
    }

    /// The tensor of that name, as far as it reaches; a name that there is not is a mistake in this program.
    pub fn values(&mut self, name: &str) -> &mut Values<T> {
        let tensor = self.plan.tensor(name);
        let tensor = tensor.unwrap_or_else(|| panic!("the plan has no tensor '{name}'"));
        assert_eq!(
            self.plan.tensors[tensor].offset, 0,
            "'{name}' shares its memory"
        );
        &mut self.memory.values[self.memory.places[tensor]]
    }

    /// The same where it is of floats.
    pub fn floats(&mut self, name: &str) -> &mut Vec<T> {
        match self.values(name) {
            Values::Floats(values) => values,
            other => panic!("expected floats, found {other:?}"),
        }
    }

    /// The same where it is of words.
    pub fn words(&mut self, name: &str) -> &mut Vec<u32> {
        match self.values(name) {
            Values::Words(values) => values,
            other => panic!("expected words, found {other:?}"),
        }
    }

    /// Carries out the batch of `shards` shards that begins with the current row of the step table, phase by phase,
    /// each shard in a step memory of its own.
    pub fn run_phases(&mut self, shards: usize) {
        let counter = self.words("counter")[0];
        let slots = self.plan.slots.len();
        let mut replicas = vec![self.memory.values[..slots].to_vec(); shards];
        let specs: Vec<KernelSpec> = self.plan.specs().cloned().collect();
        for phase in self.plan.phases() {
            for (shard, replica) in (counter..).zip(&mut replicas) {
                self.words("counter")[0] = shard;
                self.memory.values[..slots].swap_with_slice(replica);
                for spec in &specs[phase.of_shards.clone()] {
                    run(spec, &mut self.memory);
                }
                self.memory.values[..slots].swap_with_slice(replica);
            }
            for spec in &specs[phase.of_batch] {
                run(spec, &mut self.memory);
            }
        }
        self.words("counter")[0] = counter + shards as u32;
    }

    /// Carries out the kernels of some sections.
    pub fn run(&mut self, sections: &[Section]) {
        for (section, spec) in &self.plan.kernels {
            if sections.contains(section) {
                run(spec, &mut self.memory);
            }
        }
    }
}
