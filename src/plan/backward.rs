//! From the gradient by the logits to the gradients by the parameters: what each operation adds to a
//! plan on the way back (Rumelhart, Hinton, Williams, 1986). Where a value is used more than once its
//! gradients are added up, those of later layers first.

use super::forward::as_matrix;
use super::{Builder, Section};
use crate::kernels::conv2d::{self, Pass};
use crate::kernels::{Dtype, View, activation, im2col, pool, reduce};
use crate::model::{Activation, Conv2d, Layer, Op};

impl Builder<'_> {
    pub(super) fn backward(&mut self, gradient: View) {
        self.section = Section::Backward;
        let model = self.model;
        // A gradient is wanted where a parameter has had its share in a value.
        let mut wanted = vec![false];
        for layer in &model.layers {
            let by_input = layer.inputs.iter().any(|value| wanted[*value]);
            wanted.push(by_input || !layer.parameters.is_empty());
        }
        let mut gradients: Vec<Option<View>> = vec![None; wanted.len()];
        gradients[model.layers.len()] = Some(gradient);
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
                    let sum = self.add_up(gradients[*value], dx);
                    gradients[*value] = Some(sum);
                }
            }
        }
        self.layer.clear();
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
                self.product_backward_weight(layer, geometry, dy);
                vec![wanted[0].then(|| self.product_backward_input(layer, geometry, dy))]
            }
            Op::MaxPool2d(pool) => {
                let dx = self.maps("gradient", layer.input, Dtype::F32);
                let index = self.saved[&(i, "index")];
                self.emit(pool::maxpool2d_backward(
                    pool, self.batch, dy, index, None, dx,
                ));
                vec![Some(dx)]
            }
            Op::MeanPool2d(pool) => {
                let dx = self.maps("gradient", layer.input, Dtype::F32);
                self.emit(pool::meanpool2d_backward(pool, self.batch, dy, None, dx));
                vec![Some(dx)]
            }
            Op::Activation(activation) => {
                vec![Some(self.activation_backward(i, layer, *activation, dy))]
            }
            Op::Flatten => vec![Some(dy)],
            other => unimplemented!("{other:?}"),
        }
    }

    /// The sum of the gradients that a value has so far, if it has any, and another one.
    fn add_up(&mut self, so_far: Option<View>, dx: View) -> View {
        match so_far {
            None => dx,
            Some(_) => unimplemented!(),
        }
    }

    fn product_backward_weight(&mut self, layer: &Layer, geometry: &Conv2d, dy: View) {
        let gradients = self.gradients_of(layer);
        let x = self.values[layer.inputs[0]];
        let (geometry, batch, x) = self.left_operand(layer, geometry, x);
        let product = self.product(&geometry, batch, Pass::BackwardWeight);
        let splits = product.splits();
        if splits == 1 {
            self.emit(conv2d::conv2d_backward_weight(product, x, dy, gradients));
            return;
        }
        let partials = self.tensor("partials", &[splits, gradients.len], Dtype::F32);
        self.emit(conv2d::conv2d_backward_weight(product, x, dy, partials));
        self.emit(reduce::reduce_splits(splits, partials, gradients));
    }

    fn product_backward_input(&mut self, layer: &Layer, geometry: &Conv2d, dy: View) -> View {
        let parameters = self.parameters_of(layer);
        let dx = self.maps("gradient", layer.input, Dtype::F32);
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
        let dx = self.maps("activation gradient", layer.output, Dtype::F32);
        self.emit(activation::activation_backward(function, saved, dy, dx));
        dx
    }
}
