//! The step table: what changes from step to step, uploaded once per epoch.
//!
//! A training step is always the same list of dispatches. What differs (which samples, how many,
//! the learning rate) stands in a table on the GPU, and a counter on the GPU says which row is
//! current; the step's last dispatch advances it. So the host never has to come between two steps.

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
    pub padding: [u32; 3],
}

/// Loss and correct count of one step, laid out like `struct Metrics` in the shaders.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Metrics {
    /// Sum of the per-sample losses over the samples that count.
    pub loss_sum: f32,
    pub correct: u32,
}
