//! What a command line says about model and recipe, and `wgrad recipes`.

use super::{say, table};
use crate::cli::{RecipeArgs, RecipesArgs};
use wgrad::model::recipe::Recipe;
use wgrad::model::recipe_file::{RecipeFile, SHIPPED, Settings, load_recipe};
use wgrad::model::{Definition, Loss, load};
use wgrad::{Error, Result};

/// What a resume may change: how long, and what does not touch what is trained.
const FREE: [&str; 3] = ["epochs", "patience", "views"];

/// What was asked for, each setting with its place.
pub(super) struct Asked {
    /// The model, where a flag or the recipe file names one.
    pub model: Option<String>,
    pub recipe: Option<RecipeFile>,
    flags: Settings,
}

impl Asked {
    /// # Errors
    /// As [`load_recipe`] and [`Settings::set`].
    pub fn of(model: Option<&String>, args: &RecipeArgs) -> Result<Asked> {
        let recipe = args.recipe.as_deref().map(load_recipe).transpose()?;
        let mut flags = Settings::default();
        for text in &args.set {
            let (key, value) = text.split_once('=').ok_or_else(|| {
                Error::Usage(format!(
                    "--set: expected KEY=VALUE, such as lr=0.01, found {text}"
                ))
            })?;
            let (key, value) = (key.trim(), value.trim());
            flags.set(&format!("--set {key}"), key, value)?;
        }
        for (key, value) in args.values() {
            if let Some(value) = value {
                flags.set(&flag(key), key, value)?;
            }
        }
        if args.class_weights.is_some() {
            // A file's are read when the names of the classes are known.
            flags.set("--class-weights", "class_weights", "balanced")?;
        }
        if !args.freeze.is_empty() {
            flags.set("--freeze", "freeze", &format!("{:?}", args.freeze))?;
        }
        let named = || recipe.as_ref().and_then(|recipe| recipe.model.clone());
        Ok(Asked {
            model: model.cloned().or_else(named),
            recipe,
            flags,
        })
    }

    /// Whether flags say something about `key`.
    pub fn has(&self, key: &str) -> bool {
        self.flags.has(key)
    }

    /// Whether the value of `key` that no flag sets is of a file of the user's own, a recipe or a model,
    /// rather than of what ships.
    pub fn is_own(&self, key: &str) -> bool {
        match &self.recipe {
            Some(recipe) if recipe.settings.has(key) => {
                !SHIPPED.iter().any(|(name, _)| *name == recipe.name)
            }
            _ => self.model.as_ref().is_some_and(|m| m.ends_with(".toml")),
        }
    }

    /// The model, or the one called `default` where none was named, with its recipe as asked for.
    ///
    /// # Errors
    /// As [`load`] and [`Definition::lay_over`].
    pub fn definition(&self, default: &str) -> Result<Definition> {
        let mut definition = load(self.model.as_deref().unwrap_or(default))?;
        definition.lay_over(&self.layers())?;
        Ok(definition)
    }

    /// The recipe of the run whose `run.json` is at `origin` with what was asked for in its place.
    ///
    /// # Errors
    /// As [`Settings::recipe`].
    pub fn over(&self, recipe: &Recipe, loss: Loss, origin: &str) -> Result<Recipe> {
        let mut settings = Settings::of_recipe(recipe, origin);
        for layer in self.layers() {
            settings.lay_over(layer);
        }
        settings.recipe(loss)
    }

    fn layers(&self) -> Vec<&Settings> {
        let file = self.recipe.iter().map(|recipe| &recipe.settings);
        file.chain([&self.flags]).collect()
    }
}

/// The flag that sets a recipe's key: one of its own, or `--set`.
fn flag(key: &str) -> String {
    let none = RecipeArgs::default();
    let own = none.values();
    if ["freeze", "class_weights"].contains(&key) || own.iter().any(|(name, _)| *name == key) {
        format!("--{}", key.replace('_', "-"))
    } else {
        format!("--set {key}")
    }
}

/// The first setting that a resume may not change and that differs: the flag, the run's value and the
/// other.
pub(super) fn difference(run: &Recipe, given: &Recipe) -> Option<[String; 3]> {
    let (run, given) = (run.settings(), given.settings());
    let value = |of: &[(String, String)], key: &str| {
        let found = of.iter().find(|(name, _)| name == key);
        found.map_or("none".into(), |(_, value)| value.trim_matches('"').into())
    };
    let keys = run.iter().chain(&given).map(|(key, _)| key.as_str());
    keys.filter(|key| !FREE.contains(key))
        .map(|key| [flag(key), value(&run, key), value(&given, key)])
        .find(|[_, run, given]| run != given)
}

/// One line about a recipe: what is always of interest, and what is not as it is by default.
pub(super) fn describe(recipe: &Recipe) -> String {
    let plain = Recipe {
        optimizer: recipe.optimizer,
        lr: recipe.lr,
        schedule: recipe.schedule.clone(),
        epochs: recipe.epochs,
        batch_size: recipe.batch_size,
        ..Recipe::default()
    };
    let all = recipe.settings();
    let optimizer = all.first().map_or("", |(_, value)| value.trim_matches('"'));
    let mut line = format!(
        "{optimizer}, {} learning rate {}, batch size {}, epochs {}",
        recipe.schedule.name(),
        recipe.lr,
        recipe.batch_size,
        recipe.epochs
    );
    let plain = plain.settings();
    for (key, value) in all.iter().filter(|setting| !plain.contains(setting)) {
        line += &format!(", {key} {}", value.trim_matches('"'));
    }
    line
}

/// `wgrad recipes`
pub fn run(args: &RecipesArgs) -> Result<()> {
    if let Some(name) = &args.name {
        return say(load_recipe(name)?.text.trim_end());
    }
    let rows = SHIPPED.iter().map(|(name, _)| {
        let recipe = load_recipe(name)?;
        Ok(vec![
            recipe.name,
            recipe.model.unwrap_or("any".into()),
            recipe.description.unwrap_or_default(),
        ])
    });
    let rows: Vec<_> = rows.collect::<Result<_>>()?;
    say(&table(&["recipe", "model", ""], rows, 3))?;
    say("train    wgrad train --recipe NAME --data DIR\nchange   wgrad recipes NAME > mine.toml")
}
