//! What operations cost on an adapter: what the built-in choice of a tile goes by. Prices decide times, never bits.

use super::probe::PER_ROUND;
use serde::{Deserialize, Serialize};
use std::fmt;

/// How far a measured price may be from the assumed one, either way; loads of one software adapter differ tenfold
/// from processor to processor.
const PLAUSIBLE: f64 = 32.0;

/// What operations of an invocation cost, in multiply-adds of a number.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prices {
    /// Whether they were measured, or assumed for adapters of its kind.
    pub measured: bool,
    /// Nanoseconds that one core of a software adapter takes for a multiply-add in all lanes of a subgroup; on
    /// GPUs, where nothing depends on it, assumed.
    pub multiply_add_ns: f64,
    /// A load of four numbers side by side from a storage buffer, out of a cache.
    pub load: f64,
    /// Four loads of one number each.
    pub loads: f64,
    /// A read of four numbers from workgroup memory.
    pub read: f64,
}

impl Prices {
    /// Those of Mesa's software adapter on a processor with AVX-512, or of a typical GPU.
    pub fn assumed(software: bool) -> Prices {
        let multiply_add_ns = 0.22;
        let [load, loads, read] = match software {
            true => [17.0, 40.0, 33.0].map(|ns| ns / multiply_add_ns),
            false => [14.0, 28.0, 16.0],
        };
        Prices {
            measured: false,
            multiply_add_ns,
            load,
            loads,
            read,
        }
    }

    /// From the seconds that an invocation takes for each of the rounds of `probe_prices`; on a software adapter those
    /// of a subgroup on one core.
    pub fn of(seconds: [f64; 4], software: bool) -> Prices {
        let [multiply_add, load, loads, read] =
            [0, 1, 2, 3].map(|i| seconds[i] / PER_ROUND[i] as f64);
        let assumed = Prices::assumed(software);
        Prices {
            measured: true,
            multiply_add_ns: match software {
                true => 1e9 * multiply_add,
                false => assumed.multiply_add_ns,
            },
            load: load / multiply_add,
            loads: loads / multiply_add,
            read: read / multiply_add,
        }
    }

    /// Whether they could be those of an adapter for which `assumed` would be assumed; not where they are no numbers,
    /// or none above 0.
    pub fn plausible(&self, assumed: &Prices) -> bool {
        let all = |prices: &Prices| {
            [
                prices.multiply_add_ns,
                prices.load,
                prices.loads,
                prices.read,
            ]
        };
        let pairs = all(self).into_iter().zip(all(assumed));
        let near = 1.0 / PLAUSIBLE..=PLAUSIBLE;
        pairs
            .into_iter()
            .all(|(found, assumed)| near.contains(&(found / assumed)))
    }
}

impl fmt::Display for Prices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "load {:.0}, four single ones {:.0}, workgroup memory {:.0} multiply-adds ({})",
            self.load,
            self.loads,
            self.read,
            if self.measured { "measured" } else { "assumed" }
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prices_are_in_multiply_adds_and_what_is_no_price_is_noticed() {
        let seconds = [128e-9, 2.0 * 20e-9, 50e-9, 2.0 * 30e-9];
        let prices = Prices::of(seconds, true);
        let expected = [1.0, 20.0, 50.0, 30.0];
        let found = [
            prices.multiply_add_ns,
            prices.load,
            prices.loads,
            prices.read,
        ];
        for (found, expected) in found.into_iter().zip(expected) {
            assert!((found - expected).abs() < 1e-9, "{prices:?}");
        }
        let assumed = Prices::assumed(true);
        assert!(prices.measured && prices.plausible(&assumed));
        for (i, bad) in [f64::NAN, 0.0, -1e-9, f64::INFINITY, 1e-3, 1e-15]
            .into_iter()
            .enumerate()
        {
            let mut seconds = seconds;
            seconds[i % 4] = bad;
            let prices = Prices::of(seconds, true);
            assert!(!prices.plausible(&assumed), "{bad}: {prices:?}");
        }
        // The clock of a GPU is no price.
        assert_eq!(
            Prices::of(seconds, false).multiply_add_ns,
            Prices::assumed(false).multiply_add_ns
        );
    }
}
