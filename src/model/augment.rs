//! How training images are changed at random before the network sees them.

use serde::{Deserialize, Serialize};

/// What is drawn for each sample of a batch, on the device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Augment {}
