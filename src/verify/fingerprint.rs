//! The arithmetic fingerprint of a device: how it calculates where the standards leave a choice.
//!
//! It is a report, not a test: WGSL allows every answer. Two devices with the same fingerprint may
//! still differ elsewhere, two with different ones do not train to the same bits
//! (`docs/determinism.md`).

use crate::cpu;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::kernels::fingerprint::{OPERATIONS, arithmetic};
use crate::kernels::{Dtype, KernelSpec, View};
use serde::Serialize;
use sha2::{Digest, Sha256};

/// Triples of the table: with denormals, with products that cancel, drawn. Precision is measured on
/// the drawn ones. All together are a multiple of 64, so that rows of results can be bound one by one.
const DENORMAL: usize = 32;
const CANCELLING: usize = 32;
const DRAWN: usize = 4096;
const SPECIAL: usize = DENORMAL + CANCELLING;

/// The operations of the kernel, by their number.
const COPY: usize = 0;
const ADD: usize = 1;
const MULTIPLY: usize = 2;
const SUM3: usize = 3;
const CANCEL: usize = 4;
const SUM16: usize = 5;
const MULTIPLY_ADD: usize = 6;
const FMA: usize = 7;
const DIVIDE: usize = 8;
const SQRT: usize = 9;
const EXP: usize = 10;
const LOG: usize = 11;

/// What a device does with a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rounding {
    /// One rounding, after the addition.
    Fused,
    /// One after the multiplication and one after the addition.
    Separate,
    /// Neither, everywhere.
    Other,
}

/// What a device does with denormals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Denormals {
    Kept,
    /// They become 0, on the way in or on the way out.
    Flushed,
    /// Some are kept.
    Other,
}

/// How far a function is from the correctly rounded result.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Precision {
    /// Largest distance in units in the last place.
    pub max_ulp: u32,
    /// Share of the inputs with the correctly rounded result, from 0 to 1.
    pub exact: f64,
}

/// How a device calculates.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fingerprint {
    /// `fma(a, b, c)`.
    pub fma: Rounding,
    /// `a * b + c`, which a compiler may contract into the former.
    pub multiply_add: Rounding,
    /// Whether sums are taken in the order that is written.
    pub sums_in_order: bool,
    /// Whether `(a + b) - a` is calculated as it is written, and not made `b`: what compensated
    /// summation rests on.
    pub differences_kept: bool,
    /// Denormals that are only copied, that are added, that come out of or go into a product.
    pub denormals_copied: Denormals,
    pub denormals_added: Denormals,
    pub denormals_multiplied: Denormals,
    pub division: Precision,
    pub sqrt: Precision,
    pub exp: Precision,
    pub log: Precision,
    /// SHA-256 of all results, operation by operation, as little-endian words.
    pub sha256: String,
}

impl Fingerprint {
    /// Of the device that runs the shaders. Takes some milliseconds and the compilation of a dozen
    /// tiny pipelines.
    ///
    /// # Errors
    /// What the device reports.
    pub fn of(gpu: &Gpu) -> Result<Fingerprint> {
        let triples = triples();
        let [a, b, c] = &triples;
        let upload = |data: &[f32]| gpu.upload("fingerprint", data);
        let (a, b, c) = (upload(a)?, upload(b)?, upload(c)?);
        let n = a.len();
        let y = gpu.buffer("fingerprint", n * OPERATIONS)?;
        let dispatches = kernels(n)
            .iter()
            .map(|kernel| gpu.dispatch_on(kernel, &[&a, &b, &c, &y]))
            .collect::<Result<Vec<_>>>()?;
        let dispatches: Vec<_> = dispatches.iter().collect();
        gpu.submit("fingerprint", &dispatches, 1)?;
        let results: Vec<f32> = gpu.read("fingerprint", &y)?;
        Ok(Self::read(&triples, &results))
    }

    /// For people: what was looked at, and what the device does, 80 columns wide at most.
    pub fn rows(&self) -> Vec<Vec<String>> {
        let rounding = |rounding| match rounding {
            Rounding::Fused => "rounded once (fused)",
            Rounding::Separate => "rounded twice (not fused)",
            Rounding::Other => "something else",
        };
        let denormals = |denormals| match denormals {
            Denormals::Kept => "kept",
            Denormals::Flushed => "flushed to 0",
            Denormals::Other => "kept in part",
        };
        let precision = |p: Precision| {
            let (max, exact) = (p.max_ulp, 100.0 * p.exact);
            format!("{max} ULP off at most, {exact:.2} % correctly rounded")
        };
        let sums = match self.sums_in_order {
            true => "in the order that is written",
            false => "reassociated",
        };
        let differences = match self.differences_kept {
            true => "as it is written",
            false => "simplified to b",
        };
        [
            ("fma(a, b, c)", rounding(self.fma).to_string()),
            ("a · b + c", rounding(self.multiply_add).to_string()),
            ("sums", sums.to_string()),
            ("(a + b) - a", differences.to_string()),
            (
                "denormals",
                format!(
                    "copied: {}, added: {}, multiplied: {}",
                    denormals(self.denormals_copied),
                    denormals(self.denormals_added),
                    denormals(self.denormals_multiplied)
                ),
            ),
            ("a / b", precision(self.division)),
            ("sqrt", precision(self.sqrt)),
            ("exp", precision(self.exp)),
            ("log", precision(self.log)),
            // Enough to tell devices apart; all of it is in the JSON.
            ("fingerprint", self.sha256[..16].to_string()),
        ]
        .map(|(what, value)| vec![what.to_string(), value])
        .into()
    }

    /// Reads off `results`, the rows of all operations one after the other.
    fn read([a, b, c]: &[Vec<f32>; 3], results: &[f32]) -> Fingerprint {
        let n = a.len();
        let found = |operation: usize| &results[operation * n..][..n];
        let rounded = |operation| cpu::arithmetic::<f32>(operation, a, b, c);
        let wide = [a, b, c].map(|v| v.iter().map(|x| f64::from(*x)).collect::<Vec<_>>());
        let precise = |operation| {
            let exact = cpu::arithmetic::<f64>(operation, &wide[0], &wide[1], &wide[2]);
            let exact: Vec<f32> = exact.into_iter().map(|v| v as f32).collect();
            precision(&found(operation)[SPECIAL..], &exact[SPECIAL..])
        };
        // Where nothing is denormal, only the rounding shows.
        let rounding = |operation: usize| {
            let same =
                |other| same_bits(&found(operation)[DENORMAL..], &rounded(other)[DENORMAL..]);
            if same(FMA) {
                Rounding::Fused
            } else if same(MULTIPLY_ADD) {
                Rounding::Separate
            } else {
                Rounding::Other
            }
        };
        let in_order = |operation: usize| {
            same_bits(
                &found(operation)[DENORMAL..],
                &rounded(operation)[DENORMAL..],
            )
        };
        let denormals = |operation: usize| {
            let found = &found(operation)[..DENORMAL];
            if same_bits(found, &rounded(operation)[..DENORMAL]) {
                Denormals::Kept
            } else if found.iter().all(|v| !v.is_subnormal()) {
                Denormals::Flushed
            } else {
                Denormals::Other
            }
        };
        let bytes: Vec<u8> = results
            .iter()
            .flat_map(|v| v.to_bits().to_le_bytes())
            .collect();
        let digest = Sha256::digest(&bytes);
        Fingerprint {
            fma: rounding(FMA),
            multiply_add: rounding(MULTIPLY_ADD),
            sums_in_order: in_order(SUM3) && in_order(SUM16),
            differences_kept: in_order(CANCEL),
            denormals_copied: denormals(COPY),
            denormals_added: denormals(ADD),
            denormals_multiplied: denormals(MULTIPLY),
            division: precise(DIVIDE),
            sqrt: precise(SQRT),
            exp: precise(EXP),
            log: precise(LOG),
            sha256: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }
}

/// A kernel for each operation on `n` triples, whose columns and whose results are the tensors.
pub(super) fn kernels(n: usize) -> Vec<KernelSpec> {
    let [a, b, c] = [0, 1, 2].map(|tensor| View::whole(tensor, Dtype::F32, n));
    // A row per operation, on a boundary that every adapter can bind.
    let rows = View::whole(3, Dtype::F32, n * OPERATIONS);
    let kernel = |i| arithmetic(i, a, b, c, rows.slice(i * n, n));
    (0..OPERATIONS).map(kernel).collect()
}

/// The inputs, the same for ever: their bits come from integers alone.
fn triples() -> [Vec<f32>; 3] {
    let mut state = 1u32;
    let mut draw = |range: std::ops::Range<u32>| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // The upper bits are the better ones.
        let draw = u64::from(state) * u64::from(range.end - range.start);
        range.start + (draw >> 32) as u32
    };
    let mut triples: [Vec<f32>; 3] = Default::default();
    for i in 0..SPECIAL + DRAWN {
        // A number with an exponent in the range; with −127, a denormal.
        let mut number = |exponents: std::ops::Range<i32>| {
            let biased = draw((exponents.start + 127) as u32..(exponents.end + 127) as u32);
            f32::from_bits(biased << 23 | draw(1..1 << 23))
        };
        let triple = if i < DENORMAL {
            let [a, b] = match i % 4 {
                // Copied, multiplied into a normal number, added to another denormal, and made by a
                // product and by a difference of normal numbers.
                0 => [number(-127..-126), number(30..40)],
                1 => [number(-127..-126), number(-127..-126)],
                2 => [number(-80..-70), number(-60..-58)],
                _ => [number(-126..-125), -number(-126..-125)],
            };
            [a, b, 1.0]
        } else if i < SPECIAL {
            let (a, b) = match i - DENORMAL {
                0 => (1.0 + (-12f32).exp2(), 1.0 + (-12f32).exp2()),
                1 => (16_777_216.0, 1.0),
                _ => (number(0..1), number(0..1)),
            };
            // What is left is the rounding error of the product, or 0.
            [a, b, -(a * b)]
        } else {
            let (a, b, c) = (number(-20..21), number(-4..5), number(-6..4));
            [
                a,
                if i % 2 == 0 { b } else { -b },
                if i % 4 < 2 { c } else { -c },
            ]
        };
        for (column, value) in triples.iter_mut().zip(triple) {
            column.push(value);
        }
    }
    triples
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

fn precision(found: &[f32], exact: &[f32]) -> Precision {
    let ulps: Vec<u32> = found.iter().zip(exact).map(|(f, e)| ulp(*f, *e)).collect();
    Precision {
        max_ulp: ulps.iter().copied().max().unwrap_or(0),
        exact: ulps.iter().filter(|u| **u == 0).count() as f64 / ulps.len() as f64,
    }
}

/// How many f32 lie from `a` to `b`.
fn ulp(a: f32, b: f32) -> u32 {
    if a.is_nan() || b.is_nan() {
        return if a.is_nan() && b.is_nan() {
            0
        } else {
            u32::MAX
        };
    }
    // In the order of the numbers; both zeros are 0.
    let place = |v: f32| {
        let magnitude = i64::from(v.to_bits() & 0x7fff_ffff);
        if v.is_sign_negative() {
            -magnitude
        } else {
            magnitude
        }
    };
    (place(a) - place(b)).unsigned_abs() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a device that rounds every step on its own would give.
    fn plain() -> Vec<f32> {
        let [a, b, c] = triples();
        (0..OPERATIONS)
            .flat_map(|operation| cpu::arithmetic(operation, &a, &b, &c))
            .collect()
    }

    fn changed(change: impl Fn(usize, &mut [f32])) -> Fingerprint {
        let mut results = plain();
        for (operation, row) in results.chunks_mut(SPECIAL + DRAWN).enumerate() {
            change(operation, row);
        }
        Fingerprint::read(&triples(), &results)
    }

    #[test]
    fn the_table_has_what_it_says() {
        let [a, b, c] = triples();
        assert!(a.len().is_multiple_of(64));
        let (first, last) = (1.0 + (-12f32).exp2(), -(1.0 + (-11f32).exp2()));
        assert_eq!(
            [a[DENORMAL], b[DENORMAL], c[DENORMAL]],
            [first, first, last]
        );
        let fused = cpu::arithmetic(FMA, &a, &b, &c)[DENORMAL];
        let separate = cpu::arithmetic(MULTIPLY_ADD, &a, &b, &c)[DENORMAL];
        assert_eq!([fused, separate], [(-24f32).exp2(), 0.0]);
        let subnormal = |operation: usize| {
            let row = cpu::arithmetic::<f32>(operation, &a, &b, &c);
            let count = |part: &[f32]| part.iter().filter(|v| v.is_subnormal()).count();
            (count(&row[..DENORMAL]), count(&row[DENORMAL..]))
        };
        for operation in [COPY, ADD, MULTIPLY] {
            let (special, drawn) = subnormal(operation);
            assert!(
                special >= DENORMAL / 8 && drawn == 0,
                "{operation}: {special}, {drawn}"
            );
        }
        let (least, most) = c[SPECIAL..]
            .iter()
            .fold((0f32, 0f32), |(l, m), v| (l.min(*v), m.max(*v)));
        assert!(least < -15.0 && most > 15.0, "{least} to {most}");
    }

    #[test]
    fn a_device_that_rounds_every_step_is_recognised() {
        let plain = changed(|_, _| ());
        let right = Precision {
            max_ulp: 0,
            exact: 1.0,
        };
        assert_eq!(
            (plain.fma, plain.multiply_add),
            (Rounding::Fused, Rounding::Separate)
        );
        assert!(plain.sums_in_order && plain.differences_kept);
        for denormals in [
            plain.denormals_copied,
            plain.denormals_added,
            plain.denormals_multiplied,
        ] {
            assert_eq!(denormals, Denormals::Kept);
        }
        assert_eq!((plain.division, plain.sqrt), (right, right));
        // The host's own functions, one rounding in f64 apart.
        assert!(
            plain.exp.max_ulp <= 1 && plain.log.max_ulp <= 1,
            "{plain:?}"
        );
    }

    #[test]
    fn every_liberty_shows() {
        let [a, b, c] = triples();
        let row = |operation| cpu::arithmetic::<f32>(operation, &a, &b, &c);
        let reference = changed(|_, _| ());
        let contracted = changed(|operation, y| {
            if operation == MULTIPLY_ADD {
                y.copy_from_slice(&row(FMA));
            }
        });
        assert_eq!(contracted.multiply_add, Rounding::Fused);
        let unfused = changed(|operation, y| {
            if operation == FMA {
                y.copy_from_slice(&row(MULTIPLY_ADD));
            }
        });
        assert_eq!(unfused.fma, Rounding::Separate);
        let silent = changed(|_, y| y.fill(0.0));
        assert_eq!(
            (silent.fma, silent.multiply_add),
            (Rounding::Other, Rounding::Other)
        );
        assert!(!silent.sums_in_order && silent.division.exact == 0.0);
        let simplified = changed(|operation, y| {
            if operation == CANCEL {
                y.copy_from_slice(&b);
            }
        });
        assert!(simplified.sums_in_order && !simplified.differences_kept);
        let reassociated = changed(|operation, y| {
            if operation == SUM3 {
                for (i, y) in y.iter_mut().enumerate() {
                    *y = a[i] + (b[i] + c[i]);
                }
            }
        });
        assert!(!reassociated.sums_in_order && reassociated.differences_kept);
        let flushed = changed(|operation, y| {
            if operation != COPY {
                y.iter_mut()
                    .filter(|v| v.is_subnormal())
                    .for_each(|v| *v = 0.0);
            }
        });
        assert_eq!(flushed.denormals_copied, Denormals::Kept);
        assert_eq!(flushed.denormals_added, Denormals::Flushed);
        assert_eq!(flushed.denormals_multiplied, Denormals::Flushed);
        let approximate = changed(|operation, y| {
            if operation == DIVIDE {
                let last = y.last_mut().unwrap();
                *last = f32::from_bits(last.to_bits() + 3);
            }
        });
        assert_eq!(approximate.division.max_ulp, 3);
        assert_eq!(approximate.division.exact, 1.0 - 1.0 / DRAWN as f64);
        for other in [
            contracted,
            unfused,
            silent,
            simplified,
            reassociated,
            flushed,
            approximate,
        ] {
            assert_ne!(other.sha256, reference.sha256);
        }
    }

    #[test]
    fn distances_in_units_in_the_last_place() {
        assert_eq!(ulp(1.0, 1.0 + f32::EPSILON), 1);
        assert_eq!(ulp(0.0, -0.0), 0);
        assert_eq!(ulp(f32::from_bits(1), -f32::from_bits(1)), 2);
        assert_eq!(ulp(f32::NAN, 1.0), u32::MAX);
        assert_eq!(ulp(f32::MAX, f32::INFINITY), 1);
    }
}
