//! `shaders/group_norm.wgsl`: normalisation of a sample's channels, group by group.

use super::batch_norm::Chunks;

/// What is normalised: `[batch, positions, channels]` in `groups` equal groups of channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupNorm {
    pub batch: usize,
    pub positions: usize,
    pub channels: usize,
    pub groups: usize,
}

impl GroupNorm {
    /// Layer normalisation over the `channels` of each of the `positions` of each sample.
    pub const fn layer(batch: usize, positions: usize, channels: usize) -> GroupNorm {
        GroupNorm {
            batch: batch * positions,
            positions: 1,
            channels,
            groups: 1,
        }
    }

    pub const fn rows(&self) -> usize {
        self.batch * self.positions
    }

    /// Elements that are normalised together.
    pub const fn elements(&self) -> usize {
        self.positions * self.group_channels()
    }

    pub const fn group_channels(&self) -> usize {
        self.channels / self.groups
    }

    /// How the sums over the positions of a group are cut.
    pub fn chunks(&self) -> Chunks {
        Chunks::new(
            self.positions,
            256_usize.div_ceil(self.group_channels()),
            64,
        )
    }

    /// How the sums over all rows are cut.
    pub fn row_chunks(&self) -> Chunks {
        Chunks::new(self.rows(), 32, 512)
    }
}
