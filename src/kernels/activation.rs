//! `shaders/activation.wgsl`: activations as kernels of their own.

use super::{KernelSpec, View, Work, read, write};
use crate::model::Activation;

const SOURCE: &str = include_str!("../../shaders/activation.wgsl");

/// `y = f(x)` for every element of `x`. Writes `y`.
pub fn activation_forward(activation: Activation, x: View, y: View) -> KernelSpec {
    let entry = match activation {
        Activation::Relu => "relu_forward",
        Activation::Sigmoid => "sigmoid_forward",
        other => unimplemented!("{other:?}"),
    };
    let n = x.len;
    KernelSpec::new(
        entry,
        SOURCE,
        Work::ActivationForward(activation),
        &[("ELEMENTS", n as f64)],
        vec![read(0, "x", x, n), write(1, "y", y, n)],
        n,
    )
}

/// `dx = dy · f'`, the derivative computed from what was `saved`: the output `y` or the input `x`, see
/// [`Activation::by_output`]. Writes `dx`.
pub fn activation_backward(activation: Activation, saved: View, dy: View, dx: View) -> KernelSpec {
    let entry = match activation {
        Activation::Relu => "relu_backward",
        Activation::Sigmoid => "sigmoid_backward",
        other => unimplemented!("{other:?}"),
    };
    let n = saved.len;
    KernelSpec::new(
        entry,
        SOURCE,
        Work::ActivationBackward(activation),
        &[("ELEMENTS", n as f64)],
        vec![
            read(2, "saved", saved, n),
            read(3, "dy", dy, n),
            write(4, "dx", dx, n),
        ],
        n,
    )
}
