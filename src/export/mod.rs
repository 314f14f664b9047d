//! Parameters in and out of the forms that other programs read.

mod safetensors;

pub use self::safetensors::{
    Contents, Tensor, read_safetensors, running_to_pytorch, to_pytorch, write_safetensors,
};
