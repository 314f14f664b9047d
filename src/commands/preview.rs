//! `wgrad preview`: images before and after augmentation.

use super::train::{Planned, plan};
use super::{note, say, say_wrapped};
use crate::cli::{DeviceArgs, PreviewArgs, TrainArgs};
use wgrad::model::Shape;
use wgrad::model::recipe::Recipe;
use wgrad::report::preview::{Excerpt, preview};
use wgrad::report::sheet::{Tile, contact_sheet};
use wgrad::{Error, Result};

/// Pairs of pictures in a row of the sheet.
const PAIRS: usize = 4;
/// More than anybody looks at.
const MOST: usize = 1000;

pub fn run(args: &PreviewArgs) -> Result<()> {
    for (flag, number) in [("--count", args.count), ("--epoch", args.epoch)] {
        if number == 0 {
            return Err(Error::Usage(format!(
                "expected {flag} of at least 1, found 0"
            )));
        }
    }
    let train = TrainArgs {
        model: args.model.clone(),
        data: args.data.clone(),
        recipe: args.recipe.clone(),
        // Nothing is trained, so that any device will do.
        device: DeviceArgs {
            name: Some(args.device.clone()),
        },
        seed: Some(args.seed),
        ..TrainArgs::default()
    };
    let Planned {
        config,
        model,
        data,
        device,
        notes,
        ..
    } = plan(&train)?;
    notes.iter().try_for_each(|line| note(line))?;
    let shown = preview(
        device.gpu().map(|gpu| &**gpu),
        &model,
        &config.recipe,
        &data.train,
        &config.scale_and_shift(),
        Excerpt {
            seed: config.seed,
            epoch: args.epoch,
            count: args.count.min(MOST),
        },
    )?;

    let shape = model.input;
    let tile_shape = match shape.channels {
        1 | 3 => shape,
        // A picture has as many colours; of other channels the first is shown.
        _ => Shape::new(shape.height, shape.width, 1),
    };
    let picture = |bytes: &[u8]| -> Vec<u8> {
        let pixels = bytes.chunks(shape.channels);
        pixels
            .flat_map(|pixel| &pixel[..tile_shape.channels])
            .copied()
            .collect()
    };
    let name = |label: u32| data.train.class_names[label as usize].as_str();
    let percent = |share: f32| (100.0 * share).round();
    let target = |[(first, share), (second, rest)]: [(u32, f32); 2]| match percent(rest) {
        0.0 => "as trained".into(),
        _ if first == second => "as trained".into(),
        rest => {
            let (first, second) = (name(first), name(second));
            format!("{first} {} %, {second} {rest} %", percent(share))
        }
    };
    let count = shown.samples.len();
    let mut pictures = Vec::new();
    let both = shown.before.chunks(shape.elements());
    let both = both.zip(shown.after.chunks(shape.elements()));
    let samples = shown.samples.iter().zip(&shown.targets).zip(both);
    for ((sample, targets), (before, after)) in samples {
        let class = name(data.train.labels[*sample as usize]);
        pictures.push((class.to_string(), picture(before)));
        pictures.push((target(*targets), picture(after)));
    }
    let tiles: Vec<Tile> = pictures
        .iter()
        .map(|(caption, pixels)| Tile {
            pixels,
            shape: tile_shape,
            caption: caption.clone(),
        })
        .collect();
    let title = format!("{}, epoch {}, seed {}", data.name, args.epoch, args.seed);
    let png = contact_sheet(&title, 2 * PAIRS, &tiles)?;
    std::fs::write(&args.out, png).map_err(|e| Error::io("write", &args.out, e))?;

    if config.recipe.augment.is_none() {
        say_wrapped(
            "augment  nothing: the network is shown the images as they are; try --set augment.rotate=10 --set augment.shift=0.1",
        )?;
    } else {
        let (settings, plain) = (config.recipe.settings(), Recipe::default().settings());
        let changed = settings.iter().filter(|setting| !plain.contains(setting));
        let settings = changed.filter_map(|(key, value)| {
            let key = key.strip_prefix("augment.")?;
            Some(format!("{key} {}", value.trim_matches('"')))
        });
        let settings: Vec<String> = settings.collect();
        say_wrapped(&format!("augment  {}", settings.join(", ")))?;
    }
    say(&format!(
        "preview  {}: {count} images, before and after",
        args.out.display()
    ))
}
