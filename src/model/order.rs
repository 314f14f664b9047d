//! The order of channels here and in PyTorch, which differ behind a flattened image only: height × width ×
//! channels here, channels × height × width there.

use super::{Model, Op, Shape};

impl Model {
    /// For every value (see [`super::Layer::inputs`]) and each of its channels in PyTorch's order the
    /// channel here.
    pub fn channel_orders(&self) -> Vec<Vec<usize>> {
        let mut orders: Vec<Vec<usize>> = vec![(0..self.input.channels).collect()];
        for layer in &self.layers {
            let order = match &layer.op {
                Op::Conv2d(g) | Op::Dense(g) => (0..g.output.channels).collect(),
                Op::Flatten => flattened(layer.input, &orders[layer.inputs[0]]),
                Op::Concat => {
                    let mut joined: Vec<usize> = Vec::new();
                    for value in &layer.inputs {
                        let before = joined.len();
                        joined.extend(orders[*value].iter().map(|channel| before + channel));
                    }
                    joined
                }
                _ => orders[layer.inputs[0]].clone(),
            };
            orders.push(order);
        }
        orders
    }

    /// The first layer for which the order matters in such a way that PyTorch's network would be another
    /// one, and why.
    pub(super) fn mixed_orders(&self) -> Option<(usize, &'static str)> {
        let flattens =
            |layer: &super::Layer| layer.op == Op::Flatten && layer.input != layer.output;
        if !self.layers.iter().any(flattens) {
            return None;
        }
        let orders = self.channel_orders();
        self.layers.iter().enumerate().find_map(|(i, layer)| {
            let order = &orders[layer.inputs[0]];
            let plain = order.iter().copied().eq(0..order.len());
            let what = match &layer.op {
                Op::Add | Op::Scale if layer.inputs.iter().any(|v| orders[*v] != *order) => {
                    "expected inputs whose channels have one order, found a flattened image beside another; flatten behind it"
                }
                Op::GroupNorm { groups, .. } if *groups > 1 && !plain => {
                    "expected channels that are no flattened image, whose groups are others elsewhere; flatten behind it"
                }
                Op::Conv2d(g) if g.groups > 1 && !plain => {
                    "expected channels that are no flattened image, whose groups are others elsewhere; flatten behind it"
                }
                _ => return None,
            };
            Some((i, what))
        })
    }
}

/// The order of a flattened image whose channels have that order.
fn flattened(image: Shape, order: &[usize]) -> Vec<usize> {
    let positions = image.height * image.width;
    let plane = |channel: &usize| {
        let channel = *channel;
        (0..positions).map(move |p| p * image.channels + channel)
    };
    order.iter().flat_map(plane).collect()
}
