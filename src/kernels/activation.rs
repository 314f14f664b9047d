//! `shaders/activation.wgsl`: activations as kernels of their own.

use super::lanes::{lanes, with_lanes};
use super::{Argument, KernelSpec, View, Work, read, write};
use crate::model::Activation;

const SOURCE: &str = include_str!("../../shaders/activation.wgsl");

/// How often an invocation computes something.
const TIMES: usize = 2;

/// `y = f(x)` for every element of `x`. Writes `y`.
pub fn activation_forward(activation: Activation, x: View, y: View) -> KernelSpec {
    let n = x.len;
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
    let arguments = vec![read(0, "x", x, n), write(1, "y", y, n)];
    kernel(
        entry,
        activation,
        Work::ActivationForward(activation),
        arguments,
        n,
    )
}

/// `dx = dy · f'`, the derivative computed from what was `saved`: the output `y` or the input `x`, see
/// [`Activation::by_output`]. Writes `dx`.
pub fn activation_backward(activation: Activation, saved: View, dy: View, dx: View) -> KernelSpec {
    let n = saved.len;
    // Bindings of x and of y; leaky_relu only looks at the sign, of whichever it is.
    let (x, y) = (0, 2);
    let (entry, saved_at) = match activation {
        Activation::Relu => ("relu_backward", y),
        Activation::Sigmoid => ("sigmoid_backward", y),
        Activation::LeakyRelu { .. } => ("leaky_relu_backward", y),
        Activation::Gelu => ("gelu_backward", x),
        Activation::GeluTanh => ("gelu_tanh_backward", x),
        Activation::Silu => ("silu_backward", x),
        Activation::Tanh => ("tanh_backward", y),
        Activation::HardSwish => ("hard_swish_backward", x),
    };
    let arguments = vec![
        read(saved_at, "saved", saved, n),
        read(3, "dy", dy, n),
        write(4, "dx", dx, n),
    ];
    kernel(
        entry,
        activation,
        Work::ActivationBackward(activation),
        arguments,
        n,
    )
}

fn kernel(
    entry: &'static str,
    activation: Activation,
    work: Work,
    arguments: Vec<Argument>,
    elements: usize,
) -> KernelSpec {
    let mut constants = vec![("ELEMENTS", elements as f64)];
    if let Activation::LeakyRelu { slope } = activation {
        constants.push(("SLOPE", slope.into()));
    }
    let source = with_lanes(SOURCE, elements);
    let invocations = (elements / lanes(elements)).div_ceil(TIMES);
    KernelSpec::new(entry, source, work, &constants, arguments, invocations)
}
