//! A plan for people to read.

use super::{Lifetime, Plan};
use crate::kernels::{Access, View, Work};
use std::fmt;

impl fmt::Display for Plan {
    /// A line per kernel, section by section: its number and entry point, then what it writes from what
    /// it reads, each with its shape where it is first written, and the slot where it lies; then the tile
    /// of a product and what is computed along. At the end the memory.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut section = None;
        let mut layer = "";
        for (number, (part, spec)) in self.kernels.iter().enumerate() {
            if section != Some(*part) {
                writeln!(f, "{}", format!("{part:?}").to_lowercase())?;
                (section, layer) = (Some(*part), "");
            }
            if spec.layer != layer {
                layer = &spec.layer;
                writeln!(f, "  {layer}")?;
            }
            let writes = |access| access != Access::Read;
            let [written, read] = [true, false].map(|wanted| {
                let arguments = spec.arguments.iter();
                let such = arguments.filter(|a| writes(a.access) == wanted && a.elements > 0);
                let such = such.map(|a| match a.access {
                    Access::Update => format!("{} (in place)", self.name(a.view)),
                    Access::Write => format!("{}{}", self.name(a.view), self.shape(a.view)),
                    Access::Read => self.name(a.view),
                });
                such.collect::<Vec<_>>().join(", ")
            });
            write!(f, "    {number:>3} {}: {written}", spec.entry)?;
            if !read.is_empty() {
                write!(f, " ← {read}")?;
            }
            let how = how(&spec.work).join(", ");
            if !how.is_empty() {
                write!(f, "  [{how}]")?;
            }
            writeln!(f)?;
        }
        writeln!(f, "memory")?;
        for (i, slot) in self.slots.iter().enumerate() {
            let held = self.tensors.iter().filter(|t| t.slot == Some(i));
            let held = held.map(|t| match t.offset {
                0 => t.name.clone(),
                offset => format!("{} at {offset}", t.name),
            });
            let held: Vec<_> = held.collect();
            let bytes = 4 * slot.dtype.words(slot.elements);
            writeln!(f, "    slot {i}, {bytes} bytes: {}", held.join(", "))?;
        }
        Ok(())
    }
}

/// The tile of a product, and what a kernel computes along.
fn how(work: &Work) -> Vec<String> {
    let mut how = Vec::new();
    let relu = match work {
        Work::Product(product) => {
            how.push(product.tile.to_string());
            product.relu
        }
        Work::GroupedForward { relu, .. }
        | Work::BatchNormForward { relu, .. }
        | Work::BatchNormEvaluate { relu, .. } => *relu,
        _ => false,
    };
    if relu {
        how.push("relu".into());
    }
    if let Work::Product(product) = work
        && product.pool.is_some()
    {
        how.push("max-pooled".into());
    }
    how
}

impl Plan {
    fn name(&self, view: View) -> String {
        let tensor = &self.tensors[view.tensor];
        let name = &tensor.name;
        match (view.len == tensor.elements(), tensor.slot) {
            (true, Some(slot)) => format!("{name}@{slot}"),
            (true, None) => name.clone(),
            (false, _) => format!("{name}[{}..{}]", view.start, view.start + view.len),
        }
    }

    fn shape(&self, view: View) -> String {
        let tensor = &self.tensors[view.tensor];
        if tensor.lifetime != Lifetime::Step || view.len != tensor.elements() {
            return String::new();
        }
        let sizes = tensor.shape.iter().map(usize::to_string);
        format!(" {}", sizes.collect::<Vec<_>>().join("×"))
    }
}
