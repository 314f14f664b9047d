//! What a training shows while it runs.

use super::live::Block;
use super::{percent, quiet, say, tell, width};
use indicatif::{BinaryBytes, HumanCount, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::Write;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use wgrad::Result;
use wgrad::data::{Dataset, Splits};
use wgrad::engine::{Engine, Split};
use wgrad::gpu::{Compiling, Direction, Gpu, Transfers};
use wgrad::train::{EpochRecord, Observer, Run, StepRecord};

/// How long it may be silent where there is no terminal to draw on.
const SILENCE: Duration = Duration::from_secs(10);

/// A bar of `length` things, as wide as the terminal has room for behind `before` and before `after`, which
/// are parts of indicatif's template.
pub(super) fn bar(length: u64, before: &str, after: &str) -> ProgressBar {
    hidden_if_quiet(ProgressBar::new(length)).with_style(style(before, after))
}

/// What a [`bar`] looks like.
pub(super) fn style(before: &str, after: &str) -> ProgressStyle {
    let size = match width() {
        0..60 => 10,
        _ => 30,
    };
    ProgressStyle::with_template(&format!("{before} [{{bar:{size}}}] {after}"))
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Something that turns, with a message.
pub(super) fn spinner() -> ProgressBar {
    hidden_if_quiet(ProgressBar::new_spinner())
}

fn hidden_if_quiet(bar: ProgressBar) -> ProgressBar {
    if quiet() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    bar
}

/// Keeps the user posted while this thread is busy, until it is dropped: a terminal is drawn anew many
/// times a second, anything else gets a line on standard error every ten seconds.
pub(super) struct Pulse {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Pulse {
    /// Calls `beat` ten times a second, and says when a line is due.
    fn beating(mut beat: impl FnMut(bool) + Send + 'static) -> Pulse {
        let (stop, stopped) = channel();
        let thread = std::thread::spawn(move || {
            let mut last = Instant::now();
            while stopped.recv_timeout(Duration::from_millis(100)) == Err(RecvTimeoutError::Timeout)
            {
                let due = last.elapsed() >= SILENCE;
                if due {
                    last = Instant::now();
                }
                beat(due);
            }
        });
        Pulse {
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// Shows `message` in the bar, or its position and message as a line.
    pub fn start(
        bar: &ProgressBar,
        message: impl Fn() -> Option<String> + Send + 'static,
    ) -> Pulse {
        let bar = bar.clone();
        Pulse::beating(move |due| {
            if !bar.is_hidden() {
                if let Some(message) = message() {
                    bar.set_message(message);
                }
                bar.tick();
            } else if due {
                let done = match bar.length() {
                    Some(length) => format!("{} of {length}, ", bar.position()),
                    None => String::new(),
                };
                hint(&message().unwrap_or_else(|| format!("{done}{}", bar.message())));
            }
        })
    }

    /// Shows how far `gpu` is with compiling.
    pub fn compiling(gpu: &Arc<Gpu>) -> Pulse {
        let gpu = gpu.clone();
        Pulse::start(&spinner(), move || {
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

/// A line on standard error for those who have no terminal.
fn hint(message: &str) {
    if !quiet() {
        // Nobody may be listening.
        let _ = writeln!(std::io::stderr(), "wgrad: {message}");
    }
}

/// What is being compiled, for people.
fn compiling(gpu: &Gpu) -> Option<String> {
    gpu.compiling().map(|compiling| match compiling {
        Compiling::Pipelines(done) => format!("compiling kernels, {done} so far"),
        Compiling::FirstStep(done, all) => format!("compiling kernels, {done} of {all}"),
    })
}

/// Shows a training while it runs, in a few lines that stay where they are, and a line for each epoch when it
/// is over.
pub(super) struct Progress {
    /// Finished in this process.
    pub epochs: usize,
    validation_images: usize,
    test_images: usize,
    trace_transfers: bool,
    /// Steps that were skipped up to the last epoch.
    skipped: u64,
    shown: Arc<Mutex<Shown>>,
    start: Instant,
    pulse: Option<Pulse>,
}

/// What the thread that draws shares with the one that trains.
struct Shown {
    view: View,
    block: Option<Block>,
    compiling: Option<String>,
    /// When was it last looked at whether something is compiled.
    looked: f64,
}

impl Shown {
    fn draw(&mut self, now: f64) {
        if let Some(block) = &mut self.block {
            let (columns, colours) = (block.columns(), block.colours);
            let lines = self
                .view
                .lines(columns, colours, self.compiling.as_deref(), now);
            block.draw(&lines);
        }
    }
}

impl Progress {
    /// Of a training to `total` epochs, of which those in `earlier` are over.
    pub fn new(
        total: usize,
        data: &Splits,
        trace_transfers: bool,
        gpu: Option<Arc<Gpu>>,
        earlier: &[EpochRecord],
    ) -> Progress {
        let validation_images = data.validation.as_ref().map_or(0, Dataset::len);
        let test_images = data.test.len();
        let evaluated = validation_images + test_images;
        let split = data.validation.as_ref().map_or("test", |_| "validation");
        let mut view = View::new(total, data.train.len(), evaluated, split);
        earlier.iter().for_each(|record| view.remember(record));
        let start = Instant::now();
        let shown = Arc::new(Mutex::new(Shown {
            view,
            block: Block::new(),
            compiling: None,
            looked: 0.0,
        }));
        let of_pulse = shown.clone();
        let pulse = Pulse::beating(move |due| {
            let compiling = gpu.as_ref().and_then(|gpu| compiling(gpu));
            let mut shown = lock(&of_pulse);
            let now = start.elapsed().as_secs_f64();
            if compiling.is_some() {
                // A time that will not come again.
                let passed = now - shown.looked;
                shown.view.pace.skip(passed);
            }
            (shown.compiling, shown.looked) = (compiling, now);
            if shown.block.is_some() {
                shown.draw(now);
            } else if due {
                let status = shown.compiling.clone();
                hint(&status.unwrap_or_else(|| shown.view.status.clone()));
            }
        });
        Progress {
            epochs: 0,
            validation_images,
            test_images,
            trace_transfers,
            skipped: earlier.last().and_then(|r| r.skipped_steps).unwrap_or(0),
            shown,
            start,
            pulse: Some(pulse),
        }
    }

    /// Changes what is shown; `change` gets the time since the start in seconds.
    fn update(&self, change: impl FnOnce(&mut View, f64)) {
        let now = self.start.elapsed().as_secs_f64();
        change(&mut lock(&self.shown).view, now);
    }

    /// Prints what stays, above what is shown.
    fn print(&self, print: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut shown = lock(&self.shown);
        if let Some(block) = &mut shown.block {
            block.clear();
        }
        let printed = print();
        shown.draw(self.start.elapsed().as_secs_f64());
        printed
    }

    /// Prints what crossed since the last call.
    fn trace(&self, title: &str, engine: &Engine) -> Result<()> {
        match engine.gpu() {
            Some(gpu) if self.trace_transfers => {
                let text = describe_transfers(title, &gpu.take_transfers());
                self.print(|| say(&text))
            }
            _ => Ok(()),
        }
    }

    /// Takes what is shown from the screen.
    pub fn finish(&mut self) {
        self.pulse = None;
        if let Some(mut block) = lock(&self.shown).block.take() {
            block.clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

fn lock(shown: &Mutex<Shown>) -> MutexGuard<'_, Shown> {
    shown
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Observer for Progress {
    fn epoch_started(&mut self, epoch: usize, engine: &Engine) -> Result<()> {
        if self.epochs == 0 {
            self.trace("before the first epoch", engine)?;
        }
        self.update(|view, _| view.begin(epoch));
        Ok(())
    }

    fn trained(&mut self, _: usize, images: usize, mean_loss: f64) {
        self.update(|view, now| view.trained(images, mean_loss, now));
    }

    fn stepped(&mut self, record: &StepRecord) -> Result<()> {
        self.update(|view, _| view.stepped(record));
        Ok(())
    }

    fn note(&mut self, line: &str) -> Result<()> {
        self.print(|| tell(line))
    }

    fn evaluated(&mut self, split: Split, images: usize) {
        let (what, all) = match split {
            Split::Validation => ("validation", self.validation_images),
            _ => ("test", self.test_images),
        };
        let share = 100 * images / all.max(1);
        self.update(|view, _| {
            view.evaluating = Some(format!("{what} {share} %"));
            view.status = format!("evaluating, {share} % of the {what} images");
        });
    }

    fn epoch_finished(&mut self, record: &EpochRecord, engine: &Engine) -> Result<()> {
        self.epochs += 1;
        let images = [self.validation_images, self.test_images];
        self.update(|view, now| {
            view.pace.finished(now);
            view.remember(record);
        });
        let all = record.skipped_steps.unwrap_or(0);
        let skipped = all.saturating_sub(self.skipped);
        self.skipped = all;
        let total = lock(&self.shown).view.total;
        let line = epoch_line(record, total, images, skipped, width());
        self.print(|| tell(&line))?;
        self.trace(&format!("in epoch {}", record.epoch), engine)
    }
}

/// How far a training is and how it goes, as numbers.
struct View {
    total: usize,
    /// Training images of an epoch.
    images: usize,
    /// From 1; 0 before the first.
    epoch: usize,
    /// Images of the epoch that are done.
    done: usize,
    /// Of those, until the first of them of the epoch before.
    mean_loss: Option<f64>,
    evaluating: Option<String>,
    /// What is going on, as a line.
    status: String,
    /// Of the training images.
    loss: Curve,
    accuracy: Curve,
    /// Of the images of this split, after each epoch.
    measured: Curve,
    split: &'static str,
    /// Epochs up to the last record of steps.
    recorded: f64,
    pace: Pace,
}

impl View {
    /// Of a training on so many `images`, after each epoch of which others of `split` are evaluated.
    fn new(total: usize, images: usize, evaluated: usize, split: &'static str) -> View {
        View {
            total,
            images,
            epoch: 0,
            done: 0,
            mean_loss: None,
            evaluating: None,
            status: "uploading the images".into(),
            loss: Curve::default(),
            accuracy: Curve::default(),
            measured: Curve::default(),
            split,
            recorded: 0.0,
            pace: Pace::new(evaluated),
        }
    }

    /// The share of the whole training that is done when so many images of this epoch are.
    fn share(&self, images: usize) -> f64 {
        let epochs =
            self.epoch.saturating_sub(1) as f64 + images as f64 / self.images.max(1) as f64;
        epochs / self.total.max(1) as f64
    }

    /// Takes an epoch that is over into the curves.
    fn remember(&mut self, record: &EpochRecord) {
        let [from, to] =
            [record.epoch - 1, record.epoch].map(|n| n as f64 / self.total.max(1) as f64);
        // Of this process there is more than a mean.
        if record.epoch != self.epoch {
            self.loss.add(from, to, record.train_loss);
            self.accuracy.add(from, to, record.train_accuracy);
        }
        let accuracy = record.validation_accuracy.unwrap_or(record.test_accuracy);
        self.measured.add(from, to, accuracy);
    }

    fn begin(&mut self, epoch: usize) {
        (self.epoch, self.done, self.evaluating) = (epoch, 0, None);
        self.pace.began();
        self.status = format!("epoch {epoch}/{}: first images", self.total);
    }

    fn trained(&mut self, images: usize, mean_loss: f64, now: f64) {
        if images <= self.done {
            return;
        }
        let done = self.done as f64;
        let before = match self.done {
            0 => 0.0,
            _ => self.mean_loss.unwrap_or(0.0) * done,
        };
        let new = (mean_loss * images as f64 - before) / (images as f64 - done);
        self.loss
            .add(self.share(self.done), self.share(images), new);
        self.pace.trained(images, now);
        (self.done, self.mean_loss) = (images, Some(mean_loss));
        let rate = self.pace.per_second().unwrap_or(0.0);
        self.status = format!(
            "epoch {}/{}: {} of {} images, {} images/s, loss {mean_loss:.4}",
            self.epoch,
            self.total,
            HumanCount(images as u64),
            HumanCount(self.images as u64),
            HumanCount(rate as u64)
        );
    }

    fn stepped(&mut self, record: &StepRecord) {
        let all = self.total.max(1) as f64;
        let from = self.recorded.max(record.epoch.ceil() - 1.0);
        self.accuracy
            .add(from / all, record.epoch / all, record.accuracy);
        self.recorded = record.epoch;
    }

    /// Seconds to the end, as far as they can be known.
    fn remaining(&self, now: f64) -> Option<f64> {
        let after = self.total.saturating_sub(self.epoch);
        let images = self.images.saturating_sub(self.done) + after * self.images;
        self.pace
            .remaining(images, after + 1, self.evaluating.is_some(), now)
    }

    /// Lines of so many columns at most, with bars and curves where there is room for them:
    ///
    /// ```text
    /// epoch 3/20  ━━━━━━━━━━━━━━━━━━━━────────────────────   52 %  48,120 images/s
    /// all epochs  ━━━━━───────────────────────────────────   13 %  ETA 12 min 30 s
    /// loss        █▇▆▅▄▄▄▃▃▃▂▃▂▂▂▁▂▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁   0.1234
    /// accuracy    ▁▃▅▅▆▆▇▇▇▇▇▇▇▇▇▇▇▇▇███▇███████████████████  97.12 %
    /// test        ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇           98.51 %
    /// ```
    ///
    /// Loss and accuracy are of the training images, the mean of this epoch and that of the last steps. The curves
    /// go from the first image to the last so far, and from their lowest value to their highest.
    fn lines(
        &self,
        columns: usize,
        colours: bool,
        compiling: Option<&str>,
        now: f64,
    ) -> Vec<String> {
        if self.epoch == 0 || self.mean_loss.is_none() && self.loss.last.is_none() {
            let what = compiling.unwrap_or(&self.status);
            return vec![what.chars().take(columns).collect()];
        }
        let rate = |rate: f64| format!("{} images/s", HumanCount(rate as u64));
        let doing = match (compiling, &self.evaluating) {
            (Some(_), _) => "compiling".into(),
            (None, Some(what)) => what.clone(),
            (None, None) => self.pace.per_second().map_or(String::new(), rate),
        };
        let eta = self.remaining(now).map_or("—".into(), time);
        let percent = |share: f64| format!("{:.0} %", (100.0 * share).floor());
        let figure = |value: Option<f64>, text: fn(f64) -> String| value.map_or("—".into(), text);
        let accuracy = |curve: &Curve| figure(curve.last, |p| format!("{:.2} %", 100.0 * p));

        let epoch = format!("epoch {}/{}", self.epoch, self.total);
        let label = epoch.chars().count().max("all epochs".len());
        // Behind the label: two spaces, a graph, two spaces, a number, two spaces, words.
        let [number, words] = [8, 16];
        let room = columns.saturating_sub(label + 2 + 2 + words);
        let (graph, wide) = match room.saturating_sub(number + 2) {
            wide @ 8.. => (wide.min(40), true),
            _ => (room.min(40), false),
        };
        let row = |what: &str, drawn: String, figure: String, said: String| {
            let said: String = said.chars().take(words).collect();
            // Of what there is no room for, a bar's percentage goes first.
            let tail = match wide {
                true => format!("{figure:>number$}  {said}"),
                false if said.is_empty() => figure,
                false => said,
            };
            let line = match graph {
                5.. => format!("{what:label$}  {drawn}  {tail}"),
                _ => format!("{what:label$}  {tail}")
                    .chars()
                    .take(columns)
                    .collect(),
            };
            line.trim_end().to_string()
        };
        let bar = |what: &str, share: f64, said: String| {
            row(what, bar_of(share, graph, colours), percent(share), said)
        };
        let until = self.share(self.done);
        let curve = |what: &str, curve: &Curve, logarithm: bool, figure: String| {
            let drawn = curve.draw(until, graph, logarithm, colours);
            row(what, drawn, figure, String::new())
        };
        let loss = figure(self.mean_loss, |loss| format!("{loss:.4}"));
        vec![
            bar(&epoch, self.done as f64 / self.images.max(1) as f64, doing),
            bar("all epochs", until, format!("ETA {eta}")),
            curve("loss", &self.loss, true, loss),
            curve("accuracy", &self.accuracy, false, accuracy(&self.accuracy)),
            curve(self.split, &self.measured, false, accuracy(&self.measured)),
        ]
    }
}

/// How fast it goes, by a clock that stands still while kernels are compiled. All times are in seconds.
struct Pace {
    skipped: f64,
    /// Images and the time that they took, those of the last half a minute above all.
    images: f64,
    seconds: f64,
    /// When how many images of the epoch were done. What comes before the first of them, in which buffers
    /// are made and drivers compile, is not counted.
    last: Option<(f64, usize)>,
    /// From the last training image of an epoch to its end.
    between: Option<f64>,
    /// Images that are evaluated after an epoch.
    evaluated: usize,
}

impl Pace {
    fn new(evaluated: usize) -> Pace {
        Pace {
            skipped: 0.0,
            images: 0.0,
            seconds: 0.0,
            last: None,
            between: None,
            evaluated,
        }
    }

    fn skip(&mut self, seconds: f64) {
        self.skipped += seconds;
    }

    fn began(&mut self) {
        self.last = None;
    }

    fn trained(&mut self, images: usize, now: f64) {
        let now = now - self.skipped;
        if let Some((then, before)) = self.last {
            let passed = (now - then).max(0.0);
            let kept = (-passed / 30.0).exp();
            self.images = self.images * kept + (images - before) as f64;
            self.seconds = self.seconds * kept + passed;
        }
        self.last = Some((now, images));
    }

    fn finished(&mut self, now: f64) {
        if let Some((then, _)) = self.last {
            self.between = Some((now - self.skipped - then).max(0.0));
        }
    }

    fn per_second(&self) -> Option<f64> {
        (self.seconds > 0.0).then(|| self.images / self.seconds)
    }

    /// The time for so many training images and so many evaluations, the first of which may have begun.
    fn remaining(&self, images: usize, evaluations: usize, begun: bool, now: f64) -> Option<f64> {
        let per_second = self.per_second()?;
        // A forward pass is about a third of a training step.
        let guess = self.evaluated as f64 / (3.0 * per_second);
        let between = self.between.unwrap_or(guess);
        let since = match self.last {
            Some((then, _)) if begun => (now - self.skipped - then).clamp(0.0, between),
            _ => 0.0,
        };
        Some(images as f64 / per_second + evaluations as f64 * between - since)
    }
}

/// `45 s`, `12 min 30 s`, `2 h 05 min`, `3 d 04 h`.
fn time(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {:02} min", s / 3600, s / 60 % 60),
        _ => format!("{} d {:02} h", s / 86_400, s / 3600 % 24),
    }
}

fn coloured(text: &str, code: u8, colours: bool) -> String {
    if text.is_empty() || !colours {
        return text.into();
    }
    format!("\x1b[{code}m{text}\x1b[0m")
}

/// A bar of so many columns.
fn bar_of(share: f64, columns: usize, colours: bool) -> String {
    let filled = ((share * columns as f64) as usize).min(columns);
    let [cyan, faint] = [36, 2];
    let done = coloured(&"━".repeat(filled), cyan, colours);
    done + &coloured(&"─".repeat(columns - filled), faint, colours)
}

/// A value over the training so far, whose places are shares of the whole training.
struct Curve {
    /// For each cell the sum of its values by their spans, and the sum of the spans.
    cells: Vec<(f64, f64)>,
    /// What a cell spans; twice as much whenever the cells are used up.
    span: f64,
    last: Option<f64>,
}

impl Default for Curve {
    fn default() -> Curve {
        Curve {
            cells: vec![(0.0, 0.0); CELLS],
            span: 0.5f64.powi(24),
            last: None,
        }
    }
}

/// Several for each column of a terminal, even when half of them are used.
const CELLS: usize = 480;

impl Curve {
    /// A value between two places.
    fn add(&mut self, from: f64, to: f64, value: f64) {
        if !value.is_finite() {
            return;
        }
        self.last = Some(value);
        while to > self.span * CELLS as f64 {
            for i in 0..CELLS {
                let pair = self.cells.get(2 * i..2 * i + 2).unwrap_or_default();
                self.cells[i] = pair.iter().fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
            }
            self.span *= 2.0;
        }
        for (i, (sum, spans)) in self.cells.iter_mut().enumerate() {
            let [begin, end] = [i, i + 1].map(|i| i as f64 * self.span);
            let span = to.min(end) - from.max(begin);
            if span > 0.0 {
                *sum += span * value;
                *spans += span;
            }
        }
    }

    /// Up to a place, as a line of blocks, `▁` to `█`; of a loss its logarithm, which shows what is learnt late too.
    fn draw(&self, until: f64, columns: usize, logarithm: bool, colours: bool) -> String {
        let cell = |column: usize| column as f64 * until / columns as f64 / self.span;
        let mean = |column: usize| {
            let first = cell(column) as usize;
            let behind = (cell(column + 1).ceil() as usize).max(first + 1).min(CELLS);
            let cells = self.cells.get(first..behind)?;
            let sum: f64 = cells.iter().map(|(sum, _)| sum).sum();
            let spans: f64 = cells.iter().map(|(_, spans)| spans).sum();
            let mean = (spans > 0.0).then(|| sum / spans)?;
            Some(if logarithm { mean.max(1e-9).ln() } else { mean })
        };
        let means: Vec<Option<f64>> = (0..columns).map(mean).collect();
        let known = || means.iter().flatten().copied();
        let low = known().fold(f64::INFINITY, f64::min);
        let range = known().fold(f64::NEG_INFINITY, f64::max) - low;
        // Means of one value differ by rounding, which is nothing to see.
        let flat = range <= 1e-9 * low.abs().max(1e-9);
        let block = |mean: &Option<f64>| match mean {
            None => ' ',
            Some(_) if flat => '▁',
            Some(mean) => {
                let height = ((mean - low) / range * 7.0).round() as usize;
                ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'][height]
            }
        };
        let drawn: String = means.iter().map(block).collect();
        let shown = drawn.trim_end();
        let blank = " ".repeat(columns - shown.chars().count());
        coloured(shown, 36, colours) + &blank
    }
}

/// What an epoch gave, in lines of so many columns at most. The splits have as many `images`; as many steps as
/// were `skipped` in it, because gradients overflowed in mixed precision.
fn epoch_line(
    record: &EpochRecord,
    total: usize,
    [validation, test]: [usize; 2],
    skipped: u64,
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
        match skipped {
            0 => None,
            1 => Some("1 step skipped".into()),
            n => Some(format!("{} steps skipped", HumanCount(n))),
        },
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
    // On a narrow terminal a figure needs the room.
    let indent = " ".repeat(match columns {
        0..60 => 0,
        _ => label.chars().count(),
    });
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

    fn record(epoch: usize, train_accuracy: f64, test_accuracy: f64) -> EpochRecord {
        let line = format!(
            r#"{{"epoch": {epoch}, "step": {epoch}, "train_loss": 0.5, "train_accuracy": {train_accuracy},
            "test_accuracy": {test_accuracy}}}"#
        );
        serde_json::from_str(&line).unwrap()
    }

    /// Of 4 epochs of 1000 images, two are over and the third is half done.
    fn view() -> View {
        let mut view = View::new(4, 1000, 500, "test");
        let mut now = 0.0;
        for epoch in 1..=3 {
            view.begin(epoch);
            for part in 1..=if epoch == 3 { 5 } else { 10 } {
                now += 1.0;
                view.trained(100 * part, 1.0 / epoch as f64, now);
                view.stepped(&StepRecord {
                    step: 1,
                    epoch: epoch as f64 - 1.0 + part as f64 / 10.0,
                    loss: 0.0,
                    accuracy: epoch as f64 / 4.0,
                    lr: 0.0,
                });
            }
            if epoch < 3 {
                now += 5.0;
                view.pace.finished(now);
                view.remember(&record(epoch, 0.0, 0.3 + 0.1 * epoch as f64));
            }
        }
        view
    }

    #[test]
    fn a_view_is_a_grid_that_fits() {
        let lines = view().lines(80, false, None, 35.0);
        let expected = "\
epoch 3/4   ━━━━━━━━━━━━━━━━━━━━────────────────────      50 %  100 images/s
all epochs  ━━━━━━━━━━━━━━━━━━━━━━━━━───────────────      62 %  ETA 25 s
loss        ████████████████▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▁▁▁▁▁▁▁▁    0.3333
accuracy    ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅████████   75.00 %
test        ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁████████████████           50.00 %";
        assert_eq!(lines.join("\n"), expected);
        let narrow = view().lines(39, false, None, 35.0);
        let expected = "\
epoch 3/4   ━━━━─────  100 images/s
all epochs  ━━━━━────  ETA 25 s
loss        ███▇▄▄▄▂▁  0.3333
accuracy    ▁▁▁▂▅▅▅▇█  75.00 %
test        ▁▁▁▄████   50.00 %";
        assert_eq!(narrow.join("\n"), expected);
        let narrowest = view().lines(20, false, None, 35.0);
        assert_eq!(narrowest[1], "all epochs  ETA 25 s");
        for columns in 1..100 {
            for line in view().lines(columns, true, None, 35.0) {
                let width = console::measure_text_width(&line);
                assert!(width <= columns, "{columns}: {line}");
            }
        }
        // Before there is anything to show, it says what goes on.
        let mut new = View::new(4, 1000, 500, "test");
        assert_eq!(new.lines(79, true, None, 0.0), ["uploading the images"]);
        let compiling = "compiling kernels, 3 of 40";
        assert_eq!(new.lines(79, true, Some(compiling), 0.0), [compiling]);
        new.begin(1);
        assert_eq!(new.lines(79, true, None, 0.0), ["epoch 1/4: first images"]);
    }

    /// Cells hold sums, whose means are not all of the same bits.
    #[test]
    fn a_curve_of_one_value_is_flat() {
        for value in [0.9212, 0.1, 1.0 / 3.0, 0.0, -0.7] {
            let mut curve = Curve::default();
            curve.add(0.0, 1.0 / 3.0, value);
            for until in [0.34, 0.5, 0.77] {
                let drawn = curve.draw(until, 40, false, false);
                let shown = drawn.trim_end();
                assert!(shown.chars().count() > 15, "{drawn}");
                assert!(shown.chars().all(|c| c == '▁'), "{value}: {drawn}");
            }
        }
    }

    /// Half an epoch (5 s) and another (10 s), and the ends of two (5 s each) are left: 25 s.
    #[test]
    fn compiling_and_waiting_are_no_part_of_the_rest() {
        let rest = |view: &View, now: f64| view.remaining(now).unwrap().round();
        assert_eq!(rest(&view(), 35.0), 25.0);
        // What passes before the first images of a training, or while something is compiled, does not count.
        let mut late = View::new(4, 1000, 500, "test");
        late.begin(1);
        late.trained(100, 1.0, 500.0);
        assert_eq!(late.remaining(500.0), None);
        late.pace.skip(60.0);
        late.trained(200, 1.0, 561.0);
        // 800 images and 3000, at 100 images/s, and four ends of about 500/300 s.
        assert_eq!(rest(&late, 561.0), 38.0 + 7.0);
        // An evaluation that is under way counts down, and not below 0.
        let mut evaluating = view();
        evaluating.trained(1000, 0.3, 40.0);
        assert_eq!(rest(&evaluating, 42.0), 20.0);
        evaluating.evaluating = Some("test 10 %".into());
        assert_eq!(rest(&evaluating, 42.0), 18.0);
        assert_eq!(rest(&evaluating, 90.0), 15.0);
    }

    #[test]
    fn times_are_for_people() {
        for (seconds, text) in [
            (0.4, "0 s"),
            (59.4, "59 s"),
            (59.6, "1 min 00 s"),
            (754.0, "12 min 34 s"),
            (7500.0, "2 h 05 min"),
            (273_600.0, "3 d 04 h"),
        ] {
            assert_eq!(time(seconds), text);
        }
    }

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
            loss_scale: None,
            skipped_steps: None,
        };
        let text = epoch_line(&record, 100, [1000, 10_000], 0, 80);
        let expected = "epoch 100/100  loss 12.3456  validation 1.2346, 50.00 % ± 1.58
               test 1.2346, 100.00 % ± 0.00  average 50.00 %, 100.00 %  1234.5 s
               123,456 images/s";
        assert_eq!(text, expected);
        let narrow = epoch_line(&record, 100, [1000, 10_000], 0, 40);
        let expected = "epoch 100/100  loss 12.3456
  validation 1.2346, 50.00 % ± 1.58
  test 1.2346, 100.00 % ± 0.00
  average 50.00 %, 100.00 %  1234.5 s
  123,456 images/s";
        assert_eq!(narrow, expected);
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
            epoch_line(&plain, 12, [0, 10_000], 0, 80),
            "epoch 3/12  loss 0.1234  test 1.2346, 98.51 % ± 0.12  12.3 s  9,876 images/s"
        );
        assert_eq!(
            epoch_line(&plain, 12, [0, 10_000], 1, 100),
            "epoch 3/12  loss 0.1234  1 step skipped  test 1.2346, 98.51 % ± 0.12  12.3 s  9,876 images/s"
        );
        assert!(epoch_line(&plain, 12, [0, 10_000], 1234, 100).contains("1,234 steps skipped"));
    }
}
