//! Time per dispatch by timestamp queries at pass boundaries, which every adapter with
//! `TIMESTAMP_QUERY` has.

use super::{Buffer, Dispatch, Gpu};
use crate::error::{Error, Result};

/// When a dispatch ran, in seconds since the first one of its list began.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Label and layer of the dispatch.
    pub label: String,
    /// The layer that it is of.
    pub layer: String,
    /// In seconds, since the first of them.
    pub begin: f64,
    /// Likewise.
    pub end: f64,
}

/// The queries of the submissions that are timed.
pub(super) struct Clock {
    queries: wgpu::QuerySet,
    used: u32,
}

impl Clock {
    /// Where the next submission writes its begin and end; nowhere once the queries are used up.
    pub(super) fn next(&mut self) -> Option<wgpu::ComputePassTimestampWrites<'_>> {
        let first = self.used;
        (first + 2 <= wgpu::QUERY_SET_MAX_QUERIES).then(|| {
            self.used += 2;
            pass_boundaries(&self.queries, first)
        })
    }
}

/// Begin and end of a pass into queries `first` and `first + 1`.
fn pass_boundaries(queries: &wgpu::QuerySet, first: u32) -> wgpu::ComputePassTimestampWrites<'_> {
    wgpu::ComputePassTimestampWrites {
        query_set: queries,
        beginning_of_pass_write_index: Some(first),
        end_of_pass_write_index: Some(first + 1),
    }
}

impl Gpu {
    /// From now on every submission is timed, up to 2,048 of them.
    ///
    /// # Errors
    /// [`Error::Usage`] when the adapter has no timestamp queries, [`Error::Gpu`] from the device.
    pub fn start_clock(&self) -> Result<()> {
        self.expect_timestamps()?;
        let queries = self.query_set(wgpu::QUERY_SET_MAX_QUERIES)?;
        let clock = Clock { queries, used: 0 };
        *self.clock.lock().unwrap_or_else(|p| p.into_inner()) = Some(clock);
        Ok(())
    }

    /// The share of the time from the begin of the first timed submission to the end of the last one
    /// in which the GPU was at work on one of them, from 0 to 1; 0 when there was none. What is
    /// missing to 1 is the time that it waited for the host. Waits for the queue and stops timing.
    ///
    /// # Errors
    /// [`Error::Gpu`] from the device.
    pub fn stop_clock(&self) -> Result<f64> {
        let clock = self.clock.lock().unwrap_or_else(|p| p.into_inner()).take();
        let Some(Clock { queries, used }) = clock.filter(|c| c.used > 0) else {
            return Ok(0.0);
        };
        let resolved = self.scoped("timestamps", || {
            let mut encoder = self.device().create_command_encoder(&Default::default());
            let resolved = self.resolve(&mut encoder, &queries, used);
            self.queue().submit([encoder.finish()]);
            resolved
        })?;
        let ticks: Vec<u64> = self.read("timestamps", &Buffer::whole(resolved))?;
        // A submission may begin before the one ahead of it ends.
        let (mut busy, mut end) = (0, ticks[0]);
        for span in ticks.chunks_exact(2) {
            busy += span[1].saturating_sub(span[0].max(end));
            end = end.max(span[1]);
        }
        Ok(busy as f64 / (end - ticks[0]).max(1) as f64)
    }

    fn expect_timestamps(&self) -> Result<()> {
        if self.report().timestamp_query {
            return Ok(());
        }
        Err(Error::Usage(format!(
            "expected an adapter with timestamp queries, found {} without; leave --profile out",
            self.report().name
        )))
    }

    fn query_set(&self, count: u32) -> Result<wgpu::QuerySet> {
        self.scoped("timestamps", || {
            self.device().create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("timestamps"),
                ty: wgpu::QueryType::Timestamp,
                count,
            })
        })
    }

    /// Records that the first `count` queries go into a new buffer.
    fn resolve(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        queries: &wgpu::QuerySet,
        count: u32,
    ) -> wgpu::Buffer {
        let resolved = self.device().create_buffer(&wgpu::BufferDescriptor {
            label: Some("timestamps"),
            size: u64::from(count) * 8,
            usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        });
        encoder.resolve_query_set(queries, 0..count, &resolved, 0);
        resolved
    }

    /// Runs `dispatches` in order, each in a pass of its own, and tells when each ran. A pass of
    /// its own costs a little, so the sum is slightly more than the same list in one pass takes.
    ///
    /// # Errors
    /// [`Error::Usage`] when the adapter has no timestamp queries, [`Error::Gpu`] from the device.
    pub fn profile(&self, dispatches: &[&Dispatch]) -> Result<Vec<Span>> {
        self.expect_timestamps()?;
        let mut spans: Vec<Span> = Vec::with_capacity(dispatches.len());
        // A query set holds at most 4,096 queries, two per dispatch.
        for part in dispatches.chunks(wgpu::QUERY_SET_MAX_QUERIES as usize / 2) {
            let ticks = self.timestamps(part)?;
            let tick = f64::from(self.queue().get_timestamp_period()) * 1e-9;
            let after = spans.last().map_or(0.0, |s| s.end);
            let first = ticks.first().copied().unwrap_or(0);
            let since = |t: u64| after + t.saturating_sub(first) as f64 * tick;
            spans.extend(part.iter().zip(ticks.chunks_exact(2)).map(|(d, t)| Span {
                label: d.label().to_string(),
                layer: d.layer().to_string(),
                begin: since(t[0]),
                end: since(t[1]),
            }));
        }
        Ok(spans)
    }

    /// Begin and end of every dispatch in ticks.
    fn timestamps(&self, dispatches: &[&Dispatch]) -> Result<Vec<u64>> {
        let count = 2 * dispatches.len() as u32;
        let queries = self.query_set(count)?;
        let resolved = self.scoped("timestamps", || {
            let mut encoder = self.device().create_command_encoder(&Default::default());
            for (i, dispatch) in dispatches.iter().enumerate() {
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                    label: Some(dispatch.label()),
                    timestamp_writes: Some(pass_boundaries(&queries, 2 * i as u32)),
                });
                dispatch.record(&mut pass);
            }
            let resolved = self.resolve(&mut encoder, &queries, count);
            self.queue().submit([encoder.finish()]);
            resolved
        })?;
        self.read("timestamps", &Buffer::whole(resolved))
    }
}
