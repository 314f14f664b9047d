//! Kernels that are computed along by another: rewrites of a plan that change no bit of any result.

use super::Plan;
use crate::kernels::conv2d::{self, Family, Pass, Product};
use crate::kernels::{KernelSpec, View, Work, im2col, pool};
use crate::model::Activation;

impl Plan {
    /// Fuses what can be fused: a ReLU into the product before it, its mask into whatever makes the
    /// gradient that it masks, and last, since the mask no longer looks at what was pooled, max-pooling
    /// into the product.
    pub(super) fn fuse(&mut self, family: Family) {
        self.rewrite(|_, first, second| relu_into_product(first, second));
        self.rewrite(mask_into_gradient);
        self.rewrite(|_, first, second| pool_into_product(first, second, family));
    }

    /// Puts what `fuse(plan, first, second)` makes of two kernels in the place of the first, for every
    /// second one that is the only reader of what a first one wrote.
    fn rewrite(&mut self, fuse: impl Fn(&Plan, &KernelSpec, &KernelSpec) -> Option<KernelSpec>) {
        let mut second = 0;
        while second < self.kernels.len() {
            let reader = &self.kernels[second].1;
            let fused = (0..second).rev().find_map(|first| {
                let writer = &self.kernels[first].1;
                let passed = passed_on(writer, reader)?;
                (self.readers(passed.tensor) == 1).then_some(())?;
                Some((first, fuse(self, writer, reader)?))
            });
            match fused {
                None => second += 1,
                Some((first, fused)) => {
                    let layer = self.kernels[first].1.layer.clone();
                    self.kernels[first].1 = fused.of_layer(&layer);
                    self.kernels.remove(second);
                }
            }
        }
    }
}

/// What `reader` takes as its main input, if it is what `writer` made.
fn passed_on(writer: &KernelSpec, reader: &KernelSpec) -> Option<View> {
    let made = match &writer.work {
        Work::Product(p) if p.pass == Pass::Forward => writer.view("y"),
        Work::Product(p) if p.pass == Pass::BackwardInput => writer.view("dx"),
        Work::Col2im { .. } | Work::MaxPoolBackward { .. } | Work::MeanPoolBackward { .. } => {
            writer.view("dx")
        }
        _ => return None,
    };
    let taken = match &reader.work {
        Work::ActivationForward(_) | Work::MaxPoolForward(_) => reader.view("x"),
        Work::ActivationBackward(_) => reader.view("dy"),
        _ => return None,
    };
    (made == taken).then_some(made)
}

/// `y = max(0, x·W + b)` in one.
fn relu_into_product(first: &KernelSpec, second: &KernelSpec) -> Option<KernelSpec> {
    match (&first.work, &second.work) {
        (Work::Product(p), Work::ActivationForward(Activation::Relu)) if p.pool.is_none() => {
            let product = Product { relu: true, ..*p };
            let (x, parameters) = (first.view("x"), first.view("parameters"));
            Some(conv2d::conv2d_forward(
                product,
                x,
                parameters,
                second.view("y"),
                None,
            ))
        }
        _ => None,
    }
}

/// The gradient that is handed on stops where the ReLU before did.
fn mask_into_gradient(plan: &Plan, first: &KernelSpec, second: &KernelSpec) -> Option<KernelSpec> {
    let Work::ActivationBackward(Activation::Relu) = second.work else {
        return None;
    };
    let (mask, dx) = (Some(second.view("saved")), second.view("dx"));
    Some(match &first.work {
        Work::Product(p) if !p.relu => {
            let product = Product { relu: true, ..*p };
            let (dy, parameters) = (first.view("dy"), first.view("parameters"));
            conv2d::conv2d_backward_input(product, dy, parameters, dx, mask)
        }
        Work::Col2im {
            geometry,
            masked: false,
        } => im2col::col2im(geometry, plan.batch, first.view("dcolumns"), mask, dx),
        Work::MeanPoolBackward {
            pool,
            masked: false,
        } => pool::meanpool2d_backward(pool, plan.batch, first.view("dy"), mask, dx),
        Work::MaxPoolBackward {
            pool,
            masked: false,
        } => {
            // The maximum itself is what the ReLU let through, so the pooled output masks as well, and
            // is smaller.
            let index = first.view("index");
            let mut forward = plan.specs();
            let pooled = forward.find(|spec| {
                matches!(spec.work, Work::MaxPoolForward(_)) && spec.view("index") == index
            })?;
            let mask = Some(pooled.view("y"));
            pool::maxpool2d_backward(pool, plan.batch, first.view("dy"), index, mask, dx)
        }
        _ => return None,
    })
}

/// Only the maxima of the product are written.
fn pool_into_product(
    first: &KernelSpec,
    second: &KernelSpec,
    family: Family,
) -> Option<KernelSpec> {
    match (&first.work, &second.work) {
        (Work::Product(p), Work::MaxPoolForward(pool))
            if p.pool.is_none() && Product::can_pool(&p.geometry, pool, family) =>
        {
            let product = Product {
                pool: Some(*pool),
                ..*p
            };
            let (x, parameters) = (first.view("x"), first.view("parameters"));
            let (y, index) = (second.view("y"), second.view("index"));
            Some(conv2d::conv2d_forward(
                product,
                x,
                parameters,
                y,
                Some(index),
            ))
        }
        _ => None,
    }
}
