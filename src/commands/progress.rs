//! What a training shows while it runs.

use super::{percent, say, width};
use indicatif::{BinaryBytes, HumanCount, ProgressBar, ProgressState, ProgressStyle};
use std::io::Write;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use wgrad::Result;
use wgrad::data::{Dataset, Splits};
use wgrad::engine::{Engine, Split};
use wgrad::gpu::{Compiling, Direction, Gpu, Transfers};
use wgrad::train::{EpochRecord, Observer, Run};

/// How long it may be silent where there is no terminal to draw on.
const SILENCE: Duration = Duration::from_secs(10);

/// Keeps the user posted while this thread is busy, until it is dropped: a terminal is drawn anew many
/// times a second, anything else gets a line on standard error every ten seconds.
pub(super) struct Pulse {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Pulse {
    /// Shows `message` in the bar, or its position and message as a line.
    pub fn start(
        bar: &ProgressBar,
        message: impl Fn() -> Option<String> + Send + 'static,
    ) -> Pulse {
        let (stop, stopped) = channel();
        let bar = bar.clone();
        let thread = std::thread::spawn(move || {
            let mut last = Instant::now();
            while stopped.recv_timeout(Duration::from_millis(100)) == Err(RecvTimeoutError::Timeout)
            {
                let message = message();
                if !bar.is_hidden() {
                    if let Some(message) = message {
                        bar.set_message(message);
                    }
                    bar.tick();
                } else if last.elapsed() >= SILENCE {
                    last = Instant::now();
                    let done = match bar.length() {
                        Some(length) => format!("{} of {length}, ", bar.position()),
                        None => String::new(),
                    };
                    let message = message.unwrap_or_else(|| format!("{done}{}", bar.message()));
                    // Nobody may be listening.
                    let _ = writeln!(std::io::stderr(), "wgrad: {message}");
                }
            }
        });
        Pulse {
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// Shows how far `gpu` is with compiling.
    pub fn compiling(gpu: &Arc<Gpu>) -> Pulse {
        let bar = ProgressBar::new_spinner();
        let gpu = gpu.clone();
        Pulse::start(&bar, move || {
            Some(compiling(&gpu).unwrap_or_else(|| "preparing the device".into()))
        })
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What is being compiled, for people.
fn compiling(gpu: &Gpu) -> Option<String> {
    gpu.compiling().map(|compiling| match compiling {
        Compiling::Pipelines(done) => format!("compiling kernels, {done} so far"),
        Compiling::FirstStep(done, all) => format!("compiling kernels, {done} of {all}"),
    })
}

/// Shows a bar over all epochs while they run, and a line for each when it is over.
pub(super) struct Progress {
    pub bar: ProgressBar,
    total: usize,
    /// Finished in this process.
    pub epochs: usize,
    train_images: u64,
    validation_images: usize,
    test_images: usize,
    trace_transfers: bool,
    /// What is going on, as a line.
    status: Arc<Mutex<String>>,
    epoch_start: Instant,
    _pulse: Pulse,
}

impl Progress {
    pub fn new(
        total: usize,
        data: &Splits,
        trace_transfers: bool,
        gpu: Option<Arc<Gpu>>,
    ) -> Progress {
        let template = "{spinner} {prefix} [{wide_bar}] {percent} %, {per_sec}, ETA {eta}, {msg}";
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
        let status = Arc::new(Mutex::new(String::from("uploading the images")));
        let (shown, terminal) = (status.clone(), !bar.is_hidden());
        let pulse = Pulse::start(&bar, move || {
            let compiling = gpu.as_ref().and_then(|gpu| compiling(gpu));
            // The bar has its own message.
            let status = || shown.lock().unwrap_or_else(|p| p.into_inner()).clone();
            compiling.or_else(|| (!terminal).then(status))
        });
        Progress {
            bar,
            total,
            epochs: 0,
            train_images: data.train.len() as u64,
            validation_images: data.validation.as_ref().map_or(0, Dataset::len),
            test_images: data.test.len(),
            trace_transfers,
            status,
            epoch_start: Instant::now(),
            _pulse: pulse,
        }
    }

    fn set_status(&self, status: String) {
        *self.status.lock().unwrap_or_else(|p| p.into_inner()) = status;
    }

    /// Prints what crossed since the last call.
    fn trace(&self, title: &str, engine: &Engine) -> Result<()> {
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
    fn epoch_started(&mut self, epoch: usize, engine: &Engine) -> Result<()> {
        if self.epochs == 0 {
            self.trace("before the first epoch", engine)?;
            self.bar
                .set_position((epoch - 1) as u64 * self.train_images);
            self.bar.reset_eta();
        }
        self.bar.set_prefix(format!("epoch {epoch}/{}", self.total));
        self.epoch_start = Instant::now();
        self.set_status(format!("epoch {epoch}/{}: first images", self.total));
        Ok(())
    }

    fn trained(&mut self, epoch: usize, images: usize, mean_loss: f64) {
        let before = (epoch - 1) as u64 * self.train_images;
        self.bar.set_position(before + images as u64);
        self.bar.set_message(format!("loss {mean_loss:.4}"));
        let rate = images as f64 / self.epoch_start.elapsed().as_secs_f64().max(1e-3);
        self.set_status(format!(
            "epoch {epoch}/{}: {} of {} images, {} images/s, loss {mean_loss:.4}",
            self.total,
            HumanCount(images as u64),
            HumanCount(self.train_images),
            HumanCount(rate as u64)
        ));
    }

    fn note(&mut self, line: &str) -> Result<()> {
        self.bar.suspend(|| say(line))
    }

    fn evaluated(&mut self, split: Split, images: usize) {
        let (what, all) = match split {
            Split::Validation => ("validation", self.validation_images),
            _ => ("test", self.test_images),
        };
        let share = 100 * images / all.max(1);
        self.bar.set_message(format!("{what}, {share} %"));
        self.set_status(format!("evaluating, {share} % of the {what} images"));
    }

    fn epoch_finished(&mut self, record: &EpochRecord, engine: &Engine) -> Result<()> {
        self.epochs += 1;
        let images = [self.validation_images, self.test_images];
        let line = epoch_line(record, self.total, images, width());
        self.bar.suspend(|| say(&line))?;
        self.trace(&format!("in epoch {}", record.epoch), engine)
    }
}

/// What an epoch gave, in lines of so many columns at most. The splits have as many `images`.
fn epoch_line(
    record: &EpochRecord,
    total: usize,
    [validation, test]: [usize; 2],
    columns: usize,
) -> String {
    let measured = |split: &str, loss: f64, accuracy: f64, images: usize| {
        format!("{split} {loss:.4}, {}", percent(accuracy, images))
    };
    let on_validation = record
        .validation_loss
        .zip(record.validation_accuracy)
        .map(|(loss, accuracy)| measured("validation", loss, accuracy, validation));
    let on_test = measured("test", record.test_loss, record.test_accuracy, test);
    let rate = HumanCount(record.images_per_second as u64);
    // In the order of the splits.
    let average = record.average_test_accuracy.map(|test| {
        let all = record.average_validation_accuracy.into_iter().chain([test]);
        let all: Vec<String> = all.map(|p| format!("{:.2} %", 100.0 * p)).collect();
        format!("average {}", all.join(", "))
    });
    let figures = [
        Some(format!("loss {:.4}", record.train_loss)),
        on_validation,
        Some(on_test),
        average,
        Some(format!("{:.1} s", record.seconds)),
        Some(format!("{rate} images/s")),
    ];
    let label = format!("epoch {}/{total}", record.epoch);
    in_lines(&label, figures.into_iter().flatten(), columns)
}

/// `label` and behind it `figures`, none of which breaks, in lines of so many columns at most.
fn in_lines(label: &str, figures: impl IntoIterator<Item = String>, columns: usize) -> String {
    let indent = " ".repeat(label.chars().count());
    let mut lines = vec![label.to_string()];
    for figure in figures {
        let line = lines.last_mut().expect("there is one at least");
        if *line != indent && line.chars().count() + 2 + figure.chars().count() > columns {
            lines.push(format!("{indent}  {figure}"));
        } else {
            *line += &format!("  {figure}");
        }
    }
    lines.join("\n")
}

/// What a run comes to: the accuracy at its last epoch, and beside it that of the epoch which the
/// validation split likes best. Never the best by the test split.
pub(super) fn result(run: &Run) -> Option<String> {
    let (last, images) = (run.metrics().last()?, run.config().data.test_images);
    let test = |record: &EpochRecord| format!("test {}", percent(record.test_accuracy, images));
    let mut figures = vec![format!("last epoch: {}", test(last))];
    for (what, accuracy) in [
        ("in several views", last.test_accuracy_views),
        ("averaged weights", last.average_test_accuracy),
        ("both", last.average_test_accuracy_views),
    ] {
        if let Some(accuracy) = accuracy {
            figures.push(format!("{what}: test {}", percent(accuracy, images)));
        }
    }
    if let Some(best) = run.best() {
        let epoch = best.epoch;
        figures.push(format!("best by validation: epoch {epoch}, {}", test(best)));
    }
    let separated = figures.len() - 1;
    for figure in &mut figures[..separated] {
        figure.push(';');
    }
    Some(in_lines("result ", figures, width()))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// No figure is ever torn apart, and no line is wider than a terminal.
    #[test]
    fn an_epoch_stays_within_80_columns() {
        let record = EpochRecord {
            epoch: 100,
            step: 1,
            train_loss: 12.3456,
            train_accuracy: 0.5,
            validation_loss: Some(1.23456),
            validation_accuracy: Some(0.5),
            test_loss: 1.23456,
            test_accuracy: 1.0,
            average_validation_loss: Some(1.0),
            average_validation_accuracy: Some(0.5),
            average_test_loss: Some(1.0),
            average_test_accuracy: Some(1.0),
            test_loss_views: None,
            test_accuracy_views: None,
            average_test_loss_views: None,
            average_test_accuracy_views: None,
            images_per_second: 123_456.0,
            seconds: 1234.5,
            lr: 0.1,
            weight_norms: Default::default(),
            gradient_norms: Default::default(),
        };
        let text = epoch_line(&record, 100, [1000, 10_000], 80);
        let expected = "epoch 100/100  loss 12.3456  validation 1.2346, 50.00 % ± 1.58
               test 1.2346, 100.00 % ± 0.00  average 50.00 %, 100.00 %  1234.5 s
               123,456 images/s";
        assert_eq!(text, expected);
        let plain = EpochRecord {
            epoch: 3,
            validation_loss: None,
            validation_accuracy: None,
            average_test_accuracy: None,
            train_loss: 0.1234,
            test_accuracy: 0.9851,
            seconds: 12.3,
            images_per_second: 9_876.0,
            ..record
        };
        assert_eq!(
            epoch_line(&plain, 12, [0, 10_000], 80),
            "epoch 3/12  loss 0.1234  test 1.2346, 98.51 % ± 0.12  12.3 s  9,876 images/s"
        );
    }
}
