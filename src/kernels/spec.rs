//! A kernel as data: what it computes, with its shapes baked in, and the tensors that it reads and
//! writes. It knows nothing of a device: the GPU compiles it, the CPU calls the twin of its name.

use super::WORKGROUP_SIZE;
use super::batch_norm::BatchNorm;
use super::conv2d::Product;
use super::group_norm::GroupNorm;
use super::mix::Mix;
use crate::error::Result;
use crate::model::augment::Augment;
use crate::model::recipe::{Optimizer, Views};
use crate::model::{Activation, Conv2d, Loss, Pool2d, Shape};
use std::borrow::Cow;

/// What a tensor's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    F32,
    /// Two to a word on the GPU, the first in its lower half. The twins hold them as floats that a half has.
    F16,
    U32,
    /// Bytes; four to a word on the GPU, lowest first.
    U8,
}

impl Dtype {
    /// Bytes of `elements` of them.
    pub fn bytes(self, elements: usize) -> usize {
        match self {
            Dtype::F32 | Dtype::U32 => 4 * elements,
            Dtype::F16 => 2 * elements,
            Dtype::U8 => elements,
        }
    }

    /// 4-byte words that hold `elements` of them.
    pub fn words(self, elements: usize) -> usize {
        self.bytes(elements).div_ceil(4)
    }
}

/// A range of a tensor, counted in the tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct View {
    /// Place of the tensor in its plan.
    pub tensor: usize,
    pub dtype: Dtype,
    pub start: usize,
    pub len: usize,
}

impl View {
    /// All of a tensor of `len` elements.
    pub fn whole(tensor: usize, dtype: Dtype, len: usize) -> View {
        View {
            tensor,
            dtype,
            start: 0,
            len,
        }
    }

    /// The `len` elements from `start` on.
    pub fn slice(self, start: usize, len: usize) -> View {
        assert!(start + len <= self.len, "{start}+{len} of {self:?}");
        View {
            start: self.start + start,
            len,
            ..self
        }
    }
}

/// What a kernel does to an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    /// Every element is written, whatever was there before.
    Write,
    /// Elements are written in place of what was there, some of them maybe not at all.
    Update,
}

/// A tensor that a kernel is bound to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Argument {
    /// As the shader has it.
    pub binding: u32,
    /// As the shader and the twin have it.
    pub name: &'static str,
    pub view: View,
    pub access: Access,
    /// Elements that the kernel touches; 0 for a binding that must hold something although nothing
    /// looks at it.
    pub elements: usize,
}

/// What a kernel computes, as its twin needs to know it. One variant for each entry point, or for
/// several that compute the same thing in different ways.
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    GatherBatch {
        shape: Shape,
        streamed: bool,
    },
    GatherViews {
        shape: Shape,
        views: Views,
        streamed: bool,
    },
    AverageViews(Views),
    DrawMixes(Mix),
    MixBatch(Shape),
    DrawAugmentation {
        augment: Augment,
        shape: Shape,
    },
    AugmentBatch {
        augment: Augment,
        shape: Shape,
        streamed: bool,
    },
    Im2col(Conv2d),
    Col2im {
        geometry: Conv2d,
        masked: bool,
    },
    Product(Product),
    GroupedForward {
        geometry: Conv2d,
        relu: bool,
    },
    GroupedBackwardWeight {
        geometry: Conv2d,
        chunks: usize,
    },
    GroupedBackwardInput {
        geometry: Conv2d,
        masked: bool,
    },
    ReduceSplits {
        splits: usize,
    },
    ReduceChunks {
        chunks: usize,
    },
    Accumulate,
    SumShards {
        levels: usize,
    },
    FoldShards {
        levels: usize,
        scaled: bool,
    },
    MaxPoolForward(Pool2d),
    MaxPoolBackward {
        pool: Pool2d,
        masked: bool,
    },
    MeanPoolForward(Pool2d),
    MeanPoolBackward {
        pool: Pool2d,
        masked: bool,
    },
    ActivationForward(Activation),
    ActivationBackward(Activation),
    BatchNormMoments(BatchNorm),
    BatchNormStatistics {
        geometry: BatchNorm,
        momentum: f32,
        epsilon: f32,
    },
    BatchNormForward {
        geometry: BatchNorm,
        relu: bool,
    },
    BatchNormBackwardSums(BatchNorm),
    BatchNormBackwardInput {
        geometry: BatchNorm,
        divided: bool,
    },
    BatchNormShardMoments(BatchNorm),
    BatchNormSyncStatistics {
        momentum: f32,
        epsilon: f32,
    },
    BatchNormShardSums(BatchNorm),
    BatchNormSyncGradients,
    BatchNormEvaluate {
        geometry: BatchNorm,
        epsilon: f32,
        relu: bool,
    },
    BatchNormFold {
        bias: bool,
        epsilon: f32,
    },
    GroupNormMoments(GroupNorm),
    GroupNormStatistics {
        geometry: GroupNorm,
        epsilon: f32,
    },
    GroupNormForward(GroupNorm),
    GroupNormBackwardSums(GroupNorm),
    GroupNormBackwardInput(GroupNorm),
    GroupNormBackwardAffine(GroupNorm),
    Add,
    Concat {
        rows: usize,
    },
    SliceChannels {
        rows: usize,
        first: usize,
        count: usize,
    },
    Scale {
        channels: usize,
    },
    ScaleFactors {
        positions: usize,
        channels: usize,
    },
    Dropout {
        probability: f32,
        key: u32,
        batch: usize,
    },
    Loss {
        loss: Loss,
        classes: usize,
        smoothing: f32,
    },
    WeightedLoss {
        smoothing: f32,
    },
    MixedLoss {
        smoothing: f32,
        weighted: bool,
    },
    Predict {
        classes: usize,
    },
    StoreLogits {
        classes: usize,
    },
    SumMetrics,
    Update {
        rule: Optimizer,
        grouped: bool,
    },
    SumSquares {
        run: usize,
        grouped: bool,
    },
    Norm,
    ClipGradients {
        limit: f32,
    },
    MuonMomentum {
        momentum: f32,
    },
    MuonScale,
    MuonPolynomial {
        side: usize,
    },
    MuonUpdate {
        size: f32,
        rate: f32,
    },
    ToHalf,
    ToFloat,
    ScaleToHalf,
    UnscaleGradients,
    AdvanceLossScale,
    AverageValues,
    SwapValues,
    AdvanceStep,
    /// What measures a device and stands in no plan; see `kernels/peak.rs`, `kernels/probe.rs` and
    /// `kernels/fingerprint.rs`.
    PeakMultiplyAdd {
        rounds: usize,
    },
    PeakCopy,
    ProbePrices,
    Arithmetic {
        operation: usize,
    },
}

/// What a kernel costs at least.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Floating-point operations of products, two per multiply-add; 0 for what moves data.
    pub flops: f64,
    /// Bytes that must cross between the processor and its memory: every operand and every result once.
    pub bytes: f64,
}

/// A kernel with everything baked in that its pipeline and its bindings need.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelSpec {
    /// Entry point, pipeline label and the twin's name.
    pub entry: &'static str,
    pub work: Work,
    /// Values of the source's `override` declarations.
    pub constants: Vec<(&'static str, f64)>,
    pub arguments: Vec<Argument>,
    /// Workgroups, before they are folded into rows.
    pub groups: usize,
    pub cost: Cost,
    /// The layer that it works for; empty for what belongs to the step as a whole.
    pub layer: String,
    text: &'static str,
}

impl KernelSpec {
    /// Entry point `entry` of the shader `text` with at least `invocations` invocations in workgroups of
    /// [`WORKGROUP_SIZE`]. Costs what its arguments take to read and write.
    pub fn new(
        entry: &'static str,
        text: &'static str,
        work: Work,
        constants: &[(&'static str, f64)],
        arguments: Vec<Argument>,
        invocations: usize,
    ) -> KernelSpec {
        let bytes = arguments.iter().map(|a| {
            let once = a.view.dtype.bytes(a.elements) as f64;
            if a.access == Access::Update {
                2.0 * once
            } else {
                once
            }
        });
        KernelSpec {
            entry,
            work,
            constants: constants.to_vec(),
            cost: Cost {
                flops: 0.0,
                bytes: bytes.sum(),
            },
            arguments,
            groups: invocations.div_ceil(WORKGROUP_SIZE),
            layer: String::new(),
            text,
        }
    }

    /// The WGSL.
    ///
    /// # Errors
    /// [`crate::Error::Gpu`] when a template cannot be rendered.
    pub fn source(&self) -> Result<Cow<'static, str>> {
        match &self.work {
            Work::Product(product) => Ok(product.source()?.into()),
            _ if self.is_half() => {
                let text = self.text.replace(REAL, "alias real = f16;");
                Ok(format!("enable f16;\n{text}").into())
            }
            _ => Ok(self.text.into()),
        }
    }

    /// Whether some of its arguments are halves.
    pub fn is_half(&self) -> bool {
        self.arguments.iter().any(|a| a.view.dtype == Dtype::F16)
    }

    /// The same for a product in another tile; of what is no product nothing changes.
    pub fn set_product(&mut self, product: Product) {
        if let Work::Product(_) = self.work {
            self.work = Work::Product(product);
            self.groups = product.workgroups();
        }
    }

    /// The argument of that name.
    ///
    /// # Panics
    /// Where there is none, which is a mistake in this program.
    pub fn view(&self, name: &str) -> View {
        let found = self.arguments.iter().find(|a| a.name == name);
        let Some(argument) = found else {
            panic!("{} has no argument '{name}'", self.entry);
        };
        argument.view
    }

    /// What it takes of all shards of a batch, if anything.
    pub fn of_shards(&self) -> Option<View> {
        let found = self.arguments.iter().find(|a| a.name == "of_shards");
        found.map(|argument| argument.view)
    }

    /// The same for a layer.
    pub fn of_layer(mut self, layer: &str) -> KernelSpec {
        self.layer = layer.into();
        self
    }
}

/// What the text of a kernel says that can store activations as halves.
const REAL: &str = "alias real = f32;";

/// An argument that is read: binding, name, view, elements.
pub fn read(binding: u32, name: &'static str, view: View, elements: usize) -> Argument {
    argument(binding, name, view, elements, Access::Read)
}

/// An argument that is written whole.
pub fn write(binding: u32, name: &'static str, view: View, elements: usize) -> Argument {
    argument(binding, name, view, elements, Access::Write)
}

/// An argument that is changed in place.
pub fn update(binding: u32, name: &'static str, view: View, elements: usize) -> Argument {
    argument(binding, name, view, elements, Access::Update)
}

fn argument(
    binding: u32,
    name: &'static str,
    view: View,
    elements: usize,
    access: Access,
) -> Argument {
    Argument {
        binding,
        name,
        view,
        access,
        elements,
    }
}

/// What a kernel's MASK looks at. Without a mask `filler` takes its place: a binding must hold
/// something even where nothing looks at it.
pub fn mask(binding: u32, activation: Option<View>, elements: usize, filler: View) -> Argument {
    match activation {
        Some(activation) => read(binding, "activation", activation, elements),
        None => read(binding, "activation", filler, 0),
    }
}
