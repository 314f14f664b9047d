//! Time per dispatch by timestamp queries at pass boundaries, which every adapter with
//! `TIMESTAMP_QUERY` has.

use super::{Buffer, Dispatch, Gpu};
use crate::error::{Error, Result};

/// When a dispatch ran, in seconds since the first one of its list began.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Label and layer of the dispatch.
    pub label: String,
    pub layer: String,
    pub begin: f64,
    pub end: f64,
}

impl Gpu {
    /// Runs `dispatches` in order, each in a pass of its own, and tells when each ran. A pass of
    /// its own costs a little, so the sum is slightly more than the same list in one pass takes.
    ///
    /// # Errors
    /// [`Error::Usage`] when the adapter has no timestamp queries, [`Error::Gpu`] from the device.
    pub fn profile(&self, dispatches: &[&Dispatch]) -> Result<Vec<Span>> {
        if !self.report().timestamp_query {
            return Err(Error::Usage(format!(
                "expected an adapter with timestamp queries, found {} without; leave --profile out",
                self.report().name
            )));
        }
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
        let resolved = self.scoped("timestamps", || {
            let queries = self.device().create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("timestamps"),
                ty: wgpu::QueryType::Timestamp,
                count,
            });
            let resolved = self.device().create_buffer(&wgpu::BufferDescriptor {
                label: Some("timestamps"),
                size: u64::from(count) * 8,
                usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            });
            let mut encoder = self.device().create_command_encoder(&Default::default());
            for (i, dispatch) in dispatches.iter().enumerate() {
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                    label: Some(dispatch.label()),
                    timestamp_writes: Some(wgpu::ComputePassTimestampWrites {
                        query_set: &queries,
                        beginning_of_pass_write_index: Some(2 * i as u32),
                        end_of_pass_write_index: Some(2 * i as u32 + 1),
                    }),
                });
                dispatch.record(&mut pass);
            }
            encoder.resolve_query_set(&queries, 0..count, &resolved, 0);
            self.queue().submit([encoder.finish()]);
            resolved
        })?;
        self.read("timestamps", &Buffer::whole(resolved))
    }
}
