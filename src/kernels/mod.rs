//! One module per shader file: a typed wrapper per entry point that bakes in the shapes, binds the
//! buffers and gives a [`crate::gpu::Dispatch`].
//!
//! Entry point, wrapper, CPU twin (`crate::cpu`) and pipeline label share one name. The sizes of a
//! kernel come from its geometry or from its read-only inputs; a buffer may be longer than the
//! kernel needs, and what lies beyond stays untouched.

// One argument per buffer reads better than a struct per kernel.
#![allow(clippy::too_many_arguments)]

pub mod activation;
pub mod batch_norm;
pub mod conv2d;
pub mod fingerprint;
pub mod gather;
pub mod group_norm;
pub mod im2col;
pub mod lanes;
pub mod loss;
pub mod optimizer;
pub mod peak;
pub mod pool;
pub mod reduce;
pub mod step;

use crate::error::{Error, Result};
use crate::gpu::{Buffer, Dispatch, Gpu, Kernel, Step, fold_groups};

/// Invocations per workgroup in the shaders that handle their elements one by one.
pub const WORKGROUP_SIZE: usize = 64;

/// 4-byte elements of one row of the step table.
const STEP_ELEMENTS: usize = size_of::<Step>() / 4;

/// A buffer of a kernel: binding number, name for messages, least number of elements.
type Argument<'a> = (u32, &'static str, &'a Buffer, usize);

/// A dispatch of entry point `name` with at least `invocations` invocations.
///
/// # Errors
/// [`Error::Shape`] for an argument that is too short, or what [`Gpu::dispatch`] reports.
fn dispatch(
    gpu: &Gpu,
    name: &'static str,
    source: &str,
    constants: &[(&str, f64)],
    arguments: &[Argument],
    invocations: usize,
) -> Result<Dispatch> {
    for (_, argument, buffer, len) in arguments {
        if buffer.len() < *len {
            return Err(Error::Shape {
                operation: name,
                what: format!(
                    "expected {argument} of at least {len} elements, found {}; allocate it for the same shape and batch size",
                    buffer.len()
                ),
            });
        }
    }
    let bindings: Vec<_> = arguments.iter().map(|a| (a.0, a.2)).collect();
    gpu.dispatch(&Kernel {
        entry_point: name,
        source,
        constants,
        bindings: &bindings,
        groups: fold_groups(invocations.div_ceil(WORKGROUP_SIZE)),
    })
}

/// The argument that a kernel's MASK looks at. Without a mask `filler` takes its place: a binding
/// must hold something even where nothing looks at it.
fn mask<'a>(
    binding: u32,
    activation: Option<&'a Buffer>,
    len: usize,
    filler: &'a Buffer,
) -> Argument<'a> {
    match activation {
        Some(activation) => (binding, "activation", activation, len),
        None => (binding, "activation", filler, 0),
    }
}
