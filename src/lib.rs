//! wgrad trains convolutional image classifiers on any GPU that Vulkan, Metal or DX12 reaches.
//!
//! ```text
//! data ──► network.upload ─► [ GPU: gather ► forward ► loss ► backward ► optimiser ] × many steps ─► one small read-back ─► progress, metrics
//!          (once)              a few steps per submission, no host wait inside an epoch              (loss sum, correct count)
//! ```
//!
//! The dataset goes to the GPU once, as bytes. Parameters, activations, gradients, optimiser state
//! and metrics stay there; the host uploads a shuffle and a step table per epoch.
//!
//! # The rooms
//!
//! | room | what is in it | builds on |
//! |---|---|---|
//! | [`error`] | the one error type | |
//! | [`host`] | the machine's own memory | |
//! | [`model`] | architecture files, shapes, parameter layout, recipes, initial values | |
//! | [`data`] | readers of datasets | [`model`] |
//! | [`gpu`] | adapters, device, buffers, dispatches, read-backs | |
//! | [`kernels`] | a typed wrapper per WGSL entry point | [`gpu`], [`model`] |
//! | [`network`] | a model's resident buffers and the plan of a step | [`kernels`] |
//! | [`cpu`] | the oracle: a plain function per WGSL entry point, and a whole step | [`model`] |
//! | [`train`] | the loop, the run folder, checkpoints | [`network`], [`cpu`], [`data`], [`export`] |
//! | [`export`] | safetensors in PyTorch's order | [`model`] |
//! | [`tune`] | tiles chosen by measurement, and their cache | [`kernels`] |
//! | [`report`] | kernels, steps and layers measured | [`train`], [`verify`] |
//! | [`verify`] | every kernel against its twin, whole steps against the oracle | [`network`], [`cpu`] |
//!
//! `main → commands → report, train, export, verify → network → kernels → gpu`, never back. Only `gpu`,
//! `kernels` and `network` know of wgpu; none of them knows of `cpu`.

pub mod cpu;
pub mod data;
pub mod engine;
pub mod error;
pub mod export;
mod files;
pub mod gpu;
pub mod host;
pub mod kernels;
pub mod model;
pub mod plan;
pub mod report;
pub mod train;
pub mod tune;
pub mod verify;

pub use error::{Error, Result};
