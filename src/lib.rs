pub mod cpu;
pub mod error;
pub mod model;
