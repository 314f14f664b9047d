//! One module per shader file: a typed wrapper per entry point that bakes in the shapes, binds the
//! buffers and gives a [`crate::gpu::Dispatch`].
//!
//! Entry point, wrapper, CPU twin (`crate::cpu`) and pipeline label share one name.

pub mod conv2d;
