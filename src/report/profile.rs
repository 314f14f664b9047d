//! Where the time of a training step goes: per layer and kernel, by timestamp queries.

use crate::engine::GpuEngine;
use crate::error::Result;
use crate::gpu::Span;
use serde_json::{Value, json};
use std::path::Path;

/// Steps that [`Profile::of`] takes the median of.
pub const STEPS: usize = 5;

/// The dispatches of one training step, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// In the order in which they run.
    pub entries: Vec<Entry>,
    /// When each of them ran, in the last step that was measured.
    pub spans: Vec<Span>,
}

/// One dispatch.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Empty for what belongs to the step as a whole.
    pub layer: String,
    /// Its entry point.
    pub kernel: String,
    /// Median over the steps.
    pub seconds: f64,
}

impl Profile {
    /// Runs [`STEPS`] training steps, which update the parameters, and one before to warm up.
    ///
    /// # Errors
    /// As [`GpuEngine::profile_step`]: before the first epoch, and without timestamp queries.
    pub fn of(engine: &mut GpuEngine) -> Result<Profile> {
        engine.profile_step()?;
        let runs: Result<Vec<_>> = (0..STEPS).map(|_| engine.profile_step()).collect();
        Ok(Profile::median(&runs?))
    }

    /// The median of several runs of the same dispatches, at least one.
    fn median(runs: &[Vec<Span>]) -> Profile {
        let spans = runs.last().cloned().unwrap_or_default();
        let seconds = |i: usize| {
            let mut all: Vec<f64> = runs.iter().map(|r| r[i].end - r[i].begin).collect();
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        };
        let entries = spans.iter().enumerate().map(|(i, span)| Entry {
            layer: span.layer.clone(),
            kernel: span.label.clone(),
            seconds: seconds(i),
        });
        Profile {
            entries: entries.collect(),
            spans,
        }
    }

    /// Seconds of all dispatches together.
    pub fn total(&self) -> f64 {
        self.entries.iter().map(|e| e.seconds).sum()
    }

    /// What the columns of [`Profile::rows`] are; from the third on they are numbers.
    pub const HEADER: [&str; 4] = ["layer", "kernel", "ms", "% of step"];

    /// A row per dispatch, then the total.
    pub fn rows(&self) -> Vec<Vec<String>> {
        let total = self.total();
        let row = |layer: &str, kernel: &str, seconds: f64| {
            vec![
                layer.to_string(),
                kernel.to_string(),
                format!("{:.3}", 1e3 * seconds),
                format!("{:.1}", 100.0 * seconds / total),
            ]
        };
        let entries = self.entries.iter();
        let mut rows: Vec<_> = entries
            .map(|e| row(place(&e.layer), &e.kernel, e.seconds))
            .collect();
        rows.push(row("total", "", total));
        rows
    }

    /// The last step in the Trace Event Format, which `chrome://tracing` and <https://ui.perfetto.dev>
    /// show: <https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU>.
    /// Times are microseconds since the step's first dispatch began.
    pub fn trace(&self, adapter: &str) -> Value {
        let name = |what: &str, name: &str| json!({"ph": "M", "pid": 1, "tid": 1, "name": what, "args": {"name": name}});
        let mut events = vec![
            name("process_name", adapter),
            name("thread_name", "training step"),
        ];
        events.extend(self.spans.iter().map(|span| {
            json!({
                "ph": "X",
                "pid": 1,
                "tid": 1,
                "name": format!("{} {}", place(&span.layer), span.label),
                "cat": span.label,
                "ts": 1e6 * span.begin,
                "dur": 1e6 * (span.end - span.begin),
            })
        }));
        json!({"displayTimeUnit": "ms", "traceEvents": events})
    }

    /// Writes [`Profile::trace`] to a file.
    ///
    /// # Errors
    /// [`crate::Error::Io`] when the file cannot be written.
    pub fn write_trace(&self, adapter: &str, path: &Path) -> Result<()> {
        crate::files::replace(path, self.trace(adapter).to_string().as_bytes())
    }
}

/// The layer as reports name it.
pub(super) fn place(layer: &str) -> &str {
    if layer.is_empty() { "step" } else { layer }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(layer: &str, label: &str, begin: f64, end: f64) -> Span {
        Span {
            label: label.into(),
            layer: layer.into(),
            begin,
            end,
        }
    }

    #[test]
    fn takes_medians_and_shares() {
        let run = |first: f64| {
            vec![
                span("", "gather_batch", 0.0, first),
                span("dense1", "conv2d_forward", 0.010, 0.013),
            ]
        };
        let profile = Profile::median(&[run(0.009), run(0.001), run(0.002)]);
        assert_eq!(profile.spans, run(0.002));
        assert!((profile.total() - 0.005).abs() < 1e-12);
        let expected = [
            ["step", "gather_batch", "2.000", "40.0"],
            ["dense1", "conv2d_forward", "3.000", "60.0"],
            ["total", "", "5.000", "100.0"],
        ];
        assert_eq!(profile.rows(), expected);
    }
}
