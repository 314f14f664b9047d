//! `wgrad train`: a new run, or an earlier one continued.

use super::device::Device;
use super::progress::Progress;
use super::signals::Signals;
use super::{load_data, say, say_wrapped, table};
use crate::cli::{Conv, OptimizerName, TrainArgs};
use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use serde_json::json;
use std::fmt::Display;
use std::path::{Path, absolute};
use wgrad::data::{Normalization, Request, Splits};
use wgrad::engine::{CpuEngine, Engine};
use wgrad::kernels::conv2d::Product;
use wgrad::model::recipe::{Optimizer, Recipe, Schedule};
use wgrad::model::{Model, default_for, load, summary};
use wgrad::plan::{Mode, Options, Plan, Target};
use wgrad::report::profile::Profile;
use wgrad::train::{
    Config, Control, DataRecord, DeviceRecord, FORMAT, ModelRecord, Outcome, Run, train,
};
use wgrad::{Error, Result, tune};

/// What is known before anything is measured or compiled.
struct Prepared {
    run: Run,
    data: Splits,
    device: Device,
    options: Options,
}

pub fn run(args: &TrainArgs) -> Result<()> {
    let signals = Signals::catch()?;
    let prepared = match &args.resume {
        Some(folder) => resume(folder, args)?,
        None => start(args)?,
    };
    let Prepared {
        mut run,
        data,
        device,
        options,
    } = prepared;
    let folder = run.folder().display().to_string();
    let go_on = format!("resume   {}", resume_command(&folder));
    say(&format!("run      {folder}\n{go_on}"))?;
    say_wrapped(&describe(run.config()))?;
    say(&summary(run.model()))?;
    let mut engine = match engine(&mut run, &device, options, args) {
        Ok(engine) => engine,
        Err(e) => {
            if args.resume.is_none() {
                run.discard();
            }
            return Err(e);
        }
    };

    let total = run.config().recipe.epochs;
    let mut progress = Progress::new(total, &data, args.trace_transfers, device.gpu().cloned());
    let control = Control {
        checkpoint_every: args.checkpoint_every.unwrap_or_default(),
        stop_after: args.stop_after,
        interrupted: signals.hold(),
    };
    let trained = train(&mut run, data, &mut engine, &control, &mut progress);
    signals.release();
    progress.bar.finish_and_clear();
    let outcome = trained.map_err(|e| e.in_run(run.folder()))?;

    match outcome {
        Outcome::Interrupted { epoch, step, steps } => {
            say(&format!(
                "interrupted in epoch {epoch} after step {step} of {steps}; the checkpoint is written\n{go_on}"
            ))?;
            // Before the process ends: what drivers do at exit is better done in order.
            drop((engine, run));
            std::process::exit(signals.exit_code());
        }
        Outcome::Stopped => say(&format!(
            "stopped  after epoch {} of {total}, as asked\n{go_on}",
            run.config().finished_epochs
        ))?,
        Outcome::Finished if progress.epochs == 0 => say(&format!(
            "nothing to train: all {total} epochs are finished; raise --epochs to go on"
        ))?,
        Outcome::Finished => {}
    }
    if let Some(hash) = &run.config().parameter_sha256 {
        say(&format!("weights  sha256 {hash}"))?;
    }
    if let (true, Some(network)) = (args.profile && progress.epochs > 0, engine.on_gpu()) {
        // The steps that are timed change the parameters, which by now are on disk.
        let profile = Profile::of(network)?;
        let file = run.folder().join("profile.json");
        profile.write_trace(&network.gpu().report().name, &file)?;
        say(&table(&Profile::HEADER, profile.rows(), 2))?;
        say(&format!("profile  {}", file.display()))?;
    }
    say(&format!("run      {folder}"))
}

/// The command that goes on with a run, to be copied.
fn resume_command(folder: &str) -> String {
    let quote = if folder.contains(char::is_whitespace) {
        "\""
    } else {
        ""
    };
    format!("wgrad train --resume {quote}{folder}{quote}")
}

/// A new run: everything that is cheap is checked before its folder is made, and everything that is
/// not is done after.
fn start(args: &TrainArgs) -> Result<Prepared> {
    if let Some(out) = &args.out {
        Run::expect_free(out)?;
    }
    let mut definition = load(args.model.as_deref().unwrap_or("default"))?;
    let mut recipe = override_recipe(definition.recipe.clone(), args)?;
    expect_stop(args, &recipe, 0)?;
    let source = args.data.source.as_deref().unwrap_or("mnist");
    let request = args.data.request(Request::default());
    let mut data = load_data(source, &request)?;
    data.notes.iter().try_for_each(|note| say_wrapped(note))?;
    if let Some(limit) = args.data.limit {
        data.truncate(limit)?;
    }
    let name = default_for(data.train.shape);
    if args.model.is_none() && name != definition.name {
        say_wrapped(&format!(
            "model    {name}, for images of {} (--model takes another)",
            data.train.shape
        ))?;
        definition = load(name)?;
        recipe = override_recipe(definition.recipe.clone(), args)?;
        expect_stop(args, &recipe, 0)?;
    }
    let model = definition.resolve(data.train.shape, data.train.classes)?;
    let images = data.train.len();
    if recipe.batch_size > images {
        if let Some(asked) = args.batch_size {
            return Err(Error::Usage(format!(
                "expected a batch size of at most the {images} training images, found {asked}; use --batch-size {images} or smaller"
            )));
        }
        say_wrapped(&format!(
            "batch size {images} instead of the model's {}: there are no more training images",
            recipe.batch_size
        ))?;
        recipe.batch_size = images;
    }

    let requested = args.device.as_deref().unwrap_or("auto");
    let options = Options {
        family: args.kernels,
        explicit_conv: args.conv == Some(Conv::Explicit),
        ..Options::of(&recipe)
    };
    let device = open(requested, args.profile)?;
    device.expect_kernels(&options)?;
    if let Some(gpu) = device.gpu() {
        let mode = Mode::Train(recipe.optimizer);
        Plan::new(
            &model,
            recipe.batch_size,
            mode,
            &options,
            Target::Gpu(gpu.report()),
        )?;
    }
    device.expect_memory(&model, &recipe, &options)?;
    let config = Config {
        format: FORMAT,
        wgrad: env!("CARGO_PKG_VERSION").into(),
        id: None,
        model: ModelRecord {
            name: model.name.clone(),
            input: model.input,
            classes: model.classes,
            class_names: data.train.class_names.clone(),
            parameters: model.parameter_count(),
            architecture: definition.text.clone(),
        },
        data: DataRecord::of(absolute_source(source)?, args.data.limit, &request, &data),
        normalization: Normalization::of(&data.train),
        recipe,
        seed: args.seed.unwrap_or(1),
        device: device_record(requested, &device, &options),
        finished_epochs: 0,
        parameter_sha256: None,
    };
    let run = Run::create(args.out.as_deref(), config)?;
    Ok(Prepared {
        run,
        data,
        device,
        options,
    })
}

/// An earlier run. What is trained stays as it was; how long and on which device may change.
fn resume(folder: &Path, args: &TrainArgs) -> Result<Prepared> {
    let mut run = Run::resume(folder)?;
    let config = run.config().clone();
    let expect_same = |flag: &str, run: &dyn Display, given: &dyn Display| {
        let (run, given) = (run.to_string(), given.to_string());
        if run == given {
            return Ok(());
        }
        Err(Error::Usage(format!(
            "expected {flag} {run}, which the run in {} was started with, found {given}; leave it out, or start a new run",
            folder.display()
        )))
    };
    if let Some(spec) = &args.model {
        let model = load(spec)?.resolve(config.model.input, config.model.classes)?;
        if model.layers != run.model().layers || model.loss != run.model().loss {
            // Two files may use one name for different models.
            let named = format!("'{}'", config.model.name);
            expect_same("--model", &named, &format!("another one, '{spec}'"))?;
        }
    }
    let recipe = override_recipe(config.recipe.clone(), args)?;
    for ((flag, run), (_, given)) in settings(&config.recipe).iter().zip(settings(&recipe)) {
        expect_same(flag, run, &given)?;
    }
    expect_same("--seed", &config.seed, &args.seed.unwrap_or(config.seed))?;
    let limit = args.data.limit.or(config.data.limit);
    let request = args.data.request(config.data.request());
    let recorded = data_settings(&config.data.request(), config.data.limit);
    for ((flag, run), (_, given)) in recorded.iter().zip(data_settings(&request, limit)) {
        expect_same(flag, run, &given)?;
    }
    if recipe.epochs < config.finished_epochs {
        return Err(Error::Usage(format!(
            "expected --epochs of at least {}, which the run in {} has finished already, found {}; --epochs is the total",
            config.finished_epochs,
            folder.display(),
            recipe.epochs
        )));
    }
    expect_stop(args, &recipe, config.finished_epochs)?;

    let source = args.data.source.as_deref().unwrap_or(&config.data.source);
    let mut data = load_data(source, &request)?;
    data.notes.iter().try_for_each(|note| say_wrapped(note))?;
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

    let requested = args.device.as_deref().unwrap_or(&config.device.requested);
    let options = Options {
        family: args.kernels.or(config.device.family),
        explicit_conv: args
            .conv
            .map_or(config.device.explicit_conv, |conv| conv == Conv::Explicit),
        // Never measured anew: the tiles were chosen when the run began.
        choices: config.device.products.clone(),
        ..Options::of(&recipe)
    };
    let device = open(requested, args.profile)?;
    device.expect_kernels(&options)?;
    if let Some(change) = schedule_change(&config, recipe.epochs) {
        say_wrapped(&change)?;
    }
    let changed = run.config_mut();
    changed.recipe.epochs = recipe.epochs;
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
    if !args.no_check {
        device.check(&options)?;
    }
    let recipe = &run.config().recipe;
    if !args.no_tune && options.choices.is_empty() {
        let (choices, notes) = measure(device, run.model(), recipe, &options)?;
        options.choices = choices;
        notes.iter().try_for_each(|note| say_wrapped(note))?;
    }
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
fn schedule_change(config: &Config, epochs: usize) -> Option<String> {
    let (recipe, finished) = (&config.recipe, config.finished_epochs);
    if recipe.schedule == Schedule::Constant || recipe.epochs == epochs {
        return None;
    }
    let per_epoch = config
        .data
        .training_images
        .div_ceil(recipe.batch_size.max(1));
    let lr = |step: usize, epochs: usize| {
        let total = (per_epoch * epochs) as u64;
        recipe.schedule.lr_at(recipe.lr, step as u64, total)
    };
    let [.., (_, schedule), _] = settings(recipe);
    let next = per_epoch * finished;
    let rate = match next.checked_sub(1) {
        Some(last) if finished < epochs => format!(
            ", lr goes from {:.2e} to {:.2e}",
            lr(last, recipe.epochs),
            lr(next, epochs)
        ),
        _ => String::new(),
    };
    Some(format!(
        "schedule {schedule} now spans {epochs} epochs, not {}{rate}",
        recipe.epochs
    ))
}

/// The recipe with the flags' values in place of the model's.
///
/// # Errors
/// [`Error::Usage`] for values out of range, and for a momentum without sgd.
fn override_recipe(mut recipe: Recipe, args: &TrainArgs) -> Result<Recipe> {
    let check = |good: bool, flag: &str, expected: &str, found: &dyn Display| {
        if good {
            return Ok(());
        }
        Err(Error::Usage(format!(
            "expected {flag} {expected}, found {found}; leave it out for the model's own"
        )))
    };
    let is_sgd = matches!(recipe.optimizer, Optimizer::Sgd { .. });
    match args.optimizer {
        Some(OptimizerName::Sgd) if !is_sgd => {
            recipe.lr = 0.05;
            recipe.optimizer = Optimizer::Sgd {
                momentum: 0.9,
                nesterov: false,
                weight_decay: 0.0,
            };
        }
        Some(OptimizerName::Adamw) if is_sgd => {
            recipe.lr = 0.001;
            recipe.optimizer = Optimizer::Adamw {
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.01,
            };
        }
        _ => {}
    }
    if let Some(given) = args.momentum {
        check(
            (0.0..1.0).contains(&given),
            "--momentum",
            "from 0 to below 1",
            &given,
        )?;
        match &mut recipe.optimizer {
            Optimizer::Sgd { momentum, .. } | Optimizer::Muon { momentum, .. } => *momentum = given,
            Optimizer::Adamw { .. } => check(false, "--momentum", "with sgd only", &"adamw")?,
            Optimizer::Lion { .. } => check(false, "--momentum", "with sgd only", &"lion")?,
        }
    }
    if let Some(given) = args.weight_decay {
        let good = given.is_finite() && given >= 0.0;
        check(
            good,
            "--weight-decay",
            "of at least 0 and at most 3.4e38",
            &given,
        )?;
        match &mut recipe.optimizer {
            Optimizer::Sgd { weight_decay, .. }
            | Optimizer::Adamw { weight_decay, .. }
            | Optimizer::Lion { weight_decay, .. }
            | Optimizer::Muon { weight_decay, .. } => {
                *weight_decay = given;
            }
        }
    }
    if let Some(lr) = args.lr {
        // What the steps use is the f32 of it.
        let good = (lr as f32) > 0.0 && (lr as f32).is_finite();
        check(
            good,
            "--lr",
            "above 0 that 32 bits hold (1.2e-38 to 3.4e38)",
            &lr,
        )?;
        recipe.lr = lr;
    }
    if let Some(epochs) = args.epochs {
        check(epochs > 0, "--epochs", "of at least 1", &epochs)?;
        recipe.epochs = epochs;
    }
    if let Some(batch_size) = args.batch_size {
        check(batch_size > 0, "--batch-size", "of at least 1", &batch_size)?;
        recipe.batch_size = batch_size;
    }
    if let Some(schedule) = args.schedule {
        recipe.schedule = schedule;
    }
    Ok(recipe)
}

/// What a resume may not change, by flag.
fn settings(recipe: &Recipe) -> [(&'static str, String); 6] {
    let (optimizer, momentum, weight_decay) = match recipe.optimizer {
        Optimizer::Sgd {
            momentum,
            weight_decay,
            ..
        } => ("sgd", momentum, weight_decay),
        Optimizer::Adamw {
            beta1,
            weight_decay,
            ..
        } => ("adamw", beta1, weight_decay),
        Optimizer::Lion {
            beta1,
            weight_decay,
            ..
        } => ("lion", beta1, weight_decay),
        Optimizer::Muon {
            momentum,
            weight_decay,
            ..
        } => ("muon", momentum, weight_decay),
    };
    let schedule = match recipe.schedule {
        Schedule::Constant => "constant",
        Schedule::Cosine => "cosine",
        Schedule::OneCycle => "onecycle",
    };
    [
        ("--optimizer", optimizer.into()),
        ("--lr", recipe.lr.to_string()),
        ("--momentum", momentum.to_string()),
        ("--weight-decay", weight_decay.to_string()),
        ("--schedule", schedule.into()),
        ("--batch-size", recipe.batch_size.to_string()),
    ]
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

/// Opens the device and says so where the CPU stands in; refuses one that cannot be profiled.
fn open(requested: &str, profile: bool) -> Result<Device> {
    let device = Device::open(requested)?;
    if let Some(notice) = device.notice() {
        say_wrapped(notice)?;
    }
    let timed = device.gpu().is_some_and(|gpu| gpu.report().timestamp_query);
    if profile && !timed {
        return Err(Error::Usage(format!(
            "expected an adapter with timestamp queries for --profile, found {}; leave it out",
            device.description()
        )));
    }
    Ok(device)
}

/// On a real GPU: the fastest tiles for the model's products, measured once per adapter and driver,
/// and what there is to say about it, a line each.
pub(super) fn measure(
    device: &Device,
    model: &Model,
    recipe: &Recipe,
    options: &Options,
) -> Result<(Vec<Product>, Vec<String>)> {
    let Some(gpu) = device.gpu().filter(|gpu| !gpu.report().software) else {
        return Ok((Vec::new(), Vec::new()));
    };
    let mode = Mode::Train(recipe.optimizer);
    let target = Target::Gpu(gpu.report());
    let plan = Plan::new(model, recipe.batch_size, mode, options, target)?;
    let products: Vec<Product> = plan.products().into_iter().map(|(_, p)| p).collect();
    let style = ProgressStyle::with_template("measuring kernels [{bar:30}] {pos}/{len}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(products.len() as u64).with_style(style);
    let folder = tune::cache_folder();
    let tuned = tune::choose(
        gpu,
        &products,
        folder.as_deref(),
        tune::BUDGET,
        &mut |done| bar.set_position(done as u64),
    )?;
    bar.finish_and_clear();
    Ok((tuned.choices, tuned.notes))
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
        kernels: Vec::new(),
        products: options.choices.clone(),
    }
}

/// What is about to happen, above the model's table.
fn describe(config: &Config) -> String {
    let (data, model, recipe) = (&config.data, &config.model, &config.recipe);
    let settings = settings(recipe);
    let [(_, optimizer), (_, lr), .., (_, schedule), (_, batch)] = &settings;
    format!(
        "device   {}\ndata     {}: {} training{} and {} test images of {} in {} classes\nrecipe   {optimizer}, {schedule} learning rate {lr}, batch size {batch}, epochs {}, seed {}",
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
        recipe.epochs,
        config.seed
    )
}
