//! How training images are changed at random before the network sees them.

use serde::{Deserialize, Serialize};

/// What is drawn for each sample of a batch, on the device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Augment {}

impl Augment {
    /// # Errors
    /// The first key whose value is out of range, and what was expected and found.
    pub fn check(&self) -> std::result::Result<(), (&'static str, String)> {
        Ok(())
    }
}
