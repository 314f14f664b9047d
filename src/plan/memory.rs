//! The memory of a step: buffers that tensors share, side by side and one after the other.

use super::{Lifetime, Plan};
use crate::kernels::{Access, Argument, Dtype};
use crate::model::PARAMETER_ALIGNMENT;
use std::collections::HashSet;

/// Elements that a tensor's place is a multiple of, so that every adapter can bind it.
pub(super) fn alignment(dtype: Dtype) -> usize {
    4 * PARAMETER_ALIGNMENT / dtype.bytes(1)
}

/// A buffer that several tensors share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Of its elements.
    pub dtype: Dtype,
    /// Of the largest of its tensors.
    pub elements: usize,
}

impl Plan {
    /// The first and the last kernel that a tensor of the step takes part in; `None` where none does.
    pub(super) fn alive(&self, tensor: usize) -> Option<[usize; 2]> {
        let uses = |(_, spec): &&(super::Section, crate::kernels::KernelSpec)| {
            spec.arguments.iter().any(|a| a.view.tensor == tensor)
        };
        let first = self.kernels.iter().position(|kernel| uses(&kernel))?;
        let last = self.kernels.iter().rposition(|kernel| uses(&kernel))?;
        Some([first, last])
    }

    /// The tensors that a kernel is bound to beside this one, where it writes one of the two: on a GPU they
    /// may not lie in one buffer.
    fn apart_from(&self, tensor: usize) -> HashSet<usize> {
        let mut apart = HashSet::new();
        for spec in self.specs() {
            let writes = |a: &&Argument| a.access != Access::Read;
            let Some(own) = spec.arguments.iter().find(|a| a.view.tensor == tensor) else {
                continue;
            };
            let others = spec.arguments.iter().filter(|a| writes(&own) || writes(a));
            apart.extend(others.map(|a| a.view.tensor));
        }
        apart
    }

    /// Gives each tensor of the step its place, the largest first: in the first slot of its dtype that
    /// nothing lies in that it must stay apart from, at the lowest place where nobody is alive while it
    /// is. Unless memory is `shared`, each has a slot of its own.
    pub(super) fn share_memory(&mut self, shared: bool) {
        let mut tensors: Vec<(usize, [usize; 2])> = (0..self.tensors.len())
            .filter(|i| self.tensors[*i].lifetime == Lifetime::Step)
            .filter_map(|i| Some((i, self.alive(i)?)))
            .collect();
        tensors.sort_by_key(|(i, [first, _])| (usize::MAX - self.tensors[*i].elements(), *first));
        let mut held: Vec<Vec<(usize, [usize; 2])>> = Vec::new();
        for (i, alive) in tensors {
            let (dtype, elements) = (self.tensors[i].dtype, self.tensors[i].elements());
            let apart = self.apart_from(i);
            let room = |slot: &Slot, held: &[(usize, [usize; 2])]| {
                if slot.dtype != dtype || held.iter().any(|(other, _)| apart.contains(other)) {
                    return None;
                }
                let meanwhile = |[first, last]: [usize; 2]| first <= alive[1] && alive[0] <= last;
                let taken = held.iter().filter(|(_, other)| meanwhile(*other));
                let mut taken: Vec<[usize; 2]> = taken
                    .map(|(other, _)| {
                        let other = &self.tensors[*other];
                        let end = other.offset + other.elements();
                        [other.offset, end.next_multiple_of(alignment(dtype))]
                    })
                    .collect();
                taken.sort();
                let mut offset = 0;
                for [from, to] in taken {
                    if offset + elements <= from {
                        break;
                    }
                    offset = offset.max(to);
                }
                (offset + elements <= slot.elements).then_some(offset)
            };
            let mut slots = self.slots.iter().zip(&held).enumerate();
            let found = slots.find_map(|(at, (slot, held))| Some((at, room(slot, held)?)));
            let (slot, offset) = found.filter(|_| shared).unwrap_or_else(|| {
                self.slots.push(Slot { dtype, elements });
                held.push(Vec::new());
                (held.len() - 1, 0)
            });
            held[slot].push((i, alive));
            self.tensors[i].slot = Some(slot);
            self.tensors[i].offset = offset;
        }
    }

    /// Bytes of the step's memory, and of everything that its tensors would take without sharing.
    pub fn step_bytes(&self) -> [u64; 2] {
        let slots = self.slots.iter().map(|s| (s.dtype, s.elements));
        let step = self.tensors.iter().filter(|t| t.slot.is_some());
        let sum = |sizes: &mut dyn Iterator<Item = (Dtype, usize)>| -> u64 {
            sizes
                .map(|(dtype, elements)| 4 * dtype.words(elements) as u64)
                .sum()
        };
        [
            sum(&mut slots.into_iter()),
            sum(&mut step.map(|t| (t.dtype, t.elements()))),
        ]
    }

    /// Device memory by purpose, in bytes; the dataset comes on top.
    pub fn memory(&self) -> Vec<(String, u64)> {
        let kept = self.tensors.iter().filter(|t| t.lifetime == Lifetime::Kept);
        let mut rows: Vec<(String, u64)> = Vec::new();
        for tensor in kept {
            let name = match tensor.name.as_str() {
                "running" | "next_running" | "shard_statistics" => "running statistics",
                "accumulated" => "gradients added up",
                name if name.starts_with("shard_gradients") => "gradients added up",
                // Those of a layer.
                name if name.contains('.') => "batch statistics",
                name if name.starts_with("state") => "optimiser state",
                name if name.starts_with("average") => "moving average",
                "factors" => "parameter groups",
                "loss_scale" => "loss scale",
                name => name,
            };
            let bytes = 4 * tensor.elements() as u64;
            match rows.iter_mut().find(|(n, _)| n == name) {
                Some(row) => row.1 += bytes,
                None => rows.push((name.into(), bytes)),
            }
        }
        let [step, _] = self.step_bytes();
        let step = step * self.replicas as u64;
        rows.push(("activations and their gradients".into(), step));
        rows.retain(|(_, bytes)| *bytes > 0);
        rows
    }

    /// Where the slots of `other`, another plan of the same model, which never runs while this one does,
    /// find room in the slots of this one; `None` for those that do not.
    pub fn room_for(&self, other: &Plan) -> Vec<Option<usize>> {
        let mut free: Vec<usize> = (0..self.slots.len()).collect();
        let mut rooms = vec![None; other.slots.len()];
        let mut order: Vec<usize> = (0..other.slots.len()).collect();
        order.sort_by_key(|i| usize::MAX - other.slots[*i].elements);
        for i in order {
            let wanted = other.slots[i];
            let fits = |s: &Slot| s.dtype == wanted.dtype && s.elements >= wanted.elements;
            // The smallest that is large enough.
            let best = free.iter().copied().filter(|s| fits(&self.slots[*s]));
            let best = best.min_by_key(|s| self.slots[*s].elements);
            free.retain(|s| Some(*s) != best);
            rooms[i] = best;
        }
        rooms
    }

    /// Tensors that a kernel binds with write access, by kernel; for who compares them.
    pub fn written(&self, kernel: usize) -> impl Iterator<Item = &crate::kernels::Argument> {
        let arguments = self.kernels[kernel].1.arguments.iter();
        arguments.filter(|a| a.access != Access::Read)
    }
}
