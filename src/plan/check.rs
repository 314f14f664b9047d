//! What a plan must keep: found without a device, and before one is asked.

use super::memory::alignment;
use super::{Lifetime, Mode, Options, Plan, SHARD_STATISTICS, Target, Tensor};
use crate::error::{Error, Result};
use crate::host::fitting_batch;
use crate::kernels::{Access, AdapterReport, View};
use crate::model::recipe::Views;
use crate::model::{MAX_ELEMENTS, Model};
use indicatif::BinaryBytes;

/// Storage buffers that a kernel may be bound to on every adapter, by WebGPU's default limits.
const MOST_BINDINGS: usize = 8;

/// The tensor in which a sample takes the most elements, and how many: what bounds a batch, since the
/// kernels index with 32 bits.
fn largest_share(model: &Model, options: &Options) -> Result<(String, usize)> {
    // What one sample takes is what a batch takes, as often as it has samples.
    let one = Options {
        unfused: true,
        ..options.clone()
    };
    let one = Plan::unchecked(model, 1, Mode::Evaluate, &one, Target::Cpu)?;
    let tensors = one.tensors.iter().filter(|t| t.per_sample);
    // Of equal ones the first.
    let largest = tensors.rev().max_by_key(|t| t.elements());
    Ok(largest.map_or((String::new(), 1), |t| (t.name.clone(), t.elements())))
}

/// The samples that a batch of an evaluation may have at most.
///
/// # Errors
/// As [`Plan::new`].
pub fn most_samples(model: &Model, options: &Options) -> Result<usize> {
    let (_, elements) = largest_share(model, options)?;
    Ok((MAX_ELEMENTS / elements as u128) as usize)
}

/// Refuses a batch of training that is empty or has more elements in a tensor than the kernels can index.
///
/// # Errors
/// [`Error::Usage`] with the largest batch size.
pub fn expect_batch(model: &Model, batch: usize, options: &Options) -> Result<()> {
    let one_view = Options {
        views: Views::One,
        ..options.clone()
    };
    expect_samples(model, batch, &one_view)
}

/// The same of an evaluation, which may show each image in several views.
pub(super) fn expect_samples(model: &Model, batch: usize, options: &Options) -> Result<()> {
    let (name, elements) = largest_share(model, options)?;
    let most = most_samples(model, options)?;
    if (1..=most).contains(&batch) {
        return Ok(());
    }
    Err(Error::Usage(match most {
        0 => format!(
            "expected at most {MAX_ELEMENTS} elements in a tensor, found {elements} an image in {name}; leave --conv explicit out"
        ),
        _ => format!(
            "expected {} 1 to {most} ({name} has {elements} elements an image, and a tensor holds {MAX_ELEMENTS} at most), found {batch}; {}",
            match (options.shards, options.micro) {
                (Some(_), _) => "shards of",
                (None, true) => "--micro-batch from",
                (None, false) => "--batch-size from",
            },
            options.batch_advice(most)
        ),
    }))
}

impl Plan {
    /// Refuses a plan with a tensor that `adapter` does not bind, with the flag that helps; `options`
    /// are those that it was made by. `smaller` makes the same plan for another batch.
    pub(super) fn expect_bindings(
        &self,
        adapter: &AdapterReport,
        options: &Options,
        smaller: impl Fn(usize) -> Result<Plan>,
    ) -> Result<()> {
        let limit = adapter.binding_limit();
        let bytes = |elements: usize| 4 * elements as u64;
        let largest = |plan: &Plan, lifetime: Lifetime| {
            let tensors = plan.tensors.iter().filter(|t| t.lifetime == lifetime);
            // What is computed along is in no memory.
            let held = tensors.filter(|t| t.lifetime == Lifetime::Kept || t.slot.is_some());
            let sizes = held.map(|t| (t.name.clone(), 4 * t.dtype.words(t.elements()) as u64));
            // Of equal ones the first.
            let sizes = sizes.rev();
            sizes.max_by_key(|(_, bytes)| *bytes).unwrap_or_default()
        };
        let (name, size) = largest(self, Lifetime::Kept);
        let of_shards =
            name == SHARD_STATISTICS || self.slabs.iter().any(|slab| slab.tensor == name);
        if size > limit && of_shards {
            return Err(Error::Usage(format!(
                "expected sums over shards of at most {} on {}, which binds no more in one buffer, found {}; use fewer --shards, or another --device: cpu has no such limit",
                BinaryBytes(limit),
                adapter.name,
                BinaryBytes(size)
            )));
        }
        if size > limit {
            let by_layer = self.specs().filter_map(|spec| {
                let parameters = spec.arguments.iter().find(|a| a.name == "parameters")?;
                Some((spec.layer.clone(), bytes(parameters.view.len)))
                    .filter(|(l, _)| !l.is_empty())
            });
            let largest = by_layer.max_by_key(|(_, bytes)| *bytes);
            let largest = largest.map_or(String::new(), |(l, _)| format!(" (most of them in {l})"));
            return Err(Error::Usage(format!(
                "expected parameters of at most {} on {}, which binds no more in one buffer, found {}{largest}; make the layer smaller, or choose another --device: cpu has no such limit",
                BinaryBytes(limit),
                adapter.name,
                BinaryBytes(size)
            )));
        }
        let (name, size) = largest(self, Lifetime::Step);
        if size <= limit {
            return Ok(());
        }
        let fits = |batch| Ok(largest(&smaller(batch)?, Lifetime::Step).1 <= limit);
        let advice = match fitting_batch(self.batch, fits)? {
            Some(batch) => options.batch_advice(batch),
            None => "even one image is too large; use a smaller model or smaller images, or another --device: cpu has no such limit".into(),
        };
        Err(Error::Usage(format!(
            "expected tensors of at most {} on {}, which binds no more in one buffer, found {} for '{name}' at {} {}; {advice}",
            BinaryBytes(limit),
            adapter.name,
            BinaryBytes(size),
            match (options.shards, options.micro) {
                (Some(_), _) => "shards of",
                (None, true) => "micro-batch",
                (None, false) => "batch size",
            },
            self.batch
        )))
    }

    /// Whether two tensors of the step lie in the same memory, some of them at least.
    fn overlap(&self, one: usize, other: usize) -> bool {
        let [one, other] = [one, other].map(|tensor| &self.tensors[tensor]);
        let end = |tensor: &Tensor| tensor.offset + tensor.elements();
        one.slot.is_some()
            && one.slot == other.slot
            && one.offset < end(other)
            && other.offset < end(one)
    }

    /// What is wrong with the plan, a line each; nothing, unless this program has a mistake: every read
    /// has a writer before it, every write is to memory that nobody else needs any more, no kernel of a batch looks
    /// at what is of one shard, no kernel has more bindings than every adapter allows, is bound to less than it touches, or reads and writes
    /// one piece of memory.
    pub fn flaws(&self) -> Vec<String> {
        let mut flaws = Vec::new();
        let syncs = self.syncs();
        // What of each tensor was written so far, and which of them are as they were written.
        let mut written: Vec<Vec<[usize; 2]>> = vec![Vec::new(); self.tensors.len()];
        let mut whole = vec![false; self.tensors.len()];
        // Where all shards of a batch are under way: what each of them wrote in place of the one before it.
        let mut overwritten: Vec<(View, usize)> = Vec::new();
        let (mut phase, mut of_batch) = (0, false);
        let mut of_shards = vec![false; self.tensors.len()];
        for (number, (section, spec)) in self.kernels.iter().enumerate() {
            phase += usize::from(of_batch && !section.is_of_batch());
            of_batch = section.is_of_batch();
            let mut flaw = |what: String| {
                flaws.push(format!(
                    "kernel {number}, {} of '{}': {what}",
                    spec.entry, spec.layer
                ));
            };
            if spec.arguments.len() > MOST_BINDINGS {
                flaw(format!("{} bindings", spec.arguments.len()));
            }
            for argument in &spec.arguments {
                let View {
                    tensor, start, len, ..
                } = argument.view;
                let name = argument.name;
                let Some(held) = self.tensors.get(tensor) else {
                    flaw(format!("{name} is no tensor of the plan"));
                    continue;
                };
                if start + len > held.elements() || argument.elements > len {
                    let (of, elements) = (held.elements(), argument.elements);
                    flaw(format!(
                        "{name} is {start}+{len} of {of} and needs {elements}"
                    ));
                }
                if argument.view.dtype != held.dtype {
                    flaw(format!(
                        "{name} is {:?} of {:?}",
                        argument.view.dtype, held.dtype
                    ));
                }
                if held.lifetime == Lifetime::Step {
                    of_shards[tensor] |= !of_batch;
                    if of_batch && of_shards[tensor] {
                        flaw(format!("{name} ('{}') is one shard's", held.name));
                    }
                }
                let is_others = |(other, then): &(View, usize)| {
                    let meets = other.start < start + len && start < other.start + other.len;
                    other.tensor == tensor && meets && (of_batch || *then < phase)
                };
                if argument.access != Access::Write && overwritten.iter().any(is_others) {
                    flaw(format!("{name} ('{}') is the last shard's", held.name));
                }
                let from = held.offset + start;
                if !from.is_multiple_of(alignment(held.dtype)) {
                    flaw(format!("{name} starts at {from}"));
                }
                let shared = |other: &&crate::kernels::Argument| {
                    let other_place = self.tensors.get(other.view.tensor).and_then(|t| t.slot);
                    other.view.tensor == tensor || held.slot.is_some() && other_place == held.slot
                };
                let others = spec
                    .arguments
                    .iter()
                    .filter(|a| a.binding != argument.binding);
                if argument.access != Access::Read && others.clone().any(|a| shared(&a)) {
                    flaw(format!("{name} shares its memory with another argument"));
                }
                let fresh = argument.access == Access::Write;
                if let (Some(slot), Lifetime::Step) = (held.slot, held.lifetime) {
                    if held.offset + held.elements() > self.slots[slot].elements {
                        flaw(format!("{name} ('{}') reaches beyond its slot", held.name));
                    }
                    if fresh {
                        if !whole[tensor] {
                            written[tensor].clear();
                        }
                    } else if argument.elements > 0 {
                        if !whole[tensor] && !written[tensor].is_empty() {
                            flaw(format!("{name} ('{}') was overwritten", held.name));
                        }
                        if !covers(&written[tensor], [start, start + argument.elements]) {
                            flaw(format!("{name} ('{}') has no writer before it", held.name));
                        }
                    }
                } else if held.lifetime == Lifetime::Step {
                    flaw(format!("{name} ('{}') has no memory", held.name));
                }
            }
            for argument in spec.arguments.iter().filter(|a| a.access != Access::Read) {
                let View {
                    tensor, start, len, ..
                } = argument.view;
                for (other, whole) in whole.iter_mut().enumerate() {
                    *whole = other == tensor || *whole && !self.overlap(tensor, other);
                }
                if argument.access == Access::Write && argument.elements < len {
                    flaws.push(format!(
                        "kernel {number}, {}: {} is not written whole",
                        spec.entry, argument.name
                    ));
                }
                written[tensor].push([start, start + argument.elements]);
                let kept = self.tensors[tensor].lifetime == Lifetime::Kept;
                if syncs && kept && !of_batch && argument.access == Access::Write {
                    overwritten.push((argument.view, phase));
                }
            }
        }
        // Every gradient is written before the update reads it, in every step.
        let all = self.tensor("parameters");
        for (_, spec) in &self.kernels {
            let is_of_all = |a: &&crate::kernels::Argument| {
                matches!(a.name, "parameters" | "x") && Some(a.view.tensor) == all
            };
            let Some(parameters) = spec.arguments.iter().find(is_of_all) else {
                continue;
            };
            let Some(gradients) = self.tensor("gradients").filter(|_| !spec.layer.is_empty())
            else {
                continue;
            };
            let View { start, len, .. } = parameters.view;
            let known = [&written[gradients][..], &self.frozen[..]].concat();
            if !covers(&known, [start, start + len]) {
                flaws.push(format!(
                    "no kernel writes the gradients of '{}'",
                    spec.layer
                ));
            }
        }
        flaws
    }
}

/// Whether the ranges cover all of `range`.
fn covers(ranges: &[[usize; 2]], [mut start, end]: [usize; 2]) -> bool {
    while start < end {
        let Some([_, to]) = ranges
            .iter()
            .find(|[from, to]| *from <= start && start < *to)
        else {
            return false;
        };
        start = *to;
    }
    true
}
