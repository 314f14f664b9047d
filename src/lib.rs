pub mod error;
pub mod gpu;
pub mod kernels;
pub mod model;

pub use error::{Error, Result};
