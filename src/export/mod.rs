//! Parameters in and out of the forms that other programs read.

mod events;
mod safetensors;

pub use self::events::{EventFile, Summary};
pub use self::safetensors::{
    Contents, Fitting, Tensor, read_fitting, read_safetensors, running_to_pytorch, to_pytorch,
    write_safetensors,
};
