//! `wgrad lr-find`: a learning rate to begin with, and a plot of why.

use super::progress::{self, Pulse};
use super::train::{Planned, plan, ready};
use super::{note, say, say_json, say_wrapped};
use crate::cli::{LrFindArgs, TrainArgs};
use serde_json::json;
use wgrad::engine::Split;
use wgrad::report::plot;
use wgrad::train::{Range, first_parameters, range_test};
use wgrad::{Error, Result};

/// What --to is of --from.
const WIDTH: f64 = 1e7;

pub fn run(args: &LrFindArgs) -> Result<()> {
    if args.out.extension().is_none_or(|e| e != "svg") {
        return Err(Error::Usage(format!(
            "expected --out to name an SVG file, found {}; give it the ending .svg",
            args.out.display()
        )));
    }
    let train = TrainArgs {
        model: args.model.clone(),
        data: args.data.clone(),
        recipe: args.recipe.clone(),
        device: args.device.clone(),
        seed: args.seed,
        ..TrainArgs::default()
    };
    let Planned {
        config,
        model,
        mut data,
        device,
        mut options,
        mut notes,
        ..
    } = plan(&train)?;
    let recipe = &config.recipe;
    let from = args.from.unwrap_or(Range::first(&recipe.optimizer));
    let range = Range::new(from, args.to.unwrap_or(from * WIDTH), args.steps)?;
    notes.extend(ready(&device, &model, recipe, &mut options, &train)?);
    if !args.json {
        notes.iter().try_for_each(|line| note(line))?;
    }
    let mut engine = device.engine(&model, recipe, &options)?;
    engine.set_parameters(&first_parameters(&model, &config, &data.train))?;
    let images = std::mem::take(&mut data.train.images);
    let labels = &data.train.labels;
    engine.upload_dataset(Split::Train, images, labels, &config.scale_and_shift())?;

    let bar = progress::bar(range.steps as u64, "step {pos}/{len}", "{msg}");
    let pulse = Pulse::start(&bar, || None);
    let progress = &mut |step: usize, loss: f64| {
        bar.set_position(step as u64);
        bar.set_message(format!("loss {loss:.4}"));
    };
    let tested = range_test(
        &mut engine,
        &data.train,
        recipe,
        config.seed,
        &range,
        progress,
    );
    drop(pulse);
    bar.finish_and_clear();
    let test = tested?;

    let optimizer = recipe.settings().swap_remove(0).1.replace('"', "");
    let title = format!(
        "{} on {}: learning rates of {optimizer}, batch size {}",
        config.model.name, data.name, recipe.batch_size
    );
    plot::range_test(&args.out, &title, &test, test.suggested())?;
    if args.json {
        return say_json(&json!({
            "model": config.model.name,
            "data": config.data.source,
            "device": engine.description(),
            "recipe": recipe,
            "seed": config.seed,
            "range": range,
            "suggested": test.suggested(),
            "steepest": test.steepest,
            "lowest": test.lowest,
            "diverged": test.diverged,
            "points": test.points,
            "plot": args.out,
        }));
    }
    let first = test.points.first().map_or(f64::NAN, |point| point.lr);
    let last = test.points.last().map_or(f64::NAN, |point| point.lr);
    let end = if test.diverged {
        ", where the loss was four times its best"
    } else {
        ""
    };
    say_wrapped(&format!(
        "tested   {} steps from {first:.1e} to {last:.1e}{end}",
        test.points.len()
    ))?;
    if let Some(lr) = test.steepest {
        say(&format!("steepest {lr:.1e}, where the loss falls fastest"))?;
    }
    let more = match test.is_cut_off() {
        true => ", the last one tested: try a larger --to",
        false => "",
    };
    say_wrapped(&format!("lowest   {:.1e}{more}", test.lowest))?;
    match test.suggested() {
        Some(lr) => say_wrapped(&format!(
            "suggest  {lr:.1e}, a tenth of where the loss is lowest: wgrad train {}--lr {lr:.1e}",
            repeated(args)
        ))?,
        None => {
            say_wrapped("suggest  nothing: the loss does not fall; begin with a smaller --from")?
        }
    }
    say(&format!("plot     {}", args.out.display()))
}

/// The flags that a training takes over, but for the learning rate.
fn repeated(args: &LrFindArgs) -> String {
    let (data, recipe) = (&args.data, &args.recipe);
    let mut flags: Vec<(String, String)> = Vec::new();
    let mut add = |flag: &str, value: Option<String>| {
        flags.extend(value.map(|value| (flag.replace('_', "-"), value)));
    };
    add("model", args.model.clone());
    add("recipe", recipe.recipe.clone());
    add("data", data.source.clone());
    add("device", args.device.name.clone());
    add(
        "image-size",
        data.image_size.map(|[h, w]| format!("{h}x{w}")),
    );
    add("validation", data.validation.map(|share| share.to_string()));
    add("test", data.test.map(|share| share.to_string()));
    add("split-seed", data.split_seed.map(|seed| seed.to_string()));
    add("limit", data.limit.map(|limit| limit.to_string()));
    for (key, value) in recipe.values() {
        add(key, value.filter(|_| key != "lr").cloned());
    }
    add("class-weights", recipe.class_weights.clone());
    for pattern in &recipe.freeze {
        add("freeze", Some(pattern.clone()));
    }
    for setting in &recipe.set {
        let is_lr = setting
            .split('=')
            .next()
            .is_some_and(|key| key.trim() == "lr");
        add("set", Some(setting.clone()).filter(|_| !is_lr));
    }
    add("seed", args.seed.map(|seed| seed.to_string()));
    let plain = |c: char| c.is_alphanumeric() || "-_./,:=+\\".contains(c);
    let texts = flags.into_iter().map(|(flag, value)| {
        let quote = if value.chars().all(plain) { "" } else { "\"" };
        // One flag takes its value by an equals sign alone.
        let between = if flag == "nesterov" { "=" } else { " " };
        format!("--{flag}{between}{quote}{value}{quote} ")
    });
    texts.collect()
}
