//! The proof: every kernel against its CPU twin.
//!
//! [`cases`] is the one list that the tests, the benchmarks and `wgrad verify` share.

mod cases;
mod parity;

pub use cases::cases;
pub use parity::{
    Bench, Case, Comparison, Expected, GUARD, GUARD_WORDS, Outcome, POISON, Prepared, Tolerance,
    WORD_POISON, compare,
};
