//! `shaders/batch_norm.wgsl`: normalisation of every channel over the batch.

/// What is normalised: `[rows, channels]` with `rows = batch · positions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchNorm {
    pub batch: usize,
    /// Of one sample: H·W.
    pub positions: usize,
    pub channels: usize,
}

impl BatchNorm {
    pub const fn rows(&self) -> usize {
        self.batch * self.positions
    }

    /// How the sums over rows are cut.
    pub fn chunks(&self) -> Chunks {
        Chunks::new(self.rows(), 32, 512)
    }
}

/// How a sum over `len` terms is cut into chunks; it follows from `len` alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunks {
    len: usize,
    /// Terms of a chunk; the last may have fewer.
    pub size: usize,
}

impl Chunks {
    /// Chunks of at least `size` terms, and at most `most` of them.
    pub fn new(len: usize, size: usize, most: usize) -> Chunks {
        let size = size.max(len.div_ceil(most)).max(1);
        Chunks { len, size }
    }

    /// How many there are.
    pub const fn count(&self) -> usize {
        self.len.div_ceil(self.size)
    }
}
