//! `wgrad predict`: what a trained network says of pictures.

use super::device::Device;
use super::progress::Pulse;
use super::{note, say, say_json, say_wrapped, tell, width};
use crate::cli::PredictArgs;
use indicatif::{HumanCount, ProgressBar};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};
use textwrap::core::display_width;
use wgrad::data::{Files, Found, Picture, Reading, files_in, read_file, read_picture};
use wgrad::predict::{Predictor, ranked};
use wgrad::train::{Config, Run};
use wgrad::{Error, Result};

/// What is decoded at a time while the network computes on what was decoded before.
const PICTURES: usize = 256;
const BYTES: usize = 64 << 20;

/// Most bytes from standard input.
const LARGEST: u64 = 1 << 30;

/// How many files that cannot be read a line lists.
const LISTED: usize = 100;

/// Names of files and classes are padded to this width at most.
const NAME: usize = 48;

/// Where a picture comes from.
enum Source {
    Given(PathBuf),
    /// Of a folder, where what is no picture is passed over.
    InFolder(PathBuf),
    Bytes(Vec<u8>),
}

impl Source {
    fn name(&self) -> String {
        match self {
            Source::Given(path) | Source::InFolder(path) => path.display().to_string(),
            Source::Bytes(_) => "-".into(),
        }
    }

    /// The picture, or nothing where there is none to be expected.
    fn read(&self, how: &Reading) -> std::result::Result<Option<Picture>, String> {
        let found = match self {
            Source::Bytes(bytes) => return read_picture(bytes, how).map(Some),
            Source::Given(path) | Source::InFolder(path) => read_file(path)?,
        };
        match (found, self) {
            (Found::Picture(bytes), _) => read_picture(&bytes, how).map(Some),
            (Found::Other, Source::InFolder(_)) => Ok(None),
            (Found::Other, _) => Err("not a picture of a known format".into()),
        }
    }
}

/// What was found about some pictures in a row.
#[derive(Default)]
struct Decoded {
    names: Vec<String>,
    /// Whether each is inverted, and whether centred.
    changes: Vec<[bool; 2]>,
    images: Vec<u8>,
    unread: Vec<(String, String)>,
    others: usize,
}

/// What the answers come to.
#[derive(Default)]
struct Totals {
    pictures: usize,
    inverted: usize,
    centred: usize,
    others: usize,
    unread: Vec<(String, String)>,
    decoding: Duration,
    network: Duration,
}

pub fn run(args: &PredictArgs) -> Result<()> {
    if args.top == 0 {
        return Err(Error::Usage(
            "expected --top of at least 1 class, found 0; leave it out for 3".into(),
        ));
    }
    let run = Run::open(&args.run)?;
    let config = run.config();
    let mut totals = Totals::default();
    let sources = sources(&args.files, &mut totals.unread)?;
    if sources.is_empty() && totals.unread.is_empty() {
        return Err(Error::data(
            &args.files[0],
            "expected pictures (JPEG, PNG, WebP, BMP, TIFF or GIF) in the folder, found no file; give another one",
        ));
    }
    let device = Device::open(args.device.requested())?;
    // As many as a training step takes fit, the backward pass aside. More than are decoded at a time would be
    // waited for.
    let batch = config.recipe.step_batch().min(PICTURES);
    let batch = batch.min(sources.len()).max(1);
    let mut predictor = {
        let _pulse = device.gpu().map(Pulse::compiling);
        let gpu = device.gpu().cloned();
        Predictor::new(&run, args.weights.which, gpu, args.views, batch)?
    };
    let mut how = *predictor.reading();
    how.invert = args.invert;
    how.centre = !args.no_centre;
    let elements = config.model.input.elements();
    let at_a_time = PICTURES.div_ceil(batch) * batch;
    let at_a_time = at_a_time.min(BYTES / elements).max(batch);

    let mut output = Output::new(args, config, &sources);
    output.begin(&run, &device, &predictor)?;
    let started = Instant::now();
    // Rows on a terminal are progress enough.
    let bar = match args.json || (!std::io::stdout().is_terminal() && !super::quiet()) {
        true => ProgressBar::new(sources.len() as u64).with_message("pictures are looked at"),
        false => ProgressBar::hidden(),
    };
    let pulse = Pulse::start(&bar, || None);
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(1);
        scope.spawn(move || {
            // Threads of their own: those of the network do not wait for a picture to end.
            let threads = rayon::ThreadPoolBuilder::new().build().ok();
            for some in sources.chunks(at_a_time) {
                let started = Instant::now();
                let decoded = match &threads {
                    Some(threads) => threads.install(|| decode(some, &how)),
                    None => decode(some, &how),
                };
                if sender.send((decoded, started.elapsed())).is_err() {
                    break;
                }
            }
        });
        for (decoded, time) in receiver {
            let Decoded {
                names,
                changes,
                images,
                unread,
                others,
            } = decoded;
            bar.inc((names.len() + unread.len() + others) as u64);
            totals.decoding += time;
            totals.pictures += names.len();
            totals.inverted += changes.iter().filter(|[inverted, _]| *inverted).count();
            totals.centred += changes.iter().filter(|[_, centred]| *centred).count();
            totals.others += others;
            totals.unread.extend(unread);
            let started = Instant::now();
            let shares = predictor.predict(images)?;
            totals.network += started.elapsed();
            let rows = shares.chunks(config.model.classes);
            output.rows(names.iter().zip(changes).zip(rows))?;
        }
        Ok(())
    })?;
    drop(pulse);
    bar.finish_and_clear();
    output.end(&totals, started.elapsed())?;
    match totals.unread.len() {
        0 if totals.pictures == 0 => Err(Error::data(
            &args.files[0],
            format!(
                "expected pictures (JPEG, PNG, WebP, BMP, TIFF or GIF), found none among {} files; give another folder",
                totals.others
            ),
        )),
        0 => Ok(()),
        unread => Err(Error::Unread(format!(
            "{unread} of {} pictures cannot be read: {}",
            unread + totals.pictures,
            listed(&totals.unread)
        ))),
    }
}

/// Every file that is asked for, in order.
fn sources(files: &[PathBuf], unread: &mut Vec<(String, String)>) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for file in files {
        if file == Path::new("-") {
            if sources.iter().any(|s| matches!(s, Source::Bytes(_))) {
                return Err(Error::Usage(
                    "expected - (one picture on standard input) once, found it twice".into(),
                ));
            }
            let mut bytes = Vec::new();
            let input = std::io::stdin().lock();
            let read = input.take(LARGEST).read_to_end(&mut bytes);
            read.map_err(|e| Error::io("read", Path::new("standard input"), e))?;
            sources.push(Source::Bytes(bytes));
        } else if file.is_dir() {
            let Files { paths, lost } = files_in(file)?;
            sources.extend(paths.into_iter().map(Source::InFolder));
            unread.extend(
                lost.into_iter()
                    .map(|(path, why)| (path.display().to_string(), why)),
            );
        } else {
            sources.push(Source::Given(file.clone()));
        }
    }
    Ok(sources)
}

/// Decodes pictures, several at once.
fn decode(sources: &[Source], how: &Reading) -> Decoded {
    let pictures: Vec<_> = sources.par_iter().map(|source| source.read(how)).collect();
    let mut decoded = Decoded::default();
    for (source, picture) in sources.iter().zip(pictures) {
        match picture {
            Ok(Some(picture)) => {
                decoded.names.push(source.name());
                decoded.changes.push([picture.inverted, picture.centred]);
                decoded.images.extend(picture.pixels);
            }
            Ok(None) => decoded.others += 1,
            Err(why) => decoded.unread.push((source.name(), why)),
        }
    }
    decoded
}

/// `a.png (cut short), b.png (empty) and 3 more`.
fn listed(unread: &[(String, String)]) -> String {
    let some = unread.iter().take(LISTED);
    let some: Vec<String> = some.map(|(name, why)| format!("{name} ({why})")).collect();
    let more = match unread.len() - some.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    some.join(", ") + &more
}

/// Where answers go, in which form.
struct Output<'a> {
    args: &'a PredictArgs,
    names: &'a [String],
    input: String,
    top: usize,
    /// Of the column of files, and of that of classes.
    widths: [usize; 2],
    /// What is printed at the end, for JSON.
    report: Value,
    answers: Vec<Value>,
}

impl<'a> Output<'a> {
    fn new(args: &'a PredictArgs, config: &'a Config, sources: &[Source]) -> Output<'a> {
        let widest = |widths: &mut dyn Iterator<Item = usize>| widths.max().unwrap_or(0);
        let names = &config.model.class_names;
        let file = widest(&mut sources.iter().map(|source| display_width(&source.name())));
        Output {
            args,
            names,
            input: config.model.input.to_string(),
            top: args.top.min(config.model.classes),
            widths: [
                file.clamp(7, NAME),
                widest(&mut names.iter().map(|name| display_width(name))).clamp(5, NAME),
            ],
            report: json!({}),
            answers: Vec::new(),
        }
    }

    fn begin(&mut self, run: &Run, device: &Device, predictor: &Predictor) -> Result<()> {
        let weights = self.args.weights.which.to_string();
        if self.args.json {
            self.report = json!({
                "run": run.folder().display().to_string(),
                "weights": weights,
                "epoch": predictor.epoch(),
                "device": predictor.description(),
            });
            return Ok(());
        }
        if self.args.csv {
            let mut header = vec!["file".to_string(), "inverted".into(), "centred".into()];
            header
                .extend((1..=self.top).flat_map(|k| [format!("class_{k}"), format!("share_{k}")]));
            return say(&csv([header])?);
        }
        if let Some(notice) = device.notice() {
            note(notice)?;
        }
        note(&format!("device    {}", predictor.description()))?;
        let epoch = predictor
            .epoch()
            .map_or(String::new(), |n| format!(", epoch {n}"));
        tell(&format!("weights   {weights}{epoch}"))?;
        let line = "─".repeat(self.line(&["picture", "share"]).len().min(width()));
        let head = self.line(&["class", "share"]);
        say(&format!("{line}\n{head}\n{line}"))
    }

    /// The head of the table.
    fn line(&self, [class, share]: &[&str; 2]) -> String {
        let [file, name] = self.widths;
        let one = format!("  {class:<name$} {share:>8}");
        format!("{:<file$}{}", "picture", one.repeat(self.top))
    }

    fn rows<'b>(
        &mut self,
        rows: impl Iterator<Item = ((&'b String, [bool; 2]), &'b [f64])>,
    ) -> Result<()> {
        let mut lines = Vec::new();
        let mut records = Vec::new();
        for ((file, [inverted, centred]), shares) in rows {
            let ranked = ranked(shares, self.top);
            let named = ranked.iter().map(|(k, share)| (&self.names[*k], *share));
            if self.args.json {
                let classes = named.zip(&ranked).map(|((name, share), (class, _))| {
                    json!({ "class": class, "name": name, "share": share })
                });
                self.answers.push(json!({
                    "file": file,
                    "inverted": inverted,
                    "centred": centred,
                    "classes": classes.collect::<Vec<_>>(),
                }));
            } else if self.args.csv {
                let mut record = vec![file.clone(), inverted.to_string(), centred.to_string()];
                record.extend(named.flat_map(|(name, share)| [name.clone(), share.to_string()]));
                records.push(record);
            } else {
                let pad = |text: &str, to: usize| {
                    let spaces = to.saturating_sub(display_width(text));
                    format!("{text}{}", " ".repeat(spaces))
                };
                let mut line = pad(file, self.widths[0]);
                for (name, share) in named {
                    let name = pad(name, self.widths[1]);
                    line += &format!("  {name} {:>6.2} %", 100.0 * share);
                }
                lines.push(line + if inverted { "  inverted" } else { "" });
            }
        }
        match (lines.is_empty(), records.is_empty()) {
            (true, true) => Ok(()),
            (false, _) => say(&lines.join("\n")),
            (_, false) => say(&csv(records)?),
        }
    }

    fn end(&mut self, totals: &Totals, time: Duration) -> Result<()> {
        let Totals {
            pictures,
            inverted,
            centred,
            others,
            unread,
            decoding,
            network,
        } = totals;
        if self.args.json {
            self.report["pictures"] = json!(std::mem::take(&mut self.answers));
            let unread = unread.iter();
            self.report["unread"] = unread
                .map(|(file, why)| json!({ "file": file, "why": why }))
                .collect();
            self.report["seconds"] = json!({
                "all": time.as_secs_f64(),
                "decoding": decoding.as_secs_f64(),
                "network": network.as_secs_f64(),
            });
            return say_json(&self.report);
        }
        if self.args.csv {
            return Ok(());
        }
        let of = |n: &usize| match (n, pictures) {
            (1, 1) => "the picture is".to_string(),
            (n, all) if n == all => format!("all {} pictures are", HumanCount(*n as u64)),
            (1, all) => format!("1 of {} pictures is", HumanCount(*all as u64)),
            (n, all) => format!(
                "{} of {} pictures are",
                HumanCount(*n as u64),
                HumanCount(*all as u64)
            ),
        };
        if *inverted > 0 && self.args.invert == wgrad::data::Invert::Auto {
            say_wrapped(&format!(
                "inverted  {} dark ink on light paper, but the network learned from light ink on a dark ground; --invert never takes it as it is",
                of(inverted)
            ))?;
        }
        if *centred > 0 {
            say_wrapped(&format!(
                "centred   {} not {}: the ink was cut out, scaled and centred, as MNIST's was; --no-centre takes the middle of the picture",
                of(centred),
                self.input
            ))?;
        }
        if *others > 0 {
            say_wrapped(&match others {
                1 => "skipped   1 file that is no picture".into(),
                n => format!(
                    "skipped   {} files that are no pictures",
                    HumanCount(*n as u64)
                ),
            })?;
        }
        if *pictures > 1 {
            let seconds = time.as_secs_f64();
            note(&format!(
                "time      {} pictures in {seconds:.1} s, {:.0} a second: decoding took {:.1} s, and meanwhile the network {:.1} s",
                HumanCount(*pictures as u64),
                *pictures as f64 / seconds.max(1e-9),
                decoding.as_secs_f64(),
                network.as_secs_f64(),
            ))?;
        }
        Ok(())
    }
}

/// Records as lines of CSV (RFC 4180, but with plain line feeds).
fn csv(records: impl IntoIterator<Item = Vec<String>>) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    let written = records.into_iter().try_for_each(|r| writer.write_record(r));
    let failed = |e: std::io::Error| Error::io("write", Path::new("standard output"), e);
    written.map_err(|e| failed(e.into()))?;
    let bytes = writer.into_inner().map_err(|e| failed(e.into_error()))?;
    Ok(String::from_utf8_lossy(&bytes)
        .trim_end_matches('\n')
        .into())
}
