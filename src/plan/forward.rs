//! From the batch to the logits: what each operation adds to a plan on the way forward.

use super::{Builder, Section};
use crate::kernels::conv2d::{self, Pass, Product};
use crate::kernels::{Dtype, View, activation, im2col, pool};
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
                let y = self.maps("output", layer.output, Dtype::F32);
                let index = self.maps("index", layer.output, Dtype::U8);
                self.emit(pool::maxpool2d_forward(pool, self.batch, x, y, index));
                self.saved.insert((i, "index"), index);
                y
            }
            Op::MeanPool2d(pool) => {
                let y = self.maps("output", layer.output, Dtype::F32);
                self.emit(pool::meanpool2d_forward(pool, self.batch, x, y));
                y
            }
            Op::Activation(activation) => self.activation_forward(i, layer, *activation, x),
            // The same elements in the same order.
            Op::Flatten => x,
            other => unimplemented!("{other:?}"),
        }
    }

    /// A product of a layer, in a tile yet to be chosen.
    pub(super) fn product(&self, geometry: &Conv2d, batch: usize, pass: Pass) -> Product {
        Product {
            geometry: *geometry,
            batch,
            pass,
            relu: false,
            pool: None,
            tile: self.tile,
        }
    }

    fn product_forward(&mut self, layer: &Layer, geometry: &Conv2d, x: View) -> View {
        let parameters = self.parameters_of(layer);
        let (geometry, batch, x) = self.left_operand(layer, geometry, x);
        let y = self.maps("product", layer.output, Dtype::F32);
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
        let view = self.tensor(name, &dims, Dtype::F32);
        self.tensors[view.tensor].per_sample = true;
        view
    }

    fn activation_forward(
        &mut self,
        i: usize,
        layer: &Layer,
        function: Activation,
        x: View,
    ) -> View {
        let y = self.maps("output", layer.output, Dtype::F32);
        self.emit(activation::activation_forward(function, x, y));
        let saved = if function.by_output() { y } else { x };
        self.saved.insert((i, "activation"), saved);
        y
    }
}

/// A convolution whose im2col matrix is stored is a dense layer over its rows.
pub(super) fn as_matrix(geometry: &Conv2d, batch: usize) -> (Conv2d, usize) {
    (
        Conv2d::dense(geometry.patch(), geometry.output.channels),
        batch * geometry.positions(),
    )
}
