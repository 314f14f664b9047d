//! `shaders/step.wgsl` and the step table: what changes from step to step, uploaded once per epoch.
//!
//! A training step is always the same list of kernels. What differs (which samples, how many, the
//! learning rate) stands in a table on the device, and a counter there says which row is current; the
//! step's last kernel advances it. So the host never has to come between two steps.

use super::{KernelSpec, View, Work, update};

const SOURCE: &str = include_str!("../../shaders/step.wgsl");

/// Moves `counter[0]` on to the next row of the step table. Adds 1 to it.
pub fn advance_step(counter: View) -> KernelSpec {
    let arguments = vec![update(0, "counter", counter, 1)];
    KernelSpec::new("advance_step", SOURCE, Work::AdvanceStep, &[], arguments, 1)
}

/// 4-byte elements of one row of the step table.
pub const STEP_ELEMENTS: usize = size_of::<Step>() / 4;

/// One row of the step table, laid out like `struct Step` in the shaders.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Step {
    /// First sample of the batch, counted in the epoch's order.
    pub first: u32,
    /// Samples that count; the rest of the batch repeats the last one with weight zero.
    pub count: u32,
    pub lr: f32,
    /// `1 − beta1^step`, `1 − beta2^step` (AdamW).
    pub bias_correction1: f32,
    pub bias_correction2: f32,
    /// Keys of the random draws on the device; 0 where nothing draws.
    pub seed: u32,
    pub epoch: u32,
    /// Place in the epoch's order of the first image that is on the device; 0 where all of them are.
    pub base: u32,
    /// What the sum of the losses is divided by for their mean over the whole batch that this step is a
    /// part of: the number of its samples, or where classes have weights the sum of those of its labels.
    pub total: f32,
    /// Which part of its batch, from 0; 0 where a step is a whole batch.
    pub micro: u32,
    /// Share that the average of the parameters keeps of itself, where there is one.
    pub average: f32,
    /// Whether parameters and optimiser state stay as they are; written by the device, where gradients in mixed
    /// precision overflow.
    pub skip: u32,
    /// First of the batch's shards that are computed here; this row is that one, or one after it. 0 where a batch
    /// has no shards, or all are computed here.
    pub first_shard: u32,
    /// Shards of the batch, of which `micro` is one; a row whose `micro` is none of them is computed for nothing.
    pub shards: u32,
    /// 1 / `shards`.
    pub share: f32,
}

impl Step {
    /// A step on these samples that is a whole batch, draws nothing and changes nothing.
    pub fn new(first: usize, count: usize) -> Step {
        Step {
            first: first as u32,
            count: count as u32,
            lr: 0.0,
            bias_correction1: 1.0,
            bias_correction2: 1.0,
            seed: 0,
            epoch: 0,
            base: 0,
            total: count as f32,
            micro: 0,
            average: 0.0,
            skip: 0,
            first_shard: 0,
            shards: 1,
            share: 1.0,
        }
    }

    /// Whether a batch begins with this row, or its share of one.
    pub fn begins(&self) -> bool {
        self.micro == self.first_shard
    }
}

/// Loss and correct count of one step, laid out like `struct Metrics` in the shaders.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Metrics {
    /// Sum of the per-sample losses over the samples that count.
    pub loss_sum: f32,
    pub correct: u32,
}
