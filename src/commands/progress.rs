//! What a training shows while it runs.

use super::{percent, say};
use indicatif::{BinaryBytes, HumanCount, ProgressBar, ProgressState, ProgressStyle};
use wgrad::Result;
use wgrad::data::Splits;
use wgrad::gpu::{Direction, Transfers};
use wgrad::train::{Engine, EpochRecord, Observer};

/// Shows a bar over all epochs while they run, and a line for each when it is over.
pub(super) struct Progress {
    pub bar: ProgressBar,
    total: usize,
    /// Finished in this process.
    pub epochs: usize,
    train_images: u64,
    test_images: usize,
    trace_transfers: bool,
}

impl Progress {
    pub fn new(total: usize, data: &Splits, trace_transfers: bool) -> Progress {
        let template =
            "{prefix} [{bar:30}] {human_pos}/{human_len} images, {per_sec}, ETA {eta}, {msg}";
        let bar = ProgressBar::new((total * data.train.len()) as u64).with_style(
            ProgressStyle::with_template(template)
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .with_key(
                    "per_sec",
                    |state: &ProgressState, w: &mut dyn std::fmt::Write| {
                        let _ = write!(w, "{} images/s", HumanCount(state.per_sec() as u64));
                    },
                ),
        );
        Progress {
            bar,
            total,
            epochs: 0,
            train_images: data.train.len() as u64,
            test_images: data.test.len(),
            trace_transfers,
        }
    }

    /// Prints what crossed since the last call.
    fn trace(&self, title: &str, engine: &dyn Engine) -> Result<()> {
        match engine.gpu() {
            Some(gpu) if self.trace_transfers => {
                let text = describe_transfers(title, &gpu.take_transfers());
                self.bar.suspend(|| say(&text))
            }
            _ => Ok(()),
        }
    }
}

impl Observer for Progress {
    fn epoch_started(&mut self, epoch: usize, engine: &dyn Engine) -> Result<()> {
        if self.epochs == 0 {
            self.trace("before the first epoch", engine)?;
            self.bar
                .set_position((epoch - 1) as u64 * self.train_images);
            self.bar.reset_eta();
        }
        self.bar.set_prefix(format!("epoch {epoch}/{}", self.total));
        Ok(())
    }

    fn trained(&mut self, epoch: usize, images: usize, mean_loss: f64) {
        let before = (epoch - 1) as u64 * self.train_images;
        self.bar.set_position(before + images as u64);
        self.bar.set_message(format!("loss {mean_loss:.4}"));
    }

    fn note(&mut self, line: &str) -> Result<()> {
        self.bar.suspend(|| say(line))
    }

    fn evaluated(&mut self, images: usize) {
        let share = 100 * images / self.test_images;
        self.bar.set_message(format!("testing, {share} %"));
    }

    fn epoch_finished(&mut self, record: &EpochRecord, engine: &dyn Engine) -> Result<()> {
        self.epochs += 1;
        let line = format!(
            "epoch {}/{}  train loss {:.4}  test loss {:.4}  test accuracy {}  {:.1} s  {} images/s",
            record.epoch,
            self.total,
            record.train_loss,
            record.test_loss,
            percent(record.test_accuracy, self.test_images),
            record.seconds,
            HumanCount(record.images_per_second as u64)
        );
        self.bar.suspend(|| say(&line))?;
        self.trace(&format!("in epoch {}", record.epoch), engine)
    }
}

/// The bytes that crossed, one purpose per line. Those of the checkpoint (parameters and optimiser
/// state, to the host) are no part of the epoch's total.
fn describe_transfers(title: &str, transfers: &Transfers) -> String {
    let mut lines = Vec::new();
    let mut total = 0;
    for (purpose, direction, bytes) in &transfers.by_purpose {
        let checkpoint =
            *direction == Direction::ToHost && ["parameters", "optimiser state"].contains(purpose);
        let way = match direction {
            Direction::ToGpu => "to the GPU",
            Direction::ToHost => "to the host",
        };
        let note = if checkpoint { ", checkpoint" } else { "" };
        total += if checkpoint { 0 } else { *bytes };
        lines.push(format!(
            "  {way:11}  {:>12} bytes  {purpose}{note}",
            HumanCount(*bytes).to_string()
        ));
    }
    lines.insert(
        0,
        format!(
            "transfers {title}: {} without checkpoint",
            BinaryBytes(total)
        ),
    );
    lines.join("\n")
}
