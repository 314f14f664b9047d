//! A folder of pictures: `CLASS/*`, or `train/CLASS/*` with `test/` and `val/`.
//!
//! What a picture is, its contents tell, not its name. The splits follow from the names of the files
//! and the seed alone. Every picture is decoded straight into its place.

use super::cache::{Cache, Head, LIMIT, LeftOut};
use super::split::{part, shuffled};
use super::{Dataset, Request, Splits, picture};
use crate::error::{Error, Result};
use crate::files::hex;
use crate::host::available_memory;
use crate::model::Shape;
use image::ImageFormat;
use indicatif::BinaryBytes;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File, Metadata};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::{Duration, SystemTime};
use walkdir::WalkDir;

const TRAIN: [&str; 2] = ["train", "training"];
const VALIDATION: [&str; 3] = ["val", "valid", "validation"];
const TEST: [&str; 2] = ["test", "testing"];

/// Share that is held back where nothing else is said and nothing is there.
const SHARE: f64 = 0.1;

/// Pictures of one size keep it up to this on a side; what cannot keep its size gets the other one.
const LARGEST_OWN: usize = 256;
const DEFAULT: usize = 64;

/// Nobody trains on larger ones.
const LARGEST: usize = 16_384;

/// The start of a file in which most have their header.
const START: u64 = 256 << 10;

/// Larger files are not read.
const LARGEST_FILE: u64 = 1 << 30;

/// How many names of files a line lists.
const LISTED: usize = 100;

/// Times of files are no finer than this on some file systems.
const TICK: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Train,
    Validation,
    Test,
}

/// Which folders hold the classes.
#[derive(Debug)]
struct Layout {
    /// Folders of classes; what the first one has may be divided.
    parts: Vec<(Part, PathBuf)>,
    notes: Vec<String>,
}

/// A file in the folder of a class.
struct Candidate {
    part: Part,
    class: String,
    /// Below the folder that was asked for, `/` between the parts.
    name: String,
    path: PathBuf,
    size: u64,
    modified: SystemTime,
    /// What else changes when the file does, as the system has it.
    changed: [i64; 3],
}

/// The pictures, each in its place.
struct Pictures {
    head: Head,
    /// Files by number, as their images lie in the three parts.
    orders: [Vec<usize>; 3],
    /// `[N][H][W][C]` of each part.
    images: [Vec<u8>; 3],
    /// Whether the system did not let one of them be read, which may be another time.
    lost: bool,
}

/// Whether this is a folder that may hold folders of pictures: one without IDX files.
pub(super) fn holds(folder: &Path) -> bool {
    let idx = |entry: std::io::Result<fs::DirEntry>| {
        entry.is_ok_and(|entry| entry.file_name().to_string_lossy().contains("-ubyte"))
    };
    fs::read_dir(folder).is_ok_and(|mut entries| !entries.any(idx))
}

/// What images are made of the pictures.
#[derive(Clone, Copy, Debug, Default)]
struct Wanted {
    /// Height and width, or what suits the pictures.
    size: Option<[usize; 2]>,
    /// 1 or 3, or what suits them.
    channels: Option<usize>,
}

/// Which file goes where, once it is known which are pictures.
type Divide<'a> = &'a dyn Fn(&Head) -> Result<[Vec<usize>; 3]>;

/// The splits, and of what files their images are.
///
/// # Errors
/// [`Error::Usage`] for shares that leave nothing, or where there are such images already;
/// [`Error::Data`] where there are no pictures in at least two classes, or too few in one;
/// [`Error::Io`] for a folder that cannot be read.
pub(super) fn load(
    spec: &str,
    request: &Request,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Splits> {
    let folder = Path::new(spec);
    if let Some([height, width]) = request.image_size
        && height.max(width) > LARGEST
    {
        return Err(Error::Usage(format!(
            "expected --image-size of at most {LARGEST}, found {height}x{width}; give 64, say"
        )));
    }
    let Layout { parts, mut notes } = layout(folder)?;
    let shares = shares(spec, &parts, request)?;
    let before = SystemTime::now();
    let files = scan(folder, &parts, &mut notes)?;
    let wanted = Wanted {
        size: request.image_size,
        channels: None,
    };
    let divide = |head: &Head| divide(folder, &files, head, shares, request.split_seed);
    let cache = request.cache.as_deref().map(|cache| (cache, before));
    let pictures = read(folder, &files, wanted, cache, &divide, progress, &mut notes)?;
    let without = without_pictures(&parts, &files, &pictures.head)?;
    let trained = pictures.orders[0].iter().map(|i| &files[*i].class[..]);
    let classes: BTreeSet<&str> = trained.collect();
    match pictures.datasets(&files, &classes) {
        Some([train, validation, test]) if classes.len() > 1 && !test.is_empty() => Ok(Splits {
            name: spec.into(),
            train,
            validation: Some(validation).filter(|split| !split.is_empty()),
            test,
            notes: notes.into_iter().chain(without).collect(),
        }),
        _ => Err(Error::data(
            folder,
            format!(
                "expected readable pictures of each class to train on, and some to test on, found too many that are damaged; {}",
                notes.last().map_or("", |note| note)
            ),
        )),
    }
}

/// The test images, or all where there is no folder of test images, brought to `shape`.
///
/// # Errors
/// [`Error::Data`] where there are none, [`Error::Io`] for a folder that cannot be read.
pub(super) fn load_test(
    spec: &str,
    shape: Shape,
    cache: Option<&Path>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(Dataset, Vec<String>)> {
    let folder = Path::new(spec);
    let Layout {
        mut parts,
        mut notes,
    } = layout(folder)?;
    if parts.iter().any(|(part, _)| *part == Part::Test) {
        parts.retain(|(part, _)| *part == Part::Test);
    }
    let before = SystemTime::now();
    let files = scan(folder, &parts, &mut notes)?;
    let wanted = Wanted {
        size: Some([shape.height, shape.width]),
        channels: Some(shape.channels),
    };
    let cache = cache.map(|cache| (cache, before));
    let divide = |head: &Head| Ok([vec![], vec![], head.pictures(files.len())]);
    let pictures = read(folder, &files, wanted, cache, &divide, progress, &mut notes)?;
    let tested = pictures.orders[2].iter().map(|i| &files[*i].class[..]);
    let names: BTreeSet<&str> = tested.collect();
    match pictures.datasets(&files, &names) {
        Some([_, _, test]) if !test.is_empty() => Ok((test, notes)),
        _ => Err(Error::data(
            folder,
            "expected readable pictures to test on, found damaged ones only; give another folder",
        )),
    }
}

/// The pictures among `files`, from the cache or decoded, and what there is to say about it. With the folder
/// of the cache comes a time before the look at the files.
fn read(
    folder: &Path,
    files: &[Candidate],
    wanted: Wanted,
    cache: Option<(&Path, SystemTime)>,
    divide: Divide,
    progress: &mut dyn FnMut(usize, usize),
    notes: &mut Vec<String>,
) -> Result<Pictures> {
    let key = key(folder, wanted, files);
    let cache = cache.map(|(at, before)| (Cache::new(at, &key), before));
    let mut found = None;
    if let Some((cache, _)) = &cache {
        match kept(folder, files.len(), cache, &key, divide) {
            Ok(pictures) => found = pictures,
            Err(why) => notes.push(format!(
                "the decoded pictures in {} are not used, but made anew: {why}",
                cache.path().display()
            )),
        }
    }
    let mut pictures = match found {
        Some(pictures) => pictures,
        None => {
            let head = survey(folder, key, wanted, files)?;
            let orders = divide(&head)?;
            let mut pictures = Pictures::prepare(folder, head, orders)?;
            pictures.decode(files, progress);
            if let Some((cache, before)) = cache
                && let Err(why) = pictures.keep(&cache, files, before)
            {
                notes.push(format!(
                    "the decoded pictures are not kept for the next time: {why}"
                ));
            }
            pictures
        }
    };
    pictures.drop_broken();
    notes.extend(pictures.head.note.take());
    let lost = pictures.head.left_out.iter().filter_map(|(i, why)| {
        let why = match why {
            LeftOut::Unreadable(why) | LeftOut::Unread(why) | LeftOut::Broken(why) => why,
            LeftOut::NoPicture => return None,
        };
        Some(format!("{} ({why})", files.get(*i)?.name))
    });
    notes.extend(listed(lost.collect()));
    Ok(pictures)
}

/// What a cache has of the pictures, if it has anything.
///
/// # Errors
/// Why it cannot be used, in a few words.
fn kept(
    folder: &Path,
    files: usize,
    cache: &Cache,
    key: &str,
    divide: Divide,
) -> std::result::Result<Option<Pictures>, String> {
    let Some(kept) = cache.open(key)? else {
        return Ok(None);
    };
    let head = kept.head.clone();
    let pictures = divide(&head).and_then(|orders| Pictures::prepare(folder, head, orders));
    let mut pictures = pictures.map_err(|e| e.to_string())?;
    let broken = pictures.head.broken();
    let places = pictures.places(files).into_iter().enumerate();
    let places = places.filter(|(i, _)| !broken.contains(i));
    kept.images(places.filter_map(|(_, place)| place))?;
    Ok(Some(pictures))
}

impl Pictures {
    /// Room for every picture.
    fn prepare(folder: &Path, head: Head, orders: [Vec<usize>; 3]) -> Result<Pictures> {
        let Shape { height, width, .. } = head.shape;
        let images: usize = orders.iter().map(Vec::len).sum();
        let bytes = images as u128 * head.shape.elements() as u128;
        let available = available_memory();
        if bytes > available.into() {
            return Err(Error::data(
                folder,
                format!(
                    "expected pictures that fit into the free memory, {}, found {images} that take {} at {height}×{width}; use a smaller --image-size, fewer pictures, or a machine with more memory",
                    BinaryBytes(available),
                    BinaryBytes(bytes.try_into().unwrap_or(u64::MAX)),
                ),
            ));
        }
        let size = head.shape.elements();
        Ok(Pictures {
            images: orders.each_ref().map(|order| vec![0; order.len() * size]),
            orders,
            head,
            lost: false,
        })
    }

    /// The place of each of `files` files, where it has one.
    fn places(&mut self, files: usize) -> Vec<Option<&mut [u8]>> {
        let mut places: Vec<_> = (0..files).map(|_| None).collect();
        let size = self.head.shape.elements();
        for (order, images) in self.orders.iter().zip(&mut self.images) {
            for (file, image) in order.iter().zip(images.chunks_exact_mut(size)) {
                places[*file] = Some(image);
            }
        }
        places
    }

    /// Decodes every picture into its place and takes note of those that are broken.
    fn decode(&mut self, files: &[Candidate], progress: &mut dyn FnMut(usize, usize)) {
        let shape = self.head.shape;
        let places = self.places(files.len()).into_iter().enumerate();
        let jobs: Vec<_> = places.filter_map(|(i, place)| Some((i, place?))).collect();
        let all = jobs.len();
        let (mut broken, mut lost) = (Vec::new(), false);
        let (sender, receiver) = channel();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let jobs = jobs.into_par_iter();
                jobs.for_each_with(sender, |sender, (i, place)| {
                    let bytes = files[i].read(LARGEST_FILE);
                    let lost = bytes.is_err() && files[i].size <= LARGEST_FILE;
                    let done = bytes.and_then(|bytes| picture::decode(&bytes, shape, place));
                    // The receiver lives until the last sender is gone.
                    let _ = sender.send((i, done.err(), lost));
                });
            });
            for (done, (i, why, is_lost)) in (1..).zip(receiver) {
                progress(done, all);
                lost |= is_lost;
                broken.extend(why.map(|why| (i, LeftOut::Broken(why))));
            }
        });
        self.lost = lost;
        self.head.images = all - broken.len();
        self.head.left_out.extend(broken);
        self.head.left_out.sort_by_key(|(i, _)| *i);
    }

    /// Closes the gaps of broken pictures.
    fn drop_broken(&mut self) {
        let broken = self.head.broken();
        let size = self.head.shape.elements();
        for (order, images) in self.orders.iter_mut().zip(&mut self.images) {
            let mut to = 0;
            for (from, file) in order.iter().enumerate() {
                if !broken.contains(file) {
                    images.copy_within(from * size..(from + 1) * size, to * size);
                    to += 1;
                }
            }
            images.truncate(to * size);
            order.retain(|file| !broken.contains(file));
        }
    }

    /// The three parts with these classes; `None` where a picture is of another.
    fn datasets(self, files: &[Candidate], names: &BTreeSet<&str>) -> Option<[Dataset; 3]> {
        let labels: BTreeMap<&str, u32> = names.iter().copied().zip(0..).collect();
        let [train, validation, test] = self.orders.each_ref().map(|order| {
            let labels = order
                .iter()
                .map(|i| labels.get(&files[*i].class[..]).copied());
            labels.collect::<Option<Vec<u32>>>()
        });
        let labels = [train?, validation?, test?];
        let named = |order: &Vec<usize>| order.iter().map(|i| files[*i].name.clone()).collect();
        let named: [Vec<String>; 3] = self.orders.each_ref().map(named);
        let mut parts = self.images.into_iter().zip(labels).zip(named);
        let mut part = || {
            parts.next().map(|((images, labels), files)| Dataset {
                images,
                labels,
                shape: self.head.shape,
                classes: names.len(),
                class_names: names.iter().map(ToString::to_string).collect(),
                files,
            })
        };
        Some([part()?, part()?, part()?])
    }

    /// Keeps what was decoded of files that were looked at after the time `before`.
    ///
    /// # Errors
    /// Why it could not be kept, in a few words.
    fn keep(
        &mut self,
        cache: &Cache,
        files: &[Candidate],
        before: SystemTime,
    ) -> std::result::Result<(), String> {
        let now = SystemTime::now();
        // Not of a future that the clock does not know, either.
        let is_new = |file: &Candidate| {
            let (age, ahead) = (
                before.duration_since(file.modified),
                file.modified.duration_since(now),
            );
            age.map_or(true, |age| age < TICK) && ahead.map_or(true, |ahead| ahead < TICK)
        };
        let unread = |(_, why): &(usize, LeftOut)| matches!(why, LeftOut::Unread(_));
        if self.lost || files.iter().any(is_new) || self.head.left_out.iter().any(unread) {
            // Another change within the tick would not be seen, and what the system could not read now it may
            // read another time. The next time will do.
            return Ok(());
        }
        let bytes: usize = self.images.iter().map(Vec::len).sum();
        if bytes as u64 > LIMIT {
            return Err(format!(
                "{} are more than the {} that the cache may take",
                BinaryBytes(bytes as u64),
                BinaryBytes(LIMIT)
            ));
        }
        let (head, broken) = (self.head.clone(), self.head.broken());
        let places = self.places(files.len()).into_iter().enumerate();
        let places = places.filter(|(i, _)| !broken.contains(i));
        cache.keep(&head, places.filter_map(|(_, place)| place.map(|p| &*p)))
    }
}

/// Height and width of every picture that can be looked at, as they are in the files.
pub(super) fn sizes(folder: &Path) -> Result<Vec<[usize; 2]>> {
    let Layout { parts, mut notes } = layout(folder)?;
    let files = scan(folder, &parts, &mut notes)?;
    let headers = files.par_iter().map(Candidate::header);
    Ok(headers
        .filter_map(|header| Some(header.ok()?.size))
        .collect())
}

/// Which folders hold what: `train` and its neighbours, or `folder` itself.
fn layout(folder: &Path) -> Result<Layout> {
    let folders = folders(folder)?;
    let has_folders = |path: &Path| self::folders(path).is_ok_and(|f| !f.is_empty());
    let called = |names: &[&str]| -> Vec<&(String, PathBuf)> {
        let is_one = |name: &str| names.iter().any(|n| n.eq_ignore_ascii_case(name));
        let found = folders.iter().filter(|(name, _)| is_one(name));
        found.filter(|(_, path)| has_folders(path)).collect()
    };
    let [train, validation, test] = [&TRAIN[..], &VALIDATION, &TEST].map(called);
    let mut notes = Vec::new();
    let is_split = !validation.is_empty() || !test.is_empty() || folders.len() == 1;
    if train.is_empty() || !is_split {
        let pictures = pictures_in(folder);
        if folders.is_empty() {
            return Err(Error::data(
                folder,
                format!(
                    "expected a folder of pictures for each class (CLASS/*.jpg), train/ and test/ with such folders, or IDX files, found {}; sort the pictures into folders by class",
                    match pictures {
                        0 => "none".into(),
                        n => format!("{n} pictures and no folder"),
                    }
                ),
            ));
        }
        if pictures > 0 {
            notes.push(format!(
                "{pictures} pictures lie in {} itself, in the folder of no class, and are left out",
                folder.display()
            ));
        }
        return Ok(Layout {
            parts: vec![(Part::Train, folder.to_path_buf())],
            notes,
        });
    }
    for (what, found) in [
        ("training", &train),
        ("validation", &validation),
        ("test", &test),
    ] {
        if let [(first, _), (second, _), ..] = found[..] {
            return Err(Error::data(
                folder,
                format!(
                    "expected one folder of {what} images, found {first} and {second}; remove one of them"
                ),
            ));
        }
    }
    let read: Vec<&str> = [&train, &validation, &test]
        .into_iter()
        .flatten()
        .map(|(name, _)| &name[..])
        .collect();
    let others = folders
        .iter()
        .filter(|(name, _)| !read.contains(&&name[..]));
    let others: Vec<&str> = others.map(|(name, _)| &name[..]).collect();
    if !others.is_empty() {
        notes.push(format!(
            "read are the folders {}, but not {} beside them",
            read.join(", "),
            others.join(", ")
        ));
    }
    let mut parts = Vec::new();
    let found = train.iter().map(|found| (Part::Train, found));
    let found = found.chain(validation.iter().map(|found| match test.is_empty() {
        true => {
            notes.push(format!(
                "the images in {} are tested on: there are no other test images",
                found.0
            ));
            (Part::Test, found)
        }
        false => (Part::Validation, found),
    }));
    let found = found.chain(test.iter().map(|found| (Part::Test, found)));
    parts.extend(found.map(|(part, (_, path))| (part, path.clone())));
    Ok(Layout { parts, notes })
}

/// A line about the folders to train on that hold no picture, and so make no class.
fn without_pictures(
    parts: &[(Part, PathBuf)],
    files: &[Candidate],
    head: &Head,
) -> Result<Option<String>> {
    let broken = head.broken();
    let pictures = head.pictures(files.len()).into_iter();
    let pictures = pictures.filter(|i| !broken.contains(i));
    let classes: HashSet<&str> = pictures.map(|i| &files[i].class[..]).collect();
    let mut without = Vec::new();
    for (_, path) in parts.iter().filter(|(part, _)| *part == Part::Train) {
        without.extend(folders(path)?.into_iter().map(|(name, _)| name));
    }
    without.retain(|name| !classes.contains(&name[..]));
    let more = match without.len().saturating_sub(LISTED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    without.truncate(LISTED);
    Ok((!without.is_empty()).then(|| {
        format!(
            "no picture to train on, and so no class, is in the folder of {}{more}",
            without.join(", ")
        )
    }))
}

/// Shares of the training folder that are held back for validation and for testing.
fn shares(spec: &str, parts: &[(Part, PathBuf)], request: &Request) -> Result<[f64; 2]> {
    let has = |part| parts.iter().any(|(p, _)| *p == part);
    let share = |flag: &str, part, asked: Option<f64>, default| match asked {
        Some(asked) if has(part) => Err(Error::Usage(format!(
            "expected no {flag}, found {asked}: {spec} has a folder of its own for that; leave it out"
        ))),
        Some(asked) => Ok(asked),
        None => Ok(if has(part) { 0.0 } else { default }),
    };
    let test = share("--test", Part::Test, request.test, SHARE)?;
    if test == 0.0 && !has(Part::Test) {
        return Err(Error::Usage(format!(
            "expected --test above 0, found 0: {spec} has no other test images; leave it out for {SHARE}"
        )));
    }
    let default = if has(Part::Test) { 0.0 } else { SHARE };
    let validation = share(
        "--validation",
        Part::Validation,
        request.validation,
        default,
    )?;
    if validation + test >= 1.0 {
        return Err(Error::Usage(format!(
            "expected --validation and --test that leave something to train on, found {validation} and {test}; give smaller ones"
        )));
    }
    Ok([validation, test])
}

/// The folders in `folder`, sorted by name, but for hidden ones.
fn folders(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let error = |e| Error::io("read", folder, e);
    let mut folders = Vec::new();
    for entry in fs::read_dir(folder).map_err(error)? {
        let entry = entry.map_err(error)?;
        let lossy = entry.file_name().to_string_lossy().into_owned();
        if is_hidden(&lossy) || !entry.path().is_dir() {
            continue;
        }
        // Two of them might look the same.
        let name = entry.file_name().into_string().map_err(|_| {
            Error::data(
                folder,
                format!(
                    "expected folders with names in UTF-8, found {lossy}; give it another name"
                ),
            )
        })?;
        folders.push((name, entry.path()));
    }
    folders.sort();
    Ok(folders)
}

/// What a file in a folder is to somebody who looks for pictures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// Its bytes.
    Picture(Vec<u8>),
    /// Neither contents nor name are those of a picture.
    Other,
}

/// The files in a folder and below it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Files {
    /// Sorted by name.
    pub paths: Vec<PathBuf>,
    /// What could not be looked at, and why.
    pub lost: Vec<(PathBuf, String)>,
}

/// The files in a folder and below it, but for hidden ones. Links are followed.
///
/// # Errors
/// [`Error::Io`] for a folder that cannot be read.
pub fn files_in(folder: &Path) -> Result<Files> {
    fs::read_dir(folder).map_err(|e| Error::io("read", folder, e))?;
    let seen = |entry: &walkdir::DirEntry| {
        entry.depth() == 0 || !is_hidden(&entry.file_name().to_string_lossy())
    };
    let entries = WalkDir::new(folder).follow_links(true).sort_by_file_name();
    let mut files = Files::default();
    for entry in entries.into_iter().filter_entry(seen) {
        match entry {
            Ok(entry) if entry.file_type().is_file() => files.paths.push(entry.into_path()),
            Ok(_) => {}
            // What a link leads back to is read already.
            Err(e) if e.loop_ancestor().is_some() => {}
            Err(e) => {
                let why = e.io_error().map_or("not found".into(), ToString::to_string);
                let path = e.path().unwrap_or(folder).to_path_buf();
                files.lost.push((path, why));
            }
        }
    }
    Ok(files)
}

/// The contents of a file that may be a picture.
///
/// # Errors
/// Why it cannot be read, in a few words.
pub fn read_file(path: &Path) -> std::result::Result<Found, String> {
    let words = |e: std::io::Error| e.to_string();
    let mut file = File::open(path).map_err(words)?;
    let about = file.metadata().map_err(words)?;
    if about.is_dir() {
        return Err("a folder".into());
    }
    let mut bytes = Vec::new();
    let mut read = |limit| file.by_ref().take(limit).read_to_end(&mut bytes);
    read(START).map_err(words)?;
    let called = || is_called_picture(&path.to_string_lossy());
    if !picture::is_picture(&bytes) && !called() {
        return Ok(Found::Other);
    }
    let mut read = |limit| file.by_ref().take(limit).read_to_end(&mut bytes);
    read(LARGEST_FILE - START + 1).map_err(words)?;
    if bytes.len() as u64 > LARGEST_FILE {
        return Err(format!("larger than {}", BinaryBytes(LARGEST_FILE)));
    }
    Ok(Found::Picture(bytes))
}

/// How many files of `folder` itself are called as pictures are.
fn pictures_in(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            !is_hidden(&name) && is_called_picture(&name) && entry.path().is_file()
        })
        .count()
}

/// Files of the system, not of the user.
fn is_hidden(name: &str) -> bool {
    name.starts_with('.') || name == "__MACOSX"
}

/// Whether a file has the ending of a picture, readable or not.
fn is_called_picture(name: &str) -> bool {
    const OTHERS: [&str; 6] = ["heic", "heif", "jxl", "jp2", "jfif", "svg"];
    let ending = Path::new(name).extension().and_then(|e| e.to_str());
    ending.is_some_and(|ending| {
        let ending = ending.to_ascii_lowercase();
        ImageFormat::from_extension(&ending).is_some() || OTHERS.contains(&&ending[..])
    })
}

/// Every file in the folders of the classes, sorted by part, class and name; a note says what cannot
/// be looked at.
fn scan(
    folder: &Path,
    parts: &[(Part, PathBuf)],
    notes: &mut Vec<String>,
) -> Result<Vec<Candidate>> {
    let (mut files, mut lost) = (Vec::new(), Vec::new());
    let below = |path: &Path| {
        let parts = path.strip_prefix(folder).unwrap_or(path).components();
        let parts = parts.map(|part| part.as_os_str().to_string_lossy().into_owned());
        parts.collect::<Vec<_>>().join("/")
    };
    for (part, path) in parts {
        for (class, path) in folders(path)? {
            let entries = WalkDir::new(&path).follow_links(true).min_depth(1);
            // A link to a folder around this one would bring the pictures of all classes into it.
            let here = path.canonicalize().unwrap_or_default();
            let leads_up = |entry: &walkdir::DirEntry| {
                entry.path_is_symlink()
                    && entry.file_type().is_dir()
                    && entry
                        .path()
                        .canonicalize()
                        .is_ok_and(|to| here.starts_with(to))
            };
            let seen = |entry: &walkdir::DirEntry| {
                !is_hidden(&entry.file_name().to_string_lossy()) && !leads_up(entry)
            };
            for entry in entries.into_iter().filter_entry(seen) {
                let found = entry.and_then(|entry| {
                    let about = entry.metadata()?;
                    Ok((entry, about))
                });
                match found {
                    Ok((entry, about)) if about.is_file() => files.push(Candidate {
                        part: *part,
                        class: class.clone(),
                        name: below(entry.path()),
                        size: about.len(),
                        // Where there are no times, every look may find another file.
                        modified: about.modified().unwrap_or_else(|_| SystemTime::now()),
                        changed: changed(&about),
                        path: entry.into_path(),
                    }),
                    Ok(_) => {}
                    // What a link leads back to is read already.
                    Err(e) if e.loop_ancestor().is_some() => {}
                    Err(e) => {
                        let name = below(e.path().unwrap_or(&path));
                        let why = e.io_error().map_or("not found".into(), ToString::to_string);
                        lost.push(format!("{name} ({why})"));
                    }
                }
            }
        }
    }
    files.sort_by(|a, b| (a.part, &a.class, &a.name).cmp(&(b.part, &b.class, &b.name)));
    lost.sort();
    notes.extend(listed(lost));
    Ok(files)
}

/// The time at which the system changed anything about a file, and which file it is: a program can
/// set back the time of a change, not this one.
#[cfg(unix)]
fn changed(about: &Metadata) -> [i64; 3] {
    use std::os::unix::fs::MetadataExt;
    [about.ctime(), about.ctime_nsec(), about.ino() as i64]
}

#[cfg(not(unix))]
fn changed(_about: &Metadata) -> [i64; 3] {
    [0; 3]
}

/// A hash of all that the decoded pictures are made of, by what the system says of the files.
fn key(folder: &Path, wanted: Wanted, files: &[Candidate]) -> String {
    let mut hash = Sha256::new();
    let mut add = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    add(env!("CARGO_PKG_VERSION").as_bytes());
    let folder = folder.canonicalize();
    let folder = folder.unwrap_or_default();
    add(folder.as_os_str().as_encoded_bytes());
    add(format!("{wanted:?}").as_bytes());
    for file in files {
        add(file.path.as_os_str().as_encoded_bytes());
        let time = file.modified.duration_since(SystemTime::UNIX_EPOCH);
        let (before, time) = match time {
            Ok(after) => (0, after),
            Err(e) => (1, e.duration()),
        };
        let [a, b, c] = file.changed;
        let nanoseconds = i64::from(time.subsec_nanos());
        let numbers = [
            file.part as i64,
            file.size as i64,
            before,
            time.as_secs() as i64,
            nanoseconds,
            a,
            b,
            c,
        ];
        add(bytemuck::cast_slice(&numbers));
    }
    hex(&hash.finalize())
}

impl Candidate {
    /// The first bytes, `limit` of them at most.
    fn start(&self, limit: u64) -> std::result::Result<Vec<u8>, String> {
        let file = File::open(&self.path).map_err(|e| e.to_string())?;
        let mut bytes = Vec::with_capacity(self.size.min(limit) as usize + 1);
        let read = file.take(limit).read_to_end(&mut bytes);
        read.map_err(|e| e.to_string())?;
        Ok(bytes)
    }

    /// The whole contents.
    fn read(&self, limit: u64) -> std::result::Result<Vec<u8>, String> {
        if self.size > limit {
            return Err(format!("larger than {}", BinaryBytes(limit)));
        }
        self.start(limit)
    }

    /// Whether it is a picture, by its start.
    fn header(&self) -> std::result::Result<picture::Header, LeftOut> {
        let start = self.start(START);
        let is_picture = start.as_ref().is_ok_and(|start| picture::is_picture(start));
        if !is_picture && !is_called_picture(&self.name) {
            return Err(LeftOut::NoPicture);
        }
        let start = start.map_err(LeftOut::Unread)?;
        if start.is_empty() {
            return Err(LeftOut::Unreadable("empty".into()));
        }
        match picture::header(&start) {
            Err(_) if self.size > START && is_picture => {
                let whole = self.read(LARGEST_FILE).map_err(|why| match self.size {
                    0..=LARGEST_FILE => LeftOut::Unread(why),
                    _ => LeftOut::Unreadable(why),
                })?;
                picture::header(&whole)
            }
            header => header,
        }
        .map_err(LeftOut::Unreadable)
    }
}

/// Reads the start of every file: which are pictures, and what shape their images get.
fn survey(folder: &Path, key: String, wanted: Wanted, files: &[Candidate]) -> Result<Head> {
    let headers: Vec<_> = files.par_iter().map(Candidate::header).collect();
    let pictures = || headers.iter().filter_map(|header| header.as_ref().ok());
    let channels = match wanted.channels {
        Some(1) => 1,
        None if pictures().all(|header| header.grey) => 1,
        _ => 3,
    };
    let side = |pick: fn(usize, usize) -> usize, start| {
        let sides = pictures().flat_map(|header| header.size);
        sides.fold(start, pick)
    };
    let (smallest, largest) = (side(usize::min, usize::MAX), side(usize::max, 0));
    let first = pictures().next().map_or([DEFAULT; 2], |header| header.size);
    let are_equal = pictures().all(|header| header.size == first);
    let (size, note) = match wanted.size {
        Some(size) => (size, None),
        None if are_equal && largest <= LARGEST_OWN => (first, None),
        None => (
            [DEFAULT; 2],
            Some(format!(
                "pictures of {smallest} to {largest} pixels on a side are brought to {DEFAULT}×{DEFAULT}; --image-size sets another size"
            )),
        ),
    };
    let left_out = headers.iter().enumerate();
    let left_out: Vec<_> = left_out
        .filter_map(|(i, header)| Some((i, header.as_ref().err()?.clone())))
        .collect();
    if left_out.len() == files.len() {
        let unreadable = left_out.iter().filter_map(|(i, why)| match why {
            LeftOut::Unreadable(why) | LeftOut::Unread(why) => {
                Some(format!("{} ({why})", files[*i].name))
            }
            _ => None,
        });
        return Err(Error::data(
            folder,
            format!(
                "expected pictures in the folders of the classes, found {}; read are JPEG, PNG, WebP, BMP, TIFF and GIF",
                match listed(unreadable.collect()) {
                    Some(note) => format!("no readable one: {note}"),
                    None => format!("none among {} files", files.len()),
                }
            ),
        ));
    }
    Ok(Head {
        key,
        shape: Shape::new(size[0], size[1], channels),
        images: files.len() - left_out.len(),
        note,
        left_out,
    })
}

impl Head {
    /// Files by number, of `files`, that get a place.
    fn pictures(&self, files: usize) -> Vec<usize> {
        let left_out = self.left_out.iter();
        let without = left_out.filter(|(_, why)| !matches!(why, LeftOut::Broken(_)));
        let without: HashSet<usize> = without.map(|(i, _)| *i).collect();
        (0..files).filter(|i| !without.contains(i)).collect()
    }

    /// Files by number that have a place and no image.
    fn broken(&self) -> HashSet<usize> {
        let broken = |why: &LeftOut| matches!(why, LeftOut::Broken(_));
        let broken = self.left_out.iter().filter(|(_, why)| broken(why));
        broken.map(|(i, _)| *i).collect()
    }
}

/// Files by number, as they are trained on, validated on and tested on.
fn divide(
    folder: &Path,
    files: &[Candidate],
    head: &Head,
    [validation, test]: [f64; 2],
    seed: u64,
) -> Result<[Vec<usize>; 3]> {
    let mut members: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    let mut orders = [Vec::new(), Vec::new(), Vec::new()];
    for i in head.pictures(files.len()) {
        let file = &files[i];
        match file.part {
            Part::Train => members.entry(&file.class).or_default().push(i),
            part => orders[part as usize].push(i),
        }
    }
    if members.len() < 2 {
        return Err(Error::data(
            folder,
            format!(
                "expected folders of pictures of at least 2 classes, found {}; put the pictures of each class into a folder of its own",
                match members.keys().next() {
                    Some(class) => format!("one, {class}"),
                    None => "none to train on".into(),
                }
            ),
        ));
    }
    let unknown = orders.iter().flatten();
    if let Some(i) = unknown
        .copied()
        .find(|i| !members.contains_key(&files[*i].class[..]))
    {
        let Candidate { class, name, .. } = &files[i];
        return Err(Error::data(
            folder,
            format!(
                "expected only classes that there are training images of, found {class} ({name}); add some, or remove that folder"
            ),
        ));
    }
    let mut uses = vec!["training"];
    uses.extend((validation > 0.0).then_some("validation"));
    uses.extend((test > 0.0).then_some("test"));
    let needed = uses.len();
    let least = members.values().map(Vec::len).min().unwrap_or(0);
    let mut few = members.iter().filter(|(_, members)| members.len() < needed);
    if let Some((class, members)) = few.next() {
        return Err(Error::data(
            folder,
            format!(
                "expected at least {needed} pictures of each class ({}), found {} of {class}{}; add some{}",
                uses.join(", "),
                members.len(),
                match few.count() {
                    0 => String::new(),
                    n => format!(" and too few of {n} more"),
                },
                match validation > 0.0 && least + 1 >= needed {
                    true => ", or give --validation 0",
                    false => "",
                }
            ),
        ));
    }
    for members in members.into_values() {
        let n = members.len();
        let order = shuffled(members.iter().map(|i| &files[*i].name), seed);
        let tested = part(n, test).min(n - (needed - 1));
        let validated = part(n, validation).min(n - 1 - tested);
        // From both ends: where there are more pictures, none goes from one to the other.
        for (rank, i) in order.into_iter().enumerate() {
            let part = match rank {
                _ if rank < tested => Part::Test,
                _ if rank >= n - validated => Part::Validation,
                _ => Part::Train,
            };
            orders[part as usize].push(members[i]);
        }
    }
    // Mixed, so that the first few are of all classes.
    Ok(orders.map(|order| {
        let mixed = shuffled(order.iter().map(|i| &files[*i].name), seed);
        mixed.into_iter().map(|i| order[i]).collect()
    }))
}

/// A line about files that cannot be read, if there are any.
fn listed(mut lost: Vec<String>) -> Option<String> {
    let all = lost.len();
    lost.truncate(LISTED);
    let more = match all - lost.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    (all > 0).then(|| {
        format!(
            "{all} files cannot be read and are left out: {}{more}",
            lost.join(", ")
        )
    })
}
