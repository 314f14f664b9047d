//! `wgrad train`: a new run, or an earlier one continued.

use super::device::Device;
use super::progress::{self, Progress};
use super::recipe::{self, Asked};
use super::signals::Signals;
use super::{load_data, note, report, say, say_wrapped, seeds, table, tell, together, width};
use crate::cli::{Conv, Seeds, TrainArgs};
use indicatif::{BinaryBytes, HumanCount};
use serde_json::json;
use std::fmt::Display;
use std::path::{Path, absolute};
use std::time::Duration;
use wgrad::cluster::{Cluster, Link};
use wgrad::data::{Request, Splits, balanced_weights, read_weights};
use wgrad::engine::{CpuEngine, Engine};
use wgrad::export::Fitting;
use wgrad::kernels::conv2d::Product;
use wgrad::model::recipe::{ClassWeights, Optimizer, Recipe, Schedule};
use wgrad::model::{Model, default_for, load, summary};
use wgrad::plan::{Mode, Options, Plan, Target};
use wgrad::report::profile::Profile;
use wgrad::report::tensorboard::TensorBoard;
use wgrad::train::{
    Config, Control, DataRecord, DeviceRecord, EpochRecord, InitRecord, Observer, Outcome, Run,
    SeedsRecord, expect_validation, start_from, train, train_together,
};
use wgrad::tune::{self, Priced};
use wgrad::{Error, Result};

/// The report in a run folder.
const REPORT: &str = "report.html";

/// What is known before anything is measured or compiled.
pub(super) struct Prepared {
    pub run: Run,
    pub data: Splits,
    pub device: Device,
    pub options: Options,
}

/// A new run before it has a folder.
pub(super) struct Planned {
    pub config: Config,
    pub model: Model,
    pub data: Splits,
    pub device: Device,
    pub options: Options,
    /// What there is to say about it, a line each.
    pub notes: Vec<String>,
}

pub fn run(args: &TrainArgs) -> Result<()> {
    let signals = Signals::catch()?;
    let link = together::join(&signals)?;
    let done = begin(args, &signals, link);
    if together::follows() && done.is_err() {
        // The leader may have the same to say, and when a process ends, mpirun ends all.
        std::thread::sleep(LEADER_FIRST);
    }
    done
}

/// How long a process that is not the leader waits before it reports an error.
const LEADER_FIRST: Duration = Duration::from_secs(3);

fn begin(args: &TrainArgs, signals: &Signals, link: Option<Box<dyn Link>>) -> Result<()> {
    if let (Some(place), Some(_)) = (together::place(), &args.seeds) {
        return Err(Error::Usage(format!(
            "expected one training for {} ranks, found --seeds; start one for each seed, or leave mpirun out",
            place.ranks
        )));
    }
    if let Some(Seeds(numbers)) = &args.seeds {
        return seeds::start(numbers, args, signals);
    }
    let prepared = match &args.resume {
        Some(folder) => match SeedsRecord::read(folder)? {
            Some(record) => return seeds::resume(folder, record, args, signals),
            None => resume(folder, args)?,
        },
        None => start(args)?,
    };
    let recipe = &prepared.run.config().recipe;
    let (shards, exchange) = (recipe.shards.unwrap_or(1), recipe.exchange);
    let cluster = link.map(|link| Cluster::new(link, prepared.run.model(), shards, exchange));
    carry_out(prepared, args, signals, None, cluster.transpose()?)
}

/// Trains and reports; `of` is the folder of several runs that this is one of, `cluster` are the processes that
/// train together.
pub(super) fn carry_out(
    prepared: Prepared,
    args: &TrainArgs,
    signals: &Signals,
    of: Option<&Path>,
    mut cluster: Option<Cluster>,
) -> Result<()> {
    let Prepared {
        mut run,
        data,
        device,
        options,
    } = prepared;
    let folder = run.folder().display().to_string();
    let all = of.map_or(folder.clone(), |parent| parent.display().to_string());
    let go_on = format!("resume   {}", resume_command(&all));
    tell(&format!("run      {folder}\n{go_on}"))?;
    let is_told = (args.tensorboard || TensorBoard::is_in(run.folder())) && !run.follows();
    if is_told {
        tell(&format!("watch    tensorboard --logdir {}", quoted(&all)))?;
    }
    note(&describe(run.config()))?;
    if of.is_none() {
        tell(&layers(run.model()))?;
    }
    let mut engine = match engine(&mut run, &device, options, args) {
        Ok(engine) => engine,
        Err(e) => {
            if args.resume.is_none() {
                run.discard();
            }
            return Err(e);
        }
    };

    if let Some(cluster) = &mut cluster {
        let ranks = cluster.gather(engine.description().as_bytes())?;
        let ranks = ranks
            .iter()
            .map(|line| String::from_utf8_lossy(line).into());
        let device = &mut run.config_mut().device;
        (device.ranks, device.exchange) = (ranks.collect(), None);
        for (rank, line) in device.ranks.iter().enumerate() {
            note(&format!("rank {rank:<4}{line}"))?;
        }
    }

    let total = run.config().recipe.epochs;
    let mut progress = Progress::new(
        total,
        &data,
        args.trace_transfers,
        device.gpu().cloned(),
        run.metrics(),
    );
    let control = Control {
        checkpoint_every: args.checkpoint_every.unwrap_or_default(),
        stop_after: args.stop_after,
        interrupted: signals.hold(),
    };
    let (labels, files) = (data.test.labels.clone(), data.test.files.clone());
    let mut train = |run: &mut Run, data: Splits, observer: &mut dyn Observer| match &mut cluster {
        Some(cluster) => train_together(run, data, &mut engine, &control, observer, cluster),
        None => train(run, data, &mut engine, &control, observer),
    };
    let trained = match is_told {
        true => {
            let board = TensorBoard::new(&run, &data.train, &mut progress);
            board.and_then(|mut board| train(&mut run, data, &mut board))
        }
        false => train(&mut run, data, &mut progress),
    };
    signals.release();
    progress.finish();
    if run.follows() {
        drop(engine);
        let code = match trained {
            Ok(Outcome::Interrupted { .. }) => Some(signals.exit_code()),
            Ok(_) => None,
            // All ranks see that.
            Err(Error::Diverged { .. }) => Some(1),
            Err(e) => return Err(e),
        };
        leave(cluster);
        return match code {
            None => Ok(()),
            Some(code) => {
                std::thread::sleep(LEADER_FIRST);
                std::process::exit(code)
            }
        };
    }
    let outcome = match trained {
        Ok(outcome) => outcome,
        Err(e) => {
            // The curves show how it came to that.
            if matches!(e, Error::Diverged { .. }) {
                report::ended_early(&run, &e.to_string())?;
                leave(cluster);
            }
            return Err(e.in_run(run.folder()));
        }
    };

    match outcome {
        Outcome::Interrupted { epoch, step, steps } => {
            report::ended_early(&run, "it was interrupted")?;
            say_wrapped(&format!(
                "interrupted in epoch {epoch} after step {step} of {steps}; the checkpoint is written"
            ))?;
            say(&go_on)?;
            // Before the process ends: what drivers do at exit is better done in order.
            drop((engine, run));
            leave(cluster);
            std::process::exit(signals.exit_code());
        }
        Outcome::Stopped => tell(&format!(
            "stopped  after epoch {} of {total}, as asked\n{go_on}",
            run.config().finished_epochs
        ))?,
        Outcome::Finished if progress.epochs == 0 => tell(&format!(
            "nothing to train: all {total} epochs are finished; raise --epochs to go on"
        ))?,
        Outcome::OutOfPatience => note(&out_of_patience(&run, progress.epochs))?,
        Outcome::Finished => {}
    }
    if let Some(cluster) = cluster.as_ref().filter(|_| progress.epochs > 0) {
        let line = exchanges(cluster, run.config().recipe.shards.unwrap_or(1));
        note(&format!("exchange {line}"))?;
        run.config_mut().device.exchange = Some(line);
        run.write_config()?;
    }
    // Of several seeds there is a table in the end.
    let say = if of.is_some() { tell } else { say };
    if let Some(result) = progress::result(&run) {
        say(&result)?;
    }
    if let Some(hash) = &run.config().parameter_sha256 {
        say(&format!("weights  sha256 {hash}"))?;
    }
    if let (true, Some(network)) = (args.profile && progress.epochs > 0, engine.on_gpu()) {
        // The steps that are timed change the parameters, which by now are on disk.
        let profile = Profile::of(network)?;
        let file = run.folder().join("profile.json");
        profile.write_trace(&network.gpu().report().name, &file)?;
        let mut rows = profile.rows();
        if let Some(cluster) = &cluster {
            rows.extend(exchange_rows(cluster));
        }
        say(&table(&Profile::HEADER, rows, 2))?;
        say(&format!("profile  {}", file.display()))?;
    }
    if progress.epochs > 0 {
        report::after_training(&run, &device, engine, &labels, files)?;
    }
    say(&format!("run      {folder}"))?;
    leave(cluster);
    match of {
        None => tell(&next_steps(run.folder())),
        Some(_) => Ok(()),
    }
}

/// The end in good order for all ranks, where there are several.
fn leave(cluster: Option<Cluster>) {
    if let Some(cluster) = cluster {
        cluster.leave();
    }
}

/// What the exchanges between the ranks took.
fn exchanges(cluster: &Cluster, shards: usize) -> String {
    let (traffic, dealt) = (cluster.traffic(), cluster.dealt(shards));
    let dealt: Vec<String> = dealt.into_iter().map(|n| n.to_string()).collect();
    let [all, waited] = [traffic.exchanging, traffic.waiting].map(|s| 1e3 * traffic.per_batch(s));
    format!(
        "{} sent by a rank each step, {all:.1} ms, of which it waits for {waited:.1}: {:.1} % of the time; shards by rank {}",
        BinaryBytes(traffic.sent / traffic.batches.max(1)),
        100.0 * traffic.share(),
        dealt.join(" ")
    )
}

/// The same as rows of a profile: what goes on beside the kernels, and what comes on top of them.
fn exchange_rows(cluster: &Cluster) -> [Vec<String>; 2] {
    let traffic = cluster.traffic();
    let step = traffic.per_batch(traffic.computing + traffic.waiting);
    let beside = (traffic.exchanging - traffic.waiting).max(0.0);
    [("beside kernels", beside), ("waited for", traffic.waiting)].map(|(what, seconds)| {
        let seconds = traffic.per_batch(seconds);
        let share = 100.0 * seconds / step.max(f64::MIN_POSITIVE);
        let [ms, share] = [format!("{:.3}", 1e3 * seconds), format!("{share:.1}")];
        vec!["exchange".into(), what.into(), ms, share]
    })
}

/// The layers of a model; where the terminal is too narrow for their table, in a line.
fn layers(model: &Model) -> String {
    let table = summary(model);
    if table.lines().all(|line| line.chars().count() <= width()) {
        return table;
    }
    format!(
        "model    {}, {} parameters",
        model.name,
        HumanCount(model.parameter_count() as u64)
    )
}

/// What one can do with a run that has weights: commands to be copied.
fn next_steps(folder: &Path) -> String {
    let report = folder.join(REPORT);
    let run = quoted(&folder.display().to_string());
    let mut lines = match report.exists() {
        true => format!("report   {}", report.display()),
        false => format!("report   wgrad report {run}"),
    };
    for (what, rest) in [
        ("predict", " picture.png"),
        ("serve", ""),
        ("export", " --onnx model.onnx"),
    ] {
        lines += &format!("\n{what:9}wgrad {what} {run}{rest}");
    }
    lines
}

/// Why a training ended before its last planned epoch; `trained` are the epochs of this process.
fn out_of_patience(run: &Run, trained: usize) -> String {
    let epoch = |record: Option<&EpochRecord>| record.map_or(0, |record| record.epoch);
    let (last, best) = (epoch(run.metrics().last()), epoch(run.best()));
    let what = match trained {
        0 => "nothing to train: ended",
        _ => "ended   ",
    };
    format!(
        "{what} after epoch {last} of {}: none was better by validation than epoch {best}; raise --patience to go on",
        run.config().recipe.epochs
    )
}

/// The command that goes on with a run, to be copied.
fn resume_command(folder: &str) -> String {
    format!("wgrad train --resume {}", quoted(folder))
}

/// A path as a shell takes it.
fn quoted(path: &str) -> String {
    match path.contains(char::is_whitespace) {
        true => format!("\"{path}\""),
        false => path.into(),
    }
}

/// A new run: everything that is cheap is checked before its folder is made, and everything that is
/// not is done after.
fn start(args: &TrainArgs) -> Result<Prepared> {
    let Planned {
        config,
        data,
        device,
        options,
        notes,
        ..
    } = plan(args)?;
    notes.iter().try_for_each(|line| note(line))?;
    Ok(Prepared {
        run: match together::follows() {
            true => Run::follow(config)?,
            false => Run::create(args.out.as_deref(), config)?,
        },
        data,
        device,
        options,
    })
}

/// A new run as it will be; nothing is made of it yet.
pub(super) fn plan(args: &TrainArgs) -> Result<Planned> {
    if let Some(out) = args.out.as_ref().filter(|_| !together::follows()) {
        Run::expect_free(out)?;
    }
    let asked = Asked::of(args.model.as_ref(), &args.recipe)?;
    let mut definition = asked.definition("default")?;
    let mut recipe = definition.recipe.clone();
    expect_stop(args, &recipe, 0)?;
    let source = args.data.source.as_deref().unwrap_or("mnist");
    let request = args.data.request(Request::default());
    let mut data = load_data(source, &request)?;
    let mut notes = data.notes.clone();
    if let Some(limit) = args.data.limit {
        data.truncate(limit)?;
    }
    let name = default_for(data.train.shape);
    if asked.model.is_none() && name != definition.name {
        notes.push(format!(
            "model    {name}, for images of {} (--model takes another)",
            data.train.shape
        ));
        definition = asked.definition(name)?;
        recipe = definition.recipe.clone();
        expect_stop(args, &recipe, 0)?;
    }
    expect_validation(&recipe, &data)?;
    let model = definition.resolve(data.train.shape, data.train.classes)?;
    recipe.class_weights = class_weights(recipe.class_weights, args, &data)?;
    let images = data.train.len();
    let size = recipe.batch_size;
    if asked.has("batch_size") && size > images {
        return Err(Error::Usage(format!(
            "expected a batch size of at most the {images} training images, found {size}; use --batch-size {images} or smaller"
        )));
    }
    if !asked.has("batch_size") {
        recipe.batch_size = match asked.is_own("batch_size") {
            true => size.min(images),
            false => fitting_batch(size, images, args.data.limit.is_some()),
        };
        if recipe.batch_size < size {
            let whose = asked.recipe.as_ref().map_or("model", |_| "recipe");
            let mut what = format!(
                "batch size {} instead of the {whose}'s {size}",
                recipe.batch_size
            );
            let fixed = asked.has("lr") || asked.is_own("lr") || args.data.limit.is_some();
            let lr = fitting_lr(&recipe, size);
            if !fixed && lr != recipe.lr {
                what += &format!(", and learning rate {lr} instead of {}", recipe.lr);
                recipe.lr = lr;
            }
            notes.push(format!("{what}: there are {images} training images"));
        }
    }

    notes.extend(together::cut(&mut recipe));
    let requested = args.device.requested();
    let options = Options {
        family: args.kernels,
        explicit_conv: args.conv == Some(Conv::Explicit),
        spread: together::place().is_some(),
        ..Options::of(&recipe)
    };
    let device = open(requested, args.profile)?;
    notes.extend(device.notice().map(String::from));
    device.expect_kernels(&options)?;
    if let Some(gpu) = device.gpu() {
        let mode = Mode::Train(recipe.optimizer);
        Plan::new(
            &model,
            recipe.step_batch(),
            mode,
            &options,
            Target::Gpu(gpu.report()),
        )?;
    }
    device.expect_memory(&model, &recipe, &options)?;
    let seed = args.seed.unwrap_or(1);
    let init = match &args.init {
        Some(source) => Some(start_from(source, &model, seed)?.record),
        None => None,
    };
    let record = DataRecord::of(absolute_source(source)?, args.data.limit, &request, &data);
    let config = Config {
        recipe,
        init,
        device: device_record(requested, &device, &options),
        ..Config::new(&definition, &data, record, seed)?
    };
    Ok(Planned {
        config,
        model,
        data,
        device,
        options,
        notes,
    })
}

/// Fewest steps of an epoch, and smallest batch, that a batch is made smaller for.
const FEWEST_STEPS: usize = 16;
const SMALLEST_BATCH: usize = 8;

/// The batch size for so many images where a recipe that ships has `size`: half of it, and so on, until an
/// epoch has steps enough to learn from. Images that are limited are a trial of the recipe as it is.
fn fitting_batch(size: usize, images: usize, limited: bool) -> usize {
    let mut fitting = size;
    while !limited && fitting > SMALLEST_BATCH && images < fitting * FEWEST_STEPS {
        fitting = (fitting / 2).max(SMALLEST_BATCH);
    }
    fitting.min(images)
}

/// The learning rate where a batch is smaller than the `size` that the recipe's is meant for: a step of SGD
/// is as noisy as its gradient, so that its rate goes with the square root (Krizhevsky, 2014, arXiv
/// 1404.5997, section 5); the steps of the other rules have a size of their own.
fn fitting_lr(recipe: &Recipe, size: usize) -> f64 {
    match recipe.optimizer {
        Optimizer::Sgd { .. } if recipe.batch_size < size => {
            let lr = recipe.lr * (recipe.batch_size as f64 / size as f64).sqrt();
            // Three digits say it all.
            format!("{lr:.2e}").parse().unwrap_or(lr)
        }
        _ => recipe.lr,
    }
}

/// What a recipe asks for, or a flag in its place, as a weight for each class.
fn class_weights(
    asked: Option<ClassWeights>,
    args: &TrainArgs,
    data: &Splits,
) -> Result<Option<ClassWeights>> {
    let weights = match (args.recipe.class_weights.as_deref(), asked) {
        (None, Some(ClassWeights::Given(weights))) => weights,
        (None, None) => return Ok(None),
        (None | Some("balanced"), _) => balanced_weights(&data.train),
        (Some(file), _) => read_weights(Path::new(file), &data.train.class_names)?,
    };
    Ok(Some(ClassWeights::Given(weights)))
}

fn weights_in_words(weights: &Option<ClassWeights>) -> String {
    match weights {
        Some(ClassWeights::Given(weights)) => format!("{weights:?}"),
        Some(ClassWeights::Balanced) => "balanced".into(),
        None => "none".into(),
    }
}

/// What a run is asked to go on with.
pub(super) struct Continued {
    recipe: Recipe,
    /// What is asked of class weights; those that balance are known, and compared, when the data are.
    weights: Option<ClassWeights>,
    request: Request,
    limit: Option<usize>,
}

/// # Errors
/// [`Error::Usage`] where a flag gives another value than the run in `folder` was started with.
fn expect_same(folder: &Path, flag: &str, run: &dyn Display, given: &dyn Display) -> Result<()> {
    let (run, given) = (run.to_string(), given.to_string());
    if run == given {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "expected {flag} {run}, which the run in {} was started with, found {given}; leave it out, or start a new run",
        folder.display()
    )))
}

/// What the flags make of a run; refuses what would train something else.
///
/// # Errors
/// [`Error::Usage`] for such a flag, and as [`Asked::of`].
pub(super) fn continued(run: &Run, args: &TrainArgs) -> Result<Continued> {
    let (folder, config) = (run.folder(), run.config());
    let asked = Asked::of(args.model.as_ref(), &args.recipe)?;
    if let Some(spec) = &asked.model {
        let model = load(spec)?.resolve(config.model.input, config.model.classes)?;
        if model.layers != run.model().layers || model.loss != run.model().loss {
            // Two files may use one name for different models.
            let named = format!("'{}'", config.model.name);
            let given = format!("another one, '{spec}'");
            expect_same(folder, "--model", &named, &given)?;
        }
    }
    let origin = folder.join("run.json").display().to_string();
    let mut recipe = asked.over(&config.recipe, run.model().loss, &origin)?;
    let weights = recipe.class_weights.clone();
    if weights == Some(ClassWeights::Balanced) {
        recipe.class_weights = config.recipe.class_weights.clone();
    }
    if let Some([flag, run, given]) = recipe::difference(&config.recipe, &recipe) {
        expect_same(folder, &flag, &run, &given)?;
    }
    let seed = args.seed.unwrap_or(config.seed);
    expect_same(folder, "--seed", &config.seed, &seed)?;
    let limit = args.data.limit.or(config.data.limit);
    let request = args.data.request(config.data.request());
    let recorded = data_settings(&config.data.request(), config.data.limit);
    for ((flag, run), (_, given)) in recorded.iter().zip(data_settings(&request, limit)) {
        expect_same(folder, flag, run, &given)?;
    }
    if recipe.epochs < config.finished_epochs {
        return Err(Error::Usage(format!(
            "expected --epochs of at least {}, which the run in {} has finished already, found {}; --epochs is the total",
            config.finished_epochs,
            folder.display(),
            recipe.epochs
        )));
    }
    Ok(Continued {
        recipe,
        weights,
        request,
        limit,
    })
}

/// An earlier run. What is trained stays as it was; how long and on which device may change.
pub(super) fn resume(folder: &Path, args: &TrainArgs) -> Result<Prepared> {
    let mut run = match together::follows() {
        true => Run::follow_earlier(folder)?,
        false => Run::resume(folder)?,
    };
    together::expect_shards(&run.config().recipe)?;
    let config = run.config().clone();
    let Continued {
        recipe,
        weights: asked_weights,
        request,
        limit,
    } = continued(&run, args)?;
    expect_stop(args, &recipe, config.finished_epochs)?;

    let source = args.data.source.as_deref().unwrap_or(&config.data.source);
    let mut data = load_data(source, &request)?;
    data.notes.iter().try_for_each(|line| note(line))?;
    run.expect_data(source, &data.train)?;
    if let Some(limit) = limit {
        data.train.truncate(limit)?;
        if let Some(validation) = &mut data.validation {
            validation.truncate(limit)?;
        }
        // Not by the limit: a run of format 0 was tested on all.
        data.test.truncate(config.data.test_images)?;
    }
    run.expect_own_data(source, &data)?;
    let given = class_weights(asked_weights, args, &data)?;
    expect_same(
        folder,
        "--class-weights",
        &weights_in_words(&config.recipe.class_weights),
        &weights_in_words(&given),
    )?;

    let recorded = &config.device.requested;
    let requested = args.device.name.as_deref().unwrap_or(recorded);
    let options = Options {
        family: args.kernels.or(config.device.family),
        explicit_conv: args
            .conv
            .map_or(config.device.explicit_conv, |conv| conv == Conv::Explicit),
        spread: together::place().is_some(),
        // Never measured anew: the tiles were chosen when the run began.
        choices: config.device.products.clone(),
        ..Options::of(&recipe)
    };
    let device = open(requested, args.profile)?;
    if let Some(notice) = device.notice() {
        note(notice)?;
    }
    device.expect_kernels(&options)?;
    if let Some(change) = schedule_change(&config, &recipe) {
        note(&change)?;
    }
    let changed = run.config_mut();
    changed.recipe = recipe;
    // The same images, perhaps at another place by now; of format 0 this is their first hash.
    changed.data.source = absolute_source(source)?;
    let DataRecord {
        training_sha256,
        test_sha256,
        ..
    } = &mut changed.data;
    training_sha256.get_or_insert_with(|| data.train.sha256());
    test_sha256.get_or_insert_with(|| data.test.sha256());
    changed.device = device_record(requested, &device, &options);
    Ok(Prepared {
        run,
        data,
        device,
        options,
    })
}

/// The network on the device, with tiles that are measured where no earlier run chose them; the run
/// takes note of them.
fn engine(
    run: &mut Run,
    device: &Device,
    mut options: Options,
    args: &TrainArgs,
) -> Result<Engine> {
    let recipe = &run.config().recipe;
    let notes = ready(device, run.model(), recipe, &mut options, args)?;
    notes.iter().try_for_each(|line| note(line))?;
    let engine = device.engine(run.model(), recipe, &options)?;
    let record = &mut run.config_mut().device;
    let products = engine.products();
    record.kernels = products
        .iter()
        .map(|(layer, product)| format!("{layer} {product}"))
        .collect();
    record.products = products.iter().map(|(_, p)| *p).collect();
    Ok(engine)
}

/// Checks the device and chooses its tiles, as far as flags ask for it; what there is to say about it.
pub(super) fn ready(
    device: &Device,
    model: &Model,
    recipe: &Recipe,
    options: &mut Options,
    args: &TrainArgs,
) -> Result<Vec<String>> {
    if !args.no_check {
        device.check(options)?;
    }
    if args.no_tune || !options.choices.is_empty() {
        return Ok(Vec::new());
    }
    let (choices, notes) = measure(device, model, recipe, options)?;
    options.choices = choices;
    Ok(notes)
}

/// # Errors
/// [`Error::Usage`] where `--stop-after` would train nothing, or all.
fn expect_stop(args: &TrainArgs, recipe: &Recipe, finished: usize) -> Result<()> {
    match args.stop_after {
        Some(stop) if stop <= finished || stop > recipe.epochs => Err(Error::Usage(format!(
            "expected --stop-after from {} to the {} planned epochs, found {stop}; leave it out to train all",
            finished + 1,
            recipe.epochs
        ))),
        _ => Ok(()),
    }
}

/// What another number of planned epochs does to the learning rate, if it does anything.
fn schedule_change(config: &Config, recipe: &Recipe) -> Option<String> {
    let (before, finished) = (&config.recipe, config.finished_epochs);
    let fixed = matches!(recipe.schedule, Schedule::Constant | Schedule::Step { .. });
    if fixed || recipe.epochs == before.epochs {
        return None;
    }
    let images = config.data.training_images;
    let per_epoch = images.div_ceil(recipe.batch_size.max(1));
    let next = (per_epoch * finished) as u64;
    let rate = match next.checked_sub(1) {
        Some(last) if finished < recipe.epochs => format!(
            ", lr goes from {:.2e} to {:.2e}",
            before.lr_at(last, per_epoch),
            recipe.lr_at(next, per_epoch)
        ),
        _ => String::new(),
    };
    Some(format!(
        "schedule {} now spans {} epochs, not {}{rate}",
        recipe.schedule.name(),
        recipe.epochs,
        before.epochs
    ))
}

/// What a resume may not change of the data, by flag.
fn data_settings(request: &Request, limit: Option<usize>) -> [(&'static str, String); 5] {
    let or_none = |value: Option<String>| value.unwrap_or("none".into());
    [
        ("--limit", or_none(limit.map(|n| n.to_string()))),
        (
            "--image-size",
            or_none(request.image_size.map(|[h, w]| format!("{h}x{w}"))),
        ),
        (
            "--validation",
            or_none(request.validation.map(|x| x.to_string())),
        ),
        ("--test", or_none(request.test.map(|x| x.to_string()))),
        ("--split-seed", request.split_seed.to_string()),
    ]
}

/// `mnist`, or the folder's absolute path, so that a resume finds it from anywhere.
fn absolute_source(source: &str) -> Result<String> {
    if source == "mnist" {
        return Ok(source.into());
    }
    let path = absolute(source).map_err(|e| Error::io("find", Path::new(source), e))?;
    Ok(path.display().to_string())
}

/// Opens the device; refuses one that cannot be profiled.
fn open(requested: &str, profile: bool) -> Result<Device> {
    let device = Device::open(&together::device(requested)?)?;
    let timed = device.gpu().is_some_and(|gpu| gpu.report().timestamp_query);
    if profile && !timed {
        return Err(Error::Usage(format!(
            "expected an adapter with timestamp queries for --profile, found {}; leave it out",
            device.description()
        )));
    }
    Ok(device)
}

/// Tiles for the model's products by prices that were measured once per adapter and driver, on a real GPU the fastest of
/// those that are best by them; and what there is to say about it, a line each.
pub(super) fn measure(
    device: &Device,
    model: &Model,
    recipe: &Recipe,
    options: &Options,
) -> Result<(Vec<Product>, Vec<String>)> {
    let Some(gpu) = device.gpu() else {
        return Ok((Vec::new(), Vec::new()));
    };
    let folder = tune::cache_folder();
    let Priced {
        adapter, mut notes, ..
    } = tune::priced(gpu, folder.as_deref())?;
    let mode = Mode::Train(recipe.optimizer);
    let target = Target::Gpu(&adapter);
    let plan = Plan::new(model, recipe.step_batch(), mode, options, target)?;
    let products: Vec<Product> = plan.products().into_iter().map(|(_, p)| p).collect();
    if adapter.software {
        return Ok((products, notes));
    }
    let bar = progress::bar(products.len() as u64, "measuring kernels", "{pos}/{len}");
    let tuned = tune::choose(
        gpu,
        &adapter,
        &products,
        folder.as_deref(),
        tune::BUDGET,
        &mut |done| bar.set_position(done as u64),
    )?;
    bar.finish_and_clear();
    notes.extend(tuned.notes);
    Ok((tuned.choices, notes))
}

/// The record of a device on which nothing was compiled yet.
fn device_record(requested: &str, device: &Device, options: &Options) -> DeviceRecord {
    let gpu = device.gpu();
    DeviceRecord {
        requested: requested.into(),
        description: gpu.map_or_else(CpuEngine::device, |gpu| gpu.report().line()),
        adapter: gpu.map(|gpu| json!(gpu.report())),
        family: options.family,
        explicit_conv: options.explicit_conv,
        products: options.choices.clone(),
        ..DeviceRecord::default()
    }
}

/// Which weights were taken from where, and which are the seed's.
fn describe_init(init: &InitRecord) -> String {
    let Fitting { taken, left } = &init.fitting;
    let mut layers: Vec<&str> = taken
        .iter()
        .filter_map(|name| name.split('.').next())
        .collect();
    layers.dedup();
    let mut text = format!(
        "\ninit     {} of {} tensors from {}: {}",
        taken.len(),
        taken.len() + left.len(),
        init.source,
        layers.join(", ")
    );
    if !left.is_empty() {
        let left: Vec<String> = left
            .iter()
            .map(|(n, found)| format!("{n} ({found})"))
            .collect();
        text += &format!(
            "; by the seed, for what is in the file: {}",
            left.join(", ")
        );
    }
    text
}

/// What is about to happen, above the model's table.
fn describe(config: &Config) -> String {
    let (data, model) = (&config.data, &config.model);
    format!(
        "device   {}\ndata     {}: {} training{} and {} test images of {} in {} classes\nrecipe   {}, seed {}{}",
        config.device.description,
        data.source,
        HumanCount(data.training_images as u64),
        match data.validation_images {
            0 => String::new(),
            n => format!(", {} validation", HumanCount(n as u64)),
        },
        HumanCount(data.test_images as u64),
        model.input,
        model.classes,
        recipe::describe(&config.recipe),
        config.seed,
        config.init.as_ref().map(describe_init).unwrap_or_default()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_leaves_an_epoch_steps_to_learn_from() {
        assert_eq!(fitting_batch(128, 60_000, false), 128);
        assert_eq!(fitting_batch(128, 2048, false), 128);
        assert_eq!(fitting_batch(128, 2047, false), 64);
        assert_eq!(fitting_batch(128, 96, false), 8);
        assert_eq!(fitting_batch(20, 100, false), 8);
        assert_eq!(fitting_batch(4, 10, false), 4);
        assert_eq!(fitting_batch(128, 5, false), 5);
        assert_eq!(fitting_batch(128, 96, true), 96);
        assert_eq!(fitting_batch(128, 1000, true), 128);
    }

    #[test]
    fn the_rate_of_sgd_goes_with_the_root_of_the_batch() {
        let mut recipe = Recipe {
            lr: 0.05,
            batch_size: 8,
            ..Recipe::default()
        };
        assert_eq!(fitting_lr(&recipe, 128), 0.0125);
        assert_eq!(fitting_lr(&recipe, 16), 0.0354);
        assert_eq!(fitting_lr(&recipe, 8), 0.05);
        recipe.optimizer = Optimizer::Lion {
            beta1: 0.9,
            beta2: 0.99,
            weight_decay: 0.0,
        };
        assert_eq!(fitting_lr(&recipe, 128), 0.05);
    }
}
