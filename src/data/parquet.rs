//! Datasets of the Hugging Face hub in Parquet: a column of encoded pictures and a column of labels.
//!
//! A file's name (`train-00000-of-00002.parquet`) or its folder's (`train/0000.parquet`) says which
//! split it belongs to; the files of a split are read in the order of their names. The names of the
//! classes come from what the library `datasets` leaves in the schema's metadata.

use super::npz::MOST_CLASSES;
use super::{Dataset, Request, Splits, picture, split};
use crate::error::{Error, Result};
use crate::host::available_memory;
use crate::model::Shape;
use parquet::basic::Type as Physical;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::{Type, TypePtr};
use rayon::prelude::*;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// Which column holds the labels, where several could: the first of these that is there.
const LABELS: [&str; 7] = [
    "label",
    "labels",
    "fine_label",
    "class",
    "target",
    "category",
    "y",
];
/// How many pictures are decoded at a time, in parallel.
const ROUND: usize = 256;
/// Images are brought to this size where theirs differ or are larger than [`LARGEST_KEPT`].
const USUAL_SIZE: [usize; 2] = [64, 64];
const LARGEST_KEPT: usize = 256;
/// So many pictures that cannot be read are named.
const NAMED: usize = 100;

/// Which split a name stands for.
fn split_of(name: &str) -> Option<usize> {
    let word = name.split(['-', '.', '_']).next().unwrap_or_default();
    match word.to_ascii_lowercase().as_str() {
        "train" | "training" => Some(0),
        "validation" | "valid" | "val" | "dev" => Some(1),
        "test" => Some(2),
        _ => None,
    }
}

/// The Parquet files at `path`, by the folder that holds the splits, then by split.
fn files(path: &Path) -> BTreeMap<PathBuf, [Vec<PathBuf>; 3]> {
    let is_parquet = |path: &Path| path.extension().is_some_and(|e| e == "parquet");
    let mut sets: BTreeMap<PathBuf, [Vec<PathBuf>; 3]> = BTreeMap::new();
    if path.is_file() && is_parquet(path) {
        sets.entry(path.into()).or_default()[0].push(path.into());
        return sets;
    }
    let mut folders = vec![(path.to_path_buf(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        for entry in entries {
            let path = entry.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_folder && depth < 2 && !name.starts_with('.') {
                folders.push((path, depth + 1));
            } else if is_parquet(&path) && path.is_file() {
                let of_folder = folder.file_name().and_then(|name| {
                    let split = split_of(&name.to_string_lossy())?;
                    Some((folder.parent()?.to_path_buf(), split))
                });
                let of_file = split_of(&name).map(|split| (folder.clone(), split));
                if let Some((set, split)) = of_file.or(of_folder) {
                    sets.entry(set).or_default()[split].push(path.clone());
                }
            }
        }
    }
    for files in sets.values_mut().flatten() {
        files.sort_unstable();
    }
    sets
}

/// Whether there are Parquet files whose split is known.
pub(super) fn holds(path: &Path) -> bool {
    !files(path).is_empty()
}

/// What is common to all files.
struct Columns {
    image: String,
    label: String,
    class_names: Option<Vec<String>>,
}

/// A split as it is before pictures are decoded.
#[derive(Default)]
struct Raw {
    /// Of the pictures whose header can be read.
    labels: Vec<u32>,
    headers: Vec<Option<picture::Header>>,
}

/// Reads the set at `path`, which [`holds`] one. Test and validation images that there are not are
/// held back from the training images. With 1 or 3 `channels`, or as many as the pictures have.
pub(super) fn load(
    name: &str,
    path: &Path,
    request: &Request,
    channels: Option<usize>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Splits> {
    let mut sets = files(path).into_iter();
    let (Some((folder, files)), other) = (sets.next(), sets.next()) else {
        return Err(Error::data(
            path,
            "expected Parquet files named train-… and test-…, found none",
        ));
    };
    if let Some((other, _)) = other {
        return Err(Error::data(
            path,
            format!(
                "expected one dataset, found several ({} and {}); give the folder of one of them",
                folder.display(),
                other.display()
            ),
        ));
    }
    let first = files.iter().flatten().next();
    let columns = Columns::of(first.unwrap_or(&folder))?;
    if files[0].is_empty() {
        return Err(Error::data(
            &folder,
            "expected a file named train-….parquet, found none; rename the one to train on",
        ));
    }
    if let (Some(share), false) = (request.test, files[2].is_empty()) {
        return Err(Error::Usage(format!(
            "expected no --test, found {share}: {name} comes with test images; leave it out"
        )));
    }

    if request.test == Some(0.0) {
        return Err(Error::Usage(format!(
            "expected --test above 0, found 0: {name} has no other test images; leave it out for 0.1"
        )));
    }

    // First what they are, then the pixels, so that no more is held than those.
    let mut raw: [Raw; 3] = Default::default();
    for (raw, files) in raw.iter_mut().zip(&files) {
        for file in files {
            columns.read(file, &mut |bytes, label| {
                raw.headers.push(picture::header(bytes).ok());
                raw.labels.push(label);
                Ok(())
            })?;
        }
    }
    let all = || raw.iter().flat_map(|raw| &raw.headers).flatten();
    let Some(some) = all().next() else {
        return Err(Error::data(
            &folder,
            format!(
                "expected encoded pictures in column '{}', found none that can be read; convert them to JPEG or PNG",
                columns.image
            ),
        ));
    };
    let alike = all().all(|header| header.size == some.size);
    let kept = alike && some.size.iter().all(|side| *side <= LARGEST_KEPT);
    let own = if kept { some.size } else { USUAL_SIZE };
    let [height, width] = request.image_size.unwrap_or(own);
    let own = if all().all(|header| header.grey) {
        1
    } else {
        3
    };
    let channels = channels.unwrap_or(own);
    let shape = Shape::new(height, width, channels);

    let pictures: usize = raw.iter().map(|raw| raw.labels.len()).sum();
    let bytes = (pictures as u64).saturating_mul(shape.elements() as u64);
    let available = available_memory();
    if bytes > available {
        return Err(super::idx::too_large(&folder, bytes, available));
    }
    let largest = raw.iter().flat_map(|raw| &raw.labels).max();
    let classes = largest.map_or(2, |&label| label as usize + 1).max(2);
    let class_names = match &columns.class_names {
        Some(names) if names.len() >= classes => names.clone(),
        Some(names) => {
            return Err(Error::data(
                &folder,
                format!(
                    "expected labels below {}, the number of class names, found {}; the files are of different datasets, fetch them again",
                    names.len(),
                    classes - 1
                ),
            ));
        }
        None => (0..classes).map(|class| class.to_string()).collect(),
    };

    let mut unreadable = Vec::new();
    let mut done = 0;
    let mut sets = Vec::new();
    for (files, raw) in files.iter().zip(raw) {
        let mut decoding = Decoding {
            shape,
            images: Vec::with_capacity(raw.labels.len() * shape.elements()),
            labels: Vec::with_capacity(raw.labels.len()),
            round: Vec::new(),
            unreadable: &mut unreadable,
        };
        for file in files {
            let mut row = 0;
            columns.read(file, &mut |bytes, label| {
                decoding.round.push((bytes.to_vec(), label, row));
                row += 1;
                if decoding.round.len() == ROUND {
                    done += ROUND;
                    decoding.decode(file);
                    progress(done, pictures);
                }
                Ok(())
            })?;
            done += decoding.round.len();
            decoding.decode(file);
            progress(done, pictures);
        }
        sets.push(Dataset {
            images: decoding.images,
            labels: decoding.labels,
            shape,
            classes: class_names.len(),
            files: Vec::new(),
            class_names: class_names.clone(),
        });
    }
    let [mut train, validation, test] =
        <[Dataset; 3]>::try_from(sets).unwrap_or_else(|_| unreachable!("three splits"));
    let seed = request.split_seed;
    let share = |asked: Option<f64>| asked.unwrap_or(0.1);
    let own_test = !files[2].is_empty();
    let test = match own_test {
        true => test,
        false => split::carve(&mut train, share(request.test), seed),
    };
    let wanted = match own_test {
        true => request.validation.unwrap_or(0.0),
        false => share(request.validation),
    };
    let validation = match files[1].is_empty() {
        false => Some(validation),
        true if wanted > 0.0 => Some(split::carve(&mut train, wanted, seed)),
        true => None,
    };
    for (which, set) in [("training", &train), ("test", &test)] {
        if set.is_empty() {
            return Err(Error::data(
                &folder,
                format!(
                    "expected at least one {which} image that can be read, found none; give a larger dataset"
                ),
            ));
        }
    }
    let mut splits = super::assembled(
        name,
        &folder,
        train,
        validation.filter(|set| !set.is_empty()),
        test,
    )?;
    splits.notes.extend(unreadable_note(&unreadable, pictures));
    Ok(splits)
}

/// Height and width of every picture that can be looked at, as they are in the files.
pub(super) fn sizes(path: &Path) -> Result<Vec<[usize; 2]>> {
    let mut sizes = Vec::new();
    for file in files(path).values().flatten().flatten() {
        Columns::of(file)?.read(file, &mut |bytes, _| {
            sizes.extend(picture::header(bytes).ok().map(|header| header.size));
            Ok(())
        })?;
    }
    Ok(sizes)
}

fn unreadable_note(unreadable: &[String], pictures: usize) -> Option<String> {
    let more = match unreadable.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let named = unreadable.iter().take(NAMED).cloned().collect::<Vec<_>>();
    (!unreadable.is_empty()).then(|| {
        format!(
            "warning: {} of {pictures} pictures cannot be read and are left out: {}{more}",
            unreadable.len(),
            named.join(", ")
        )
    })
}

/// Pictures on their way to pixels.
struct Decoding<'a> {
    shape: Shape,
    images: Vec<u8>,
    labels: Vec<u32>,
    /// Encoded picture, label and row.
    round: Vec<(Vec<u8>, u32, usize)>,
    unreadable: &'a mut Vec<String>,
}

impl Decoding<'_> {
    /// Decodes what has come together, from `file`.
    fn decode(&mut self, file: &Path) {
        let size = self.shape.elements();
        let start = self.images.len();
        self.images.resize(start + self.round.len() * size, 0);
        let targets = self.images[start..].par_chunks_exact_mut(size);
        let outcomes: Vec<_> = targets
            .zip(&self.round)
            .map(|(target, (bytes, ..))| picture::decode(bytes, self.shape, target))
            .collect();
        let mut kept = start;
        for (i, (outcome, (_, label, row))) in
            outcomes.into_iter().zip(self.round.drain(..)).enumerate()
        {
            match outcome {
                Ok(()) => {
                    let from = start + i * size;
                    self.images.copy_within(from..from + size, kept);
                    kept += size;
                    self.labels.push(label);
                }
                Err(what) => {
                    let name = file.file_name().unwrap_or_default().to_string_lossy();
                    self.unreadable.push(format!("{name} row {row} ({what})"));
                }
            }
        }
        self.images.truncate(kept);
    }
}

/// Carries out what may find a file damaged in ways that its reader does not foresee.
fn guarded<T>(path: &Path, read: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(read))
        .unwrap_or_else(|_| Err(damaged(path, &"not what its header says")))
}

fn damaged(path: &Path, e: &dyn std::fmt::Display) -> Error {
    let text = e.to_string();
    let line = text
        .lines()
        .next()
        .unwrap_or_default()
        .trim_end_matches('.');
    Error::data(
        path,
        format!("expected an intact Parquet file, found a damaged one ({line}); fetch it again"),
    )
}

fn open(path: &Path) -> Result<SerializedFileReader<File>> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    SerializedFileReader::new(file).map_err(|e| damaged(path, &e))
}

impl Columns {
    /// The columns as one file has them.
    fn of(path: &Path) -> Result<Columns> {
        guarded(path, || {
            let reader = open(path)?;
            let metadata = reader.metadata().file_metadata();
            let pairs = metadata.key_value_metadata();
            let text = pairs.and_then(|pairs| {
                let pair = pairs.iter().find(|pair| pair.key == "huggingface")?;
                pair.value.as_deref()
            });
            let features: Value = text
                .and_then(|text| serde_json::from_str::<Value>(text).ok())
                .and_then(|mut value| value.pointer_mut("/info/features").map(Value::take))
                .unwrap_or_default();
            let kind = |name: &str| features[name]["_type"].as_str();

            let fields = metadata.schema().get_fields();
            let holds_bytes = |field: &Type| {
                field.is_primitive() && field.get_physical_type() == Physical::BYTE_ARRAY
            };
            let is_image = |field: &Type| match field.is_group() {
                true => field
                    .get_fields()
                    .iter()
                    .any(|f| f.name() == "bytes" && holds_bytes(f)),
                false => {
                    let text = field.get_basic_info().logical_type_ref().is_some()
                        || field.get_basic_info().converted_type()
                            != parquet::basic::ConvertedType::NONE;
                    holds_bytes(field) && !text
                }
            };
            let is_label = |field: &Type| {
                field.is_primitive()
                    && [Physical::INT32, Physical::INT64].contains(&field.get_physical_type())
            };
            let all = || {
                let names = fields.iter().map(|field| field.name());
                names.collect::<Vec<_>>().join(", ")
            };
            let image = fields
                .iter()
                .find(|field| kind(field.name()) == Some("Image") && is_image(field))
                .or_else(|| fields.iter().find(|field| is_image(field)));
            let Some(image) = image else {
                return Err(Error::data(
                    path,
                    format!(
                        "expected a column of encoded pictures (bytes, or a struct with bytes), found {}; save it with the library datasets",
                        all()
                    ),
                ));
            };
            let labels: Vec<&TypePtr> = fields.iter().filter(|field| is_label(field)).collect();
            let named = |name: &str| labels.iter().copied().find(|field| field.name() == name);
            let of_class = |field: &&&TypePtr| kind(field.name()) == Some("ClassLabel");
            let label = LABELS
                .iter()
                .find_map(|name| named(name))
                .or_else(|| labels.iter().find(of_class).copied());
            let Some(label) = label else {
                return Err(Error::data(
                    path,
                    format!(
                        "expected an integer column named {}, found {}; rename the one with the labels",
                        LABELS.join(", "),
                        all()
                    ),
                ));
            };
            let names = features[label.name()]["names"].as_array();
            let names = names.map(|names| {
                let names = names.iter().filter_map(|name| name.as_str());
                names.map(String::from).collect::<Vec<_>>()
            });
            Ok(Columns {
                image: image.name().into(),
                label: label.name().into(),
                class_names: names.filter(|names| names.len() >= 2),
            })
        })
    }

    /// Hands over picture and label of each row of a file.
    fn read(&self, path: &Path, row: &mut dyn FnMut(&[u8], u32) -> Result<()>) -> Result<()> {
        guarded(path, || {
            let reader = open(path)?;
            let schema = reader.metadata().file_metadata().schema();
            let field = |name: &str| {
                let field = schema.get_fields().iter().find(|f| f.name() == name);
                field.cloned().ok_or_else(|| {
                    Error::data(
                        path,
                        format!("expected a column '{name}' as in the other files, found none; fetch it again"),
                    )
                })
            };
            let fields = vec![field(&self.image)?, field(&self.label)?];
            let wanted = Type::group_type_builder(schema.name())
                .with_fields(fields)
                .build()
                .map_err(|e| damaged(path, &e))?;
            let rows = reader
                .get_row_iter(Some(wanted))
                .map_err(|e| damaged(path, &e))?;
            for (i, found) in rows.enumerate() {
                let found = found.map_err(|e| damaged(path, &e))?;
                let (mut bytes, mut label) = (None, None);
                for (name, field) in found.get_column_iter() {
                    match field {
                        _ if *name == self.label => label = whole(field),
                        Field::Bytes(b) => bytes = Some(b.data()),
                        Field::Group(group) => bytes = inner(group),
                        _ => {}
                    }
                }
                let Some(label) = label.filter(|label| (0..MOST_CLASSES as i64).contains(label))
                else {
                    let found = label.map_or("none".into(), |label| label.to_string());
                    return Err(Error::data(
                        path,
                        format!(
                            "expected labels from 0 to below {MOST_CLASSES} in column '{}', found {found} in row {i}; leave out files without labels",
                            self.label
                        ),
                    ));
                };
                // A picture that is not there is one that cannot be read.
                row(bytes.unwrap_or_default(), label as u32)?;
            }
            Ok(())
        })
    }
}

/// The bytes in a struct of a picture.
fn inner(group: &Row) -> Option<&[u8]> {
    group
        .get_column_iter()
        .find_map(|(name, field)| match field {
            Field::Bytes(bytes) if name == "bytes" => Some(bytes.data()),
            _ => None,
        })
}

/// A whole number of any type.
fn whole(field: &Field) -> Option<i64> {
    match *field {
        Field::Byte(n) => Some(n.into()),
        Field::Short(n) => Some(n.into()),
        Field::Int(n) => Some(n.into()),
        Field::Long(n) => Some(n),
        Field::UByte(n) => Some(n.into()),
        Field::UShort(n) => Some(n.into()),
        Field::UInt(n) => Some(n.into()),
        Field::ULong(n) => i64::try_from(n).ok(),
        _ => None,
    }
}
