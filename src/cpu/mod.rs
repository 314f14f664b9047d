//! The twins: one plain function per WGSL entry point, under the same name, and what carries out a plan
//! with them ([`run`], [`Twins`]). They are what the GPU is held against.
//!
//! Everything is generic over f32 and f64: the GPU is compared with f32, finite differences
//! ([`finite_difference_checks`]) need f64. Activations are NHWC; the parameters of a layer are one
//! `[KH·KW·C + 1, OC]` matrix, the weight `[KH][KW][C][OC]` with the bias, if any, as its last row. Slices
//! come in, vectors go out; the batch size N follows from a slice's length, and lengths that do not
//! fit the geometry are a bug of the caller and panic.
//!
//! [`fast`] has faster functions for the kernels that decide the speed of training without a GPU; they are
//! held against the twins and prove nothing themselves.
//!
//! Work is spread over threads by output: by samples, by rows or by chunks of a fixed size, and
//! every sum has one fixed order, so the bits do not depend on the number of threads.

mod activation;
pub mod augment;
mod average;
mod batch_norm;
mod check;
mod clip;
mod conv2d;
pub mod dropout;
pub mod fast;
mod fast_activation;
mod fingerprint;
mod gather;
mod group_norm;
mod grouped;
mod half;
mod im2col;
pub mod join;
mod loss;
mod mix;
mod muon;
mod optimizer;
mod outputs;
mod peak;
mod pool;
mod probe;
pub mod random;
mod reduce;
mod run;
mod shards;
mod views;

pub use activation::{
    activation_backward, activation_forward, bias_backward, bias_forward, gelu_backward,
    gelu_forward, gelu_tanh_backward, gelu_tanh_forward, hard_swish_backward, hard_swish_forward,
    leaky_relu_backward, leaky_relu_forward, relu_backward, relu_forward, sigmoid_backward,
    sigmoid_forward, silu_backward, silu_forward, tanh_backward, tanh_forward,
};
pub use average::{average_values, swap_values};
pub use batch_norm::{
    batch_norm_backward_input, batch_norm_backward_sums, batch_norm_evaluate, batch_norm_fold,
    batch_norm_forward, batch_norm_moments, batch_norm_shard_moments, batch_norm_shard_sums,
    batch_norm_statistics, batch_norm_sync_gradients, batch_norm_sync_statistics,
};
pub use check::{FiniteDifference, finite_difference_checks};
pub use clip::{clip_gradients, norm, sum_squares};
pub use conv2d::{
    conv2d_backward_input, conv2d_backward_weight, conv2d_forward, matmul_nn, matmul_nt, matmul_tn,
};
pub use fingerprint::arithmetic;
pub use gather::gather_batch;
pub use group_norm::{
    group_norm_backward_affine, group_norm_backward_input, group_norm_backward_sums,
    group_norm_forward, group_norm_moments, group_norm_statistics,
};
pub use grouped::{grouped_backward_input, grouped_backward_weight, grouped_forward};
pub use half::{
    advance_loss_scale, round_to_half, scale_to_half, to_float, to_half, unscale_gradients,
};
pub use im2col::{col2im, im2col};
pub use loss::{
    LossOutput, argmax, mixed_softmax_cross_entropy, predict, softmax_cross_entropy, squared_error,
    sum_metrics, weighted_softmax_cross_entropy,
};
pub use mix::{draw_mixes, mix_batch};
pub use muon::{muon_momentum, muon_polynomial, muon_scale, muon_update};
pub use optimizer::{adamw_update, lion_update, sgd_update};
pub use outputs::store_logits;
pub use peak::{peak_copy, peak_multiply_add};
pub use pool::{
    maxpool2d_backward, maxpool2d_backward_overlapping, maxpool2d_forward, meanpool2d_backward,
    meanpool2d_forward,
};
pub use probe::probe_prices;
pub use reduce::{accumulate, reduce_chunks, reduce_splits};
pub use run::{Memory, Twins, Values, run};
pub use shards::{flushed, fold_shards, root, sum_shards};
pub use views::{average_views, gather_views};

use crate::model::Shape;

/// The element type of the oracle: f32 or f64.
pub trait Float:
    num_traits::Float
    + num_traits::NumAssign
    + From<f32>
    + Into<f64>
    + Default
    + std::fmt::Debug
    + Send
    + Sync
    + std::iter::Sum
    + 'static
{
}

impl Float for f32 {}
impl Float for f64 {}

/// `y += a·x`, the inner loop of every product: independent sums side by side, which the compiler
/// turns into vector instructions without reordering anything.
#[inline(always)]
fn axpy<T: Float>(y: &mut [T], a: T, x: &[T]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// Elementwise additions `y += x`.
#[inline(always)]
fn add<T: Float>(y: &mut [T], x: &[T]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

/// Number of samples of `shape` in a slice of `len` elements.
fn batch(len: usize, shape: Shape) -> usize {
    assert!(
        len.is_multiple_of(shape.elements()),
        "expected whole samples of {shape}, found {len} elements"
    );
    len / shape.elements()
}
