//! Pipelines and dispatches: a kernel with its shapes baked in and its buffers bound.

use super::{Buffer, Compiling, Gpu};
use crate::error::{Error, Result};
use crate::kernels::{Argument, KernelSpec, Work};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A compiled kernel, shared by the dispatches of one shape.
#[derive(Clone)]
pub(super) struct Pipeline {
    inner: wgpu::ComputePipeline,
    /// Whether it was ever submitted: the first time, some drivers compile.
    ran: Arc<AtomicBool>,
}

/// A kernel ready to be recorded: pipeline, bind group, workgroup counts.
#[derive(Clone)]
pub struct Dispatch {
    label: String,
    layer: String,
    pipeline: Pipeline,
    bind_group: wgpu::BindGroup,
    groups: [u32; 3],
}

impl Dispatch {
    /// The kernel's entry point.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The layer it works for, empty when it is none's in particular.
    pub fn layer(&self) -> &str {
        &self.layer
    }

    pub(super) fn ran(&self) -> bool {
        self.pipeline.ran.load(Ordering::Relaxed)
    }

    /// The same with its workgroups laid out in three rows, as [`fold_groups`] does where there are
    /// too many for one, a surplus included; `None` for a single workgroup, which never folds, and
    /// where they lie in rows already.
    pub(crate) fn folded(&self) -> Option<Dispatch> {
        let [x, y, _] = self.groups;
        (x > 1 && y == 1).then(|| Dispatch {
            groups: [x.div_ceil(3), 3, 1],
            ..self.clone()
        })
    }

    pub(super) fn record(&self, pass: &mut wgpu::ComputePass<'_>) {
        self.pipeline.ran.store(true, Ordering::Relaxed);
        pass.set_pipeline(&self.pipeline.inner);
        pass.set_bind_group(0, &self.bind_group, &[]);
        let [x, y, z] = self.groups;
        pass.dispatch_workgroups(x, y, z);
    }
}

/// Workgroup counts `[x, y, 1]` with `x·y ≥ groups` and both within the 65,535 that every adapter
/// allows. Kernels recover the linear group as `id.y * num_workgroups.x + id.x` and must guard
/// against the surplus.
pub fn fold_groups(groups: usize) -> [u32; 3] {
    const MOST: usize = 65_535;
    let y = groups.div_ceil(MOST).max(1);
    [groups.div_ceil(y).max(1) as u32, y as u32, 1]
}

/// Pipelines that are kept to be shared: more than a network has, so that who compiles thousands, as `verify`
/// does, holds some at a time. What is bound keeps its own.
const MOST_PIPELINES: usize = 512;

impl Gpu {
    /// Compiles (or finds) the pipeline of `spec` and binds the buffers that `buffer` names for its
    /// arguments.
    ///
    /// # Errors
    /// [`crate::Error::Gpu`] with the entry point as label when the source, the constants or the
    /// bindings do not fit.
    pub fn dispatch(
        &self,
        spec: &KernelSpec,
        mut buffer: impl FnMut(&Argument) -> Buffer,
    ) -> Result<Dispatch> {
        let pipeline = self.pipeline(spec)?;
        let mut bound = Vec::with_capacity(spec.arguments.len());
        for argument in &spec.arguments {
            let buffer = buffer(argument);
            let (least, found) = (argument.view.dtype.words(argument.elements), buffer.len());
            if found < least {
                return Err(Error::Shape {
                    operation: spec.entry,
                    what: format!(
                        "expected {} of at least {least} words, found {found}",
                        argument.name
                    ),
                });
            }
            bound.push((argument.binding, buffer));
        }
        let bind_group = self.scoped(spec.entry, || {
            let entries: Vec<_> = bound
                .iter()
                .map(|(binding, buffer)| wgpu::BindGroupEntry {
                    binding: *binding,
                    resource: buffer.binding(),
                })
                .collect();
            self.device().create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(spec.entry),
                layout: &pipeline.inner.get_bind_group_layout(0),
                entries: &entries,
            })
        })?;
        Ok(Dispatch {
            label: spec.entry.into(),
            layer: spec.layer.clone(),
            pipeline,
            bind_group,
            groups: fold_groups(spec.groups),
        })
    }

    /// The same where the views of `spec` count the tensors as `buffers` lists them.
    ///
    /// # Errors
    /// As [`Gpu::dispatch`].
    pub fn dispatch_on(&self, spec: &KernelSpec, buffers: &[&Buffer]) -> Result<Dispatch> {
        self.dispatch(spec, |argument| {
            let view = argument.view;
            let words = view.dtype.words(view.len);
            buffers[view.tensor].slice(view.start, words)
        })
    }

    /// Compiles the pipeline of `spec`, which is then there when it is bound.
    ///
    /// # Errors
    /// As [`Gpu::dispatch`].
    pub fn compile(&self, spec: &KernelSpec) -> Result<()> {
        self.pipeline(spec).map(|_| ())
    }

    /// Whether products that are compiled from now on check at run time what they index, as all other kernels do. At
    /// first they do not: it takes a few per cent of their time.
    pub fn check_products(&self, check: bool) {
        self.checks_products.store(check, Ordering::Relaxed);
    }

    /// On Metal always: there nothing else bounds an access to memory.
    fn products_are_checked(&self) -> bool {
        self.checks_products.load(Ordering::Relaxed) || self.report.backend == "Metal"
    }

    fn pipeline(&self, spec: &KernelSpec) -> Result<Pipeline> {
        let source = spec.source()?;
        let checks = !matches!(spec.work, Work::Product(_)) || self.products_are_checked();
        let key = format!("{}\n{:?} {checks}\n{source}", spec.entry, spec.constants);
        // Not held while one is made: several threads may compile at a time.
        let pipelines = || self.pipelines.lock().unwrap_or_else(|p| p.into_inner());
        if let Some(pipeline) = pipelines().get(&key) {
            return Ok(pipeline.clone());
        }
        let inner = self.scoped(spec.entry, || {
            let module = wgpu::ShaderModuleDescriptor {
                label: Some(spec.entry),
                source: wgpu::ShaderSource::Wgsl(source.as_ref().into()),
            };
            let module = match checks {
                true => self.device().create_shader_module(module),
                // SAFETY: the loops of a product end at constants, and what it indexes by a variable is its workgroup
                // memory, by an invocation's place in it, and its operands, by places that are inside by
                // construction. `verify` holds every product with these checks to its twin, and whole steps without.
                false => unsafe {
                    let none = wgpu::ShaderRuntimeChecks::unchecked();
                    self.device().create_shader_module_trusted(module, none)
                },
            };
            self.device()
                .create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                    label: Some(spec.entry),
                    layout: None,
                    module: &module,
                    entry_point: Some(spec.entry),
                    compilation_options: wgpu::PipelineCompilationOptions {
                        constants: &spec.constants,
                        // Every kernel writes its workgroup memory before it reads it.
                        zero_initialize_workgroup_memory: false,
                    },
                    cache: None,
                })
        })?;
        let pipeline = Pipeline {
            inner,
            ran: Arc::default(),
        };
        let mut pipelines = pipelines();
        if pipelines.len() >= MOST_PIPELINES {
            pipelines.clear();
        }
        let pipeline = pipelines.entry(key).or_insert(pipeline).clone();
        self.set_compiling(Some(Compiling::Pipelines(pipelines.len())));
        Ok(pipeline)
    }
}
