//! `wgrad train`: a new run, or an earlier one continued.

use super::device::Device;
use super::progress::Progress;
use super::{say, table};
use crate::cli::{Conv, OptimizerName, TrainArgs};
use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use serde_json::json;
use std::fmt::Display;
use std::path::{Path, absolute};
use wgrad::data::{self, Normalization, Splits};
use wgrad::model::recipe::{Optimizer, Recipe, Schedule};
use wgrad::model::{Model, load, summary};
use wgrad::network::{self, Options, Product};
use wgrad::report::profile::Profile;
use wgrad::train::{Config, DataRecord, DeviceRecord, Engine, ModelRecord, Run, train};
use wgrad::{Error, Result, tune};

pub fn run(args: &TrainArgs) -> Result<()> {
    let (mut run, data, mut engine) = match &args.resume {
        Some(folder) => resume(folder, args)?,
        None => start(args)?,
    };
    let Config { recipe, .. } = run.config();
    let total = recipe.epochs;
    say(&describe(run.config()))?;
    say(&summary(run.model()))?;

    let mut progress = Progress::new(total, &data, args.trace_transfers);
    let trained = train(&mut run, data, engine.as_mut(), &mut progress);
    progress.bar.finish_and_clear();
    trained?;

    if progress.epochs == 0 {
        say(&format!(
            "nothing to train: all {total} epochs are finished; raise --epochs to go on"
        ))?;
    }
    if let Some(hash) = &run.config().parameter_sha256 {
        say(&format!("weights  sha256 {hash}"))?;
    }
    if let (true, Some(network)) = (args.profile && progress.epochs > 0, engine.network()) {
        // The steps that are timed change the parameters, which by now are on disk.
        let profile = Profile::of(network)?;
        let file = run.folder().join("profile.json");
        profile.write_trace(&network.gpu().report().name, &file)?;
        say(&table(&Profile::HEADER, profile.rows(), 2))?;
        say(&format!("profile  {}", file.display()))?;
    }
    say(&format!("run      {}", run.folder().display()))
}

/// A new run: everything is checked before its folder is made.
fn start(args: &TrainArgs) -> Result<(Run, Splits, Box<dyn Engine>)> {
    let definition = load(args.model.as_deref().unwrap_or("default"))?;
    let recipe = override_recipe(definition.recipe.clone(), args)?;
    let source = args.data.as_deref().unwrap_or("mnist");
    let data = load_data(source, args.limit)?;
    let model = definition.resolve(data.train.shape, data.train.classes)?;
    if recipe.batch_size > data.train.len() {
        return Err(Error::Usage(format!(
            "expected a batch size of at most the {} training images, found {}; use --batch-size {0} or smaller",
            data.train.len(),
            recipe.batch_size
        )));
    }

    let requested = args.device.as_deref().unwrap_or("auto");
    let mut options = Options {
        family: args.kernels,
        explicit_conv: args.conv == Some(Conv::Explicit),
        ..Options::default()
    };
    let device = open(requested, args.profile)?;
    if !args.no_tune {
        let (choices, notes) = measure(&device, &model, recipe.batch_size, &options)?;
        options.choices = choices;
        notes.iter().try_for_each(|note| say(note))?;
    }
    let engine = device.engine(&model, &recipe, &options)?;
    let config = Config {
        wgrad: env!("CARGO_PKG_VERSION").into(),
        model: ModelRecord {
            name: model.name.clone(),
            input: model.input,
            classes: model.classes,
            class_names: data.train.class_names.clone(),
            parameters: model.parameter_count(),
            architecture: definition.text.clone(),
        },
        data: DataRecord {
            source: absolute_source(source)?,
            limit: args.limit,
            training_images: data.train.len(),
            test_images: data.test.len(),
        },
        normalization: Normalization::of(&data.train),
        recipe,
        seed: args.seed.unwrap_or(1),
        device: device_record(requested, engine.as_ref(), &options),
        finished_epochs: 0,
        parameter_sha256: None,
    };
    let run = Run::create(args.out.as_deref(), config)?;
    Ok((run, data, engine))
}

/// An earlier run. What is trained stays as it was; how long and on which device may change.
fn resume(folder: &Path, args: &TrainArgs) -> Result<(Run, Splits, Box<dyn Engine>)> {
    let mut run = Run::open(folder)?;
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
    let count = |limit: Option<usize>| limit.map_or("none".into(), |n| n.to_string());
    let limit = args.limit.or(config.data.limit);
    expect_same("--limit", &count(config.data.limit), &count(limit))?;
    if recipe.epochs < config.finished_epochs {
        return Err(Error::Usage(format!(
            "expected --epochs of at least {}, which the run in {} has finished already, found {}; --epochs is the total",
            config.finished_epochs,
            folder.display(),
            recipe.epochs
        )));
    }

    let source = args.data.as_deref().unwrap_or(&config.data.source);
    let data = load_data(source, limit)?;
    run.expect_data(source, &data.train)?;
    let images = format!("{source} with training images:");
    expect_same(&images, &config.data.training_images, &data.train.len())?;

    let requested = args.device.as_deref().unwrap_or(&config.device.requested);
    let options = Options {
        family: args.kernels.or(config.device.family),
        explicit_conv: args
            .conv
            .map_or(config.device.explicit_conv, |conv| conv == Conv::Explicit),
        // Never measured anew: the tiles were chosen when the run began.
        choices: config.device.products.clone(),
        ..Options::default()
    };
    let device = open(requested, args.profile)?;
    let engine = device.engine(run.model(), &recipe, &options)?;
    let changed = run.config_mut();
    changed.recipe.epochs = recipe.epochs;
    changed.device = device_record(requested, engine.as_ref(), &options);
    Ok((run, data, engine))
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
            Optimizer::Sgd { momentum, .. } => *momentum = given,
            Optimizer::Adamw { .. } => check(false, "--momentum", "with sgd only", &"adamw")?,
        }
    }
    if let Some(given) = args.weight_decay {
        let good = given.is_finite() && given >= 0.0;
        check(good, "--weight-decay", "of at least 0", &given)?;
        match &mut recipe.optimizer {
            Optimizer::Sgd { weight_decay, .. } | Optimizer::Adamw { weight_decay, .. } => {
                *weight_decay = given;
            }
        }
    }
    if let Some(lr) = args.lr {
        // What the steps use is the f32 of it.
        let good = (lr as f32) > 0.0 && (lr as f32).is_finite();
        check(good, "--lr", "above 0 and finite", &lr)?;
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
        } => ("sgd", momentum, weight_decay),
        Optimizer::Adamw {
            beta1,
            weight_decay,
            ..
        } => ("adamw", beta1, weight_decay),
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

fn load_data(source: &str, limit: Option<usize>) -> Result<Splits> {
    let mut data = data::load(source)?;
    if let Some(limit) = limit {
        data.train.truncate(limit)?;
    }
    Ok(data)
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
        say(notice)?;
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
    batch_size: usize,
    options: &Options,
) -> Result<(Vec<Product>, Vec<String>)> {
    let Some(gpu) = device.gpu().filter(|gpu| !gpu.report().software) else {
        return Ok((Vec::new(), Vec::new()));
    };
    let products = network::products(model, batch_size, options, gpu.report())?;
    let products: Vec<Product> = products.into_iter().map(|(_, product)| product).collect();
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

fn device_record(requested: &str, engine: &dyn Engine, options: &Options) -> DeviceRecord {
    DeviceRecord {
        requested: requested.into(),
        description: engine.description(),
        adapter: engine.gpu().map(|gpu| json!(gpu.report())),
        family: options.family,
        explicit_conv: options.explicit_conv,
        kernels: engine
            .products()
            .iter()
            .map(|(layer, product)| format!("{layer} {product}"))
            .collect(),
        products: engine.products().iter().map(|(_, p)| *p).collect(),
    }
}

/// What is about to happen, above the model's table.
fn describe(config: &Config) -> String {
    let (data, model, recipe) = (&config.data, &config.model, &config.recipe);
    let settings = settings(recipe);
    let [(_, optimizer), (_, lr), .., (_, schedule), (_, batch)] = &settings;
    format!(
        "device   {}\ndata     {}: {} training and {} test images of {} in {} classes\nrecipe   {optimizer}, {schedule} learning rate {lr}, batch size {batch}, epochs {}, seed {}",
        config.device.description,
        data.source,
        HumanCount(data.training_images as u64),
        HumanCount(data.test_images as u64),
        model.input,
        model.classes,
        recipe.epochs,
        config.seed
    )
}
