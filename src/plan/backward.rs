//! From the gradient by the logits to the gradients by the parameters: what each operation adds to a
//! plan on the way back (Rumelhart, Hinton, Williams, 1986). Where a value is used more than once its
//! gradients are added up, those of later layers first.

use super::forward::as_matrix;
use super::{Builder, Section};
use crate::kernels::conv2d::{self, Pass, Tile};
use crate::kernels::{
    Dtype, KernelSpec, View, activation, grouped, half, im2col, join, pool, reduce,
};
use crate::model::{Activation, Conv2d, Layer, Op, Shape};

impl Builder<'_> {
    pub(super) fn backward(&mut self, gradient: View) {
        self.section = Section::Backward;
        let model = self.model;
        // A gradient is wanted where a parameter that is trained has had its share in a value.
        let mut wanted = vec![false];
        for (i, layer) in model.layers.iter().enumerate() {
            let by_input = layer.inputs.iter().any(|value| wanted[*value]);
            wanted.push(by_input || self.learns(i));
            if !self.learns(i) && (layer.op.product().is_some() || !by_input) {
                self.frozen.push([layer.range().start, layer.range().end]);
            }
        }
        let mut gradients: Vec<Option<View>> = vec![None; wanted.len()];
        gradients[model.layers.len()] = Some(self.scaled(gradient));
        for (i, layer) in model.layers.iter().enumerate().rev() {
            let Some(mut dy) = gradients[i + 1].filter(|_| wanted[i + 1]) else {
                continue;
            };
            self.layer.clone_from(&layer.name);
            if let Some(activation) = layer.activation {
                dy = self.activation_backward(i, layer, activation, dy);
            }
            let wants: Vec<bool> = layer.inputs.iter().map(|value| wanted[*value]).collect();
            let by_inputs = self.op_backward(i, layer, dy, &wants);
            for ((value, wanted), dx) in layer.inputs.iter().zip(wants).zip(by_inputs) {
                if wanted {
                    let dx = dx.expect("a gradient that is wanted");
                    let sum = self.add_up(model.shape(*value), gradients[*value], dx);
                    gradients[*value] = Some(sum);
                }
            }
            // Those of this layer and all behind it are there.
            if !layer.range().is_empty() {
                self.add_up_slab(layer.range().start, false);
            }
        }
        self.layer.clear();
        self.add_up_slab(0, true);
    }

    /// The gradient by the logits; in mixed precision times the loss scale, in halves.
    fn scaled(&mut self, gradient: View) -> View {
        if self.real == Dtype::F32 {
            return gradient;
        }
        let shape = Shape::new(1, 1, self.model.classes);
        let scaled = self.maps("logits.scaled_gradient", shape, Dtype::F16);
        let loss_scale = self.kept("loss_scale", &[half::LOSS_SCALE.len()]);
        self.loss_scale = Some(loss_scale);
        self.emit(half::scale_to_half(gradient, loss_scale, scaled));
        scaled
    }

    /// Whether layer `i` has a parameter that is trained.
    fn learns(&self, i: usize) -> bool {
        self.factors[i].iter().any(|factors| factors.lr != 0.0)
    }

    /// Plans the way back through the operation of layer `i`, with its share of the parameters'
    /// gradients, and says where the gradient by each input is; those that are not wanted may be missing.
    fn op_backward(
        &mut self,
        i: usize,
        layer: &Layer,
        dy: View,
        wanted: &[bool],
    ) -> Vec<Option<View>> {
        match &layer.op {
            Op::Conv2d(geometry) | Op::Dense(geometry) => {
                if self.learns(i) {
                    self.product_backward_weight(layer, geometry, dy);
                }
                vec![wanted[0].then(|| self.product_backward_input(layer, geometry, dy))]
            }
            Op::MaxPool2d(pool) => {
                let dx = self.maps("gradient", layer.input, self.real);
                let index = self.saved[&(i, "index")];
                self.emit(pool::maxpool2d_backward(
                    pool, self.batch, dy, index, None, dx,
                ));
                vec![Some(dx)]
            }
            Op::MeanPool2d(pool) => {
                let dx = self.maps("gradient", layer.input, self.real);
                self.emit(pool::meanpool2d_backward(pool, self.batch, dy, None, dx));
                vec![Some(dx)]
            }
            Op::Activation(activation) => {
                vec![Some(self.activation_backward(i, layer, *activation, dy))]
            }
            Op::BatchNorm { .. } => vec![self.batch_norm_backward(i, layer, dy, wanted[0])],
            Op::GroupNorm { groups, .. } => {
                let g = self.group_norm(layer, *groups);
                vec![self.group_norm_backward(i, layer, g, dy, wanted[0])]
            }
            Op::LayerNorm { .. } => {
                let g = self.layer_norm(layer);
                vec![self.group_norm_backward(i, layer, g, dy, wanted[0])]
            }
            Op::Dropout { probability } => vec![Some(self.dropout(layer, *probability, dy))],
            Op::Add => vec![Some(dy); layer.inputs.len()],
            Op::Concat => self.concat_backward(layer, dy, wanted),
            Op::Scale => self.scale_backward(layer, dy, wanted),
            Op::Flatten => vec![Some(dy)],
        }
    }

    /// The sum of the gradients that a value of `shape` has so far, if it has any, and another one.
    fn add_up(&mut self, shape: Shape, so_far: Option<View>, dx: View) -> View {
        let Some(so_far) = so_far else {
            return dx;
        };
        let sum = self.maps("gradient sum", shape, self.real);
        self.emit(join::add(so_far, dx, sum));
        sum
    }

    /// Each input gets the gradients of its own channels.
    fn concat_backward(&mut self, layer: &Layer, dy: View, wanted: &[bool]) -> Vec<Option<View>> {
        let (rows, c) = (self.batch * layer.output.positions(), layer.output.channels);
        let model = self.model;
        let mut first = 0;
        let inputs = layer.inputs.iter().zip(wanted);
        let slices = inputs.map(|(value, wanted)| {
            let shape = model.shape(*value);
            let at = first;
            first += shape.channels;
            wanted.then(|| {
                let dx = self.maps("gradient", shape, self.real);
                self.emit(join::slice_channels(rows, c, at, shape.channels, dy, dx));
                dx
            })
        });
        slices.collect()
    }

    fn scale_backward(&mut self, layer: &Layer, dy: View, wanted: &[bool]) -> Vec<Option<View>> {
        let [x, factors] = [0, 1].map(|input| self.values[layer.inputs[input]]);
        let (batch, positions, c) = (self.batch, layer.input.positions(), layer.input.channels);
        let by_map = wanted[0].then(|| {
            let dx = self.maps("gradient", layer.input, self.real);
            self.emit(join::scale_forward(batch, positions, c, dy, factors, dx));
            dx
        });
        let by_factors = wanted[1].then(|| {
            let df = self.maps("factors' gradient", Shape::new(1, 1, c), self.real);
            self.emit(join::scale_backward_factors(batch, positions, c, x, dy, df));
            df
        });
        vec![by_map, by_factors]
    }

    fn product_backward_weight(&mut self, layer: &Layer, geometry: &Conv2d, dy: View) {
        let gradients = self.gradients_of(layer);
        let x = self.values[layer.inputs[0]];
        if geometry.groups > 1 {
            let (g, batch) = (geometry, self.batch);
            // The CPU sums in one piece.
            let chunks = match self.tile {
                Tile::Whole => 1,
                _ => grouped::chunks(g, batch),
            };
            self.in_parts(chunks, gradients, |partials| {
                grouped::grouped_backward_weight(g, batch, chunks, x, dy, partials)
            });
            return;
        }
        let (geometry, batch, x) = self.left_operand(layer, geometry, x);
        let product = self.product(&geometry, batch, Pass::BackwardWeight);
        self.in_parts(product.splits(), gradients, |partials| {
            conv2d::conv2d_backward_weight(product, x, dy, partials)
        });
    }

    /// A kernel whose sums come in so many parts, and what adds them up.
    pub(super) fn in_parts(
        &mut self,
        parts: usize,
        sums: View,
        kernel: impl Fn(View) -> KernelSpec,
    ) {
        if parts == 1 {
            self.emit(kernel(sums));
            return;
        }
        let partials = self.tensor("partials", &[parts, sums.len], Dtype::F32);
        self.emit(kernel(partials));
        self.emit(reduce::reduce_splits(parts, partials, sums));
    }

    fn product_backward_input(&mut self, layer: &Layer, geometry: &Conv2d, dy: View) -> View {
        let working = self.working.get(&layer.name).copied();
        let parameters = working.unwrap_or_else(|| self.parameters_of(layer));
        let dx = self.maps("gradient", layer.input, self.real);
        if geometry.groups > 1 {
            self.emit(grouped::grouped_backward_input(
                geometry, self.batch, dy, parameters, None, dx,
            ));
            return dx;
        }
        if !self.explicit_conv || !matches!(layer.op, Op::Conv2d(_)) {
            let product = self.product(geometry, self.batch, Pass::BackwardInput);
            self.emit(conv2d::conv2d_backward_input(
                product, dy, parameters, dx, None,
            ));
            return dx;
        }
        // The gradient of the columns first, then added back onto the image.
        let columns = self.columns("column gradients", geometry);
        let (matrix, rows) = as_matrix(geometry, self.batch);
        let product = self.product(&matrix, rows, Pass::BackwardInput);
        self.emit(conv2d::conv2d_backward_input(
            product, dy, parameters, columns, None,
        ));
        self.emit(im2col::col2im(geometry, self.batch, columns, None, dx));
        dx
    }

    fn activation_backward(
        &mut self,
        i: usize,
        layer: &Layer,
        function: Activation,
        dy: View,
    ) -> View {
        let saved = self.saved[&(i, "activation")];
        let dx = self.maps("activation gradient", layer.output, self.real);
        self.emit(activation::activation_backward(function, saved, dy, dx));
        dx
    }
}
