//! Recipes as text: the `[recipe]` of a model file, recipe files, and what a command line says. All of
//! them set the same keys, so all of them become [`Settings`], which lie one over the other and are read
//! as a [`Recipe`] in the end, every mistake with its `file:line` or its flag.
//!
//! ```toml
//! description = "MNIST in a minute" # for `wgrad recipes`
//! model = "lenet5"                  # or a file beside this one
//! optimizer = "adamw"
//! lr = 0.004
//! schedule = "onecycle"
//! epochs = 3
//!
//! [augment]
//! rotate = 10
//! ```

use super::Loss;
use super::augment::Augment;
use super::file::{FINITE, MAX_ELEMENTS, Source};
use super::keys::{Table, Value};
use super::recipe::{
    ClassWeights, Exchanged, Groups, Optimizer, Precision, Recipe, Sampler, Schedule, Views,
};
use crate::error::{Error, Result};
use std::fmt::Display;
use std::ops::Range;
use std::path::Path;

/// The recipes that come with the binary: name and text of the file in `recipes/`.
pub const SHIPPED: &[(&str, &str)] = &[
    ("best", include_str!("../../recipes/best.toml")),
    ("tiny", include_str!("../../recipes/tiny.toml")),
    ("cnn-bn", include_str!("../../recipes/cnn-bn.toml")),
    ("cifar-fast", include_str!("../../recipes/cifar-fast.toml")),
];

/// Every key of a recipe but those of `augment`, which are [`Augment`]'s fields.
const KEYS: [&str; 33] = [
    "optimizer",
    "lr",
    "momentum",
    "nesterov",
    "beta1",
    "beta2",
    "epsilon",
    "weight_decay",
    "other_lr",
    "other_momentum",
    "bias_lr",
    "head_lr",
    "bias_decay",
    "freeze",
    "schedule",
    "step_epochs",
    "step_factor",
    "peak_at",
    "warm_up",
    "epochs",
    "batch_size",
    "micro_batch",
    "shards",
    "sync_batch_norm",
    "exchange",
    "clip_norm",
    "average",
    "label_smoothing",
    "class_weights",
    "sampler",
    "views",
    "patience",
    "precision",
];

/// Keys that only some optimisers have, with them.
const OPTIMIZER_KEYS: [(&str, &[&str]); 7] = [
    ("momentum", &["sgd", "muon"]),
    ("nesterov", &["sgd"]),
    ("beta1", &["adamw", "lion"]),
    ("beta2", &["adamw", "lion"]),
    ("epsilon", &["adamw"]),
    ("other_lr", &["muon"]),
    ("other_momentum", &["muon"]),
];

/// Keys that only some schedules have, with them.
const SCHEDULE_KEYS: [(&str, &[&str]); 3] = [
    ("step_epochs", &["step"]),
    ("step_factor", &["step"]),
    ("peak_at", &["triangular"]),
];

/// What follows from an optimiser besides, so that another one does not take it over.
const OPTIMIZERS_OWN: [&str; 5] = ["lr", "weight_decay", "bias_lr", "head_lr", "bias_decay"];

/// Where a value stands.
#[derive(Clone, Debug)]
enum Place {
    Line(String, usize),
    Flag(String),
}

impl Place {
    fn error(&self, what: impl Display) -> Error {
        match self {
            Place::Line(file, line) => Error::Model {
                file: file.clone(),
                line: *line,
                what: what.to_string(),
            },
            Place::Flag(flag) => Error::Usage(format!("{flag}: {what}")),
        }
    }
}

/// A value, as it was written and where.
#[derive(Clone, Debug)]
struct Setting {
    data: Data,
    text: String,
    place: Place,
}

#[derive(Clone, Debug)]
enum Data {
    Boolean(bool),
    Whole(i64),
    Number(f64),
    Text(String),
    Array(Vec<Setting>),
}

/// Values for some of a recipe's keys, each with its place; not held against each other yet.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Keys are dotted: `augment.rotate`. Each is there once.
    entries: Vec<(String, Setting)>,
}

/// A recipe file.
#[derive(Clone, Debug)]
pub struct RecipeFile {
    /// Of a shipped one, or the path.
    pub name: String,
    /// The model that it is for: a name or a path.
    pub model: Option<String>,
    /// One line for people.
    pub description: Option<String>,
    /// What it says, key by key.
    pub settings: Settings,
    /// The whole text of the file.
    pub text: String,
}

/// Reads a recipe: one of [`SHIPPED`] by name, or a file whose path ends in `.toml`.
///
/// # Errors
/// [`Error::Usage`] for an unknown name, [`Error::Io`] for an unreadable file, [`Error::Model`] with the
/// line of the first mistake: TOML syntax, unknown keys, a value of no known type. What values have to
/// be is [`Settings::recipe`]'s.
pub fn load_recipe(spec: &str) -> Result<RecipeFile> {
    if let Some((name, text)) = SHIPPED.iter().find(|(name, _)| *name == spec) {
        return RecipeFile::parse(text, &format!("recipes/{name}.toml"), name);
    }
    if !spec.ends_with(".toml") {
        let names: Vec<&str> = SHIPPED.iter().map(|(name, _)| *name).collect();
        return Err(Error::Usage(format!(
            "unknown recipe '{spec}': expected one of {} or the path of a file that ends in .toml",
            names.join(", ")
        )));
    }
    let text = std::fs::read_to_string(spec).map_err(|e| Error::io("read", Path::new(spec), e))?;
    let mut recipe = RecipeFile::parse(&text, spec, spec)?;
    // Beside the recipe, from wherever it is used.
    let folder = Path::new(spec).parent();
    recipe.model = recipe.model.map(|model| match folder {
        Some(folder) if model.ends_with(".toml") => folder.join(model).display().to_string(),
        _ => model,
    });
    Ok(recipe)
}

impl RecipeFile {
    fn parse(text: &str, origin: &str, name: &str) -> Result<RecipeFile> {
        let source = Source { text, origin };
        let mut table: Table = source.toml()?;
        let mut take = |key: &str| {
            let found = table.0.iter().position(|(name, _)| name.get_ref() == key);
            let taken = found.map(|at| table.0.remove(at).1);
            taken
                .map(|value| match value.get_ref() {
                    Value::Text(line) if !line.trim().is_empty() && !line.contains('\n') => {
                        Ok(line.clone())
                    }
                    _ => Err(source.error(
                        &value.span(),
                        format!("expected `{key}` as a line of text in quotes"),
                    )),
                })
                .transpose()
        };
        let (model, description) = (take("model")?, take("description")?);
        Ok(RecipeFile {
            name: name.into(),
            model,
            description,
            settings: Settings::of_table(&source, &table, &["model", "description"])?,
            text: text.into(),
        })
    }
}

impl Settings {
    /// What a table of a file says, `more` being what else may stand in it.
    ///
    /// # Errors
    /// [`Error::Model`] with the line of an unknown key or a table where a value belongs.
    pub(super) fn of_table(source: &Source, table: &Table, more: &[&str]) -> Result<Settings> {
        let place =
            |span: &Range<usize>| Place::Line(source.origin.into(), source.line(span.start));
        let mut settings = Settings::default();
        settings.add_table(source, table, &place, more)?;
        Ok(settings)
    }

    /// What a recipe says, of the run whose `run.json` is at `origin`.
    pub fn of_recipe(recipe: &Recipe, origin: &str) -> Settings {
        let mut settings = Settings::default();
        for (key, text) in recipe.settings() {
            // What was written is read; see the test.
            let _ = settings.add_text(&key, &text, &Place::Line(origin.into(), 1));
        }
        settings
    }

    /// Sets `key` to a value that `flag` gives: TOML, or a word that needs no quotes.
    ///
    /// # Errors
    /// [`Error::Usage`] with the flag for an unknown key or what is no value.
    pub fn set(&mut self, flag: &str, key: &str, value: &str) -> Result<()> {
        self.add_text(key, value, &Place::Flag(flag.into()))
    }

    /// Whether a flag or a file says something about `key`.
    pub fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    fn get(&self, key: &str) -> Option<&Setting> {
        let found = self.entries.iter().find(|(name, _)| name == key);
        found.map(|(_, setting)| setting)
    }

    fn add_text(&mut self, key: &str, value: &str, place: &Place) -> Result<()> {
        let word = |c: char| c.is_alphanumeric() || "-_.*/+".contains(c);
        let plain = !value.is_empty() && value.chars().all(word);
        let line = |value: &str| format!("{key} = {value}");
        let (text, quoted) = (line(value), line(&format!("{value:?}")));
        for text in [&text, &quoted] {
            let source = Source { text, origin: "" };
            let Ok(table) = source.toml::<Table>() else {
                if !plain {
                    break;
                }
                continue;
            };
            return self.add_table(&source, &table, &|_| place.clone(), &[]);
        }
        let found = value.replace('\n', " ");
        Err(place.error(format!(
            "expected a TOML value (3, 0.1, true, \"word\" or [1, 2]) for a key, found {key} = {found}"
        )))
    }

    fn add_table(
        &mut self,
        source: &Source,
        table: &Table,
        place: &dyn Fn(&Range<usize>) -> Place,
        more: &[&str],
    ) -> Result<()> {
        for (key, value) in &table.0 {
            let name = key.get_ref().as_str();
            match value.get_ref() {
                Value::Table(keys) if name == "augment" => {
                    for (key, value) in &keys.0 {
                        let name = format!("augment.{}", key.get_ref());
                        self.insert(name, setting(source, value, place)?);
                    }
                }
                _ if KEYS.contains(&name) => {
                    self.insert(name.into(), setting(source, value, place)?);
                }
                _ if name == "augment" => {
                    let what = "expected `augment` as a table of keys and values";
                    return Err(place(&value.span()).error(what));
                }
                _ => {
                    let known = more.iter().chain(&KEYS).chain(&["augment"]);
                    let known: Vec<_> = known.map(|key| format!("`{key}`")).collect();
                    return Err(place(&key.span()).error(format!(
                        "unknown key `{name}`, expected one of {}",
                        known.join(", ")
                    )));
                }
            }
        }
        Ok(())
    }

    fn insert(&mut self, key: String, setting: Setting) {
        self.entries.retain(|(name, _)| *name != key);
        self.entries.push((key, setting));
    }

    /// Lays `upper` over these settings. With another optimiser or schedule goes what belongs to the one
    /// before: its constants, and the learning rate and its factors.
    pub fn lay_over(&mut self, upper: &Settings) {
        let other = |key: &str| match (self.get(key), upper.get(key)) {
            (Some(a), Some(b)) => a.word() != b.word(),
            _ => false,
        };
        let (optimizer, schedule) = (other("optimizer"), other("schedule"));
        let among = |keys: &[(&str, &[&str])], name: &str| keys.iter().any(|(key, _)| *key == name);
        self.entries.retain(|(name, _)| {
            let its = among(&OPTIMIZER_KEYS, name) || OPTIMIZERS_OWN.contains(&name.as_str());
            !(optimizer && its || schedule && among(&SCHEDULE_KEYS, name))
        });
        for (key, setting) in &upper.entries {
            self.insert(key.clone(), setting.clone());
        }
        let chosen = self.get("optimizer").map(|s| (s.word(), s.place.clone()));
        if let Some((Some("sgd"), place @ Place::Flag(_))) = chosen
            && optimizer
            && !self.has("momentum")
        {
            // Whoever asks for SGD on the command line expects it as it is mostly used.
            let _ = self.add_text("momentum", "0.9", &place);
        }
    }

    /// # Errors
    /// [`Error::Model`] or [`Error::Usage`] where `class_weights` is a list of another length.
    pub fn expect_classes(&self, classes: usize) -> Result<()> {
        match self.get("class_weights") {
            Some(Setting {
                data: Data::Array(weights),
                place,
                ..
            }) if weights.len() != classes => Err(place.error(format!(
                "expected a weight for each of {classes} classes, found {} in `class_weights`",
                weights.len()
            ))),
            _ => Ok(()),
        }
    }

    /// The recipe that these settings are, for a model with this loss; what they do not say is as
    /// `docs/recipes.md` has it.
    ///
    /// # Errors
    /// [`Error::Model`] or [`Error::Usage`] with the place of the first value that is of the wrong type,
    /// out of range, or belongs to another optimiser, schedule or loss.
    pub fn recipe(&self, loss: Loss) -> Result<Recipe> {
        let optimizer = self.choice(
            "optimizer",
            &["sgd", "adamw", "lion", "muon"].map(|name| (name, name)),
            "sgd",
        )?;
        self.expect_owner("optimizer", optimizer, &OPTIMIZER_KEYS)?;
        let schedules = [
            "constant",
            "step",
            "cosine",
            "onecycle",
            "triangular",
            "linear",
        ];
        let schedule = self.choice("schedule", &schedules.map(|name| (name, name)), "constant")?;
        self.expect_owner("schedule", schedule, &SCHEDULE_KEYS)?;
        for key in ["label_smoothing", "class_weights"] {
            if let (Some(setting), Loss::SquaredError) = (self.get(key), loss) {
                return Err(setting.place.error(format!(
                    "`{key}` belongs to the loss softmax_cross_entropy; remove it, or set loss = \"softmax_cross_entropy\""
                )));
            }
        }
        let fraction = |key: &str, default: f32| {
            self.number(key, "a number from 0 to below 1", |x| {
                (0.0..1.0).contains(&x)
            })
            .map(|found| found.map_or(default, |x| x as f32))
        };
        let above_zero = |key: &str| {
            self.number(key, &format!("a number above 0{FINITE}"), |x| {
                x > 0.0 && x.is_finite()
            })
        };
        let least_zero = |key: &str| {
            self.number(key, &format!("a number of at least 0{FINITE}"), |x| {
                x >= 0.0 && x.is_finite()
            })
        };
        let factor = |key: &str| Ok(least_zero(key)?.map_or(1.0, |x| x as f32));
        let decay = |default: f32| -> Result<f32> {
            Ok(least_zero("weight_decay")?.map_or(default, |x| x as f32))
        };
        let (default_lr, optimizer) = match optimizer {
            "adamw" => (
                0.001,
                Optimizer::Adamw {
                    beta1: fraction("beta1", 0.9)?,
                    beta2: fraction("beta2", 0.999)?,
                    epsilon: above_zero("epsilon")?.map_or(1e-8, |x| x as f32),
                    weight_decay: decay(0.01)?,
                },
            ),
            "lion" => (
                1e-4,
                Optimizer::Lion {
                    beta1: fraction("beta1", 0.9)?,
                    beta2: fraction("beta2", 0.99)?,
                    weight_decay: decay(0.0)?,
                },
            ),
            "muon" => (
                0.1,
                Optimizer::Muon {
                    momentum: fraction("momentum", 0.6)?,
                    weight_decay: decay(0.0)?,
                    other_lr: above_zero("other_lr")?.map_or(0.05, |x| x as f32),
                    other_momentum: fraction("other_momentum", 0.85)?,
                },
            ),
            _ => (
                0.05,
                Optimizer::Sgd {
                    momentum: fraction("momentum", 0.0)?,
                    nesterov: self.flag("nesterov", false)?,
                    weight_decay: decay(0.0)?,
                },
            ),
        };
        let schedule = match schedule {
            "step" => Schedule::Step {
                epochs: self.epochs("step_epochs")?,
                factor: above_zero("step_factor")?.map_or(0.1, |x| x as f32),
            },
            "cosine" => Schedule::Cosine,
            "onecycle" => Schedule::OneCycle,
            "triangular" => Schedule::Triangular {
                peak_at: self
                    .number("peak_at", "a number from 0 to 1", |x| {
                        (0.0..=1.0).contains(&x)
                    })?
                    .map_or(0.3, |x| x as f32),
            },
            "linear" => Schedule::Linear,
            _ => Schedule::Constant,
        };
        let plain = Recipe::default();
        let epochs = self.whole("epochs")?.unwrap_or(plain.epochs);
        let warm_up = least_zero("warm_up")?.unwrap_or(plain.warm_up);
        if let Some(setting) = self.get("warm_up")
            && warm_up >= epochs as f64
        {
            return Err(setting.place.error(format!(
                "expected `warm_up` below the {epochs} epochs, found {}",
                setting.text
            )));
        }
        let shards = self.whole("shards")?;
        if let (Some(_), Some(setting)) = (shards, self.get("micro_batch")) {
            return Err(setting.place.error(format!(
                "expected no `micro_batch` beside `shards`, which cut the batch already, found {}; leave it out, and use more shards for smaller ones",
                setting.text
            )));
        }
        let sync_batch_norm = self.flag("sync_batch_norm", plain.sync_batch_norm)?;
        if let (true, Some(setting)) = (sync_batch_norm, self.get("micro_batch")) {
            return Err(setting.place.error(format!(
                "expected no `micro_batch` beside `sync_batch_norm`, found {}; cut the batch by `shards` instead, whose statistics can be those of all",
                setting.text
            )));
        }
        Ok(Recipe {
            lr: above_zero("lr")?.unwrap_or(default_lr),
            optimizer,
            schedule,
            warm_up,
            epochs,
            batch_size: self.whole("batch_size")?.unwrap_or(plain.batch_size),
            micro_batch: self.whole("micro_batch")?,
            shards,
            sync_batch_norm,
            exchange: self.choice(
                "exchange",
                &[
                    ("exact", Exchanged::Exact),
                    ("fast", Exchanged::Fast),
                    ("half", Exchanged::Half),
                ],
                plain.exchange,
            )?,
            groups: Groups {
                bias_lr: factor("bias_lr")?,
                head_lr: factor("head_lr")?,
                bias_decay: factor("bias_decay")?,
                freeze: self.words("freeze")?,
            },
            clip_norm: above_zero("clip_norm")?.map(|x| x as f32),
            average: match self.has("average") {
                true => Some(fraction("average", 0.0)?),
                false => None,
            },
            sampler: self.choice(
                "sampler",
                &[
                    ("shuffle", Sampler::Shuffle),
                    ("balanced", Sampler::Balanced),
                ],
                plain.sampler,
            )?,
            augment: self.augment()?,
            views: self.choice(
                "views",
                &[
                    ("one", Views::One),
                    ("mirror", Views::Mirror),
                    ("six", Views::Six),
                ],
                plain.views,
            )?,
            patience: self.whole("patience")?,
            precision: self.choice(
                "precision",
                &[("f32", Precision::F32), ("mixed", Precision::Mixed)],
                plain.precision,
            )?,
            label_smoothing: fraction("label_smoothing", 0.0)?,
            class_weights: self.class_weights()?,
        })
    }

    /// Refuses keys that belong to another `kind` (optimizer, schedule) than the one chosen.
    fn expect_owner(&self, kind: &str, chosen: &str, keys: &[(&str, &[&str])]) -> Result<()> {
        for (key, owners) in keys {
            if let Some(setting) = self.get(key)
                && !owners.contains(&chosen)
            {
                return Err(setting.place.error(format!(
                    "`{key}` belongs to the {kind} {}, not to {chosen}; remove it, or set {kind} = \"{}\"",
                    owners.join(" and "),
                    owners[0]
                )));
            }
        }
        Ok(())
    }

    /// What `key` says, one of these words.
    fn choice<T: Copy>(&self, key: &str, words: &[(&str, T)], default: T) -> Result<T> {
        let Some(setting) = self.get(key) else {
            return Ok(default);
        };
        let found = setting
            .word()
            .and_then(|word| words.iter().find(|(name, _)| *name == word));
        found.map(|(_, value)| *value).ok_or_else(|| {
            let known: Vec<_> = words.iter().map(|(name, _)| format!("`{name}`")).collect();
            let found = setting.word().unwrap_or(&setting.text);
            setting.place.error(format!(
                "unknown value `{found}` for `{key}`, expected one of {}",
                known.join(", ")
            ))
        })
    }

    /// A number that is `good` in the 32 bits that the device sees.
    fn number(&self, key: &str, expected: &str, good: fn(f32) -> bool) -> Result<Option<f64>> {
        let read = |setting: &Setting| setting.number(expected, good);
        self.get(key).map(read).transpose()
    }

    /// A whole number from 1 on.
    fn whole(&self, key: &str) -> Result<Option<usize>> {
        self.get(key).map(Setting::whole).transpose()
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Setting {
                data: Data::Boolean(flag),
                ..
            }) => Ok(*flag),
            Some(setting) => Err(setting.wrong("true or false")),
        }
    }

    /// The words of an array, or one.
    fn words(&self, key: &str) -> Result<Vec<String>> {
        let expected = "names in quotes, such as [\"conv2d1\", \"conv2d2.*\"]";
        let read = |setting: &Setting| match setting.word() {
            Some(word) if !word.is_empty() => Ok(word.to_string()),
            _ => Err(setting.wrong(expected)),
        };
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Setting {
                data: Data::Array(words),
                ..
            }) => words.iter().map(read).collect(),
            Some(word) => Ok(vec![read(word)?]),
        }
    }

    /// Whole numbers that rise.
    fn epochs(&self, key: &str) -> Result<Vec<usize>> {
        let expected = "epochs that rise, such as [30, 60, 80]";
        let Some(setting) = self.get(key) else {
            let Some(schedule) = self.get("schedule") else {
                return Ok(Vec::new());
            };
            let what = format!("missing key `{key}` for schedule = \"step\": {expected}");
            return Err(schedule.place.error(what));
        };
        let epochs = match &setting.data {
            Data::Array(epochs) => epochs.iter().map(Setting::whole).collect::<Result<_>>()?,
            _ => vec![setting.whole()?],
        };
        let rise = epochs.windows(2).all(|pair| pair[0] < pair[1]);
        if rise && !epochs.is_empty() {
            Ok(epochs)
        } else {
            Err(setting.wrong(expected))
        }
    }

    fn class_weights(&self) -> Result<Option<ClassWeights>> {
        let Some(setting) = self.get("class_weights") else {
            return Ok(None);
        };
        match &setting.data {
            Data::Array(weights) => {
                let expected = format!("a number above 0{FINITE}");
                let weight = |w: &Setting| w.number(&expected, |x| x > 0.0 && x.is_finite());
                let weights = weights.iter().map(|w| Ok(weight(w)? as f32));
                let weights = weights.collect::<Result<_>>()?;
                Ok(Some(ClassWeights::Given(weights)))
            }
            Data::Text(word) if word == "balanced" => Ok(Some(ClassWeights::Balanced)),
            _ => Err(setting.wrong("\"balanced\" or a list of numbers, one for each class")),
        }
    }

    /// The keys behind `augment.`, each by itself and then together.
    fn augment(&self) -> Result<Augment> {
        let mut table = toml::Table::new();
        for (name, setting) in &self.entries {
            let Some(key) = name.strip_prefix("augment.") else {
                continue;
            };
            let alone = toml::Table::from_iter([(key.to_string(), setting.toml())]);
            if let Err(e) = alone.try_into::<Augment>() {
                let what = e
                    .message()
                    .lines()
                    .collect::<Vec<_>>()
                    .join(", ")
                    .replace("unknown field", "unknown key")
                    .replace("unknown variant", "unknown value")
                    .replace("expected u32", "expected a whole number from 0")
                    .replace("expected f32", "expected a number");
                return Err(setting.place.error(format!("augment.{key}: {what}")));
            }
            table.insert(key.into(), setting.toml());
        }
        let wrong = |e: toml::de::Error| Error::Usage(format!("augment: {}", e.message()));
        let augment: Augment = table.try_into().map_err(wrong)?;
        match augment.check() {
            Ok(()) => Ok(augment),
            Err((key, what)) => Err(match self.get(&format!("augment.{key}")) {
                Some(setting) => setting.place.error(what),
                None => Error::Usage(what),
            }),
        }
    }
}

impl Setting {
    fn word(&self) -> Option<&str> {
        match &self.data {
            Data::Text(word) => Some(word),
            _ => None,
        }
    }

    fn wrong(&self, expected: &str) -> Error {
        let found = match (&self.place, self.word()) {
            // The quotes may be ours.
            (Place::Flag(_), Some(word)) => word,
            _ => &self.text,
        };
        self.place
            .error(format!("expected {expected}, found {found}"))
    }

    fn number(&self, expected: &str, good: fn(f32) -> bool) -> Result<f64> {
        let number = match self.data {
            Data::Number(number) => Some(number),
            Data::Whole(number) => Some(number as f64),
            _ => None,
        };
        let number = number.filter(|number| good(*number as f32));
        number.ok_or_else(|| self.wrong(expected))
    }

    fn whole(&self) -> Result<usize> {
        let number = match self.data {
            Data::Whole(number) => usize::try_from(number).ok(),
            _ => None,
        };
        let number = number.filter(|n| *n > 0 && *n as u128 <= MAX_ELEMENTS);
        let expected = || format!("a whole number from 1 to {MAX_ELEMENTS}");
        number.ok_or_else(|| self.wrong(&expected()))
    }

    fn toml(&self) -> toml::Value {
        match &self.data {
            Data::Boolean(flag) => (*flag).into(),
            Data::Whole(number) => (*number).into(),
            Data::Number(number) => (*number).into(),
            Data::Text(word) => word.clone().into(),
            Data::Array(values) => values.iter().map(Setting::toml).collect::<Vec<_>>().into(),
        }
    }
}

/// A value of a file or a flag.
fn setting(
    source: &Source,
    value: &toml::Spanned<Value>,
    place: &dyn Fn(&Range<usize>) -> Place,
) -> Result<Setting> {
    let span = value.span();
    let text = source.text.get(span.clone()).unwrap_or_default();
    Ok(Setting {
        data: match value.get_ref() {
            Value::Boolean(flag) => Data::Boolean(*flag),
            Value::Integer(number) => Data::Whole(*number),
            Value::Float(number) => Data::Number(*number),
            Value::Text(word) => Data::Text(word.clone()),
            Value::Array(values) => {
                let values = values.iter().map(|value| setting(source, value, place));
                Data::Array(values.collect::<Result<_>>()?)
            }
            Value::Table(_) => return Err(place(&span).error("expected a value, found a table")),
        },
        text: text.split_whitespace().collect::<Vec<_>>().join(" "),
        place: place(&span),
    })
}

impl Recipe {
    /// Every value, by the key that sets it and in TOML, in the order of the documentation; what is off
    /// is not there.
    pub fn settings(&self) -> Vec<(String, String)> {
        let Recipe {
            optimizer,
            lr,
            schedule,
            warm_up,
            epochs,
            batch_size,
            micro_batch,
            shards,
            sync_batch_norm,
            exchange,
            groups,
            clip_norm,
            average,
            sampler,
            augment,
            precision,
            views,
            patience,
            label_smoothing,
            class_weights,
        } = self;
        let mut all = Vec::new();
        let mut set = |key: &str, value: &dyn Display| all.push((key.into(), value.to_string()));
        // With a point or an exponent, so that any size of number is TOML.
        let float = |number: &dyn std::fmt::Debug| format!("{number:?}");
        let quoted = |word: &str| format!("{word:?}");
        let list = |values: Vec<String>| format!("[{}]", values.join(", "));
        match optimizer {
            Optimizer::Sgd {
                momentum,
                nesterov,
                weight_decay,
            } => {
                set("optimizer", &"\"sgd\"");
                set("lr", &float(lr));
                set("momentum", &float(momentum));
                set("nesterov", nesterov);
                set("weight_decay", &float(weight_decay));
            }
            Optimizer::Adamw {
                beta1,
                beta2,
                epsilon,
                weight_decay,
            } => {
                set("optimizer", &"\"adamw\"");
                set("lr", &float(lr));
                set("beta1", &float(beta1));
                set("beta2", &float(beta2));
                set("epsilon", &float(epsilon));
                set("weight_decay", &float(weight_decay));
            }
            Optimizer::Lion {
                beta1,
                beta2,
                weight_decay,
            } => {
                set("optimizer", &"\"lion\"");
                set("lr", &float(lr));
                set("beta1", &float(beta1));
                set("beta2", &float(beta2));
                set("weight_decay", &float(weight_decay));
            }
            Optimizer::Muon {
                momentum,
                weight_decay,
                other_lr,
                other_momentum,
            } => {
                set("optimizer", &"\"muon\"");
                set("lr", &float(lr));
                set("momentum", &float(momentum));
                set("weight_decay", &float(weight_decay));
                set("other_lr", &float(other_lr));
                set("other_momentum", &float(other_momentum));
            }
        }
        let Groups {
            bias_lr,
            head_lr,
            bias_decay,
            freeze,
        } = groups;
        set("bias_lr", &float(bias_lr));
        set("head_lr", &float(head_lr));
        set("bias_decay", &float(bias_decay));
        set("freeze", &list(freeze.iter().map(|f| quoted(f)).collect()));
        set("schedule", &quoted(schedule.name()));
        match schedule {
            Schedule::Step { epochs, factor } => {
                set("step_epochs", &format!("{epochs:?}"));
                set("step_factor", &float(factor));
            }
            Schedule::Triangular { peak_at } => set("peak_at", &float(peak_at)),
            _ => {}
        }
        set("warm_up", &float(warm_up));
        set("epochs", epochs);
        set("batch_size", batch_size);
        if let Some(micro_batch) = micro_batch {
            set("micro_batch", micro_batch);
        }
        if let Some(shards) = shards {
            set("shards", shards);
        }
        if *sync_batch_norm {
            set("sync_batch_norm", &true);
        }
        if *exchange != Exchanged::default() {
            let word = serde_json::to_string(exchange);
            set("exchange", &word.unwrap_or_default());
        }
        if let Some(norm) = clip_norm {
            set("clip_norm", &float(norm));
        }
        if let Some(share) = average {
            set("average", &float(share));
        }
        if *label_smoothing != 0.0 {
            set("label_smoothing", &float(label_smoothing));
        }
        match class_weights {
            Some(ClassWeights::Balanced) => set("class_weights", &"\"balanced\""),
            Some(ClassWeights::Given(weights)) => {
                let weights = weights.iter().map(|w| float(w)).collect();
                set("class_weights", &list(weights));
            }
            None => {}
        }
        let word = |value: serde_json::Result<String>| value.unwrap_or_default();
        set("sampler", &word(serde_json::to_string(sampler)));
        set("views", &word(serde_json::to_string(views)));
        set("precision", &word(serde_json::to_string(precision)));
        if let Some(epochs) = patience {
            set("patience", epochs);
        }
        // JSON's numbers, words and arrays are TOML's.
        let json = word(serde_json::to_string(augment));
        let augment: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(&json).unwrap_or_default();
        for (key, value) in augment.iter().filter(|(_, value)| !value.is_null()) {
            set(&format!("augment.{key}"), value);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::augment::Flip;

    const CROSS: Loss = Loss::SoftmaxCrossEntropy;

    fn read(text: &str) -> Result<Recipe> {
        RecipeFile::parse(text, "mine.toml", "mine")?
            .settings
            .recipe(CROSS)
    }

    /// One of each optimiser and schedule, nothing as it is by default.
    const WHOLE: [&str; 4] = [
        "optimizer = 'sgd'\nlr = 0.125\nmomentum = 0.75\nnesterov = true\nweight_decay = 1e-30\nbias_lr = 64\nhead_lr = 0.5\nbias_decay = 0.25\nfreeze = ['conv2d1', 'a.*']\nschedule = 'step'\nstep_epochs = [2, 4]\nstep_factor = 0.2\nwarm_up = 0.5\nepochs = 6\nbatch_size = 7\nmicro_batch = 3\nclip_norm = 2\naverage = 0.999\nlabel_smoothing = 0.1\nclass_weights = [1, 2.5]\nsampler = 'balanced'\nviews = 'six'\nprecision = 'mixed'\npatience = 4\n[augment]\nrotate = 12.5\nflip = 'alternating'\nresized_crop = [0.25, 1]",
        "optimizer = 'adamw'\nlr = 3e-38\nbeta1 = 0.7\nbeta2 = 0.9\nepsilon = 1e-9\nweight_decay = 0.3\nschedule = 'triangular'\npeak_at = 0.2\nepochs = 2\nbatch_size = 1\nshards = 4\nsync_batch_norm = true\nclass_weights = 'balanced'\nviews = 'mirror'",
        "optimizer = 'lion'\nlr = 1e38\nbeta1 = 0.8\nbeta2 = 0.95\nweight_decay = 1\nschedule = 'linear'",
        "optimizer = 'muon'\nlr = 0.24\nmomentum = 0.5\nother_lr = 1\nother_momentum = 0.8\nweight_decay = 0.01\nschedule = 'onecycle'",
    ];

    #[test]
    fn every_key_arrives() {
        let recipe = read(WHOLE[0]).unwrap();
        let expected = Recipe {
            optimizer: Optimizer::Sgd {
                momentum: 0.75,
                nesterov: true,
                weight_decay: 1e-30,
            },
            lr: 0.125,
            schedule: Schedule::Step {
                epochs: vec![2, 4],
                factor: 0.2,
            },
            warm_up: 0.5,
            epochs: 6,
            batch_size: 7,
            micro_batch: Some(3),
            shards: None,
            sync_batch_norm: false,
            exchange: Exchanged::Exact,
            groups: Groups {
                bias_lr: 64.0,
                head_lr: 0.5,
                bias_decay: 0.25,
                freeze: vec!["conv2d1".into(), "a.*".into()],
            },
            clip_norm: Some(2.0),
            average: Some(0.999),
            sampler: Sampler::Balanced,
            augment: Augment {
                rotate: 12.5,
                flip: Flip::Alternating,
                resized_crop: Some([0.25, 1.0]),
                ..Augment::default()
            },
            precision: Precision::Mixed,
            views: Views::Six,
            patience: Some(4),
            label_smoothing: 0.1,
            class_weights: Some(ClassWeights::Given(vec![1.0, 2.5])),
        };
        assert_eq!(recipe, expected);
        let file = RecipeFile::parse("model = 'a'\ndescription = 'b'", "m.toml", "m").unwrap();
        assert_eq!(file.model.as_deref(), Some("a"));
        assert_eq!(file.description.as_deref(), Some("b"));
        assert_eq!(
            file.settings.recipe(CROSS).unwrap().optimizer,
            Optimizer::Sgd {
                momentum: 0.0,
                nesterov: false,
                weight_decay: 0.0
            }
        );
    }

    /// A resume reads what a run's recipe is written as.
    #[test]
    fn what_is_listed_is_read() {
        let texts = WHOLE.iter().chain(&["", "lr = 0.1"]);
        for recipe in texts.map(|text| read(text).unwrap()) {
            let settings = Settings::of_recipe(&recipe, "run.json");
            assert_eq!(settings.entries.len(), recipe.settings().len());
            assert_eq!(settings.recipe(CROSS).unwrap(), recipe);
        }
        let plain = Settings::of_recipe(&Recipe::default(), "run.json");
        assert_eq!(plain.recipe(Loss::SquaredError).unwrap(), Recipe::default());
    }

    /// Each mistake in a file: the text, the line it is reported at, and words of the message.
    #[test]
    fn mistakes_are_reported_with_their_line() {
        #[rustfmt::skip]
        let cases: &[(&str, usize, &[&str])] = &[
            ("lr = ", 1, &["value"]),
            ("lr = 1\nlr = 2", 2, &["duplicate key"]),
            ("\nlearning_rate = 1", 2, &["unknown key `learning_rate`", "`model`", "`lr`", "`augment`"]),
            ("name = 'x'", 1, &["unknown key `name`"]),
            ("model = 3", 1, &["`model`", "text in quotes"]),
            ("lr = 1\ndescription = \"a\\nb\"", 2, &["`description` as a line"]),
            ("lr = {a = 1}", 1, &["expected a value, found a table"]),
            ("augment = 3", 1, &["`augment` as a table"]),
            ("lr = '1'", 1, &["above 0", "found '1'"]),
            ("lr = -1", 1, &["above 0", "found -1"]),
            ("optimizer = 'adam'", 1, &["unknown value `adam` for `optimizer`", "`lion`", "`muon`"]),
            ("optimizer = 3", 1, &["unknown value `3`"]),
            ("optimizer = 'lion'\nepsilon = 1e-8", 2, &["`epsilon` belongs to the optimizer adamw, not to lion"]),
            ("optimizer = 'lion'\nmomentum = 0.9", 2, &["sgd and muon, not to lion", "optimizer = \"sgd\""]),
            ("optimizer = 'adamw'\nnesterov = true", 2, &["`nesterov` belongs to the optimizer sgd"]),
            ("other_lr = 1", 1, &["`other_lr` belongs to the optimizer muon"]),
            ("other_momentum = 0.5", 1, &["belongs to the optimizer muon"]),
            ("optimizer = 'muon'\nother_lr = 0", 2, &["above 0", "found 0"]),
            ("optimizer = 'muon'\nother_momentum = 1", 2, &["below 1, found 1"]),
            ("nesterov = 1", 1, &["true or false, found 1"]),
            ("bias_decay = -1", 1, &["at least 0", "found -1"]),
            ("bias_lr = -1", 1, &["at least 0", "found -1"]),
            ("head_lr = inf", 1, &["at least 0", "found inf"]),
            ("freeze = [1]", 1, &["names in quotes", "found 1"]),
            ("freeze = ['a',\n'']", 2, &["names in quotes", "found ''"]),
            ("schedule = 'cyclic'", 1, &["unknown value `cyclic`", "`triangular`", "`linear`"]),
            ("schedule = 'step'", 1, &["missing key `step_epochs`", "[30, 60, 80]"]),
            ("schedule = 'step'\nstep_epochs = []", 2, &["epochs that rise"]),
            ("schedule = 'step'\nstep_epochs = [2, 2]", 2, &["epochs that rise", "found [2, 2]"]),
            ("schedule = 'step'\nstep_epochs = [1, 0.5]", 2, &["whole number", "found 0.5"]),
            ("schedule = 'step'\nstep_epochs = [3]\nstep_factor = 0", 3, &["above 0"]),
            ("step_epochs = [3]", 1, &["`step_epochs` belongs to the schedule step, not to constant"]),
            ("schedule = 'cosine'\nstep_factor = 1", 2, &["belongs to the schedule step, not to cosine"]),
            ("peak_at = 0.3", 1, &["belongs to the schedule triangular"]),
            ("schedule = 'triangular'\npeak_at = 1.5", 2, &["from 0 to 1", "found 1.5"]),
            ("warm_up = -1", 1, &["at least 0"]),
            ("epochs = 2\nwarm_up = 2", 2, &["`warm_up` below the 2 epochs, found 2"]),
            ("epochs = 0", 1, &["whole number from 1", "found 0"]),
            ("micro_batch = 0", 1, &["whole number from 1", "found 0"]),
            ("shards = 0", 1, &["whole number from 1", "found 0"]),
            ("shards = 4\nmicro_batch = 2", 2, &["beside `shards`", "found 2"]),
            ("sync_batch_norm = true\nmicro_batch = 2", 2, &["beside `sync_batch_norm`", "found 2", "by `shards`"]),
            ("sync_batch_norm = 1", 1, &["true or false"]),
            ("batch_size = 3000000000", 1, &["2147483648, found 3000000000"]),
            ("clip_norm = 0", 1, &["above 0"]),
            ("average = 1", 1, &["below 1"]),
            ("label_smoothing = 1", 1, &["below 1"]),
            ("class_weights = 'even'", 1, &["\"balanced\" or a list", "found 'even'"]),
            ("class_weights = [1,\n-1]", 2, &["above 0", "found -1"]),
            ("sampler = 'random'", 1, &["`shuffle`, `balanced`"]),
            ("views = 2", 1, &["unknown value `2`", "`one`, `mirror`, `six`"]),
            ("precision = 'f16'", 1, &["unknown value `f16`", "`f32`, `mixed`"]),
            ("patience = 0", 1, &["whole number from 1"]),
            ("[augment]\nrotat = 1", 2, &["unknown key `rotat`", "`rotate`"]),
            ("[augment]\ncrop = 1\nrotate = 181", 3, &["from 0 to 180, found 181"]),
            ("[augment]\nflip = 'up'", 2, &["unknown value `up`", "`alternating`"]),
            ("[augment]\ncrop = 1.5", 2, &["augment.crop", "whole number"]),
        ];
        let mut failures = Vec::new();
        for (text, expected, words) in cases {
            match read(text) {
                Err(Error::Model { file, line, what }) => {
                    let good = file == "mine.toml"
                        && line == *expected
                        && !what.contains('\n')
                        && words.iter().all(|word| what.contains(word));
                    if !good {
                        failures.push(format!("{text:?}: expected line {expected} and {words:?}, found {file}:{line}: {what}"));
                    }
                }
                other => failures.push(format!("{text:?}: {other:?}")),
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
        let settings = RecipeFile::parse("label_smoothing = 0.1", "mine.toml", "mine");
        let error = settings.unwrap().settings.recipe(Loss::SquaredError);
        let error = error.unwrap_err().to_string();
        assert!(error.starts_with("mine.toml:1: `label_smoothing` belongs to the loss"));
    }

    #[test]
    fn flags_are_read_like_files() {
        let set = |key: &str, value: &str| {
            let mut settings = Settings::default();
            settings.set("--flag", key, value)?;
            settings.recipe(CROSS)
        };
        assert_eq!(set("lr", "0.5").unwrap().lr, 0.5);
        assert_eq!(set("augment.rotate", "10").unwrap().augment.rotate, 10.0);
        assert_eq!(
            set("schedule", "cosine").unwrap().schedule,
            Schedule::Cosine
        );
        let quoted = set("schedule", "'linear'").unwrap();
        assert_eq!(quoted.schedule, Schedule::Linear);
        let freeze = set("freeze", "conv2d1.*").unwrap().groups.freeze;
        assert_eq!(freeze, ["conv2d1.*"]);
        let freeze = set("freeze", "[\"a\", \"b\"]").unwrap().groups.freeze;
        assert_eq!(freeze, ["a", "b"]);
        for (key, value, words) in [
            ("lr", "0", "found 0"),
            ("lr", "NaN", "found NaN"),
            ("lr", "many", "found many"),
            ("lr", "[1", "a TOML value"),
            ("lr", "", "a TOML value"),
            ("lr", "1\nepochs = 2\nx = 3", "unknown key `x`"),
            ("rate", "1", "unknown key `rate`"),
            ("augment.rotat", "1", "unknown key `rotat`"),
            ("augment", "1", "`augment` as a table"),
            ("lr.x", "1", "found a table"),
            ("schedule", "poly", "unknown value `poly`"),
            ("a b", "1", "a TOML value"),
            ("momentum", "1", "found 1"),
        ] {
            let error = set(key, value).unwrap_err();
            assert!(matches!(error, Error::Usage(_)), "{error}");
            let error = error.to_string();
            assert!(error.starts_with("--flag: "), "{error}");
            assert!(error.contains(words) && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn another_optimiser_begins_anew() {
        let file = |text: &str| RecipeFile::parse(text, "m.toml", "m").unwrap().settings;
        let over = |lower: &str, upper: &Settings| {
            let mut settings = file(lower);
            settings.lay_over(upper);
            settings.recipe(CROSS)
        };
        let adamw = "optimizer = 'adamw'\nlr = 0.5\nbeta1 = 0.5\nweight_decay = 0.5\nbias_lr = 9\nepochs = 7";
        // The same one, however it is written, keeps what it has.
        let same = over(adamw, &file("optimizer = \"adamw\"\nbeta2 = 0.5")).unwrap();
        let expected = Optimizer::Adamw {
            beta1: 0.5,
            beta2: 0.5,
            epsilon: 1e-8,
            weight_decay: 0.5,
        };
        assert_eq!((same.optimizer, same.lr, same.epochs), (expected, 0.5, 7));
        assert_eq!(same.groups.bias_lr, 9.0);
        let sgd = over(adamw, &file("optimizer = 'sgd'")).unwrap();
        let expected = Optimizer::Sgd {
            momentum: 0.0,
            nesterov: false,
            weight_decay: 0.0,
        };
        assert_eq!((sgd.optimizer, sgd.lr, sgd.epochs), (expected, 0.05, 7));
        assert_eq!(sgd.groups.bias_lr, 1.0);
        // The command line's has momentum, as most users expect.
        let mut flag = Settings::default();
        flag.set("--optimizer", "optimizer", "sgd").unwrap();
        flag.set("--lr", "lr", "2").unwrap();
        let sgd = over(adamw, &flag).unwrap();
        let expected = Optimizer::Sgd {
            momentum: 0.9,
            nesterov: false,
            weight_decay: 0.0,
        };
        assert_eq!((sgd.optimizer, sgd.lr), (expected, 2.0));
        let kept = over("optimizer = 'sgd'\nlr = 1", &flag).unwrap();
        assert_eq!(kept.optimizer, read("").unwrap().optimizer);
        // So does another schedule.
        let linear = over(
            "schedule = 'step'\nstep_epochs = [1]\nlr = 2",
            &file("schedule = 'linear'"),
        );
        let linear = linear.unwrap();
        assert_eq!((linear.schedule, linear.lr), (Schedule::Linear, 2.0));
    }

    #[test]
    fn shipped_recipes_are_recipes() {
        for (name, _) in SHIPPED {
            let recipe = load_recipe(name).unwrap();
            assert_eq!(recipe.name, *name);
            assert!(recipe.description.is_some(), "{name}");
            recipe.settings.recipe(CROSS).unwrap();
        }
        let error = load_recipe("best-of-all").unwrap_err().to_string();
        assert!(
            error.contains("'best-of-all'") && error.contains("cifar-fast"),
            "{error}"
        );
        assert!(matches!(
            load_recipe("no.toml").unwrap_err(),
            Error::Io { .. }
        ));
    }

    #[test]
    fn the_docs_example_is_a_recipe_and_they_name_every_key() {
        let docs = include_str!("../../docs/recipes.md");
        let (_, example) = docs.split_once("```toml\n").unwrap();
        let (example, _) = example.split_once("```").unwrap();
        assert_eq!(read(example).unwrap().warm_up, 1.0);
        for key in KEYS {
            assert!(docs.contains(&format!("`{key}`")), "{key}");
        }
    }

    #[test]
    fn a_model_file_is_found_beside_its_recipe() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine.toml");
        std::fs::write(&path, "model = 'net.toml'").unwrap();
        let recipe = load_recipe(path.to_str().unwrap()).unwrap();
        let model = folder.path().join("net.toml").display().to_string();
        assert_eq!(recipe.model, Some(model));
    }
}
