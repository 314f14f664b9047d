//! The keys of one layer's table in a model file: values of any type, read as what an operation needs,
//! each mistake with its line.

use super::file::{FINITE, MAX_ELEMENTS, Source};
use super::op::{KINDS, Kind};
use super::{Activation, Init, Shape, same_padding};
use crate::error::{Error, Result};
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use toml::Spanned;

/// A TOML value whose parts know where they stand.
#[derive(Clone, Debug)]
pub(super) enum Value {
    Boolean(bool),
    Integer(i64),
    Float(f64),
    Text(String),
    Array(Vec<Spanned<Value>>),
    Table(Table),
}

/// In the order of the file.
#[derive(Clone, Debug)]
pub(super) struct Table(pub Vec<(Spanned<String>, Spanned<Value>)>);

impl Table {
    pub fn get(&self, key: &str) -> Option<&Spanned<Value>> {
        let found = self.0.iter().find(|(name, _)| name.get_ref() == key);
        found.map(|(_, value)| value)
    }
}

// By hand, because serde loses the place of a value inside an untagged enum.
impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Value, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

impl<'de> Deserialize<'de> for Table {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Table, D::Error> {
        match deserializer.deserialize_map(AnyValue)? {
            Value::Table(table) => Ok(table),
            _ => Err(serde::de::Error::custom("expected a table")),
        }
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a table of keys and values")
    }

    fn visit_bool<E>(self, value: bool) -> std::result::Result<Value, E> {
        Ok(Value::Boolean(value))
    }

    fn visit_i64<E>(self, value: i64) -> std::result::Result<Value, E> {
        Ok(Value::Integer(value))
    }

    fn visit_f64<E>(self, value: f64) -> std::result::Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> std::result::Result<Value, E> {
        Ok(Value::Text(value.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = seq.next_element()? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Value::Table(Table(entries)))
    }
}

/// What the words of a block stand for where it is used; nothing outside of blocks.
#[derive(Clone, Debug, Default)]
pub(super) struct Words {
    pub values: BTreeMap<String, Spanned<Value>>,
    /// The block, and the line where it is used.
    pub block: Option<(String, usize)>,
}

/// How many channels or units.
#[derive(Clone, Copy)]
pub(super) enum Count {
    Number(usize),
    /// One for each class.
    Classes,
}

impl Count {
    pub fn of(self, classes: usize) -> usize {
        match self {
            Count::Number(number) => number,
            Count::Classes => classes,
        }
    }
}

#[derive(Clone, Copy)]
pub(super) enum Padding {
    /// Whatever makes the output as large as the input divided by the stride, rounded up.
    Same,
    /// `[[top, bottom], [left, right]]`.
    Sides([[usize; 2]; 2]),
}

impl Padding {
    pub fn sides(
        self,
        input: Shape,
        kernel: [usize; 2],
        stride: [usize; 2],
        dilation: [usize; 2],
    ) -> [[usize; 2]; 2] {
        match self {
            Padding::Same => same_padding(input, kernel, stride, dilation),
            Padding::Sides(sides) => sides,
        }
    }
}

#[derive(Clone, Copy)]
pub(super) enum Groups {
    Number(usize),
    /// A group for every channel.
    Depthwise,
}

/// What `init` can be besides a constant.
const INITS: [(&str, Init); 9] = [
    ("kaiming_normal", Init::KaimingNormal),
    ("kaiming_uniform", Init::KaimingUniform),
    ("xavier_normal", Init::XavierNormal),
    ("xavier_uniform", Init::XavierUniform),
    ("dirac", Init::Dirac),
    ("partial_dirac", Init::PartialDirac),
    ("whitening", Init::Whitening),
    ("zeros", Init::Constant(0.0)),
    ("ones", Init::Constant(1.0)),
];

/// Keys that every layer has.
pub(super) const COMMON: [&str; 4] = ["type", "name", "input", "inputs"];

/// Whether a word has a meaning of its own in a layer's values, so that no block can give it one.
pub(super) fn reserved(word: &str) -> bool {
    ["same", "valid", "depthwise", "classes"].contains(&word)
        || INITS.iter().any(|(name, _)| *name == word)
        || Activation::ALL.iter().any(|a| a.name() == word)
}

/// One layer's table.
pub(super) struct Keys<'a> {
    pub source: &'a Source<'a>,
    pub table: &'a Table,
    /// The table's place.
    pub span: Range<usize>,
    /// What stands behind `type =`.
    pub kind: &'a str,
    pub words: &'a Words,
}

impl<'a> Keys<'a> {
    /// The value of a key; that of the block's word where it is one.
    fn get(&self, key: &str) -> Option<&'a Spanned<Value>> {
        self.table.get(key).map(|value| self.meant(value))
    }

    /// What a value stands for.
    pub fn meant(&self, value: &'a Spanned<Value>) -> &'a Spanned<Value> {
        match value.get_ref() {
            Value::Text(word) => self.words.values.get(word).unwrap_or(value),
            _ => value,
        }
    }

    /// A mistake in the value of `key`.
    pub fn error(&self, key: &str, what: impl Into<String>) -> Error {
        let span = self.get(key).map_or(self.span.clone(), Spanned::span);
        self.source.error(&span, what)
    }

    fn wrong(&self, value: &Spanned<Value>, expected: &str) -> Error {
        let found = self.source.text.get(value.span()).unwrap_or_default();
        let found = found.split_whitespace().collect::<Vec<_>>().join(" ");
        let mut what = format!("expected {expected}, found {found}");
        if let (Value::Text(word), Some((block, line))) = (value.get_ref(), &self.words.block) {
            what += &format!(", and no `{word}` where block '{block}' is used (line {line})");
        }
        self.source.error(&value.span(), what)
    }

    /// What was found, or the error that the key is missing.
    pub fn required<T>(&self, key: &str, found: Option<T>) -> Result<T> {
        let what = || format!("missing key `{key}` for {}", self.kind);
        found.ok_or_else(|| self.source.error(&self.span, what()))
    }

    /// Refuses keys other than these and those of every layer.
    pub fn known(&self, keys: &[&str]) -> Result<()> {
        for (key, _) in &self.table.0 {
            let name = key.get_ref().as_str();
            if COMMON.contains(&name) || keys.contains(&name) {
                continue;
            }
            let known = COMMON.iter().chain(keys).map(|key| format!("`{key}`"));
            let what = format!(
                "unknown key `{name}` for {}, expected one of {}",
                self.kind,
                known.collect::<Vec<_>>().join(", ")
            );
            return Err(self.source.error(&key.span(), what));
        }
        Ok(())
    }

    /// The names behind `input` or `inputs`, none where neither is given; with their places.
    pub fn inputs(&self) -> Result<Vec<(&'a str, Range<usize>)>> {
        let text = |value: &'a Spanned<Value>| match value.get_ref() {
            Value::Text(name) => Ok((name.as_str(), value.span())),
            _ => Err(self.wrong(value, "the name of a layer")),
        };
        match (self.table.get("input"), self.table.get("inputs")) {
            (Some(_), Some(inputs)) => Err(self.source.error(
                &inputs.span(),
                "expected `input` or `inputs`, found both; name all of them in `inputs`",
            )),
            (Some(input), None) => Ok(vec![text(input)?]),
            (None, Some(inputs)) => match inputs.get_ref() {
                Value::Array(names) if !names.is_empty() => names.iter().map(text).collect(),
                _ => Err(self.wrong(inputs, "an array of layers' names, such as [\"a\", \"b\"]")),
            },
            (None, None) => Ok(Vec::new()),
        }
    }

    /// The name that the layer is given.
    pub fn name(&self) -> Result<Option<&'a str>> {
        let Some(value) = self.table.get("name") else {
            return Ok(None);
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
        match value.get_ref() {
            Value::Text(name)
                if (1..=64).contains(&name.len()) && name.chars().all(plain) && name != "input" =>
            {
                Ok(Some(name))
            }
            _ => Err(self.wrong(
                value,
                "a name of 1 to 64 letters, digits, '-' or '_' that is not \"input\"",
            )),
        }
    }

    fn whole_in(&self, value: &'a Spanned<Value>, least: usize) -> Option<usize> {
        match self.meant(value).get_ref() {
            Value::Integer(number) => {
                let number = usize::try_from(*number).ok()?;
                (number >= least && number as u128 <= MAX_ELEMENTS).then_some(number)
            }
            _ => None,
        }
    }

    fn pair_in(&self, value: &'a Spanned<Value>, least: usize) -> Option<[usize; 2]> {
        match self.meant(value).get_ref() {
            Value::Array(values) => match &values[..] {
                [height, width] => {
                    Some([self.whole_in(height, least)?, self.whole_in(width, least)?])
                }
                _ => None,
            },
            _ => self.whole_in(value, least).map(|size| [size, size]),
        }
    }

    /// A whole number.
    pub fn whole(&self, key: &str, least: usize) -> Result<Option<usize>> {
        let read = |value| {
            let expected = || format!("a whole number from {least} to {MAX_ELEMENTS}");
            let number = self.whole_in(value, least);
            number.ok_or_else(|| self.wrong(value, &expected()))
        };
        self.get(key).map(read).transpose()
    }

    /// One size for both axes, or `[height, width]`.
    pub fn pair(&self, key: &str, least: usize) -> Result<Option<[usize; 2]>> {
        let read = |value| {
            let expected = format!("a whole number of at least {least}, or two as [height, width]");
            let pair = self.pair_in(value, least);
            pair.ok_or_else(|| self.wrong(value, &expected))
        };
        self.get(key).map(read).transpose()
    }

    /// A whole number or `"classes"`.
    pub fn count(&self, key: &str) -> Result<Option<Count>> {
        let read = |value: &'a Spanned<Value>| match value.get_ref() {
            Value::Text(word) if word == "classes" => Ok(Count::Classes),
            _ => {
                let expected = format!("a whole number from 1 to {MAX_ELEMENTS} or \"classes\"");
                let number = self.whole_in(value, 1).map(Count::Number);
                number.ok_or_else(|| self.wrong(value, &expected))
            }
        };
        self.get(key).map(read).transpose()
    }

    /// `groups` of a convolution.
    pub fn groups(&self) -> Result<Groups> {
        let Some(value) = self.get("groups") else {
            return Ok(Groups::Number(1));
        };
        match value.get_ref() {
            Value::Text(word) if word == "depthwise" => Ok(Groups::Depthwise),
            _ => {
                let number = self.whole_in(value, 1).map(Groups::Number);
                number.ok_or_else(|| {
                    self.wrong(value, "a whole number of at least 1 or \"depthwise\"")
                })
            }
        }
    }

    /// `padding`.
    pub fn padding(&self) -> Result<Padding> {
        let Some(value) = self.get("padding") else {
            return Ok(Padding::Sides([[0; 2]; 2]));
        };
        let sides = match value.get_ref() {
            Value::Text(word) if word == "same" => return Ok(Padding::Same),
            Value::Text(word) if word == "valid" => Some([[0; 2]; 2]),
            Value::Array(axes) => match &axes[..] {
                [vertical, horizontal] => {
                    let axis = |value| self.pair_in(value, 0);
                    axis(vertical).zip(axis(horizontal)).map(|(v, h)| [v, h])
                }
                _ => None,
            },
            _ => self.whole_in(value, 0).map(|size| [[size; 2]; 2]),
        };
        sides.map(Padding::Sides).ok_or_else(|| {
            self.wrong(
                value,
                "a whole number of at least 0, [height, width], [[top, bottom], [left, right]], \"same\" or \"valid\"",
            )
        })
    }

    /// `true` or `false`.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        let read = |value: &'a Spanned<Value>| match value.get_ref() {
            Value::Boolean(flag) => Ok(*flag),
            _ => Err(self.wrong(value, "true or false")),
        };
        self.get(key).map(read).transpose()
    }

    /// A number that is `good` in 32 bits.
    fn number(&self, key: &str, expected: &str, good: fn(f32) -> bool) -> Result<Option<f32>> {
        let read = |value| {
            let number = self.number_in(value).filter(|number| good(*number));
            number.ok_or_else(|| self.wrong(value, expected))
        };
        self.get(key).map(read).transpose()
    }

    fn number_in(&self, value: &'a Spanned<Value>) -> Option<f32> {
        match self.meant(value).get_ref() {
            Value::Float(number) => Some(*number as f32),
            Value::Integer(number) => Some(*number as f32),
            _ => None,
        }
    }

    /// A number above 0.
    pub fn above_zero(&self, key: &str) -> Result<Option<f32>> {
        let good = |x: f32| x >= f32::MIN_POSITIVE && x.is_finite();
        self.number(key, &format!("a number above 0{FINITE}"), good)
    }

    /// A number from 0 to below 1.
    pub fn fraction(&self, key: &str) -> Result<Option<f32>> {
        let expected = "a number from 0 to below 1";
        self.number(key, expected, |x| (0.0..1.0).contains(&x))
    }

    /// A number from 0 to 1.
    pub fn share(&self, key: &str) -> Result<Option<f32>> {
        self.number(key, "a number from 0 to 1", |x| (0.0..=1.0).contains(&x))
    }

    /// The activation of that name, with the layer's `slope`.
    pub fn activation_named(&self, name: &str) -> Result<Activation> {
        let slope = self.number("slope", &format!("a number{FINITE}"), f32::is_finite)?;
        let found = Activation::ALL.into_iter().find(|a| a.name() == name);
        match (found, slope) {
            (Some(Activation::LeakyRelu { .. }), Some(slope)) => {
                Ok(Activation::LeakyRelu { slope })
            }
            (Some(_), Some(_)) => {
                Err(self.error("slope", "`slope` belongs to leaky_relu; remove it"))
            }
            (Some(activation), None) => Ok(activation),
            (None, _) => {
                let all = Activation::ALL
                    .map(|a| format!("`{}`", a.name()))
                    .join(", ");
                let what = format!("unknown value `{name}`, expected one of {all}");
                Err(self.error("activation", what))
            }
        }
    }

    /// What `activation` says.
    pub fn activation(&self) -> Result<Option<Activation>> {
        let Some(value) = self.get("activation") else {
            return match self.get("slope") {
                Some(slope) if !Activation::ALL.iter().any(|a| a.name() == self.kind) => {
                    let what = "`slope` belongs to leaky_relu; set activation = \"leaky_relu\"";
                    Err(self.source.error(&slope.span(), what))
                }
                _ => Ok(None),
            };
        };
        match value.get_ref() {
            Value::Text(name) => self.activation_named(name).map(Some),
            _ => Err(self.wrong(value, "the name of an activation, such as \"relu\"")),
        }
    }

    /// What `init` says.
    pub fn init(&self) -> Result<Option<Init>> {
        let Some(value) = self.get("init") else {
            return Ok(None);
        };
        let normalisation = self.kind.ends_with("_norm");
        let init = match value.get_ref() {
            Value::Text(name) => INITS.iter().find(|(n, _)| n == name).map(|(_, init)| *init),
            Value::Table(Table(entries)) => match &entries[..] {
                [(key, value)] => {
                    let number = self.number_in(value).filter(|number| number.is_finite());
                    match (key.get_ref().as_str(), number) {
                        ("constant", Some(value)) => Some(Init::Constant(value)),
                        ("uniform", Some(bound)) if bound > 0.0 => Some(Init::Uniform(bound)),
                        _ => None,
                    }
                }
                _ => None,
            },
            _ => None,
        };
        let allowed = |init: &Init| match init {
            Init::Constant(_) => true,
            Init::Dirac | Init::PartialDirac | Init::Whitening => self.kind == "conv2d",
            _ => !normalisation,
        };
        init.filter(allowed).map(Some).ok_or_else(|| {
            let names: Vec<_> = INITS
                .iter()
                .filter(|(_, init)| allowed(init))
                .map(|(name, _)| format!("\"{name}\""))
                .collect();
            self.wrong(
                value,
                &format!(
                    "{}{} or {{ constant = NUMBER }}",
                    names.join(", "),
                    if normalisation {
                        ""
                    } else {
                        ", { uniform = BOUND }"
                    }
                ),
            )
        })
    }
}

/// The type of layer of that name.
pub(super) fn kind(name: &str) -> Option<&'static Kind> {
    KINDS.iter().find(|kind| kind.name == name)
}
