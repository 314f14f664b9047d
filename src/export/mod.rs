//! Parameters in and out of the forms that other programs read.

mod events;
mod fold;
mod import;
mod onnx;
mod proto;
mod pytorch;
mod safetensors;

pub use self::events::{EventFile, Summary};
pub use self::fold::{Folded, fold_batch_norm};
pub use self::import::{Imported, read_onnx};
pub use self::onnx::{OPSET, OnnxOptions, write_onnx};
pub use self::pytorch::pytorch_module;
pub use self::safetensors::{
    Contents, Fitting, Tensor, read_fitting, read_safetensors, running_to_pytorch, to_pytorch,
    write_safetensors,
};
