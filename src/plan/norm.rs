//! What the normalisations add to a plan, on the way forward and back.

use super::{Builder, Section};
use crate::kernels::batch_norm::{self, BatchNorm};
use crate::kernels::group_norm::{self, GroupNorm};
use crate::kernels::{Dtype, View, reduce};
use crate::model::Layer;

impl Builder<'_> {
    pub(super) fn batch_norm_forward(
        &mut self,
        i: usize,
        layer: &Layer,
        [momentum, epsilon]: [f32; 2],
        x: View,
    ) -> View {
        let g = self.batch_norm(layer);
        let (affine, running) = (self.parameters_of(layer), self.running_of(layer));
        let y = self.maps("output", layer.output, self.real);
        if !self.trains() {
            self.emit(batch_norm::batch_norm_evaluate(
                &g, epsilon, false, x, running, affine, y,
            ));
            return y;
        }
        let [steps, counter] = self.step();
        let chunks = g.chunks().count();
        let moments = self.tensor("moments", &[chunks, 2, g.channels], Dtype::F32);
        let constants = [momentum, epsilon];
        self.emit(batch_norm::batch_norm_moments(
            &g, x, steps, counter, moments,
        ));
        let statistics = if let Some((shards, next)) = self.synced {
            let next = next.slice(layer.running_range().start, running.len);
            let of_shards = self.kept("shard_moments", &[shards, 4, g.channels]);
            let statistics = self.kept("statistics", &[2, g.channels]);
            self.emit(batch_norm::batch_norm_shard_moments(
                &g, x, moments, steps, counter, of_shards,
            ));
            self.section = Section::Sync;
            self.emit(batch_norm::batch_norm_sync_statistics(
                constants, of_shards, steps, counter, running, statistics, next,
            ));
            self.section = Section::Forward;
            statistics
        } else {
            let statistics = self.tensor("statistics", &[2, g.channels], Dtype::F32);
            self.emit(batch_norm::batch_norm_statistics(
                &g, constants, x, moments, steps, counter, statistics, running,
            ));
            statistics
        };
        self.emit(batch_norm::batch_norm_forward(
            &g, false, x, statistics, affine, y,
        ));
        self.saved.insert((i, "statistics"), statistics);
        y
    }

    /// The gradient by the input, where it is wanted.
    pub(super) fn batch_norm_backward(
        &mut self,
        i: usize,
        layer: &Layer,
        dy: View,
        wanted: bool,
    ) -> Option<View> {
        let g = self.batch_norm(layer);
        let (affine, gradient) = (self.parameters_of(layer), self.gradients_of(layer));
        let (x, statistics) = (self.values[layer.inputs[0]], self.saved[&(i, "statistics")]);
        let [steps, counter] = self.step();
        let chunks = g.chunks().count();
        let partials = self.tensor("partials", &[chunks, 2, g.channels], Dtype::F32);
        self.emit(batch_norm::batch_norm_backward_sums(
            &g, x, dy, statistics, steps, counter, partials,
        ));
        self.emit(reduce::reduce_chunks(chunks, partials, gradient));
        if !wanted {
            return None;
        }
        let mut sums = gradient;
        if let Some((shards, _)) = self.synced {
            let of_shards = self.kept("shard_sums", &[shards, 3, g.channels]);
            sums = self.kept("mean_gradients", &[2, g.channels]);
            self.emit(batch_norm::batch_norm_shard_sums(
                &g, gradient, steps, counter, of_shards,
            ));
            // The next shard overwrites the gradients of the layers so far.
            self.add_up_slab(layer.range().start, true);
            self.section = Section::Sync;
            self.emit(batch_norm::batch_norm_sync_gradients(
                of_shards, steps, counter, sums,
            ));
            self.section = Section::Backward;
        }
        let dx = self.maps("gradient", layer.input, self.real);
        let divided = self.synced.is_some();
        self.emit(batch_norm::batch_norm_backward_input(
            &g, divided, x, dy, statistics, affine, sums, steps, counter, dx,
        ));
        Some(dx)
    }

    fn batch_norm(&self, layer: &Layer) -> BatchNorm {
        BatchNorm {
            batch: self.batch,
            positions: layer.input.height * layer.input.width,
            channels: layer.input.channels,
        }
    }

    pub(super) fn group_norm_forward(
        &mut self,
        i: usize,
        layer: &Layer,
        g: GroupNorm,
        epsilon: f32,
        x: View,
    ) -> View {
        let affine = self.parameters_of(layer);
        let y = self.maps("output", layer.output, self.real);
        let chunks = g.chunks().count();
        let moments = self.pairs("moments", &[chunks, g.batch, g.groups]);
        let statistics = self.pairs("statistics", &[g.batch, g.groups]);
        self.emit(group_norm::group_norm_moments(&g, x, moments));
        self.emit(group_norm::group_norm_statistics(
            &g, epsilon, x, moments, statistics,
        ));
        self.emit(group_norm::group_norm_forward(&g, x, statistics, affine, y));
        self.saved.insert((i, "statistics"), statistics);
        y
    }

    /// The gradient by the input, where it is wanted.
    pub(super) fn group_norm_backward(
        &mut self,
        i: usize,
        layer: &Layer,
        g: GroupNorm,
        dy: View,
        wanted: bool,
    ) -> Option<View> {
        let (affine, gradient) = (self.parameters_of(layer), self.gradients_of(layer));
        let (x, statistics) = (self.values[layer.inputs[0]], self.saved[&(i, "statistics")]);
        let chunks = g.row_chunks().count();
        let partials = self.tensor("partials", &[chunks, 2, g.channels], Dtype::F32);
        self.emit(group_norm::group_norm_backward_affine(
            &g, x, dy, statistics, partials,
        ));
        self.emit(reduce::reduce_chunks(chunks, partials, gradient));
        wanted.then(|| {
            let dx = self.maps("gradient", layer.input, self.real);
            let chunks = g.chunks().count();
            let mut sums = self.pairs("sums", &[chunks, g.batch, g.groups]);
            self.emit(group_norm::group_norm_backward_sums(
                &g, x, dy, statistics, affine, sums,
            ));
            if chunks > 1 {
                let partials = sums;
                sums = self.pairs("sum", &[g.batch, g.groups]);
                self.emit(reduce::reduce_splits(chunks, partials, sums));
            }
            self.emit(group_norm::group_norm_backward_input(
                &g, x, dy, statistics, affine, sums, dx,
            ));
            dx
        })
    }

    /// Group normalisation of a layer's input.
    pub(super) fn group_norm(&self, layer: &Layer, groups: usize) -> GroupNorm {
        GroupNorm {
            batch: self.batch,
            positions: layer.input.height * layer.input.width,
            channels: layer.input.channels,
            groups,
        }
    }

    /// Layer normalisation of a layer's input.
    pub(super) fn layer_norm(&self, layer: &Layer) -> GroupNorm {
        let positions = layer.input.height * layer.input.width;
        GroupNorm::layer(self.batch, positions, layer.input.channels)
    }

    /// A tensor that holds two numbers for each group of every sample.
    fn pairs(&mut self, name: &str, shape: &[usize]) -> View {
        let view = self.tensor(name, &[shape, &[2]].concat(), Dtype::F32);
        self.tensors[view.tensor].per_sample = true;
        view
    }
}
