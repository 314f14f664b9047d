//! What every kernel must keep.

use crate::assembly::Loops;
use crate::driver::Compiled;
use wgrad::kernels::conv2d::Product;

/// A line for each bound that a kernel misses.
pub fn misses(
    _chip: &str,
    _product: Option<&Product>,
    _loops: Option<&Loops>,
    _found: &Compiled,
) -> Vec<String> {
    Vec::new()
}
