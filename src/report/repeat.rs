//! The command that repeats a run.

use crate::error::Result;
use crate::model::recipe::Recipe;
use crate::model::recipe_file::Settings;
use crate::model::{Definition, SHIPPED, default_for, load};
use crate::train::{Config, EpochRecord};
use std::path::Path;

/// What leads to the same weights again.
#[derive(Clone, Debug, PartialEq)]
pub struct Repeat {
    /// The words of the command, `wgrad` first.
    pub words: Vec<String>,
    /// Why it leads elsewhere, a sentence each; none where it does not, on the same device, driver and
    /// wgrad.
    pub doubts: Vec<String>,
}

impl Repeat {
    /// As a POSIX shell takes it.
    pub fn line(&self) -> String {
        let words: Vec<String> = self.words.iter().map(|word| quoted(word)).collect();
        words.join(" ")
    }
}

/// The command for a run, with every flag that differs from the defaults. `model` is a file that holds the
/// architecture, for one that does not ship.
pub fn repeat(config: &Config, metrics: &[EpochRecord], model: &Path) -> Repeat {
    let mut words: Vec<String> = vec!["wgrad".into(), "train".into()];
    let mut doubts = Vec::new();
    let shipped = SHIPPED
        .iter()
        .find(|(_, text)| *text == config.model.architecture)
        .map(|(name, _)| *name);
    match shipped {
        Some(name) if name == default_for(config.model.input) => {}
        Some(name) => words.extend(["--model".into(), name.into()]),
        None => words.extend(["--model".into(), model.display().to_string()]),
    }
    let data = &config.data;
    let mut flag = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            words.extend([format!("--{name}"), value]);
        }
    };
    flag(
        "data",
        (data.source != "mnist").then(|| data.source.clone()),
    );
    flag(
        "image-size",
        data.image_size.map(|[h, w]| format!("{h}x{w}")),
    );
    flag("validation", data.validation.map(|x| x.to_string()));
    flag("test", data.test.map(|x| x.to_string()));
    let seed = data.split_seed;
    flag("split-seed", (seed != 0).then(|| seed.to_string()));
    flag("limit", data.limit.map(|n| n.to_string()));
    let device = &config.device;
    let asked = !["", "auto"].contains(&device.requested.as_str());
    flag("device", asked.then(|| device.requested.clone()));
    flag("seed", (config.seed != 1).then(|| config.seed.to_string()));
    flag("init", config.init.as_ref().map(|init| init.source.clone()));
    flag("conv", device.explicit_conv.then(|| "explicit".into()));
    flag("kernels", device.family.map(|family| family.to_string()));
    let planned = config.recipe.epochs;
    let finished = config.finished_epochs;
    let patient = config.recipe.patience.is_some();
    let stopped = finished > 0 && finished < planned && !patient;
    flag("stop-after", stopped.then(|| finished.to_string()));
    match recipe_flags(config, shipped) {
        Ok(flags) => words.extend(flags),
        Err(why) => doubts.push(format!(
            "The command does not lead to the run's recipe ({why}); its values are in the configuration below."
        )),
    }
    if let Some(init) = &config.init {
        doubts.push(format!(
            "It needs the weights that the run started from, a file with the SHA-256 {}.",
            init.sha256
        ));
    }
    if rates_differ(config, metrics) {
        doubts.push(
            "The run was resumed with another number of planned epochs, which the schedule of the learning rate spans: one command alone does not repeat it.".into(),
        );
    }
    if config.format < 2 {
        doubts.push(
            "The run was written by an older wgrad, whose kernels may have rounded differently."
                .into(),
        );
    }
    Repeat { words, doubts }
}

/// The flags that make the recipe of the model that ships as `name`, or of the run's own file, the run's.
fn recipe_flags(config: &Config, name: Option<&str>) -> std::result::Result<Vec<String>, String> {
    let base = || -> Result<Definition> {
        match name {
            Some(name) => load(name),
            None => Definition::parse(&config.model.architecture, "the model file"),
        }
    };
    let definition = base().map_err(|e| e.to_string())?;
    let (own, wanted) = (definition.recipe.settings(), config.recipe.settings());
    // A batch size that equals the file's is made smaller for few images unless it is asked for.
    let few = config.data.training_images < 16 * config.recipe.batch_size;
    let differs: Vec<&(String, String)> = wanted
        .iter()
        .filter(|setting| !own.contains(setting) || few && setting.0 == "batch_size")
        .collect();
    // Another optimiser or schedule takes the constants of the one before with it.
    let mut why = String::new();
    for settings in [differs, wanted.iter().collect()] {
        match laid_over(base(), &settings) {
            Ok(recipe) if recipe == config.recipe => {
                return Ok(settings.into_iter().flat_map(as_flag).collect());
            }
            Ok(_) => why = "it leaves a value of the model's in its place".into(),
            Err(e) => why = e.to_string(),
        }
    }
    Err(why)
}

fn laid_over(base: Result<Definition>, settings: &[&(String, String)]) -> Result<Recipe> {
    let mut definition = base?;
    let mut flags = Settings::default();
    for (key, value) in settings {
        flags.set(key, key, value)?;
    }
    definition.lay_over(&[&flags])?;
    Ok(definition.recipe)
}

/// The keys that have flags of their own, which take numbers and plain words.
const FLAGS: [&str; 21] = [
    "epochs",
    "batch_size",
    "micro_batch",
    "shards",
    "sync_batch_norm",
    "optimizer",
    "lr",
    "momentum",
    "nesterov",
    "weight_decay",
    "bias_lr",
    "head_lr",
    "schedule",
    "warm_up",
    "clip_norm",
    "average",
    "label_smoothing",
    "sampler",
    "views",
    "patience",
    "precision",
];

fn as_flag((key, value): &(String, String)) -> Vec<String> {
    let word = value.trim_matches('"');
    match FLAGS.contains(&key.as_str()) {
        // These take their value by an equals sign alone.
        true if ["nesterov", "sync_batch_norm"].contains(&key.as_str()) => {
            vec![format!("--{}={word}", key.replace('_', "-"))]
        }
        true => vec![format!("--{}", key.replace('_', "-")), word.into()],
        false => vec!["--set".into(), format!("{key}={value}")],
    }
}

/// Whether the learning rates that were recorded are others than the recipe gives.
fn rates_differ(config: &Config, metrics: &[EpochRecord]) -> bool {
    let images = config.data.training_images;
    let per_epoch = images.div_ceil(config.recipe.batch_size.max(1));
    metrics.iter().any(|record| {
        let expected = config
            .recipe
            .lr_at(record.step.saturating_sub(1), per_epoch);
        record.lr.is_finite() && (record.lr - expected).abs() > 1e-9 * config.recipe.lr.abs()
    })
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,:=+@%".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.into(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quoted("a/b-c_1.toml"), "a/b-c_1.toml");
        assert_eq!(quoted(""), "''");
        assert_eq!(quoted("it's $HOME"), "'it'\\''s $HOME'");
        assert_eq!(quoted("Straße"), "'Straße'");
    }
}
