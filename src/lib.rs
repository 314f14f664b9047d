//! wgrad trains convolutional image classifiers on any GPU that Vulkan, Metal or DX12 reaches.
//!
//! ```text
//! model file ─► graph ─► plan ─┬─► GPU: compiled once ─► [ gather ► forward ► loss ► backward ► update ] × many steps
//!                              └─► CPU: the twins, and faster functions for some   a few steps per submission, one small read-back
//! ```
//!
//! A training step is data: a [`plan::Plan`] lists the kernels and the tensors that they read and write,
//! and needs no device. The GPU compiles it; the CPU calls, for each kernel, the plain function of the
//! same name. The dataset goes to the device, as bytes: once, or in slabs where it does not fit. Parameters, activations, gradients,
//! optimiser state and metrics stay there; the host uploads a shuffle and a step table per epoch.
//!
//! # The rooms
//!
//! | room | what is in it | builds on |
//! |---|---|---|
//! | [`error`] | the one error type | |
//! | [`host`] | the machine's own memory | |
//! | [`model`] | architecture files, graphs, the table of operations, parameters, recipes | |
//! | [`data`] | readers of datasets | [`model`] |
//! | [`kernels`] | a kernel as data; a typed constructor per WGSL entry point | [`model`] |
//! | [`plan`] | a step as data: forward, backward, fusions, memory, what is wrong with it | [`kernels`] |
//! | [`gpu`] | adapters, device, buffers, dispatches, read-backs | [`kernels`] |
//! | [`cpu`] | the twins, what carries out plans with them, and what is faster | [`plan`] |
//! | [`engine`] | what carries out plans step after step, on either | [`gpu`], [`cpu`] |
//! | [`cluster`] | several processes that train one network, and what they exchange | [`engine`] |
//! | [`train`] | the loop, the run folder, checkpoints | [`cluster`], [`data`], [`export`] |
//! | [`predict`] | a run's network, ready to answer | [`train`] |
//! | [`export`] | safetensors and modules for PyTorch, ONNX in and out, TensorBoard's event files | [`model`] |
//! | [`tune`] | tiles chosen by measurement, and their cache | [`gpu`] |
//! | [`verify`] | every kernel against its twin, alone and in whole steps | [`gpu`], [`cpu`] |
//! | [`report`] | kernels, steps and layers measured; runs as pages; TensorBoard | [`engine`], [`verify`], [`train`] |
//!
//! `main → commands → report, verify, predict → train → cluster → engine → gpu, cpu → plan → kernels → model`, never back.
//! Only `gpu` names wgpu; neither `gpu` nor `cpu` knows of the other.

#![warn(missing_docs)]

pub mod cluster;
#[allow(missing_docs)]
// The rooms of the kernels: their names are those of the shaders, which say the rest.
pub mod cpu;
pub mod data;
pub mod engine;
pub mod error;
pub mod export;
mod files;
pub mod gpu;
pub mod host;
#[allow(missing_docs)]
pub mod kernels;
pub mod model;
pub mod plan;
pub mod predict;
pub mod report;
pub mod train;
pub mod tune;
#[allow(missing_docs)]
pub mod verify;

pub use error::{Error, Result};
