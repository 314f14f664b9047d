//! The adapter, the device and the few things every kernel needs from them: buffers, pipelines,
//! dispatches, submissions and read-backs.
//!
//! Every creation runs inside error scopes, so that a validation error or a lack of memory comes
//! back as an [`Error`] with the label of what was being made, never as a zeroed buffer. Errors
//! that surface later (a lost device, say) are kept and reported by the next synchronising call.

mod adapter;
mod buffer;
mod dispatch;
mod fault;
mod profile;

pub use crate::kernels::AdapterReport;
pub use adapter::{Choice, GPU_HINT, NO_ADAPTER_HINT, adapters, choose};
pub use buffer::{Buffer, Readback};
pub use dispatch::{Dispatch, fold_groups};
#[doc(hidden)]
pub use fault::Fault;
pub use profile::Span;

use crate::error::{Error, Result};
use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// An open device with its queue, its pipelines and what was learned about its adapter.
pub struct Gpu {
    device: wgpu::Device,
    queue: wgpu::Queue,
    report: AdapterReport,
    /// One pipeline per (entry point, constants, checks, source): kernels of equal shape share it.
    pipelines: Mutex<HashMap<String, dispatch::Pipeline>>,
    compiling: Mutex<Option<Compiling>>,
    /// See [`Gpu::check_products`].
    checks_products: AtomicBool,
    /// The first error that reached no error scope.
    fault: Arc<Mutex<Option<String>>>,
    transfers: Mutex<Transfers>,
    /// While set, every submission is timed.
    clock: Mutex<Option<profile::Clock>>,
    faults: fault::Faults,
}

/// How far the kernels of a model are, for those who wait for the first result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compiling {
    /// So many pipelines were made so far.
    Pipelines(usize),
    /// The first step is under way, kernel by kernel: so many of so many are through. A driver may
    /// put off to this moment what a pipeline costs.
    FirstStep(usize, usize),
}

/// Bytes that crossed between host and GPU, by purpose, in the order of first appearance.
#[derive(Clone, Debug, Default)]
pub struct Transfers {
    /// Purpose, direction and bytes.
    pub by_purpose: Vec<(&'static str, Direction, u64)>,
}

/// Which way a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the host's memory.
    ToGpu,
    /// Into the host's memory.
    ToHost,
}

impl Transfers {
    fn add(&mut self, purpose: &'static str, direction: Direction, bytes: u64) {
        match self
            .by_purpose
            .iter_mut()
            .find(|(p, d, _)| *p == purpose && *d == direction)
        {
            Some(entry) => entry.2 += bytes,
            None => self.by_purpose.push((purpose, direction, bytes)),
        }
    }

    /// Sum over all purposes.
    pub fn total(&self) -> u64 {
        self.by_purpose.iter().map(|(_, _, bytes)| bytes).sum()
    }
}

impl Gpu {
    /// Opens the device that `choice` names, with the adapter's own limits.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] when nothing fits, [`Error::Gpu`] when the driver refuses the device.
    pub fn open(choice: &Choice) -> Result<Gpu> {
        let (adapter, report) = choose(choice)?;
        Self::from_adapter(&adapter, report)
    }

    fn from_adapter(adapter: &wgpu::Adapter, report: AdapterReport) -> Result<Gpu> {
        let mut wanted = wgpu::Features::SUBGROUP
            | wgpu::Features::SHADER_F16
            | wgpu::Features::SHADER_INT64
            | wgpu::Features::TIMESTAMP_QUERY
            | wgpu::Features::TIMESTAMP_QUERY_INSIDE_PASSES;
        let mut experimental_features = wgpu::ExperimentalFeatures::disabled();
        if report.cooperative_matrix.is_some() {
            wanted |= wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
            // SAFETY: what wgpu asks of those who use an experimental feature is that they bear with its bugs. Of
            // this one it is that it does not check everything of a shader that it should; the only shader that has
            // cooperative matrices is `product_matrix.wgsl`, which stays inside its workgroup memory by
            // construction, multiplies only what the adapter lists, and is held against its CPU twin by `verify`.
            experimental_features = unsafe { wgpu::ExperimentalFeatures::enabled() };
        }
        let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("wgrad"),
            required_features: adapter.features() & wanted,
            required_limits: adapter.limits(),
            experimental_features,
            ..Default::default()
        }))
        .map_err(|e| Error::Gpu {
            label: report.name.clone(),
            what: format!(
                "the driver refused to open a device: {}; try another --device",
                one_line(&e)
            ),
        })?;
        let fault = Arc::new(Mutex::new(None));
        let slot = fault.clone();
        device.on_uncaptured_error(Arc::new(move |e: wgpu::Error| keep(&slot, one_line(&e))));
        let slot = fault.clone();
        device.set_device_lost_callback(move |reason, message| {
            // Dropping the device is reported as "destroyed", which is no fault.
            if reason != wgpu::DeviceLostReason::Destroyed {
                keep(&slot, format!("the device was lost ({message})"));
            }
        });
        Ok(Gpu {
            device,
            queue,
            report,
            pipelines: Mutex::default(),
            fault,
            compiling: Mutex::default(),
            checks_products: AtomicBool::default(),
            transfers: Mutex::default(),
            clock: Mutex::default(),
            faults: fault::Faults::default(),
        })
    }

    /// What is known about the adapter.
    pub fn report(&self) -> &AdapterReport {
        &self.report
    }

    /// wgpu's device.
    pub fn device(&self) -> &wgpu::Device {
        &self.device
    }

    /// wgpu's queue.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.queue
    }

    /// Bytes of device memory in the buffers that exist now, as the driver's allocator counts them;
    /// 0 where the backend does not tell.
    pub fn allocated_bytes(&self) -> u64 {
        let report = self.device.generate_allocator_report();
        report.map_or(0, |r| r.total_allocated_bytes)
    }

    /// Takes the transfer counts since the last call.
    pub fn take_transfers(&self) -> Transfers {
        std::mem::take(&mut self.transfers.lock().unwrap_or_else(|p| p.into_inner()))
    }

    fn count_transfer(&self, purpose: &'static str, direction: Direction, bytes: u64) {
        self.transfers
            .lock()
            .unwrap_or_else(|p| p.into_inner())
            .add(purpose, direction, bytes);
    }

    /// Runs `make` inside error scopes; an error inside becomes an [`Error`] with `label`.
    pub(crate) fn scoped<T>(&self, label: &str, make: impl FnOnce() -> T) -> Result<T> {
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let internal = self.device.push_error_scope(wgpu::ErrorFilter::Internal);
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let made = make();
        // Popped in reverse order of their creation.
        let errors = [validation, internal, memory].map(|scope| pollster::block_on(scope.pop()));
        let error = errors.into_iter().flatten().next();
        if error.is_some() {
            // A lost device makes nonsense of whatever is asked of it.
            self.check(label)?;
        }
        match error {
            None => Ok(made),
            Some(wgpu::Error::OutOfMemory { source }) => Err(Error::OutOfMemory {
                label: label.into(),
                what: one_line(&*source),
                allocated: self.allocated_bytes(),
            }),
            Some(e) => Err(Error::Gpu {
                label: label.into(),
                what: one_line(&e),
            }),
        }
    }

    /// The error that reached no scope, if there was one.
    ///
    /// # Errors
    /// [`Error::Gpu`] with `label` as the place where it was noticed.
    pub fn check(&self, label: &str) -> Result<()> {
        match &*self.fault.lock().unwrap_or_else(|p| p.into_inner()) {
            None => Ok(()),
            Some(what) => Err(Error::Gpu {
                label: label.into(),
                what: what.clone(),
            }),
        }
    }

    /// How far the kernels are that are being compiled; `None` while all that is submitted is.
    pub fn compiling(&self) -> Option<Compiling> {
        *self.compiling.lock().unwrap_or_else(|p| p.into_inner())
    }

    fn set_compiling(&self, compiling: Option<Compiling>) {
        *self.compiling.lock().unwrap_or_else(|p| p.into_inner()) = compiling;
    }

    /// Submits `dispatches` in order, `repeat` times over, as one submission; does not wait. Timed
    /// between [`Gpu::start_clock`] and [`Gpu::stop_clock`].
    ///
    /// Where some of a list never ran before, its first round goes kernel by kernel and is waited
    /// for, so that one can watch what the driver compiles ([`Gpu::compiling`]) and an error names
    /// the kernel.
    ///
    /// # Errors
    /// [`Error::Gpu`] with `label` (or the kernel) when the device refuses or was lost.
    pub fn submit(&self, label: &str, dispatches: &[&Dispatch], repeat: usize) -> Result<Ticket> {
        let cold = dispatches.iter().any(|dispatch| !dispatch.ran());
        if !cold || dispatches.len() == 1 || repeat == 0 {
            return self.submit_at_once(label, dispatches, repeat);
        }
        let mut last = None;
        for (i, dispatch) in dispatches.iter().enumerate() {
            self.set_compiling(Some(Compiling::FirstStep(i, dispatches.len())));
            let ticket = self.submit_at_once(dispatch.label(), &[dispatch], 1)?;
            self.wait_until(dispatch.label(), Some(&ticket))?;
            last = Some(ticket);
        }
        self.set_compiling(None);
        match last {
            Some(ticket) if repeat == 1 => Ok(ticket),
            _ => self.submit_at_once(label, dispatches, repeat - 1),
        }
    }

    fn submit_at_once(
        &self,
        label: &str,
        dispatches: &[&Dispatch],
        repeat: usize,
    ) -> Result<Ticket> {
        if self.faults.strikes(Fault::Lost) {
            keep(&self.fault, "the device was lost (injected)".into());
            self.device.destroy();
        }
        let idle = self.faults.strikes(Fault::Idle);
        let index = self.scoped(label, || {
            let mut encoder = self
                .device
                .create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some(label) });
            let mut clock = self.clock.lock().unwrap_or_else(|p| p.into_inner());
            {
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                    label: Some(label),
                    timestamp_writes: clock.as_mut().and_then(profile::Clock::next),
                });
                for dispatch in std::iter::repeat_n(dispatches, repeat).flatten() {
                    if !idle {
                        dispatch.record(&mut pass);
                    }
                }
            }
            self.queue.submit([encoder.finish()])
        })?;
        Ok(Ticket(index))
    }

    /// Waits until everything up to `ticket` has finished.
    ///
    /// # Errors
    /// [`Error::Gpu`] when the device was lost, reported an error or gives no answer: for two minutes
    /// on hardware, half an hour on a software adapter.
    pub fn wait(&self, ticket: &Ticket) -> Result<()> {
        self.wait_until("waiting for the GPU", Some(ticket))
    }

    /// Waits until the queue is empty; fails as [`Gpu::wait`] does.
    pub fn wait_all(&self) -> Result<()> {
        self.wait_until("waiting for the GPU", None)
    }

    fn wait_until(&self, label: &str, ticket: Option<&Ticket>) -> Result<()> {
        let patience = self.patience();
        let polled = if self.faults.strikes(Fault::Hang) {
            Err(wgpu::PollError::Timeout)
        } else {
            self.device.poll(wgpu::PollType::Wait {
                submission_index: ticket.map(|t| t.0.clone()),
                timeout: Some(patience),
            })
        };
        self.check(label)?;
        match polled {
            Ok(_) => Ok(()),
            Err(wgpu::PollError::Timeout) => Err(self.no_answer(label, patience)),
            Err(e) => Err(Error::Gpu {
                label: label.into(),
                what: one_line(&e),
            }),
        }
    }

    /// The error for a device that hangs, which from now on nothing waits for.
    fn no_answer(&self, label: &str, patience: Duration) -> Error {
        // Dropping the last handle would wait for the queue, for ever.
        std::mem::forget((self.device.clone(), self.queue.clone()));
        Error::Gpu {
            label: label.into(),
            what: format!(
                "expected an answer within {patience:?}, found none; the driver or the GPU hangs"
            ),
        }
    }
}

/// Keeps the first fault.
fn keep(fault: &Mutex<Option<String>>, what: String) {
    let mut fault = fault.lock().unwrap_or_else(|p| p.into_inner());
    fault.get_or_insert(what);
}

/// Names a submission, to wait for it later.
#[derive(Clone)]
pub struct Ticket(wgpu::SubmissionIndex);

/// An error and its causes on one line.
fn one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
