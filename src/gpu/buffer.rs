//! Device memory: buffers of 4-byte elements, slices of them, uploads and read-backs.

use super::{Direction, Fault, Gpu, Ticket};
use crate::error::{Error, Result};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

/// A range of a device buffer, counted in 4-byte elements (f32 or u32). Cloning it clones a
/// handle, not the memory.
#[derive(Clone)]
pub struct Buffer {
    inner: wgpu::Buffer,
    /// First element and number of elements of the range.
    start: u64,
    len: u64,
    /// Elements from `start` on that a kernel is bound to, see [`Buffer::head`].
    bound: u64,
}

impl Buffer {
    /// Number of 4-byte elements.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The `len` elements from `start` on. As a kernel argument `start` must respect the adapter's
    /// offset alignment; [`crate::model::PARAMETER_ALIGNMENT`] does so on all of them.
    pub fn slice(&self, start: usize, len: usize) -> Buffer {
        assert!(
            (start + len) as u64 <= self.len,
            "slice {start}+{len} of a buffer of {} elements",
            self.len
        );
        Buffer {
            inner: self.inner.clone(),
            start: self.start + start as u64,
            len: len as u64,
            bound: len as u64,
        }
    }

    /// The first `len` elements, as the host sees them, while a kernel stays bound to the whole range:
    /// one that reads past the end finds what lies there, and it shows.
    pub(crate) fn head(&self, len: usize) -> Buffer {
        Buffer {
            bound: self.bound,
            ..self.slice(0, len)
        }
    }

    /// All of a raw buffer.
    pub(super) fn whole(inner: wgpu::Buffer) -> Buffer {
        let len = inner.size() / 4;
        Buffer {
            inner,
            start: 0,
            len,
            bound: len,
        }
    }

    pub(super) fn binding(&self) -> wgpu::BindingResource<'_> {
        wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer: &self.inner,
            offset: self.start * 4,
            size: wgpu::BufferSize::new(self.bound * 4),
        })
    }
}

/// Bytes that are written at a time.
const PIECE: usize = 1 << 24;

impl Gpu {
    /// A zeroed storage buffer of `len` 4-byte elements (at least one).
    ///
    /// # Errors
    /// [`Error::Usage`] when the adapter does not bind so much, [`Error::OutOfMemory`] when its memory
    /// does not hold it.
    pub fn buffer(&self, label: &str, len: usize) -> Result<Buffer> {
        let len = len.max(1) as u64;
        let limit = self
            .report()
            .max_storage_binding_bytes
            .min(self.report().max_buffer_bytes);
        if len * 4 > limit {
            return Err(Error::Usage(format!(
                "expected at most {limit} bytes in the buffer '{label}' on {}, found {}; choose another --device: cpu has no such limit",
                self.report().name,
                len * 4
            )));
        }
        if self.faults.strikes(Fault::OutOfMemory) || self.faults.strikes(Fault::Full) {
            return Err(Error::OutOfMemory {
                label: label.into(),
                what: format!("the device has no {} bytes left (injected)", len * 4),
                allocated: self.allocated_bytes(),
            });
        }
        let inner = self.scoped(label, || {
            self.device().create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size: len * 4,
                usage: wgpu::BufferUsages::STORAGE
                    | wgpu::BufferUsages::COPY_SRC
                    | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        })?;
        Ok(Buffer::whole(inner))
    }

    /// A storage buffer holding `data`, which arrives piece by piece: what is under way never holds all of
    /// a large one once more.
    pub fn upload<T: bytemuck::NoUninit>(&self, label: &'static str, data: &[T]) -> Result<Buffer> {
        self.upload_with_room(label, data, 0)
    }

    /// As [`Gpu::upload`], with zeros behind `data` where that is of fewer than `least` 4-byte elements.
    pub fn upload_with_room<T: bytemuck::NoUninit>(
        &self,
        label: &'static str,
        data: &[T],
        least: usize,
    ) -> Result<Buffer> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let buffer = self.buffer(label, bytes.len().div_ceil(4).max(least))?;
        for (i, piece) in bytes.chunks(PIECE).enumerate() {
            let place = buffer.slice(i * PIECE / 4, piece.len().div_ceil(4));
            self.write(label, &place, piece)?;
            if bytes.len() > PIECE {
                self.scoped(label, || self.queue().submit([]))?;
                self.wait_all()?;
            }
        }
        Ok(buffer)
    }

    /// Overwrites the start of `buffer` with `data`, in order with the submissions.
    /// `purpose` names the transfer in [`Gpu::take_transfers`].
    pub fn write<T: bytemuck::NoUninit>(
        &self,
        purpose: &'static str,
        buffer: &Buffer,
        data: &[T],
    ) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        assert!(
            bytes.len() as u64 <= buffer.len * 4,
            "{purpose}: write past the end"
        );
        self.count_transfer(purpose, Direction::ToGpu, bytes.len() as u64);
        let whole = bytes.len() / 4 * 4;
        self.scoped(purpose, || {
            // Pieces, because the queue stages each write in a buffer of its own.
            for (i, piece) in bytes[..whole].chunks(PIECE).enumerate() {
                let at = buffer.start * 4 + (i * PIECE) as u64;
                self.queue().write_buffer(&buffer.inner, at, piece);
            }
            if whole < bytes.len() {
                let mut last = [0u8; 4];
                last[..bytes.len() - whole].copy_from_slice(&bytes[whole..]);
                let at = buffer.start * 4 + whole as u64;
                self.queue().write_buffer(&buffer.inner, at, &last);
            }
        })
    }

    /// Starts copying `buffer` to the host behind everything submitted so far; does not wait.
    pub fn start_readback(&self, purpose: &'static str, buffer: &Buffer) -> Result<Readback> {
        let bytes = buffer.len * 4;
        self.count_transfer(purpose, Direction::ToHost, bytes);
        let (staging, ready, copied) = self.scoped(purpose, || {
            let staging = self.device().create_buffer(&wgpu::BufferDescriptor {
                label: Some(purpose),
                size: bytes,
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            });
            let mut encoder = self.device().create_command_encoder(&Default::default());
            encoder.copy_buffer_to_buffer(&buffer.inner, buffer.start * 4, &staging, 0, bytes);
            let copied = self.queue().submit([encoder.finish()]);
            let (sender, ready) = channel();
            staging.map_async(wgpu::MapMode::Read, .., move |result| {
                // The receiver may be gone: a read-back that nobody waits for is dropped.
                let _ = sender.send(result);
            });
            (staging, ready, Ticket(copied))
        })?;
        Ok(Readback {
            purpose,
            staging,
            ready,
            copied,
        })
    }

    /// Copies `buffer` to the host and waits for it.
    pub fn read<T: bytemuck::AnyBitPattern>(
        &self,
        purpose: &'static str,
        buffer: &Buffer,
    ) -> Result<Vec<T>> {
        self.start_readback(purpose, buffer)?.finish(self)
    }
}

/// A copy to the host that is under way.
pub struct Readback {
    purpose: &'static str,
    staging: wgpu::Buffer,
    ready: Receiver<std::result::Result<(), wgpu::BufferAsyncError>>,
    copied: Ticket,
}

impl Readback {
    /// Waits for the copy (not for what was submitted after it) and returns its elements.
    ///
    /// # Errors
    /// [`Error::Gpu`] when the device was lost, the mapping failed or does not come (as [`Gpu::wait`]).
    pub fn finish<T: bytemuck::AnyBitPattern>(self, gpu: &Gpu) -> Result<Vec<T>> {
        let fail = |what: String| Error::Gpu {
            label: self.purpose.into(),
            what,
        };
        gpu.wait(&self.copied)?;
        // The copy is done, so the answer is there; a driver may see that differently.
        let (start, patience) = (Instant::now(), gpu.patience());
        let unmapped = gpu.faults.strikes(Fault::Unmapped);
        loop {
            match self.ready.try_recv() {
                _ if unmapped => return Err(gpu.no_answer(self.purpose, patience)),
                Ok(Ok(())) => break,
                Err(TryRecvError::Empty) if start.elapsed() < patience => {
                    // An error shows in the check.
                    let _ = gpu.device().poll(wgpu::PollType::Poll);
                    gpu.check(self.purpose)?;
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(TryRecvError::Empty) => return Err(gpu.no_answer(self.purpose, patience)),
                _ => return Err(fail("the read-back could not be mapped".into())),
            }
        }
        let view = self
            .staging
            .get_mapped_range(..)
            .map_err(|e| fail(e.to_string()))?;
        // A byte copy: the mapped pointer's alignment is the driver's affair.
        let mut out = vec![<T as bytemuck::Zeroable>::zeroed(); view.len() / size_of::<T>()];
        let bytes = view.len() / size_of::<T>() * size_of::<T>();
        for (element, chunk) in out
            .iter_mut()
            .zip(view[..bytes].chunks_exact(size_of::<T>()))
        {
            *element = bytemuck::pod_read_unaligned(chunk);
        }
        Ok(out)
    }
}
