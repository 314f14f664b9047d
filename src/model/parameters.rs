//! Parameters and running statistics: names, shapes, and where they lie in their flat vectors.

use super::{Op, PARAMETER_ALIGNMENT, Shape};

/// One named tensor of a flat vector.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// `conv2d1.weight`, as in exported files.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// In this program's layout, `[KH, KW, C, OC]` or `[C]`.
    pub shape: Vec<usize>,
    /// Of its first element in the flat vector.
    pub start: usize,
    /// What it is before the first step.
    pub init: Init,
    /// Inputs that an output is a sum over, and outputs that an input has a share in; what the
    /// initialisations are scaled by.
    pub fans: [usize; 2],
    /// Groups that the outputs fall into, see [`super::Conv2d::groups`].
    pub groups: usize,
}

impl Parameter {
    /// How many numbers it has.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// What a parameter is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// What inputs are multiplied by.
    Weight,
    /// What is added.
    Bias,
    /// Of batch normalisation: what an evaluation takes off.
    RunningMean,
    /// Of batch normalisation: what an evaluation divides by the root of.
    RunningVariance,
}

/// What a parameter is before the first step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Uniform in ±1/√fan_in, as PyTorch's `Conv2d` and `Linear` start.
    FanIn,
    /// `torch.nn.init.kaiming_uniform_`, for ReLU.
    KaimingUniform,
    /// `torch.nn.init.kaiming_normal_`, for ReLU.
    KaimingNormal,
    /// `torch.nn.init.xavier_uniform_`.
    XavierUniform,
    /// `torch.nn.init.xavier_normal_`.
    XavierNormal,
    /// A convolution that hands its input on.
    Dirac,
    /// The same as far as there are inputs; further outputs as with [`Init::FanIn`].
    PartialDirac,
    /// What whitens the patches of the training images, see [`super::whiten`].
    Whitening,
    /// Uniform in ± this.
    Uniform(f32),
    /// This number everywhere.
    Constant(f32),
}

/// The trained parameters of a layer called `name`, from `start` on in the flat vector. `init` is that
/// of its weight.
pub(super) fn trained(
    op: &Op,
    name: &str,
    input: Shape,
    init: Option<Init>,
    start: usize,
) -> Vec<Parameter> {
    let mut layout = op.parameters(input);
    for (role, _, default) in &mut layout {
        if let (Role::Weight, Some(init)) = (*role, init) {
            *default = init;
        }
    }
    // As in PyTorch, groups narrow what an output sees, and are left out of what an input has a share in.
    let (fans, groups) = op.product().map_or(([1, 1], 1), |g| {
        let taps = g.kernel[0] * g.kernel[1];
        ([g.patch(), taps * g.output.channels], g.groups)
    });
    lay_out(name, layout, fans, groups, start)
}

/// The running statistics of a layer called `name`, from `start` on in their flat vector.
pub(super) fn running(op: &Op, name: &str, input: Shape, start: usize) -> Vec<Parameter> {
    lay_out(name, op.running(input), [1, 1], 1, start)
}

fn lay_out(
    name: &str,
    layout: Vec<(Role, Vec<usize>, Init)>,
    fans: [usize; 2],
    groups: usize,
    mut start: usize,
) -> Vec<Parameter> {
    let place = |(role, shape, init)| {
        let what = match role {
            Role::Weight => "weight",
            Role::Bias => "bias",
            Role::RunningMean => "running_mean",
            Role::RunningVariance => "running_var",
        };
        let parameter = Parameter {
            name: format!("{name}.{what}"),
            role,
            shape,
            start,
            init,
            fans,
            groups,
        };
        start += parameter.elements();
        parameter
    };
    layout.into_iter().map(place).collect()
}

/// Where the next layer's begin, behind these that begin at `start` at the earliest.
pub(super) fn end(parameters: &[Parameter], start: usize) -> usize {
    let end = parameters.last().map(|p| p.start + p.elements());
    end.map_or(start, |end| end.next_multiple_of(PARAMETER_ALIGNMENT))
}
