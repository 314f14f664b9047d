//! `wgrad data`: what is in a dataset, before it is trained on.

use super::{load_data, say, say_json, say_wrapped, table};
use crate::cli::LookArgs;
use indicatif::HumanCount;
use serde_json::json;
use std::path::Path;
use wgrad::data::survey::{Place, Survey};
use wgrad::data::{Dataset, Request, Splits, picture_sizes};
use wgrad::model::Shape;
use wgrad::report::sheet::{BLANK, Tile, contact_sheet};
use wgrad::{Error, Result};

/// So many groups of images with the same pixels are named.
const NAMED: usize = 3;
/// So many pictures are on a sheet at most, and so many of a class.
const PICTURES: usize = 200;
const PER_CLASS: usize = 10;
const COLUMNS: usize = 10;

pub fn run(args: &LookArgs) -> Result<()> {
    let source = args.what.as_ref().or(args.data.source.as_ref());
    let source = source.map_or("mnist", String::as_str);
    let request = args.data.request(Request::default());
    let mut data = load_data(source, &request)?;
    if let Some(limit) = args.data.limit {
        data.truncate(limit)?;
    }
    let survey = Survey::of(&data);
    let sizes = picture_sizes(source)?;
    if let Some(out) = &args.out {
        let png = sheet(source, &data)?;
        std::fs::write(out, png).map_err(|e| Error::io("write", out, e))?;
    }
    if args.json {
        return say_json(&as_json(
            source,
            &data,
            &survey,
            &sizes,
            args.out.as_deref(),
        ));
    }

    say_wrapped(&format!(
        "data        {source}: {}",
        sets(&data)
            .iter()
            .map(|(which, set)| format!("{} {which}", HumanCount(set.len() as u64)))
            .collect::<Vec<_>>()
            .join(", ")
    ))?;
    say_wrapped(&format!(
        "images      {}, as height × width × channels, bytes",
        data.train.shape
    ))?;
    if let Some(line) = in_files(&sizes) {
        say_wrapped(&line)?;
    }
    let numbers = |numbers: &[f64]| {
        let texts: Vec<String> = numbers.iter().map(|x| format!("{x:.4}")).collect();
        texts.join(", ")
    };
    say_wrapped(&format!(
        "channels    mean {}, standard deviation {} of the training images, from 0 to 1",
        numbers(&survey.mean),
        numbers(&survey.deviation)
    ))?;
    let imbalance = match survey.imbalance {
        Some(1.0) => "every class has as many training images as any other".into(),
        Some(ratio) => format!(
            "the largest class has {ratio:.2} times as many training images as the smallest{}",
            if ratio >= 2.0 {
                "; see --class-weights and --sampler of train"
            } else {
                ""
            }
        ),
        None => "there are classes without a training image".into(),
    };
    say_wrapped(&format!("balance     {imbalance}"))?;
    for line in duplicates(&data, &survey) {
        say_wrapped(&line)?;
    }
    for note in &data.notes {
        say_wrapped(note)?;
    }
    say(&class_table(&data, &survey))?;
    match &args.out {
        Some(out) => say_wrapped(&format!("sheet       {}", out.display())),
        None => Ok(()),
    }
}

/// How large the pictures are in their files.
fn in_files(sizes: &[([usize; 2], usize)]) -> Option<String> {
    let size = |[height, width]: [usize; 2]| format!("{height}×{width}");
    let some: Vec<String> = sizes
        .iter()
        .take(NAMED)
        .map(|(found, count)| format!("{} of {}", HumanCount(*count as u64), size(*found)))
        .collect();
    let others = match sizes.len() {
        0..=NAMED => String::new(),
        n => {
            let by_pixels = |(size, _): &&([usize; 2], usize)| size[0] * size[1];
            let smallest = sizes.iter().min_by_key(by_pixels)?.0;
            let largest = sizes.iter().max_by_key(by_pixels)?.0;
            format!(
                " and {} other size{}, from {} to {}",
                n - NAMED,
                if n - NAMED == 1 { "" } else { "s" },
                size(smallest),
                size(largest)
            )
        }
    };
    (!some.is_empty()).then(|| format!("files       {}{others} (height × width)", some.join(", ")))
}

/// The splits that there are, with their names.
fn sets(data: &Splits) -> Vec<(&'static str, &Dataset)> {
    let validation = data.validation.iter().map(|set| ("validation", set));
    let train = [("training", &data.train)].into_iter();
    train
        .chain(validation)
        .chain([("test", &data.test)])
        .collect()
}

fn class_table(data: &Splits, survey: &Survey) -> String {
    let share = |n: usize| {
        let percent = 100.0 * n as f64 / data.train.len() as f64;
        format!("{percent:.1} %")
    };
    let mut header = vec!["class", "training", "share"];
    if data.validation.is_some() {
        header.push("validation");
    }
    header.push("test");
    let rows = survey.classes.iter().map(|class| {
        let mut row = vec![
            class.name.clone(),
            class.training.to_string(),
            share(class.training),
        ];
        if data.validation.is_some() {
            row.push(class.validation.to_string());
        }
        row.push(class.test.to_string());
        row
    });
    table(&header, rows, 1)
}

/// A line for each pair of splits that share images, and one for labels that contradict each other.
fn duplicates(data: &Splits, survey: &Survey) -> Vec<String> {
    let named = |groups: &mut dyn Iterator<Item = &Vec<Place>>| {
        let place = |at: &Place| match &at.file {
            Some(file) => file.clone(),
            None => format!("{} {}", at.split, at.image),
        };
        let group = |group: &Vec<Place>| {
            let places: Vec<String> = group.iter().take(4).map(place).collect();
            places.join(" = ")
        };
        let mut named: Vec<String> = groups.take(NAMED + 1).map(group).collect();
        if named.len() > NAMED {
            named[NAMED] = "…".into();
        }
        named.join(", ")
    };
    let sets = sets(data);
    let mut lines = Vec::new();
    for (i, (split, set)) in sets.iter().enumerate() {
        for (of, _) in &sets[..=i] {
            let count = survey.repeated(split, of);
            if count == 0 {
                continue;
            }
            let whose = if split == of { "an earlier" } else { "a" };
            let mut both = survey.duplicates.iter().filter(|group| {
                let has = |name: &str| group.iter().filter(|at| at.split == name).count();
                has(split) > usize::from(split == of) && has(of) > 0
            });
            lines.push(format!(
                "duplicates  {} of {} {split} images have the pixels of {whose} {of} image: {}",
                HumanCount(count as u64),
                HumanCount(set.len() as u64),
                named(&mut both)
            ));
        }
    }
    if lines.is_empty() {
        lines.push("duplicates  none: no two images have the same pixels".into());
    }
    let contradictions = survey.contradictions().count();
    if contradictions > 0 {
        lines.push(format!(
            "labels      contradict each other for {contradictions} of those: {}",
            named(&mut survey.contradictions())
        ));
    }
    lines
}

fn as_json(
    source: &str,
    data: &Splits,
    survey: &Survey,
    sizes: &[([usize; 2], usize)],
    out: Option<&Path>,
) -> serde_json::Value {
    let Shape {
        height,
        width,
        channels,
    } = data.train.shape;
    let images: serde_json::Map<String, serde_json::Value> = sets(data)
        .into_iter()
        .map(|(which, set)| (which.into(), set.len().into()))
        .collect();
    json!({
        "data": source,
        "images": images,
        "picture_sizes": sizes
            .iter()
            .map(|([height, width], count)| json!({"height": height, "width": width, "pictures": count}))
            .collect::<Vec<_>>(),
        "height": height,
        "width": width,
        "channels": channels,
        "mean": survey.mean,
        "standard_deviation": survey.deviation,
        "imbalance": survey.imbalance,
        "classes": survey.classes,
        "duplicates": survey.duplicates,
        "notes": data.notes,
        "sheet": out.map(|out| out.display().to_string()),
    })
}

/// Some training images of each class, evenly from its first to its last.
fn sheet(source: &str, data: &Splits) -> Result<Vec<u8>> {
    let set = &data.train;
    let shown = set.classes.min(PICTURES);
    let per_class = (PICTURES / shown).clamp(1, PER_CLASS);
    let mut members = vec![Vec::new(); set.classes];
    for (image, label) in set.labels.iter().enumerate() {
        members[*label as usize].push(image);
    }
    // Grey and colour can be shown: of two channels the first, of more the first three.
    let size = set.shape.elements();
    let channels = if set.shape.channels < 3 { 1 } else { 3 };
    let shape = Shape {
        channels,
        ..set.shape
    };
    let pixels = |image: usize| -> Vec<u8> {
        let pixels = set.images[image * size..(image + 1) * size].chunks_exact(set.shape.channels);
        pixels
            .flat_map(|pixel| &pixel[..channels])
            .copied()
            .collect()
    };
    let mut pictures: Vec<(Vec<u8>, String)> = Vec::new();
    for (members, name) in members.iter().zip(&set.class_names).take(shown) {
        for i in 0..per_class {
            pictures.push(if i < members.len() {
                let image = members[i * members.len() / per_class.min(members.len())];
                (pixels(image), format!("{name} #{image}"))
            } else {
                (BLANK.repeat(shape.positions()), name.clone())
            });
        }
    }
    let tiles: Vec<Tile> = pictures
        .iter()
        .map(|(pixels, caption)| Tile {
            pixels,
            shape: Shape {
                channels: pixels.len() / shape.positions(),
                ..shape
            },
            caption: caption.clone(),
        })
        .collect();
    // A class stays in one row.
    let columns = COLUMNS / per_class * per_class;
    let of = match set.classes > shown {
        true => format!(" (the first {shown} shown)"),
        false => String::new(),
    };
    let title = format!(
        "{source}: {} training images of {} in {} classes{of}",
        HumanCount(set.len() as u64),
        set.shape,
        set.classes
    );
    contact_sheet(&title, columns, &tiles)
}
