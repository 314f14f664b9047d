//! One module per shader file: a typed constructor per entry point that bakes in the shapes and gives a
//! [`KernelSpec`], which knows nothing of a device.
//!
//! Entry point, constructor, CPU twin (`crate::cpu`) and pipeline label share one name. The sizes of a
//! kernel come from its geometry or from the views of what it reads; a view may be longer than the
//! kernel needs, and what lies beyond stays untouched.

// One argument per tensor reads better than a struct per kernel.
#![allow(clippy::too_many_arguments)]

pub mod activation;
mod adapter;
pub mod augment;
pub mod average;
pub mod batch_norm;
pub mod clip;
pub mod conv2d;
pub mod dropout;
pub mod fingerprint;
pub mod gather;
pub mod group_norm;
pub mod grouped;
pub mod half;
pub mod im2col;
pub mod join;
pub mod lanes;
pub mod loss;
pub mod mix;
pub mod muon;
pub mod optimizer;
pub mod outputs;
pub mod peak;
pub mod pool;
mod prices;
pub mod probe;
pub mod reduce;
pub mod shards;
mod spec;
pub mod step;
pub mod views;

pub use adapter::AdapterReport;
pub use prices::Prices;
pub use spec::{Access, Argument, Cost, Dtype, KernelSpec, View, Work};
use spec::{mask, read, update, write};
pub use step::{Metrics, STEP_ELEMENTS, Step};

/// Invocations per workgroup in the shaders that handle their elements one by one.
pub const WORKGROUP_SIZE: usize = 64;
