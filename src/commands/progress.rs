//! What a training shows while it runs.

use super::{percent, say, say_wrapped};
use indicatif::{BinaryBytes, HumanCount, ProgressBar, ProgressState, ProgressStyle};
use std::io::Write;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use wgrad::Result;
use wgrad::data::Splits;
use wgrad::engine::Engine;
use wgrad::gpu::{Compiling, Direction, Gpu, Transfers};
use wgrad::train::{EpochRecord, Observer};

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

    fn evaluated(&mut self, images: usize) {
        let share = 100 * images / self.test_images;
        self.bar.set_message(format!("testing, {share} %"));
        self.set_status(format!("testing, {share} % of the test images"));
    }

    fn epoch_finished(&mut self, record: &EpochRecord, engine: &Engine) -> Result<()> {
        self.epochs += 1;
        let line = format!(
            "epoch {}/{}  loss {:.4}  test {:.4}, {}  {:.1} s  {} images/s",
            record.epoch,
            self.total,
            record.train_loss,
            record.test_loss,
            percent(record.test_accuracy, self.test_images),
            record.seconds,
            HumanCount(record.images_per_second as u64)
        );
        self.bar.suspend(|| say_wrapped(&line))?;
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
