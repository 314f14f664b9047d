//! `shaders/activation.wgsl`: activations as kernels of their own.

use super::{KernelSpec, View, Work, read, write};
use crate::model::Activation;

const SOURCE: &str = include_str!("../../shaders/activation.wgsl");

/// `y = f(x)` for every element of `x`. Writes `y`.
pub fn activation_forward(activation: Activation, x: View, y: View) -> KernelSpec {
    let n = x.len;
    let fours = n.is_multiple_of(4);
    let entry = match activation {
        Activation::Relu if fours => "relu_forward4",
        Activation::Relu => "relu_forward",
        Activation::Sigmoid => "sigmoid_forward",
        Activation::LeakyRelu { .. } if fours => "leaky_relu_forward4",
        Activation::LeakyRelu { .. } => "leaky_relu_forward",
        Activation::Gelu => "gelu_forward",
        Activation::GeluTanh => "gelu_tanh_forward",
        Activation::Silu => "silu_forward",
        Activation::Tanh => "tanh_forward",
        Activation::HardSwish if fours => "hard_swish_forward4",
        Activation::HardSwish => "hard_swish_forward",
    };
    let ([x_at, y_at], invocations) = match entry.ends_with('4') {
        true => ([5, 6], n / 4),
        false => ([0, 1], n),
    };
    KernelSpec::new(
        entry,
        SOURCE,
        Work::ActivationForward(activation),
        &constants(activation, n),
        vec![read(x_at, "x", x, n), write(y_at, "y", y, n)],
        invocations,
    )
}

/// `dx = dy · f'`, the derivative computed from what was `saved`: the output `y` or the input `x`, see
/// [`Activation::by_output`]. Writes `dx`.
pub fn activation_backward(activation: Activation, saved: View, dy: View, dx: View) -> KernelSpec {
    let n = saved.len;
    let fours = n.is_multiple_of(4);
    // Bindings of x and of y; leaky_relu only looks at the sign, of whichever it is.
    let (x, y, x4, y4) = (0, 2, 5, 7);
    let (entry, saved_at) = match activation {
        Activation::Relu if fours => ("relu_backward4", y4),
        Activation::Relu => ("relu_backward", y),
        Activation::Sigmoid => ("sigmoid_backward", y),
        Activation::LeakyRelu { .. } if fours => ("leaky_relu_backward4", y4),
        Activation::LeakyRelu { .. } => ("leaky_relu_backward", y),
        Activation::Gelu => ("gelu_backward", x),
        Activation::GeluTanh => ("gelu_tanh_backward", x),
        Activation::Silu => ("silu_backward", x),
        Activation::Tanh => ("tanh_backward", y),
        Activation::HardSwish if fours => ("hard_swish_backward4", x4),
        Activation::HardSwish => ("hard_swish_backward", x),
    };
    let ([dy_at, dx_at], invocations) = match entry.ends_with('4') {
        true => ([8, 9], n / 4),
        false => ([3, 4], n),
    };
    KernelSpec::new(
        entry,
        SOURCE,
        Work::ActivationBackward(activation),
        &constants(activation, n),
        vec![
            read(saved_at, "saved", saved, n),
            read(dy_at, "dy", dy, n),
            write(dx_at, "dx", dx, n),
        ],
        invocations,
    )
}

fn constants(activation: Activation, elements: usize) -> Vec<(&'static str, f64)> {
    let mut constants = vec![("ELEMENTS", elements as f64)];
    if let Activation::LeakyRelu { slope } = activation {
        constants.push(("SLOPE", slope.into()));
    }
    constants
}
