//! The harness: runs a kernel on inputs that are guarded and outputs that are poisoned before and
//! guarded after, and compares what it wrote with what its CPU twin computed.

use crate::cpu::{self, Memory, Values};
use crate::error::Result;
use crate::gpu::{Buffer, Dispatch, Gpu};
use crate::kernels::conv2d::{Family, Tile};
use crate::kernels::{Dtype, KernelSpec, Metrics, STEP_ELEMENTS, Step, View, Work};
use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What stands in a float output before the kernel runs, so that an element left unwritten shows: a
/// NaN that no arithmetic makes.
pub const POISON: u32 = 0x7FC0_DEAD;
/// The same for an output of words.
pub const WORD_POISON: u32 = 0xDEAD_BEEF;
/// What stands behind an output, as often as a workgroup has invocations. The guard lies inside the
/// binding: out of it the driver would drop or clamp a stray write, and nothing would show.
pub const GUARD: u32 = 0x5AFE_5AFE;
pub const GUARD_WORDS: usize = crate::kernels::WORKGROUP_SIZE;
/// What stands behind an input, as often: NaN as a float and a wild index as a word, so that a read
/// past the end that is used shows. It lies inside the binding too; a read farther out finds it as
/// well where the driver or the translation of the shader clamps the index.
pub const BEYOND: u32 = u32::MAX;
/// The same for a kernel that computes anew what comes out NaN, which would hide such a read: 1e36, or two
/// halves of 61,280.
pub const BEYOND_FINITE: u32 = 0x7B7B_7B7B;
/// What stands in an output of halves before the kernel runs: a NaN as [`POISON`] is one.
const HALF_POISON: u16 = 0x7E5D;

/// How far an element may be from its reference: `absolute + relative · |reference|`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    pub absolute: f64,
    pub relative: f64,
}

impl Tolerance {
    /// The same bits (−0 equals 0).
    pub const EXACT: Tolerance = Tolerance {
        absolute: 0.0,
        relative: 0.0,
    };

    /// For `exp` and `log`, of which WGSL asks no more than a few units in the last place per unit
    /// of the argument, and 2⁻²¹ absolute.
    pub const TRANSCENDENTAL: Tolerance = Tolerance {
        absolute: 5e-6,
        relative: 2e-5,
    };

    /// The same where the result is stored as halves: another one may be rounded to, and one below the smallest
    /// normal may become 0.
    pub fn of_halves(self) -> Tolerance {
        Tolerance {
            absolute: self.absolute + 1.0 / 16_384.0,
            relative: self.relative + 1.0 / 1024.0,
        }
    }

    /// For a sum of `terms` products of numbers around 1 in any order, with or without fused
    /// multiply-adds. Rounding errors are a share of the partial sums they are made in: where these
    /// wander around 0 they grow like √terms and their errors add up like another √terms; where
    /// they grow towards the sum its error is √terms roundings of that.
    pub fn sum(terms: usize) -> Tolerance {
        let epsilon = f64::from(f32::EPSILON);
        let terms = terms as f64;
        Tolerance {
            absolute: epsilon * (terms + 4.0),
            relative: epsilon * (terms.sqrt() + 4.0),
        }
    }
}

/// The reference of one output.
#[derive(Clone, Debug)]
pub enum Expected {
    Floats(Vec<f64>, Tolerance),
    /// Indices and counts: the very same.
    Words(Vec<u32>),
}

impl Expected {
    fn len(&self) -> usize {
        match self {
            Expected::Floats(values, _) => values.len(),
            Expected::Words(words) => words.len(),
        }
    }
}

/// How an output compares with its reference.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// The largest error, measured by its tolerance, as found.
    pub worst: f64,
    /// The tolerance at that element.
    pub tolerance: f64,
    /// What is wrong, if anything is.
    pub failure: Option<String>,
}

impl Comparison {
    pub(super) fn failed(failure: String) -> Comparison {
        Comparison {
            worst: f64::INFINITY,
            tolerance: 0.0,
            failure: Some(failure),
        }
    }

    /// Error by tolerance; an error that is no number counts as infinite.
    fn ratio(&self) -> f64 {
        if self.worst == 0.0 {
            0.0
        } else if self.worst.is_nan() {
            f64::INFINITY
        } else {
            self.worst / self.tolerance
        }
    }

    /// Whether this comparison is the one to report, of the two.
    pub(super) fn worse_than(&self, other: &Comparison) -> bool {
        (self.failure.is_some(), self.ratio()) > (other.failure.is_some(), other.ratio())
            || self.ratio() == other.ratio() && self.tolerance > other.tolerance
    }
}

/// Compares output `name` as it was read back (`found`: its 4-byte elements, then
/// [`GUARD_WORDS`] words that must still be [`GUARD`]) with its reference.
///
/// A NaN must be found where one is expected and nowhere else, and so must an infinity of either
/// sign. A length that does not fit is a failure.
pub fn compare(name: &str, found: &[u32], expected: &Expected) -> Comparison {
    let len = expected.len();
    if found.len() != len + GUARD_WORDS {
        return Comparison::failed(format!(
            "{name}: expected {len} elements and {GUARD_WORDS} guard words, found {} in all",
            found.len()
        ));
    }
    let (found, guard) = found.split_at(len);
    if let Some(i) = guard.iter().position(|word| *word != GUARD) {
        return Comparison::failed(format!(
            "{name}: expected nothing to be written past element {len}, found {:#010x} at {}",
            guard[i],
            len + i
        ));
    }
    compare_elements(name, found, expected)
}

/// Compares the elements of output `name`, as many as the reference has, without a guard.
pub(super) fn compare_elements(name: &str, found: &[u32], expected: &Expected) -> Comparison {
    let len = expected.len();
    let mut worst = Comparison {
        worst: 0.0,
        tolerance: 0.0,
        failure: None,
    };
    let mut bad: Option<(usize, String)> = None;
    let mut bad_count = 0;
    for (i, word) in found.iter().enumerate() {
        let (value, reference, tolerance, unwritten) = match expected {
            Expected::Floats(values, tolerance) => (
                f64::from(f32::from_bits(*word)),
                values[i],
                tolerance.absolute + tolerance.relative * values[i].abs(),
                *word == POISON,
            ),
            Expected::Words(words) => (
                f64::from(*word),
                f64::from(words[i]),
                0.0,
                *word == WORD_POISON,
            ),
        };
        let error = (value - reference).abs();
        // Written so that NaN is out of tolerance, and so is any error by an infinite reference,
        // whose tolerance is infinite.
        let same = value == reference || value.is_nan() && reference.is_nan() && !unwritten;
        let within = same || error.is_finite() && error <= tolerance;
        if !within {
            bad_count += 1;
            bad.get_or_insert_with(|| {
                let margin = if tolerance > 0.0 && tolerance.is_finite() {
                    format!(" ± {tolerance:.1e}")
                } else {
                    String::new()
                };
                let note = if unwritten { " (never written)" } else { "" };
                (
                    i,
                    format!("expected {reference}{margin}, found {value}{note}"),
                )
            });
        }
        let here = Comparison {
            worst: if same { 0.0 } else { error },
            // There is none by which to measure NaN and infinity.
            tolerance: if tolerance.is_finite() {
                tolerance
            } else {
                0.0
            },
            failure: None,
        };
        if here.worse_than(&worst) {
            worst = here;
        }
    }
    worst.failure = bad.map(|(i, what)| format!("{name}[{i}]: {what}; {bad_count} of {len} out"));
    worst
}

/// What a case found.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Outcome {
    pub kernel: String,
    pub variant: String,
    /// The largest error, measured by its tolerance, as found.
    pub worst: f64,
    /// The tolerance at that element (0 where only the very same will do).
    pub tolerance: f64,
    pub passed: bool,
    /// What is wrong, where something is.
    pub detail: Option<String>,
}

type Build = dyn Fn(&mut Bench) -> Vec<KernelSpec> + Send + Sync;

/// One kernel on one set of inputs.
pub struct Case {
    /// The entry point.
    pub kernel: String,
    /// Shape, mask and the like, for people.
    pub variant: String,
    build: Box<Build>,
    nonfinite: bool,
    half: bool,
}

impl Case {
    /// A case whose `build` draws the inputs, says which outputs there are and how exact they must be,
    /// and returns the kernel (or several, where one needs another to make a result that can be
    /// compared). What the outputs must become is what the twins make of the same inputs in f64,
    /// which are then so much more exact than the kernel that only the kernel's error shows.
    pub fn new(
        kernel: impl Into<String>,
        variant: impl Into<String>,
        build: impl Fn(&mut Bench) -> Vec<KernelSpec> + Send + Sync + 'static,
    ) -> Case {
        Case {
            kernel: kernel.into(),
            variant: variant.into(),
            build: Box::new(build),
            nonfinite: false,
            half: false,
        }
    }

    /// The same case with a NaN or an infinity among the numbers it draws, see [`Bench::spoil`].
    pub fn nonfinite(mut self) -> Case {
        self.variant += ", NaN and ±∞ among them";
        self.nonfinite = true;
        self
    }

    /// The same case with halves for everything that its kernels can store as such; `None` where they store
    /// nothing so, or have halves already.
    pub fn in_halves(mut self) -> Option<Case> {
        if std::mem::replace(&mut self.half, true) {
            return None;
        }
        self.variant += ", in halves";
        let kernels = self.kernels();
        kernels.iter().any(KernelSpec::is_half).then_some(self)
    }

    /// The same case for a product of such a tile: in halves where its family takes nothing else.
    pub(super) fn for_tile(self, tile: &Tile) -> Case {
        match tile.family() {
            Family::Matrix => self.in_halves().expect("products can be in halves"),
            _ => self,
        }
    }

    /// Its kernels, as they are on any device.
    pub fn kernels(&self) -> Vec<KernelSpec> {
        self.build().0
    }

    /// The kernels and the tensors before they run.
    fn build(&self) -> (Vec<KernelSpec>, Vec<Tensor>) {
        // The seed follows from the case, so that one case can be run without the others.
        let seed = format!("{} {}", self.kernel, self.variant)
            .bytes()
            .fold(0u64, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            });
        let mut bench = Bench {
            rng: ChaCha8Rng::seed_from_u64(seed),
            tensors: Vec::new(),
            beyond: BEYOND,
            spoiled: self.nonfinite.then_some(0),
        };
        let mut kernels = (self.build)(&mut bench);
        if self.half {
            store_halves(&mut kernels, &mut bench.tensors);
        }
        (kernels, bench.tensors)
    }

    /// Inputs, outputs and dispatches on the GPU, nothing run yet: what a benchmark times.
    ///
    /// # Errors
    /// What the device reports.
    pub fn prepare(&self, gpu: &Gpu) -> Result<Prepared> {
        let (kernels, tensors) = self.build();
        let mut memory = Memory {
            places: (0..tensors.len()).collect(),
            offsets: vec![0; tensors.len()],
            values: tensors.iter().map(Tensor::values).collect(),
        };
        for kernel in &kernels {
            cpu::run(kernel, &mut memory);
        }
        let mut uploaded = Vec::with_capacity(tensors.len());
        for (tensor, values) in tensors.into_iter().zip(&memory.values) {
            let label = match tensor.role {
                Role::Input => "verify input",
                _ => "verify output",
            };
            uploaded.push(Uploaded {
                buffer: gpu.upload(label, &tensor.initial)?,
                expected: tensor.expected(values),
                tensor,
            });
        }
        let dispatches = kernels.iter().map(|kernel| {
            gpu.dispatch(kernel, |argument| {
                let view = argument.view;
                let words = view.dtype.words(view.len);
                let buffer = &uploaded[view.tensor].buffer;
                match (view.start, uploaded[view.tensor].tensor.len == view.len) {
                    // Bound with its guard.
                    (0, true) => buffer.head(words),
                    (start, _) => buffer.slice(start, words),
                }
            })
        });
        Ok(Prepared {
            dispatches: dispatches.collect::<Result<_>>()?,
            tensors: uploaded,
        })
    }

    /// Runs the kernel and compares every output with its reference and every input with what it
    /// was; once as it is, and once more with its workgroups in several rows, as a larger problem
    /// would have them.
    ///
    /// # Errors
    /// What the device reports; a wrong result is an [`Outcome`], not an error.
    pub fn run(&self, gpu: &Gpu) -> Result<Outcome> {
        let prepared = self.prepare(gpu)?;
        let dispatches: Vec<&Dispatch> = prepared.dispatches.iter().collect();
        gpu.submit(&self.kernel, &dispatches, 1)?;
        let mut worst = prepared.compare(gpu)?;
        let folded: Vec<_> = dispatches.iter().map(|d| d.folded()).collect();
        if folded.iter().any(Option::is_some) {
            for uploaded in &prepared.tensors {
                if !matches!(uploaded.tensor.role, Role::Input) {
                    gpu.write("verify output", &uploaded.buffer, &uploaded.tensor.initial)?;
                }
            }
            let folded = folded.iter().zip(&dispatches);
            let folded: Vec<&Dispatch> = folded.map(|(f, d)| f.as_ref().unwrap_or(d)).collect();
            gpu.submit(&self.kernel, &folded, 1)?;
            if let Some(mut folded) = prepared.compare(gpu)? {
                let note = |what| format!("with its workgroups in several rows: {what}");
                folded.failure = folded.failure.map(note);
                if worst.as_ref().is_none_or(|w| folded.worse_than(w)) {
                    worst = Some(folded);
                }
            }
        }
        // A case that compares nothing proves nothing.
        let worst = worst.unwrap_or_else(|| Comparison::failed("no output to compare".into()));
        Ok(Outcome {
            kernel: self.kernel.clone(),
            variant: self.variant.clone(),
            worst: worst.worst,
            tolerance: worst.tolerance,
            passed: worst.failure.is_none(),
            detail: worst.failure,
        })
    }
}

/// A case that is ready to run.
pub struct Prepared {
    pub dispatches: Vec<Dispatch>,
    tensors: Vec<Uploaded>,
}

impl Prepared {
    /// The worst of all outputs and inputs after a run; `None` where there is no output.
    fn compare(&self, gpu: &Gpu) -> Result<Option<Comparison>> {
        let mut worst: Option<Comparison> = None;
        for Uploaded {
            buffer,
            tensor,
            expected,
        } in &self.tensors
        {
            let Some(expected) = expected else {
                continue;
            };
            let found = gpu.read::<u32>("verify", buffer)?;
            let found = match tensor.dtype {
                Dtype::F16 => unpack_halves(&found, tensor.len),
                _ => found,
            };
            let comparison = compare(tensor.name, &found, expected);
            if worst.as_ref().is_none_or(|w| comparison.worse_than(w)) {
                worst = Some(comparison);
            }
        }
        let inputs = self
            .tensors
            .iter()
            .filter(|u| matches!(u.tensor.role, Role::Input));
        for (i, input) in inputs.enumerate() {
            let found = gpu.read::<u32>("verify", &input.buffer)?;
            let initial = &input.tensor.initial;
            let differs = found.iter().zip(initial).position(|(f, w)| f != w);
            if let (Some(at), Some(worst)) = (differs, &mut worst) {
                let (i, was, is) = (i + 1, initial[at], found[at]);
                *worst = Comparison::failed(format!(
                    "input {i}: expected nothing to be written to it, found {is:#010x} at {at} in place of {was:#010x}"
                ));
            }
        }
        Ok(worst)
    }
}

/// A tensor on the GPU, and what it must become; `None` for inputs and for what only passes from one
/// kernel to the next.
struct Uploaded {
    buffer: Buffer,
    tensor: Tensor,
    expected: Option<Expected>,
}

/// A tensor of a case.
struct Tensor {
    name: &'static str,
    dtype: Dtype,
    len: usize,
    /// The elements' words, then the guard.
    initial: Vec<u32>,
    role: Role,
}

enum Role {
    Input,
    /// Floats that may differ so much from the reference.
    Floats(Tolerance),
    /// The very same words or bytes.
    Exact,
    /// Words that are compared as floats, so that any NaN is as good as another.
    Metrics,
    Scratch,
}

impl Tensor {
    /// As the twins take it.
    fn values(&self) -> Values<f64> {
        let words = &self.initial[..self.dtype.words(self.len)];
        match self.dtype {
            Dtype::F32 => Values::Floats(words.iter().map(|w| float(*w)).collect()),
            Dtype::F16 => {
                let floats = unpack_halves(words, self.len);
                Values::Floats(floats.iter().map(|w| float(*w)).collect())
            }
            Dtype::U32 => Values::Words(words.to_vec()),
            Dtype::U8 => Values::Bytes(bytemuck::cast_slice(words)[..self.len].to_vec()),
        }
    }

    /// The reference, from what the twins made of it.
    fn expected(&self, values: &Values<f64>) -> Option<Expected> {
        match (&self.role, values) {
            (Role::Input | Role::Scratch, _) => None,
            (Role::Floats(tolerance), Values::Floats(values)) => {
                let tolerance = match self.dtype {
                    Dtype::F16 => tolerance.of_halves(),
                    _ => *tolerance,
                };
                Some(Expected::Floats(values.clone(), tolerance))
            }
            (Role::Metrics, Values::Words(words)) => {
                let floats = words.iter().map(|w| float(*w)).collect();
                Some(Expected::Floats(floats, Tolerance::EXACT))
            }
            (_, Values::Bytes(bytes)) => {
                let mut padded = bytes.clone();
                padded.resize(bytes.len().next_multiple_of(4), 0);
                Some(Expected::Words(bytemuck::pod_collect_to_vec(&padded)))
            }
            (_, Values::Words(words)) => Some(Expected::Words(words.clone())),
            (_, Values::Floats(values)) => Some(Expected::Floats(values.clone(), Tolerance::EXACT)),
        }
    }
}

fn float(word: u32) -> f64 {
    f64::from(f32::from_bits(word))
}

/// Makes halves of all tensors that kernels can store as such: those whose elements the shader calls `real`.
fn store_halves(kernels: &mut [KernelSpec], tensors: &mut [Tensor]) {
    for kernel in kernels.iter_mut() {
        let source = kernel.source().unwrap_or_default().into_owned();
        for argument in &mut kernel.arguments {
            let declared = format!("@binding({}) var<storage", argument.binding);
            let line = source.lines().find(|line| line.contains(&declared));
            // Products load some of them as words of 64 bits, where they are floats.
            let is_real = |line: &str| {
                let names = ["real>", "Stored>", "vec2<u64>"];
                names.iter().any(|name| line.contains(name))
            };
            if line.is_some_and(is_real) {
                argument.view.dtype = Dtype::F16;
                tensors[argument.view.tensor].dtype = Dtype::F16;
            }
        }
        if let Work::Product(product) = kernel.work
            && kernel.is_half()
        {
            kernel.set_product(product.in_halves(true));
        }
    }
    for tensor in tensors.iter_mut().filter(|t| t.dtype == Dtype::F16) {
        let guard = tensor.initial.split_off(tensor.len);
        tensor.initial = pack_halves(&tensor.initial);
        if tensor.len % 2 == 1 && matches!(tensor.role, Role::Input) {
            // The half that is left of the last word belongs to the guard.
            let last = &mut tensor.initial[tensor.len / 2];
            *last = (*last & 0xffff) | (guard[0] & 0xffff_0000);
        }
        tensor.initial.extend(guard);
    }
}

/// Floats, given by their bits, as halves, two to a word; what is left of the last word is poison.
pub(super) fn pack_halves(floats: &[u32]) -> Vec<u32> {
    let half = |word: &u32| match *word {
        POISON => HALF_POISON,
        word => f16::from_f32(f32::from_bits(word)).to_bits(),
    };
    let mut halves: Vec<u16> = floats.iter().map(half).collect();
    halves.resize(halves.len().next_multiple_of(2), HALF_POISON);
    bytemuck::pod_collect_to_vec(&halves)
}

/// The bits of the floats that the first `len` halves in `words` are, then the words behind them, where the first
/// is spoiled if what is left of the last word of halves is no longer poison.
pub(super) fn unpack_halves(words: &[u32], len: usize) -> Vec<u32> {
    let (words, behind) = words.split_at(Dtype::F16.words(len));
    let halves: &[u16] = bytemuck::cast_slice(words);
    let float = |half: &u16| match *half {
        HALF_POISON => POISON,
        half => f16::from_bits(half).to_f32().to_bits(),
    };
    let mut floats: Vec<u32> = halves[..len].iter().map(float).collect();
    floats.extend(behind);
    if halves[len..].iter().any(|half| *half != HALF_POISON)
        && let Some(guard) = floats.get_mut(len)
    {
        *guard = !*guard;
    }
    floats
}

/// What a tensor of a case can be made of.
pub trait Element: bytemuck::NoUninit {
    const DTYPE: Dtype;
    /// Elements of the dtype in one of these.
    const COUNT: usize = 1;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
}

impl Element for u32 {
    const DTYPE: Dtype = Dtype::U32;
}

impl Element for u8 {
    const DTYPE: Dtype = Dtype::U8;
}

impl Element for Step {
    const DTYPE: Dtype = Dtype::U32;
    const COUNT: usize = STEP_ELEMENTS;
}

impl Element for Metrics {
    const DTYPE: Dtype = Dtype::U32;
    const COUNT: usize = 2;
}

/// Where a case makes its inputs and outputs.
pub struct Bench {
    rng: ChaCha8Rng,
    tensors: Vec<Tensor>,
    /// The word that stands behind an input.
    beyond: u32,
    /// How many slices were spoiled so far, in a case that has them spoiled.
    spoiled: Option<usize>,
}

impl Bench {
    /// From now on no NaN stands behind an input, see [`BEYOND_FINITE`].
    pub(super) fn finite_guards(&mut self) {
        self.beyond = BEYOND_FINITE;
    }

    /// `len` numbers between −1 and 1.5: signed, and with a mean that is not 0.
    pub fn values(&mut self, len: usize) -> Vec<f32> {
        let mut values: Vec<_> = (0..len).map(|_| self.rng.random_range(-1.0..1.5)).collect();
        self.spoil(&mut values);
        values
    }

    /// `len` multiples of ¼ between −1 and 1.5: many of them equal, some 0.
    pub fn ties(&mut self, len: usize) -> Vec<f32> {
        let mut quarter = || self.rng.random_range(-4i32..=6) as f32 / 4.0;
        let mut values: Vec<_> = (0..len).map(|_| quarter()).collect();
        self.spoil(&mut values);
        values
    }

    /// In a [`Case::nonfinite`]: NaN, ∞ and −∞ by turns, seven elements apart and from the end of the
    /// slice on, where the elements lie that do not count. A slice begins one element before the one
    /// that was spoiled before it, so that they do not all meet.
    pub fn spoil(&mut self, values: &mut [f32]) {
        let Some(spoiled) = &mut self.spoiled else {
            return;
        };
        let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        let places = values.iter_mut().rev().skip(*spoiled).step_by(7);
        places
            .zip(bad.into_iter().cycle())
            .for_each(|(v, bad)| *v = bad);
        *spoiled += 1;
    }

    /// `len` whole numbers below `limit`.
    pub fn below(&mut self, limit: u32, len: usize) -> Vec<u32> {
        (0..len).map(|_| self.rng.random_range(0..limit)).collect()
    }

    /// A read-only input. Kernels are bound to [`GUARD_WORDS`] words more, of [`BEYOND`], or of
    /// a large number where a kernel redoes its NaNs.
    pub fn input<T: Element>(&mut self, data: &[T]) -> View {
        let mut bytes = bytemuck::cast_slice::<T, u8>(data).to_vec();
        // What is left of the last word belongs to the guard.
        bytes.resize(bytes.len().next_multiple_of(4), self.beyond as u8);
        let words = bytemuck::pod_collect_to_vec(&bytes);
        self.register("input", T::DTYPE, T::COUNT * data.len(), words, Role::Input)
    }

    /// A float output of `len` elements, every one of which must be written.
    pub fn output(&mut self, name: &'static str, len: usize, tolerance: Tolerance) -> View {
        let poison = vec![POISON; len];
        self.register(name, Dtype::F32, len, poison, Role::Floats(tolerance))
    }

    /// An output of words.
    pub fn output_words(&mut self, name: &'static str, len: usize) -> View {
        self.register(name, Dtype::U32, len, vec![WORD_POISON; len], Role::Exact)
    }

    /// An output of bytes; what is left of the last word is written 0.
    pub fn output_bytes(&mut self, name: &'static str, len: usize) -> View {
        let words = vec![WORD_POISON; Dtype::U8.words(len)];
        self.register(name, Dtype::U8, len, words, Role::Exact)
    }

    /// Floats that the kernel changes in place.
    pub fn updated(&mut self, name: &'static str, initial: &[f32], tolerance: Tolerance) -> View {
        let words = initial.iter().map(|v| v.to_bits()).collect();
        let role = Role::Floats(tolerance);
        self.register(name, Dtype::F32, initial.len(), words, role)
    }

    /// Words that the kernel changes in place.
    pub fn updated_words(&mut self, name: &'static str, initial: &[u32]) -> View {
        let len = initial.len();
        self.register(name, Dtype::U32, len, initial.to_vec(), Role::Exact)
    }

    /// Rows of metrics of which the kernel changes one.
    pub fn updated_metrics(&mut self, name: &'static str, initial: &[Metrics]) -> View {
        let words: Vec<u32> = bytemuck::cast_slice(initial).to_vec();
        self.register(name, Dtype::U32, words.len(), words, Role::Metrics)
    }

    /// `len` floats that one kernel writes and the next one reads.
    pub fn scratch(&mut self, len: usize) -> View {
        self.register("scratch", Dtype::F32, len, vec![POISON; len], Role::Scratch)
    }

    fn register(
        &mut self,
        name: &'static str,
        dtype: Dtype,
        len: usize,
        mut words: Vec<u32>,
        role: Role,
    ) -> View {
        let guard = match role {
            Role::Input => self.beyond,
            _ => GUARD,
        };
        words.resize(words.len() + GUARD_WORDS, guard);
        self.tensors.push(Tensor {
            name,
            dtype,
            len,
            initial: words,
            role,
        });
        View::whole(self.tensors.len() - 1, dtype, len)
    }
}
