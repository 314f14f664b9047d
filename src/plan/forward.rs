//! From the batch to the logits: what each operation adds to a plan on the way forward.

use super::{Builder, Section};
use crate::kernels::conv2d::{self, Pass, Product};
use crate::kernels::{Dtype, View, activation, dropout, grouped, half, im2col, join, pool};
use crate::model::{Activation, Conv2d, Layer, Op};

impl Builder<'_> {
    pub(super) fn forward(&mut self) {
        self.section = Section::Forward;
        let model = self.model;
        for (i, layer) in model.layers.iter().enumerate() {
            self.layer.clone_from(&layer.name);
            let inputs: Vec<View> = layer
                .inputs
                .iter()
                .map(|value| self.values[*value])
                .collect();
            let mut y = self.op_forward(i, layer, &inputs);
            if let Some(activation) = layer.activation {
                y = self.activation_forward(i, layer, activation, y);
            }
            self.values.push(y);
        }
        self.layer.clear();
    }

    /// Plans the operation of layer `i` and says where its result is.
    fn op_forward(&mut self, i: usize, layer: &Layer, inputs: &[View]) -> View {
        let x = inputs[0];
        match &layer.op {
            Op::Conv2d(geometry) | Op::Dense(geometry) => self.product_forward(layer, geometry, x),
            Op::MaxPool2d(pool) => {
                let y = self.maps("output", layer.output, self.real);
                let index = self.maps("index", layer.output, Dtype::U8);
                self.emit(pool::maxpool2d_forward(pool, self.batch, x, y, index));
                self.saved.insert((i, "index"), index);
                y
            }
            Op::MeanPool2d(pool) => {
                let y = self.maps("output", layer.output, self.real);
                self.emit(pool::meanpool2d_forward(pool, self.batch, x, y));
                y
            }
            Op::Activation(activation) => self.activation_forward(i, layer, *activation, x),
            Op::BatchNorm { epsilon, momentum } => {
                self.batch_norm_forward(i, layer, [*momentum, *epsilon], x)
            }
            Op::GroupNorm { groups, epsilon } => {
                let g = self.group_norm(layer, *groups);
                self.group_norm_forward(i, layer, g, *epsilon, x)
            }
            Op::LayerNorm { epsilon } => {
                let g = self.layer_norm(layer);
                self.group_norm_forward(i, layer, g, *epsilon, x)
            }
            Op::Dropout { probability } => self.dropout(layer, *probability, x),
            Op::Add => self.add_forward(layer, inputs),
            Op::Concat => self.concat_forward(layer, inputs),
            Op::Scale => {
                let y = self.maps("output", layer.output, self.real);
                let (positions, c) = (layer.input.positions(), layer.input.channels);
                let factors = inputs[1];
                self.emit(join::scale_forward(self.batch, positions, c, x, factors, y));
                y
            }
            // The same elements in the same order.
            Op::Flatten => x,
        }
    }

    /// The gathered batch, or in mixed precision its copy in halves, as the network's input.
    pub(super) fn input(&mut self) {
        if self.real == Dtype::F16 {
            self.section = Section::Forward;
            let (x, shape) = (self.values[0], self.model.input);
            let y = self.maps("input.half", shape, Dtype::F16);
            self.emit(half::to_half(x, y));
            self.values[0] = y;
        }
    }

    /// The logits as floats, which is what a loss takes.
    pub(super) fn logits(&mut self) {
        if self.real == Dtype::F16 {
            let (x, shape) = (
                self.values[self.values.len() - 1],
                self.model.shape(self.values.len() - 1),
            );
            let y = self.maps("logits", shape, Dtype::F32);
            self.emit(half::to_float(x, y));
            self.values.push(y);
        }
    }

    /// The parameters of a layer with a product as it takes them: in mixed precision a copy in halves, which is
    /// made anew in every step.
    fn working_parameters_of(&mut self, layer: &Layer) -> View {
        let parameters = self.parameters_of(layer);
        if self.real == Dtype::F32 {
            return parameters;
        }
        let y = self.tensor("parameters", &[parameters.len], Dtype::F16);
        self.emit(half::to_half(parameters, y));
        self.working.insert(layer.name.clone(), y);
        y
    }

    /// A product of a layer, in a tile yet to be chosen.
    pub(super) fn product(&self, geometry: &Conv2d, batch: usize, pass: Pass) -> Product {
        Product {
            geometry: *geometry,
            batch,
            pass,
            relu: false,
            pool: None,
            half: false,
            tile: self.tile,
        }
    }

    fn product_forward(&mut self, layer: &Layer, geometry: &Conv2d, x: View) -> View {
        let parameters = self.working_parameters_of(layer);
        if geometry.groups > 1 {
            let y = self.maps("grouped", layer.output, self.real);
            self.emit(grouped::grouped_forward(
                geometry, self.batch, false, x, parameters, y,
            ));
            return y;
        }
        let (geometry, batch, x) = self.left_operand(layer, geometry, x);
        let y = self.maps("product", layer.output, self.real);
        let product = self.product(&geometry, batch, Pass::Forward);
        self.emit(conv2d::conv2d_forward(product, x, parameters, y, None));
        y
    }

    /// What a layer's product takes from the left: its input, or where the im2col matrix is stored the
    /// columns of it, over whose rows the convolution is a dense layer.
    pub(super) fn left_operand(
        &mut self,
        layer: &Layer,
        geometry: &Conv2d,
        x: View,
    ) -> (Conv2d, usize, View) {
        if !self.explicit_conv || !matches!(layer.op, Op::Conv2d(_)) {
            return (*geometry, self.batch, x);
        }
        let columns = self.columns("columns", geometry);
        self.emit(im2col::im2col(geometry, self.batch, x, columns));
        let (matrix, rows) = as_matrix(geometry, self.batch);
        (matrix, rows, columns)
    }

    /// A tensor for the im2col matrix of all samples.
    pub(super) fn columns(&mut self, name: &str, geometry: &Conv2d) -> View {
        let dims = [self.batch, geometry.positions(), geometry.patch()];
        let view = self.tensor(name, &dims, self.real);
        self.tensors[view.tensor].per_sample = true;
        view
    }

    /// Zeros of a layer's own while training, else nothing; the way back is the same on dy.
    pub(super) fn dropout(&mut self, layer: &Layer, probability: f32, x: View) -> View {
        if !self.trains() || probability == 0.0 {
            return x;
        }
        let y = self.maps("dropped", layer.output, self.real);
        let (order, [steps, counter]) = (self.order(), self.step());
        let key = dropout::key(&layer.name);
        self.emit(dropout::dropout(
            probability,
            key,
            self.batch,
            x,
            order,
            steps,
            counter,
            y,
        ));
        y
    }

    /// Two at a time, from the first on.
    fn add_forward(&mut self, layer: &Layer, inputs: &[View]) -> View {
        inputs[1..].iter().fold(inputs[0], |sum, x| {
            let y = self.maps("sum", layer.output, self.real);
            self.emit(join::add(sum, *x, y));
            y
        })
    }

    /// Likewise.
    fn concat_forward(&mut self, layer: &Layer, inputs: &[View]) -> View {
        let mut shape = layer.input;
        let rows = self.batch * shape.positions();
        let model = self.model;
        let others = inputs.iter().zip(&layer.inputs).skip(1);
        others.fold(inputs[0], |joined, (x, value)| {
            let (ca, cb) = (shape.channels, model.shape(*value).channels);
            shape.channels += cb;
            let y = self.maps("joined", shape, self.real);
            self.emit(join::concat(rows, ca, cb, joined, *x, y));
            y
        })
    }

    fn activation_forward(
        &mut self,
        i: usize,
        layer: &Layer,
        function: Activation,
        x: View,
    ) -> View {
        let y = self.maps("output", layer.output, self.real);
        self.emit(activation::activation_forward(function, x, y));
        let saved = if function.by_output() { y } else { x };
        self.saved.insert((i, "activation"), saved);
        y
    }
}

/// A convolution whose im2col matrix is stored is a dense layer over its rows.
pub(super) fn as_matrix(geometry: &Conv2d, batch: usize) -> (Conv2d, usize) {
    let matrix = Conv2d {
        bias: geometry.bias,
        ..Conv2d::dense(geometry.patch(), geometry.output.channels)
    };
    (matrix, batch * geometry.positions())
}
