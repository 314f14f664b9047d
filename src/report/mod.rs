//! Measurements, for people and for machines: [`mod@bench`] for kernels and steps against the adapter's
//! own peak, [`profile`] for where the time of a training step goes; and pictures: [`plot`] of a range test,
//! [`sheet`] of data,
//! [`mod@preview`] of what a training step is shown; [`tensorboard`] for those who watch by that.

pub mod bench;
pub mod plot;
pub mod preview;
pub mod profile;
pub mod sheet;
pub mod tensorboard;
