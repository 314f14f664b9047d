//! Kernels that are computed along by another: rewrites of a plan that change no bit of any result, except
//! that an evaluation rounds a little differently where a batch-norm is folded into a convolution.

use super::{Lifetime, Plan, Tensor};
use crate::kernels::conv2d::{self, Family, Pass, Product};
use crate::kernels::{Dtype, KernelSpec, View, Work, batch_norm, grouped, im2col, pool};
use crate::model::{Activation, Conv2d};

impl Plan {
    /// Fuses what can be fused: an evaluated batch-norm and then a ReLU into the product before it, its
    /// mask into whatever makes the gradient that it masks, and last, since the mask no longer looks at
    /// what was pooled, max-pooling into the product.
    pub(super) fn fuse(&mut self, family: Family) {
        self.fold_batch_norms();
        self.rewrite(|_, first, second| relu_into_product(first, second));
        self.rewrite(mask_into_gradient);
        self.rewrite(|_, first, second| pool_into_product(first, second, family));
    }

    /// A convolution whose output only a batch-norm by running statistics reads becomes one with a folded
    /// weight and bias, which are made anew in every step: the parameters may have changed.
    fn fold_batch_norms(&mut self) {
        let mut at = 0;
        while at < self.kernels.len() {
            if let Some((first, [fold, product])) = self.folded(at) {
                let section = self.kernels[first].0;
                self.kernels.remove(at);
                self.kernels[first].1 = product;
                self.kernels.insert(first, (section, fold));
            }
            at += 1;
        }
    }

    /// Where the convolution of the batch-norm `at` stands, if that is one and can be folded, and what to
    /// put in its place.
    fn folded(&mut self, at: usize) -> Option<(usize, [KernelSpec; 2])> {
        let norm = &self.kernels[at].1;
        let Work::BatchNormEvaluate {
            epsilon,
            relu: false,
            ..
        } = norm.work
        else {
            return None;
        };
        let x = norm.view("x");
        let convolution = |spec: &KernelSpec| match spec.work {
            Work::Product(p) if p.pass == Pass::Forward && !p.relu && p.pool.is_none() => {
                Some(p.geometry)
            }
            Work::GroupedForward {
                geometry,
                relu: false,
            } => Some(geometry),
            _ => None,
        };
        let (first, g) = (0..at).find_map(|i| {
            let spec = &self.kernels[i].1;
            let geometry = convolution(spec)?;
            (spec.view("y") == x).then_some((i, geometry))
        })?;
        (self.readers(x.tensor) == 1).then_some(())?;
        let spec = self.kernels[first].1.clone();
        let (running, affine, y) = (norm.view("running"), norm.view("affine"), norm.view("y"));
        // In mixed precision what is folded would be rounded once more.
        let parameters = spec.view("parameters");
        (parameters.dtype == Dtype::F32).then_some(())?;
        let (m, c) = (g.patch(), g.output.channels);
        let folded = self.add_tensor(&format!("{}.folded", spec.layer), &[m + 1, c]);
        let image = spec.view("x");
        let fold =
            batch_norm::batch_norm_fold(m, c, g.bias, epsilon, parameters, running, affine, folded);
        let biased = Conv2d { bias: true, ..g };
        let convolution = match spec.work {
            Work::Product(p) => {
                let product = Product {
                    geometry: biased,
                    ..p
                };
                conv2d::conv2d_forward(product, image, folded, y, None)
            }
            _ => {
                let batch = y.len / g.output.elements();
                grouped::grouped_forward(&biased, batch, false, image, folded, y)
            }
        };
        let both = [fold, convolution].map(|new| new.of_layer(&spec.layer));
        Some((first, both))
    }

    /// A tensor of the step, of floats that no sample has a share in.
    fn add_tensor(&mut self, name: &str, shape: &[usize]) -> View {
        let elements = shape.iter().product();
        self.tensors.push(Tensor {
            name: name.into(),
            shape: shape.to_vec(),
            dtype: Dtype::F32,
            lifetime: Lifetime::Step,
            per_sample: false,
            slot: None,
            offset: 0,
        });
        View::whole(self.tensors.len() - 1, Dtype::F32, elements)
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
        Work::GroupedForward { .. }
        | Work::BatchNormForward { .. }
        | Work::BatchNormEvaluate { .. } => writer.view("y"),
        Work::GroupedBackwardInput { .. }
        | Work::Col2im { .. }
        | Work::MaxPoolBackward { .. }
        | Work::MeanPoolBackward { .. } => writer.view("dx"),
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
        (
            Work::GroupedForward {
                geometry,
                relu: false,
            },
            Work::ActivationForward(Activation::Relu),
        ) => {
            let (x, parameters) = (first.view("x"), first.view("parameters"));
            let y = second.view("y");
            let batch = y.len / geometry.output.elements();
            Some(grouped::grouped_forward(
                geometry, batch, true, x, parameters, y,
            ))
        }
        (
            Work::BatchNormForward {
                geometry,
                relu: false,
            },
            Work::ActivationForward(Activation::Relu),
        ) => {
            let (x, statistics) = (first.view("x"), first.view("statistics"));
            let (affine, y) = (first.view("affine"), second.view("y"));
            Some(batch_norm::batch_norm_forward(
                geometry, true, x, statistics, affine, y,
            ))
        }
        (
            Work::BatchNormEvaluate {
                geometry,
                epsilon,
                relu: false,
            },
            Work::ActivationForward(Activation::Relu),
        ) => {
            let (x, running) = (first.view("x"), first.view("running"));
            let (affine, y) = (first.view("affine"), second.view("y"));
            Some(batch_norm::batch_norm_evaluate(
                geometry, *epsilon, true, x, running, affine, y,
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
        Work::GroupedBackwardInput {
            geometry,
            masked: false,
        } => {
            let (dy, parameters) = (first.view("dy"), first.view("parameters"));
            grouped::grouped_backward_input(geometry, plan.batch, dy, parameters, mask, dx)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Twins;
    use crate::kernels::{AdapterReport, Step};
    use crate::model::{Loss, Model, Op, Shape};
    use crate::plan::{Mode, Options, Section, Target};

    /// Every kind of convolution before a batch-norm and a ReLU: with a bias, without, depthwise.
    fn model() -> Model {
        let mut model = Model::new("folded", Shape::new(5, 6, 4), 3, Loss::SquaredError);
        let conv = |input| Conv2d::new(input, 4, [3, 3], [1, 1], [1, 1]).unwrap();
        let kinds: [fn(Conv2d) -> Conv2d; 3] = [
            |g| g,
            |g| g.without_bias(),
            |g| g.grouped(4).unwrap().without_bias(),
        ];
        let mut value = 0;
        for kind in kinds {
            let op = Op::Conv2d(kind(conv(model.shape(value))));
            value = model.push(None, op, None, None, &[value]).unwrap();
            let op = Op::BatchNorm {
                epsilon: 1e-3,
                momentum: 0.1,
            };
            let relu = Some(Activation::Relu);
            value = model.push(None, op, relu, None, &[value]).unwrap();
        }
        let op = Op::Dense(Conv2d::dense(model.shape(value).elements(), 3));
        model.push(None, op, None, None, &[value]).unwrap();
        model.finish().unwrap()
    }

    #[test]
    fn a_batch_norm_folds_into_every_kind_of_convolution() {
        let (model, adapter) = (model(), AdapterReport::imagined(true));
        // Loss and predictions, and how many kernels it took.
        let evaluate = |unfused, explicit_conv| {
            let options = Options {
                unfused,
                explicit_conv,
                unshared: true,
                ..Options::default()
            };
            let target = Target::Gpu(&adapter);
            let plan = Plan::new(&model, 2, Mode::Evaluate, &options, target).unwrap();
            let of = |wanted: fn(&Work) -> bool| plan.specs().filter(|s| wanted(&s.work)).count();
            let norms = of(|work| matches!(work, Work::BatchNormEvaluate { .. }));
            let relus = of(|work| matches!(work, Work::ActivationForward(_)));
            let mut twins = Twins::<f64>::new(plan, 2);
            let step = Step::new(0, 2);
            *twins.words("steps") = bytemuck::cast_slice(&[step]).to_vec();
            // Some positive, so that variances are.
            let fill = |values: &mut Vec<f64>, signs: bool| {
                for (i, value) in values.iter_mut().enumerate() {
                    let phase = (i * i % 17) as f64 / 17.0;
                    *value = if signs { phase - 0.5 } else { 0.2 + phase };
                }
            };
            fill(twins.floats("parameters"), true);
            fill(twins.floats("input"), true);
            fill(twins.floats("running"), false);
            twins.run(&[Section::Forward, Section::Loss]);
            (twins.floats("losses").clone(), norms, relus)
        };
        let (losses, norms, relus) = evaluate(true, false);
        assert_eq!((norms, relus), (3, 3));
        for explicit_conv in [false, true] {
            let (folded, norms, relus) = evaluate(false, explicit_conv);
            assert_eq!((norms, relus), (0, 0));
            for (folded, loss) in folded.iter().zip(&losses) {
                assert!((folded - loss).abs() <= 1e-12 * loss, "{folded}, {loss}");
            }
        }
    }
}
