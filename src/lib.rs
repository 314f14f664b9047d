pub mod cpu;
pub mod data;
pub mod error;
pub mod export;
pub mod gpu;
pub mod kernels;
pub mod model;
pub mod network;
pub mod train;
pub mod verify;

pub use error::{Error, Result};
