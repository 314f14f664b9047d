//! The proof: every kernel against its CPU twin.
//!
//! [`cases`] is the one list that the tests, the benchmarks and `wgrad verify` share.

mod augment;
pub(crate) mod cases;
mod drawn;
mod elementwise;
mod fingerprint;
mod grouped;
mod half;
mod mixed;
mod nonfinite;
mod norm;
mod parity;
mod products;
mod quick;
mod steps;
mod updates;

pub use drawn::{DRAWS, drawn};
pub use fingerprint::{Denormals, Fingerprint, Precision, Rounding};
pub use parity::{
    BEYOND, Bench, Case, Comparison, Expected, GUARD, GUARD_WORDS, Outcome, POISON, Prepared,
    Tolerance, WORD_POISON, compare,
};
pub(crate) use products::product_case;
pub use products::products;
pub use quick::quick;
pub use steps::{step_of, steps};

use crate::error::Result;
use crate::gpu::AdapterReport;
use crate::kernels::KernelSpec;
use std::collections::{HashMap, HashSet};
use std::num::NonZeroUsize;

/// Every case that `adapter` can run, and where it has halves those that store activations once more in them; of
/// the products then without every tile: what is another in halves is what loads and stores, and that is the same in
/// all tiles.
pub fn cases(adapter: &AdapterReport) -> Vec<Case> {
    let mut cases = with(products::cases(adapter), adapter);
    if adapter.shader_f16 {
        let again = with(products::layer_cases(adapter), adapter);
        cases.extend(again.into_iter().filter_map(Case::in_halves));
    }
    cases
}

/// Some products' cases and those of everything else.
fn with(products: Vec<Case>, adapter: &AdapterReport) -> Vec<Case> {
    let mut cases = cases::cases();
    cases.extend(products);
    cases.extend(grouped::cases());
    cases.extend(nonfinite::cases(adapter));
    cases.extend(elementwise::cases());
    cases.extend(augment::cases());
    cases.extend(elementwise::nonfinite_cases());
    cases.extend(updates::cases());
    cases.extend(updates::nonfinite_cases());
    cases.extend(mixed::cases());
    cases.extend(mixed::nonfinite_cases());
    cases.extend(half::cases());
    cases
}

/// Leaves each kernel's first case and every nth after it, for drivers that take long to compile.
pub fn thin_out<T>(cases: &mut Vec<T>, n: NonZeroUsize, kernel: impl Fn(&T) -> &str) {
    let mut before: HashMap<String, usize> = HashMap::new();
    cases.retain(|case| {
        let before = before.entry(kernel(case).into()).or_default();
        *before += 1;
        (*before - 1).is_multiple_of(n.get())
    });
}

/// The kernels of [`cases`] and of the fingerprint, those that would share a pipeline once: what
/// compilers and translators are shown that need no device.
///
/// # Errors
/// [`crate::Error::Gpu`] when a template cannot be rendered.
pub fn kernels(adapter: &AdapterReport) -> Result<Vec<KernelSpec>> {
    let mut seen = HashSet::new();
    let mut kernels = Vec::new();
    let cases = cases(adapter);
    let all = cases.iter().flat_map(Case::kernels);
    for kernel in all.chain(fingerprint::kernels(64)) {
        let source = kernel.source()?;
        if seen.insert(format!("{} {:?}\n{source}", kernel.entry, kernel.constants)) {
            kernels.push(kernel);
        }
    }
    Ok(kernels)
}

/// What `adapter` cannot run and [`cases`] therefore leaves out, a line each, with the reason.
pub fn left_out(adapter: &AdapterReport) -> Vec<String> {
    let families = products::left_out(adapter);
    let line = |family| {
        format!(
            "kernel family {family}: skipped, {} has subgroups of {:?}, {} bytes of workgroup memory, {} invocations and cooperative matrices of {}",
            adapter.name,
            adapter.subgroup_size,
            adapter.max_workgroup_storage_bytes,
            adapter.max_workgroup_invocations,
            adapter.matrices()
        )
    };
    families.into_iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_keeps_its_first_case() {
        let mut cases = vec!["a1", "a2", "b1", "a3", "b2", "c1", "a4"];
        thin_out(&mut cases, NonZeroUsize::new(3).unwrap(), |case| &case[..1]);
        assert_eq!(cases, ["a1", "b1", "c1", "a4"]);
        thin_out(&mut cases, NonZeroUsize::MIN, |case| &case[..1]);
        assert_eq!(cases.len(), 4);
    }
}
