//! One module per subcommand: arguments in, library calls, report out. Only these, `cli.rs` and
//! `main.rs` print.

mod bench;
mod compare;
mod completions;
mod data;
mod device;
mod devices;
mod eval;
mod export;
mod inspect;
mod live;
mod lr_find;
mod man;
mod predict;
mod preview;
mod progress;
mod recipe;
mod report;
mod seeds;
mod serve;
mod signals;
mod together;
mod train;
mod verify;

use crate::cli::{Cli, Command};
use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, TableStyle};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use terminal_size::{Width, terminal_size_of};
use wgrad::data::{Dataset, Request, Splits};
use wgrad::train::Config;
use wgrad::{Error, Result};

/// What `--quiet` says.
static QUIET: OnceLock<bool> = OnceLock::new();

/// Whether only results and errors are printed.
fn quiet() -> bool {
    QUIET.get().copied().unwrap_or(false) || together::follows()
}

/// Carries out a command.
pub fn run(Cli { quiet, command }: Cli) -> Result<()> {
    QUIET.get_or_init(|| quiet);
    // Silent unless RUST_LOG asks: warnings of the driver would spoil tables and progress bars.
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("off")).init();
    match command {
        Command::Train(args) => train::run(&args),
        Command::Recipes(args) => recipe::run(&args),
        Command::LrFind(args) => lr_find::run(&args),
        Command::Data(args) => data::run(&args),
        Command::Preview(args) => preview::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Predict(args) => predict::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Import(args) => export::import(&args),
        Command::Devices(args) => devices::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => man::run(&args),
    }
}

/// The data, with a bar while pictures are read.
fn load_data(source: &str, request: &Request) -> Result<Splits> {
    reading(|progress| wgrad::data::load(source, request, progress))
}

/// What the network of a run is tested on, and what looks wrong about it: the run's own test images,
/// as many as it was tested on, or those of `other` data.
fn load_test_data(
    other: Option<&str>,
    config: &Config,
    cache: Option<PathBuf>,
) -> Result<(Dataset, Vec<String>)> {
    let Some(source) = other else {
        let request = Request {
            cache,
            ..config.data.request()
        };
        let Splits {
            mut test, notes, ..
        } = load_data(&config.data.source, &request)?;
        if config.data.limit.is_some() {
            test.truncate(config.data.test_images)?;
        }
        return Ok((test, notes));
    };
    let shape = config.model.input;
    let cache = cache.as_deref();
    let (mut test, notes) =
        reading(|progress| wgrad::data::load_test(source, shape, cache, progress))?;
    // Images of another shape are refused for that, whatever their classes.
    if test.shape != shape {
        return Ok((test, notes));
    }
    let names = &config.model.class_names;
    test.relabel(names).map_err(|class| {
        Error::data(
            Path::new(source),
            format!(
                "expected images of classes that the run knows ({}), found {class}; name the folders as those that it was trained on",
                names.join(", ")
            ),
        )
    })?;
    Ok((test, notes))
}

/// Shows a bar while pictures are read.
fn reading<T>(read: impl FnOnce(&mut dyn FnMut(usize, usize)) -> Result<T>) -> Result<T> {
    let bar = progress::spinner().with_message("reading the data");
    let style = progress::style("reading pictures", "{pos}/{len}, ETA {eta}");
    let pulse = progress::Pulse::start(&bar, || None);
    let data = read(&mut |done, all| {
        if bar.length().is_none() {
            bar.set_style(style.clone());
        }
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    });
    drop(pulse);
    bar.finish_and_clear();
    data
}

/// Prints a line (or several) on standard output. That nobody reads on (`wgrad … | head`) is no
/// reason to stop: a training is worth finishing.
fn say(text: &str) -> Result<()> {
    if together::follows() {
        return Ok(());
    }
    let mut stdout = std::io::stdout().lock();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            Err(Error::io("write", Path::new("standard output"), e))
        }
        _ => Ok(()),
    }
}

/// As [`say`] what is no result: with `--quiet` nobody wants to know.
fn tell(text: &str) -> Result<()> {
    if quiet() { Ok(()) } else { say(text) }
}

/// As [`say_wrapped`] what is no result.
fn note(text: &str) -> Result<()> {
    if quiet() { Ok(()) } else { say_wrapped(text) }
}

/// Columns of the terminal; where there is none, what `COLUMNS` says, else 80.
fn width() -> usize {
    let columns = || std::env::var("COLUMNS").ok()?.parse().ok();
    match terminal_size_of(std::io::stdout()) {
        Some((Width(columns), _)) => usize::from(columns).max(40),
        None => columns().unwrap_or(80).max(40),
    }
}

/// Prints lines that break between words at the [`width`], each under the text behind its label
/// (`device   llvmpipe …`).
fn say_wrapped(text: &str) -> Result<()> {
    let wrap = |line: &str| {
        let text = line.find("  ").map_or(0, |at| {
            let spaces = line[at..].len() - line[at..].trim_start().len();
            at + spaces
        });
        let indent = " ".repeat(if (1..=12).contains(&text) { text } else { 2 });
        let options = textwrap::Options::new(width())
            .subsequent_indent(&indent)
            // A path or a name is worth more in one piece.
            .break_words(false)
            .word_splitter(textwrap::WordSplitter::NoHyphenation);
        textwrap::fill(line, options)
    };
    say(&text.lines().map(wrap).collect::<Vec<_>>().join("\n"))
}

/// Prints a value as JSON.
fn say_json(value: &serde_json::Value) -> Result<()> {
    say(&format!("{value:#}"))
}

/// A table like the model summary's, as wide as the [`width`] at most, without a header where `header` is empty; columns from number
/// `right` on are aligned to the right.
fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>, right: usize) -> String {
    const LINE: LineStyle = LineStyle::none().fill('─').junction('─');
    const STYLE: TableStyle = TableStyle::new()
        .top_border(LINE)
        .header_separator(LINE)
        .bottom_border(LINE);
    let mut table = Table::new();
    table.load_style(STYLE);
    table
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(width().try_into().unwrap_or(u16::MAX));
    if !header.is_empty() {
        table.set_header(header);
    }
    table.add_rows(rows);
    for column in table.column_iter_mut().skip(right) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.trim_fmt()
}

/// Standard error of a share `p` of `n` independent samples (binomial): `√(p(1 − p)/n)`.
fn standard_error(p: f64, n: usize) -> f64 {
    (p * (1.0 - p) / n as f64).sqrt()
}

/// `98.51 % ± 0.12`.
fn percent(p: f64, n: usize) -> String {
    format!("{:.2} % ± {:.2}", 100.0 * p, 100.0 * standard_error(p, n))
}
