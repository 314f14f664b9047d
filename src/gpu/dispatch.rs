//! Pipelines and dispatches: a kernel with its shapes baked in and its buffers bound.

use super::{Buffer, Compiling, Gpu};
use crate::error::Result;
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

    /// The layer it works for, see [`Dispatch::set_layer`]; empty when it is none's in particular.
    pub fn layer(&self) -> &str {
        &self.layer
    }

    /// Says which layer it works for, for those who measure.
    pub fn set_layer(&mut self, layer: &str) {
        self.layer = layer.into();
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

/// What a kernel wrapper hands over to have a [`Dispatch`] made.
pub struct Kernel<'a> {
    /// Pipeline label, also the entry point's name.
    pub entry_point: &'a str,
    pub source: &'a str,
    /// Values of the source's `override` declarations (shapes, mostly).
    pub constants: &'a [(&'a str, f64)],
    /// Exactly the bindings that the entry point uses, as (binding number, buffer).
    pub bindings: &'a [(u32, &'a Buffer)],
    pub groups: [u32; 3],
}

/// Workgroup counts `[x, y, 1]` with `x·y ≥ groups` and both within the 65,535 that every adapter
/// allows. Kernels recover the linear group as `id.y * num_workgroups.x + id.x` and must guard
/// against the surplus.
pub fn fold_groups(groups: usize) -> [u32; 3] {
    const MOST: usize = 65_535;
    let y = groups.div_ceil(MOST).max(1);
    [groups.div_ceil(y).max(1) as u32, y as u32, 1]
}

impl Gpu {
    /// Compiles (or finds) the pipeline of `kernel` and binds its buffers.
    ///
    /// # Errors
    /// [`crate::Error::Gpu`] with the entry point as label when the source, the constants or the
    /// bindings do not fit.
    pub fn dispatch(&self, kernel: &Kernel) -> Result<Dispatch> {
        let pipeline = self.pipeline(kernel)?;
        let bind_group = self.scoped(kernel.entry_point, || {
            let entries: Vec<_> = kernel
                .bindings
                .iter()
                .map(|(binding, buffer)| wgpu::BindGroupEntry {
                    binding: *binding,
                    resource: buffer.binding(),
                })
                .collect();
            self.device().create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(kernel.entry_point),
                layout: &pipeline.inner.get_bind_group_layout(0),
                entries: &entries,
            })
        })?;
        Ok(Dispatch {
            label: kernel.entry_point.into(),
            layer: String::new(),
            pipeline,
            bind_group,
            groups: kernel.groups,
        })
    }

    fn pipeline(&self, kernel: &Kernel) -> Result<Pipeline> {
        let key = format!(
            "{}\n{:?}\n{}",
            kernel.entry_point, kernel.constants, kernel.source
        );
        let mut pipelines = self.pipelines.lock().unwrap_or_else(|p| p.into_inner());
        if let Some(pipeline) = pipelines.get(&key) {
            return Ok(pipeline.clone());
        }
        let inner = self.scoped(kernel.entry_point, || {
            let module = self
                .device()
                .create_shader_module(wgpu::ShaderModuleDescriptor {
                    label: Some(kernel.entry_point),
                    source: wgpu::ShaderSource::Wgsl(kernel.source.into()),
                });
            self.device()
                .create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                    label: Some(kernel.entry_point),
                    layout: None,
                    module: &module,
                    entry_point: Some(kernel.entry_point),
                    compilation_options: wgpu::PipelineCompilationOptions {
                        constants: kernel.constants,
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
        pipelines.insert(key, pipeline.clone());
        self.set_compiling(Some(Compiling::Pipelines(pipelines.len())));
        Ok(pipeline)
    }
}
