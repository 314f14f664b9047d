//! A look at a dataset before it is trained on: how many of what, what is there twice, how bright.

use super::{Dataset, Splits, moments};
use rayon::prelude::*;
use serde::Serialize;
use std::hash::{DefaultHasher, Hasher};

/// What a look at all images of a dataset tells.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Survey {
    pub classes: Vec<ClassCount>,
    /// How many training images the largest class has for one of the smallest; `None` where that has
    /// none.
    pub imbalance: Option<f64>,
    /// Images with the same pixels, in groups of two and more: by split, then by number.
    pub duplicates: Vec<Vec<Place>>,
    /// Mean of each channel over the training images, as numbers from 0 to 1.
    pub mean: Vec<f64>,
    /// Standard deviation of the same.
    pub deviation: Vec<f64>,
}

/// How many images of a class there are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ClassCount {
    pub name: String,
    pub training: usize,
    pub validation: usize,
    pub test: usize,
}

/// Where an image is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// `training`, `validation` or `test`.
    pub split: &'static str,
    /// Number of the image in its split, from 0.
    pub image: usize,
    pub class: String,
    /// Its file, in a folder of pictures.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
}

impl Survey {
    pub fn of(splits: &Splits) -> Survey {
        let counts = |set: &Dataset| class_counts(set);
        let (training, test) = (counts(&splits.train), counts(&splits.test));
        let validation = splits.validation.as_ref().map(counts);
        let largest = training.iter().max().copied().unwrap_or(0);
        let smallest = training.iter().min().copied().unwrap_or(0);
        let names = splits.train.class_names.iter().enumerate();
        let (mean, deviation) = moments(&splits.train)
            .into_iter()
            .map(|[mean, deviation]| (mean / 255.0, deviation / 255.0))
            .unzip();
        Survey {
            classes: names
                .map(|(class, name)| ClassCount {
                    name: name.clone(),
                    training: training[class],
                    validation: validation.as_ref().map_or(0, |counts| counts[class]),
                    test: test[class],
                })
                .collect(),
            imbalance: (smallest > 0).then(|| largest as f64 / smallest as f64),
            duplicates: duplicates(splits)
                .into_iter()
                .map(|group| group.into_iter().map(|at| place(splits, at)).collect())
                .collect(),
            mean,
            deviation,
        }
    }

    /// How many images of `split` another image of the same split or of the one named `of` has the
    /// pixels of; of several in the same split, all but the first count.
    pub fn repeated(&self, split: &str, of: &str) -> usize {
        let groups = self.duplicates.iter().map(|group| {
            let here = group.iter().filter(|place| place.split == split).count();
            let there = group.iter().any(|place| place.split == of);
            match () {
                _ if split == of => here.saturating_sub(1),
                _ if there => here,
                _ => 0,
            }
        });
        groups.sum()
    }

    /// The groups of images with the same pixels whose labels differ.
    pub fn contradictions(&self) -> impl Iterator<Item = &Vec<Place>> {
        let differ = |group: &&Vec<Place>| group.iter().any(|at| at.class != group[0].class);
        self.duplicates.iter().filter(differ)
    }
}

/// How many images each class has.
pub fn class_counts(set: &Dataset) -> Vec<usize> {
    let mut counts = vec![0; set.classes];
    for label in &set.labels {
        counts[*label as usize] += 1;
    }
    counts
}

/// Says how many test images are training images, too, and names the first few.
pub(super) fn leak(splits: &Splits) -> Option<String> {
    const NAMED: usize = 3;
    let name = |at: (usize, usize)| {
        let Place {
            split, image, file, ..
        } = place(splits, at);
        file.unwrap_or_else(|| format!("{split} image {image}"))
    };
    let mut pairs = Vec::new();
    for group in duplicates(splits) {
        let at = |split: usize| group.iter().filter(move |at| at.0 == split);
        if let Some(train) = at(0).next() {
            pairs.extend(at(2).map(|test| (*test, *train)));
        }
    }
    pairs.sort_unstable();
    let named = pairs.iter().take(NAMED);
    let named = named.map(|(test, train)| format!("{} is {}", name(*test), name(*train)));
    let named: Vec<String> = named.collect();
    (!pairs.is_empty()).then(|| {
        format!(
            "warning: {} of {} test images {} the pixels of a training image ({}{}{}), so that the test accuracy is too good; remove them from one of the two",
            pairs.len(),
            splits.test.len(),
            if pairs.len() == 1 { "has" } else { "have" },
            named.join(", "),
            if pairs.len() > NAMED { ", …" } else { "" },
            if splits.train.files.is_empty() { ", counted from 0" } else { "" },
        )
    })
}

/// Training, validation and test images.
fn sets(splits: &Splits) -> [Option<&Dataset>; 3] {
    [
        Some(&splits.train),
        splits.validation.as_ref(),
        Some(&splits.test),
    ]
}

fn place(splits: &Splits, (split, image): (usize, usize)) -> Place {
    let set = sets(splits)[split].unwrap_or(&splits.train);
    Place {
        split: ["training", "validation", "test"][split],
        image,
        class: set.class_names[set.labels[image] as usize].clone(),
        file: set.files.get(image).cloned(),
    }
}

/// The images with the same pixels, in groups of (split, image).
fn duplicates(splits: &Splits) -> Vec<Vec<(usize, usize)>> {
    let size = splits.train.shape.elements();
    let sets = sets(splits);
    let pixels = |(split, image): (usize, usize)| {
        let images = sets[split].map_or(&[][..], |set| &set.images);
        &images[image * size..(image + 1) * size]
    };
    let mut hashes: Vec<(u64, (usize, usize))> = Vec::new();
    for (split, set) in sets.iter().enumerate() {
        let Some(set) = set else { continue };
        let images = set.images.par_chunks_exact(size).enumerate();
        hashes.par_extend(images.map(|(image, pixels)| {
            let mut hasher = DefaultHasher::new();
            hasher.write(pixels);
            (hasher.finish(), (split, image))
        }));
    }
    hashes.par_sort_unstable();
    let mut groups = Vec::new();
    for alike in hashes.chunk_by(|a, b| a.0 == b.0) {
        let mut rest: Vec<(usize, usize)> = alike.iter().map(|(_, at)| *at).collect();
        // Almost always one round: a hash says little about other pixels.
        while rest.len() > 1 {
            let first = pixels(rest[0]);
            let (same, other): (Vec<_>, Vec<_>) =
                rest.into_iter().partition(|at| pixels(*at) == first);
            if same.len() > 1 {
                groups.push(same);
            }
            rest = other;
        }
    }
    groups.sort_unstable();
    groups
}
