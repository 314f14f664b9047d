//! The proof: every kernel against its CPU twin.
//!
//! [`cases`] is the one list that the tests, the benchmarks and `wgrad verify` share.

pub(crate) mod cases;
mod drawn;
mod fingerprint;
mod nonfinite;
mod norm;
mod parity;
mod products;
mod quick;

pub use drawn::{DRAWS, drawn};
pub use fingerprint::{Denormals, Fingerprint, Precision, Rounding};
pub use parity::{
    BEYOND, Bench, Case, Comparison, Expected, GUARD, GUARD_WORDS, Outcome, POISON, Prepared,
    Tolerance, WORD_POISON, compare,
};
pub(crate) use products::product_case;
pub use products::products;
pub use quick::quick;

use crate::gpu::AdapterReport;

/// Every case that `adapter` can run.
pub fn cases(adapter: &AdapterReport) -> Vec<Case> {
    let mut cases = cases::cases();
    cases.extend(products::cases(adapter));
    cases.extend(nonfinite::cases(adapter));
    cases
}

/// What `adapter` cannot run and [`cases`] therefore leaves out, a line each, with the reason.
pub fn left_out(adapter: &AdapterReport) -> Vec<String> {
    let families = products::left_out(adapter);
    let line = |family| {
        format!(
            "kernel family {family}: skipped, {} has subgroups of {:?}, {} bytes of workgroup memory and {} invocations",
            adapter.name,
            adapter.subgroup_size,
            adapter.max_workgroup_storage_bytes,
            adapter.max_workgroup_invocations
        )
    };
    families.into_iter().map(line).collect()
}

/// To come.
pub fn training(
    _: &std::sync::Arc<crate::gpu::Gpu>,
    _: &mut dyn FnMut(&str),
) -> crate::Result<Vec<Outcome>> {
    Ok(Vec::new())
}
