//! The memory of a step: tensors that are never alive at the same time share a slot.

use super::{Lifetime, Plan};
use crate::kernels::{Access, Dtype};

/// A piece of memory that several tensors take turns in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
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

    /// Gives each tensor of the step its slot, the largest first, each in the first slot of its dtype
    /// where nobody is alive while it is.
    pub(super) fn share_memory(&mut self) {
        let mut tensors: Vec<(usize, [usize; 2])> = (0..self.tensors.len())
            .filter(|i| self.tensors[*i].lifetime == Lifetime::Step)
            .filter_map(|i| Some((i, self.alive(i)?)))
            .collect();
        tensors.sort_by_key(|(i, [first, _])| (usize::MAX - self.tensors[*i].elements(), *first));
        let mut taken: Vec<Vec<[usize; 2]>> = Vec::new();
        for (i, [first, last]) in tensors {
            let (dtype, elements) = (self.tensors[i].dtype, self.tensors[i].elements());
            let free = self.slots.iter().zip(&taken).position(|(slot, taken)| {
                let apart = |[f, l]: &[usize; 2]| last < *f || *l < first;
                slot.dtype == dtype && taken.iter().all(apart)
            });
            let slot = free.unwrap_or_else(|| {
                self.slots.push(Slot { dtype, elements });
                taken.push(Vec::new());
                taken.len() - 1
            });
            taken[slot].push([first, last]);
            self.tensors[i].slot = Some(slot);
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
                "running" => "running statistics",
                name if name.starts_with("state") => "optimiser state",
                name => name,
            };
            let bytes = 4 * tensor.elements() as u64;
            match rows.iter_mut().find(|(n, _)| n == name) {
                Some(row) => row.1 += bytes,
                None => rows.push((name.into(), bytes)),
            }
        }
        let [step, _] = self.step_bytes();
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
