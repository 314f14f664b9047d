//! `shaders/activation.wgsl`: ReLU and sigmoid as layers of their own.

use super::dispatch;
use crate::error::Result;
use crate::gpu::{Buffer, Dispatch, Gpu};

const SOURCE: &str = include_str!("../../shaders/activation.wgsl");

fn forward(gpu: &Gpu, name: &'static str, x: &Buffer, y: &Buffer) -> Result<Dispatch> {
    let n = x.len();
    let arguments = [(0, "x", x, n), (1, "y", y, n)];
    dispatch(gpu, name, SOURCE, &[("ELEMENTS", n as f64)], &arguments, n)
}

fn backward(
    gpu: &Gpu,
    name: &'static str,
    y: &Buffer,
    dy: &Buffer,
    dx: &Buffer,
) -> Result<Dispatch> {
    let n = y.len();
    let arguments = [(2, "y", y, n), (3, "dy", dy, n), (4, "dx", dx, n)];
    dispatch(gpu, name, SOURCE, &[("ELEMENTS", n as f64)], &arguments, n)
}

/// `y = max(0, x)` for every element of `x`. Writes `y`.
///
/// # Errors
/// [`crate::Error::Shape`] for buffers that are too short, [`crate::Error::Gpu`] from the device;
/// so for every wrapper here.
pub fn relu_forward(gpu: &Gpu, x: &Buffer, y: &Buffer) -> Result<Dispatch> {
    forward(gpu, "relu_forward", x, y)
}

/// `dx = dy` where the stored output `y` is positive, else 0. Writes `dx`.
pub fn relu_backward(gpu: &Gpu, y: &Buffer, dy: &Buffer, dx: &Buffer) -> Result<Dispatch> {
    backward(gpu, "relu_backward", y, dy, dx)
}

/// `y = 1 / (1 + e^−x)` for every element of `x`. Writes `y`.
pub fn sigmoid_forward(gpu: &Gpu, x: &Buffer, y: &Buffer) -> Result<Dispatch> {
    forward(gpu, "sigmoid_forward", x, y)
}

/// `dx = dy · y · (1 − y)` from the stored output `y`. Writes `dx`.
pub fn sigmoid_backward(gpu: &Gpu, y: &Buffer, dy: &Buffer, dx: &Buffer) -> Result<Dispatch> {
    backward(gpu, "sigmoid_backward", y, dy, dx)
}
