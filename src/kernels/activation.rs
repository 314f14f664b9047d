//! `shaders/activation.wgsl`: activations as kernels of their own.

use super::{KernelSpec, View, Work, read, write};
use crate::model::Activation;

const SOURCE: &str = include_str!("../../shaders/activation.wgsl");

/// `y = f(x)` for every element of `x`. Writes `y`.
pub fn activation_forward(activation: Activation, x: View, y: View) -> KernelSpec {
    let entry = match activation {
        Activation::Relu => "relu_forward",
        Activation::Sigmoid => "sigmoid_forward",
        Activation::LeakyRelu { .. } => "leaky_relu_forward",
        Activation::Gelu => "gelu_forward",
        Activation::GeluTanh => "gelu_tanh_forward",
        Activation::Silu => "silu_forward",
        Activation::Tanh => "tanh_forward",
        Activation::HardSwish => "hard_swish_forward",
    };
    let n = x.len;
    KernelSpec::new(
        entry,
        SOURCE,
        Work::ActivationForward(activation),
        &constants(activation, n),
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
        Activation::LeakyRelu { .. } => "leaky_relu_backward",
        Activation::Gelu => "gelu_backward",
        Activation::GeluTanh => "gelu_tanh_backward",
        Activation::Silu => "silu_backward",
        Activation::Tanh => "tanh_backward",
        Activation::HardSwish => "hard_swish_backward",
    };
    let saved_at = if activation.by_output() { 2 } else { 0 };
    let n = saved.len;
    KernelSpec::new(
        entry,
        SOURCE,
        Work::ActivationBackward(activation),
        &constants(activation, n),
        vec![
            read(saved_at, "saved", saved, n),
            read(3, "dy", dy, n),
            write(4, "dx", dx, n),
        ],
        n,
    )
}

fn constants(activation: Activation, elements: usize) -> Vec<(&'static str, f64)> {
    let mut constants = vec![("ELEMENTS", elements as f64)];
    if let Activation::LeakyRelu { slope } = activation {
        constants.push(("SLOPE", slope.into()));
    }
    constants
}
