pub mod cpu;
pub mod data;
pub mod error;
pub mod gpu;
pub mod kernels;
pub mod model;
pub mod network;
pub mod tune;
pub mod verify;

pub use error::{Error, Result};
