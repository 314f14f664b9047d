//! Folders of pictures: which files are read and how, what is held back, what is kept in the cache,
//! and what is said of folders that are not what they should be.

use assert_cmd::cargo::cargo_bin;
use flate2::{Compression, Crc, write::ZlibEncoder};
use image::{DynamicImage, GrayImage, ImageBuffer, ImageFormat, Luma, LumaA, Rgb, RgbImage, Rgba};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};
use tempfile::TempDir;
use wgrad::data::{self, Dataset, Request, Splits};
use wgrad::error::{Error, Result};
use wgrad::model::Shape;

const FORMATS: [(ImageFormat, &str); 6] = [
    (ImageFormat::Png, "png"),
    (ImageFormat::Jpeg, "jpg"),
    (ImageFormat::WebP, "webp"),
    (ImageFormat::Bmp, "bmp"),
    (ImageFormat::Tiff, "tiff"),
    (ImageFormat::Gif, "gif"),
];

fn encoded(picture: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture.into().write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn png(picture: impl Into<DynamicImage>) -> Vec<u8> {
    encoded(picture, ImageFormat::Png)
}

/// A grey picture of 4×4 pixels of one value.
fn grey(value: u8) -> Vec<u8> {
    png(GrayImage::from_pixel(4, 4, Luma([value])))
}

fn put(folder: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, bytes).unwrap();
    path
}

fn load_with(folder: &Path, request: &Request) -> Result<Splits> {
    data::load(folder.to_str().unwrap(), request, &mut |_, _| ())
}

fn load(folder: &TempDir) -> Result<Splits> {
    load_with(folder.path(), &Request::default())
}

/// `count` grey pictures in each of the classes `a` and `b`, each of another value: even ones in `a`.
fn values(count: usize) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for i in 0..2 * count {
        let class = ["a", "b"][i % 2];
        put(&folder, &format!("{class}/{i}.png"), &grey(i as u8));
    }
    folder
}

/// The values of the pictures of a split of [`values`].
fn of(split: &Dataset) -> Vec<u8> {
    let images = split.images.chunks(split.shape.elements());
    let values = images.zip(&split.labels).map(|(image, label)| {
        assert!(image.iter().all(|pixel| *pixel == image[0]));
        assert_eq!(*label, u32::from(image[0] % 2));
        image[0]
    });
    values.collect()
}

fn sorted(mut values: Vec<u8>) -> Vec<u8> {
    values.sort_unstable();
    values
}

/// Decodes one picture to `size`, on its own or beside a picture in colour.
fn decoded(bytes: &[u8], name: &str, size: [usize; 2], in_colour: bool) -> (Vec<u8>, Shape) {
    let folder = tempfile::tempdir().unwrap();
    put(&folder, &format!("test/x/{name}"), bytes);
    let other = match in_colour {
        true => png(RgbImage::new(4, 4)),
        false => grey(0),
    };
    for class in ["x", "y"] {
        put(&folder, &format!("train/{class}/a"), &other);
    }
    let request = Request {
        image_size: Some(size),
        ..Request::default()
    };
    let splits = load_with(folder.path(), &request).unwrap();
    assert_eq!((splits.train.len(), splits.test.len()), (2, 1));
    assert_eq!(splits.test.labels, [0]);
    (splits.test.images, splits.test.shape)
}

/// Pixels of 24×16 in four quarters: red and green over blue and white.
fn quarters() -> RgbImage {
    RgbImage::from_fn(16, 24, |x, y| match (x < 8, y < 12) {
        (true, true) => Rgb([255, 0, 0]),
        (false, true) => Rgb([0, 255, 0]),
        (true, false) => Rgb([0, 0, 255]),
        (false, false) => Rgb([255, 255, 255]),
    })
}

/// The letters of the quarters of an image, in rows.
fn corners(pixels: &[u8], [height, width]: [usize; 2]) -> String {
    let letter = |y: usize, x: usize| {
        let at = 3 * (y * width + x);
        match [pixels[at] > 127, pixels[at + 1] > 127, pixels[at + 2] > 127] {
            [true, false, false] => 'r',
            [false, true, false] => 'g',
            [false, false, true] => 'b',
            [true, true, true] => 'w',
            _ => '?',
        }
    };
    let (top, bottom) = (height / 4, height - 1 - height / 4);
    let (left, right) = (width / 4, width - 1 - width / 4);
    [
        letter(top, left),
        letter(top, right),
        letter(bottom, left),
        letter(bottom, right),
    ]
    .into_iter()
    .collect()
}

#[test]
fn every_format_is_read_by_its_contents() {
    let picture = quarters();
    for (format, ending) in FORMATS {
        let bytes = encoded(picture.clone(), format);
        // Even where the name says something else, or nothing.
        for name in [&format!("p.{ending}")[..], "p.png", "p"] {
            let (pixels, shape) = decoded(&bytes, name, [24, 16], true);
            assert_eq!(shape, Shape::new(24, 16, 3));
            let worst = pixels.iter().zip(picture.as_raw());
            let worst = worst.map(|(a, b)| a.abs_diff(*b)).max().unwrap();
            match format {
                ImageFormat::Jpeg => assert!(worst < 140, "{worst}"),
                _ => assert_eq!(worst, 0, "{ending}"),
            }
            assert_eq!(corners(&pixels, [24, 16]), "rgbw", "{ending} {name}");
        }
    }
}

/// A JPEG file with an EXIF orientation, in either byte order.
fn oriented(orientation: u8, big_endian: bool) -> Vec<u8> {
    let jpeg = encoded(quarters(), ImageFormat::Jpeg);
    let mut exif = b"Exif\0\0".to_vec();
    exif.extend(match big_endian {
        true => [
            &b"MM\0\x2a\0\0\0\x08"[..],
            &[0, 1, 1, 0x12, 0, 3, 0, 0, 0, 1, 0, orientation, 0, 0],
            &[0; 4],
        ]
        .concat(),
        false => [
            &b"II\x2a\0\x08\0\0\0"[..],
            &[1, 0, 0x12, 1, 3, 0, 1, 0, 0, 0, orientation, 0, 0, 0],
            &[0; 4],
        ]
        .concat(),
    });
    let length = (exif.len() as u16 + 2).to_be_bytes();
    [&jpeg[..2], &[0xff, 0xe1], &length, &exif, &jpeg[2..]].concat()
}

#[test]
fn the_orientation_of_a_camera_is_honoured() {
    let expected = [
        "rgbw", "grwb", "wbgr", "bwrg", "rbgw", "brwg", "wgbr", "gwrb",
    ];
    for (orientation, expected) in (1..).zip(expected) {
        for big_endian in [false, true] {
            let bytes = oriented(orientation, big_endian);
            let own = if orientation < 5 { [24, 16] } else { [16, 24] };
            // At its own size, scaled, and scaled and cropped.
            for size in [own, [own[0] / 2, own[1] / 2], [12, 12]] {
                let (pixels, _) = decoded(&bytes, "p.jpg", size, true);
                let found = corners(&pixels, size);
                assert_eq!(found, expected, "{orientation} at {size:?}");
            }
        }
    }
    // The own size of a set is that of what is looked at.
    let folder = tempfile::tempdir().unwrap();
    for i in 0..6 {
        put(&folder, &format!("{}/{i}.jpg", i % 2), &oriented(6, true));
    }
    assert_eq!(load(&folder).unwrap().train.shape, Shape::new(16, 24, 3));
}

#[test]
fn grey_alpha_16_bits_and_palettes_become_bytes() {
    let size = [4, 4];
    let one = |picture: DynamicImage, in_colour| {
        let (pixels, shape) = decoded(&png(picture), "p.png", size, in_colour);
        assert_eq!(shape.channels, if in_colour { 3 } else { 1 });
        let first = pixels[..shape.channels].to_vec();
        assert_eq!(pixels, first.repeat(16));
        first
    };
    let plain = GrayImage::from_pixel(4, 4, Luma([77]));
    assert_eq!(one(plain.clone().into(), false), [77]);
    assert_eq!(one(plain.into(), true), [77; 3]);
    // Transparency is laid on white: 255 − 0.6·(255 − 77).
    let alpha = |a| ImageBuffer::from_pixel(4, 4, LumaA([77u8, a]));
    assert_eq!(one(alpha(255).into(), false), [77]);
    assert_eq!(one(alpha(153).into(), false), [148]);
    assert_eq!(one(alpha(0).into(), false), [255]);
    let colour = |a| ImageBuffer::from_pixel(4, 4, Rgba([255u8, 77, 0, a]));
    assert_eq!(one(colour(255).into(), true), [255, 77, 0]);
    assert_eq!(one(colour(153).into(), true), [255, 148, 102]);
    // 16 bits: v / 257.
    let deep: ImageBuffer<Luma<u16>, _> = ImageBuffer::from_pixel(4, 4, Luma([77 * 257]));
    assert_eq!(one(deep.into(), false), [77]);
    let deep: ImageBuffer<Rgb<u16>, _> = ImageBuffer::from_pixel(4, 4, Rgb([65535, 77 * 257, 0]));
    assert_eq!(one(deep.into(), true), [255, 77, 0]);
    let deep = Rgba([65535u16, 77 * 257, 0, 153 * 257]);
    let deep: ImageBuffer<Rgba<u16>, _> = ImageBuffer::from_pixel(4, 4, deep);
    assert_eq!(one(deep.into(), true), [255, 148, 102]);

    // Two colours by number, 1 bit per pixel.
    let mut palette = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut rows = ZlibEncoder::new(Vec::new(), Compression::fast());
    rows.write_all(&[0, 0b0101_0000, 0, 0b0101_0000]).unwrap();
    let chunks = [
        (b"IHDR", vec![0, 0, 0, 4, 0, 0, 0, 2, 1, 3, 0, 0, 0]),
        (b"PLTE", vec![10, 20, 30, 200, 210, 220]),
        (b"IDAT", rows.finish().unwrap()),
        (b"IEND", vec![]),
    ];
    for (name, contents) in chunks {
        palette.extend((contents.len() as u32).to_be_bytes());
        let chunk = [&name[..], &contents].concat();
        let mut crc = Crc::new();
        crc.update(&chunk);
        palette.extend(&chunk);
        palette.extend(crc.sum().to_be_bytes());
    }
    let (pixels, _) = decoded(&palette, "p.png", [2, 4], true);
    assert_eq!(pixels, [10, 20, 30, 200, 210, 220].repeat(4));
}

#[test]
fn the_middle_is_kept_and_nothing_aliases() {
    // Columns: 10 of 10, 20 of 100, 10 of 250.
    let wide = GrayImage::from_fn(40, 20, |x, _| {
        Luma([match x {
            0..10 => 10,
            10..30 => 100,
            _ => 250,
        }])
    });
    let (pixels, shape) = decoded(&png(wide.clone()), "p", [20, 20], false);
    assert_eq!(shape, Shape::new(20, 20, 1));
    assert_eq!(pixels, [100; 400]);
    let (pixels, _) = decoded(&png(wide.clone()), "p", [10, 10], false);
    // The filter reaches half a pixel over the edge.
    assert!(
        pixels.chunks(10).all(|row| row[1..9] == [100; 8]),
        "{pixels:?}"
    );
    let tall = image::imageops::rotate90(&wide);
    let (pixels, _) = decoded(&png(tall), "p", [20, 20], false);
    assert_eq!(pixels, [100; 400]);
    // The whole of it, in its own proportions.
    let (pixels, _) = decoded(&png(wide), "p", [10, 20], false);
    let ends = [0, 10, 19].map(|x| pixels[5 * 20 + x]);
    assert_eq!(ends, [10, 100, 250]);

    // Columns of one pixel, black and white: grey from afar.
    let fine = GrayImage::from_fn(256, 256, |x, _| Luma([255 * (x % 2) as u8]));
    let (pixels, _) = decoded(&png(fine), "p", [16, 16], false);
    assert!(pixels.iter().all(|p| p.abs_diff(127) < 4), "{pixels:?}");
    // Larger than it is: no colour that was not there.
    let (pixels, _) = decoded(&grey(200), "p", [33, 57], false);
    assert_eq!(pixels, [200; 33 * 57]);
}

#[test]
fn sizes_follow_from_the_pictures_where_none_is_asked_for() {
    let shape = |sizes: [[u32; 2]; 6]| {
        let folder = tempfile::tempdir().unwrap();
        for (i, [height, width]) in sizes.into_iter().enumerate() {
            let picture = RgbImage::from_pixel(width, height, Rgb([20 * i as u8; 3]));
            put(&folder, &format!("{}/{i}.png", i % 2), &png(picture));
        }
        let splits = load(&folder).unwrap();
        (splits.train.shape, splits.notes)
    };
    assert_eq!(shape([[30, 20]; 6]), (Shape::new(30, 20, 3), vec![]));
    assert_eq!(shape([[256, 8]; 6]).0, Shape::new(256, 8, 3));
    let (found, notes) = shape([[257, 8]; 6]);
    assert_eq!(found, Shape::new(64, 64, 3));
    assert!(notes[0].contains("8 to 257 pixels"), "{notes:?}");
    let (found, notes) = shape([[9, 9], [9, 9], [9, 9], [9, 9], [9, 9], [9, 12]]);
    assert_eq!(found, Shape::new(64, 64, 3));
    assert!(notes[0].contains("--image-size"), "{notes:?}");
}

#[test]
fn a_share_of_each_class_is_held_back() {
    let folder = values(30);
    let splits = load(&folder).unwrap();
    assert_eq!(splits.notes, Vec::<String>::new());
    assert_eq!(splits.train.class_names, ["a", "b"]);
    assert_eq!(splits.train.shape, Shape::new(4, 4, 1));
    let validation = splits.validation.clone().unwrap();
    let parts = [&splits.train, &validation, &splits.test].map(of);
    assert_eq!(parts.each_ref().map(Vec::len), [48, 6, 6]);
    for part in &parts {
        assert_eq!(part.iter().filter(|v| **v % 2 == 0).count(), part.len() / 2);
    }
    // Mixed: no class lies together, so that the first few are of all.
    let first = &parts[0][..12];
    assert!(!parts[0].is_sorted());
    assert!(
        [0, 1]
            .iter()
            .all(|class| first.iter().any(|v| v % 2 == *class)),
        "{first:?}"
    );
    assert_eq!(sorted(parts.concat()), (0..60).collect::<Vec<u8>>());

    let request = Request {
        validation: Some(0.0),
        test: Some(0.3),
        split_seed: 7,
        ..Request::default()
    };
    let other = load_with(folder.path(), &request).unwrap();
    assert_eq!((other.train.len(), other.validation), (42, None));
    assert_ne!(of(&other.test), of(&splits.test));

    // The same files in another folder, made in another order.
    let again = tempfile::tempdir().unwrap();
    for i in (0..60).rev() {
        let class = ["a", "b"][i % 2];
        put(&again, &format!("{class}/{i}.png"), &grey(i as u8));
    }
    let mut again = load(&again).unwrap();
    again.name = splits.name.clone();
    assert_eq!(again, splits);
}

#[test]
fn added_pictures_move_none_from_test_to_training() {
    let folder = values(30);
    let before = load(&folder).unwrap();
    for i in 60..70 {
        let class = ["a", "b"][i % 2];
        put(&folder, &format!("{class}/{i}.png"), &grey(i as u8));
    }
    let after = load(&folder).unwrap();
    let set = |split: &Dataset| of(split).into_iter().collect::<BTreeSet<u8>>();
    // 35 of a class: 4 for testing, of which 3 were before unless a new one ranks first.
    let tested = set(&before.test);
    let still = set(&after.test).intersection(&tested).count();
    assert!(still >= 4, "{still}");
    let validated = set(&after.validation.unwrap());
    assert_eq!(tested.intersection(&validated).count(), 0);
}

#[test]
fn layouts_are_told_apart() {
    // CLASS/*, with folders in a class and things of no interest around.
    let folder = values(5);
    put(&folder, "a/deep/down/100.png", &grey(100));
    put(&folder, "a/.hidden.png", &grey(3));
    put(&folder, ".thumbnails/x.png", &grey(3));
    put(&folder, "a/notes.txt", b"not a picture");
    put(&folder, "a/Thumbs.db", b"P5 is no picture either");
    put(&folder, "empty/readme.md", b"no class");
    let splits = load(&folder).unwrap();
    let all = splits.train.len() + splits.test.len() + splits.validation.unwrap().len();
    assert_eq!(
        (all, splits.train.class_names),
        (11, vec!["a".into(), "b".into()])
    );
    let [note] = &splits.notes[..] else {
        panic!("one note, found {:?}", splits.notes)
    };
    assert!(
        note.starts_with("no picture to train on") && note.ends_with("of empty"),
        "{note}"
    );
    put(&folder, "lost.png", &grey(3));
    let notes = load(&folder).unwrap().notes;
    assert!(notes[0].starts_with("1 pictures lie in"), "{notes:?}");

    // train/CLASS/* and more, in every spelling.
    for [train, validation, test] in [
        ["train", "val", "test"],
        ["Train", "valid", "TEST"],
        ["training", "validation", "testing"],
    ] {
        let folder = tempfile::tempdir().unwrap();
        for (part, values) in [(train, 0..20), (validation, 20..26), (test, 26..30)] {
            for i in values {
                let class = ["a", "b"][i % 2];
                put(&folder, &format!("{part}/{class}/{i}.png"), &grey(i as u8));
            }
        }
        let splits = load(&folder).unwrap();
        assert_eq!(sorted(of(&splits.train)), (0..20).collect::<Vec<_>>());
        let found = splits.validation.as_ref().map(of).unwrap();
        assert_eq!(sorted(found), (20..26).collect::<Vec<_>>());
        assert_eq!(sorted(of(&splits.test)), (26..30).collect::<Vec<_>>());
        assert_eq!(splits.notes, Vec::<String>::new());
        for (request, flag) in [
            (
                Request {
                    test: Some(0.1),
                    ..Request::default()
                },
                "--test",
            ),
            (
                Request {
                    validation: Some(0.1),
                    ..Request::default()
                },
                "--validation",
            ),
        ] {
            let error = load_with(folder.path(), &request).unwrap_err();
            assert!(matches!(error, Error::Usage(_)), "{error}");
            assert!(error.to_string().contains(flag), "{error}");
        }

        // One of the two is what is tested on; the other one comes from the training images if asked.
        fs::remove_dir_all(folder.path().join(test)).unwrap();
        let splits = load(&folder).unwrap();
        assert_eq!(sorted(of(&splits.test)), (20..26).collect::<Vec<_>>());
        assert_eq!((splits.train.len(), splits.validation), (20, None));
        assert!(splits.notes[0].contains("tested on"), "{:?}", splits.notes);
        let request = Request {
            validation: Some(0.2),
            ..Request::default()
        };
        let splits = load_with(folder.path(), &request).unwrap();
        assert_eq!(splits.train.len(), 16);
        let validation = splits.validation.as_ref().map(of).unwrap();
        let all = [of(&splits.train), validation].concat();
        assert_eq!(sorted(all), (0..20).collect::<Vec<_>>());

        // The training images alone are divided like a folder of classes.
        fs::remove_dir_all(folder.path().join(validation_name(&folder))).unwrap();
        let splits = load(&folder).unwrap();
        assert_eq!((splits.train.len(), splits.test.len()), (16, 2));
    }

    // A class may be called train.
    let folder = tempfile::tempdir().unwrap();
    for i in 0..3 {
        for class in ["train", "bus"] {
            put(&folder, &format!("{class}/{i}.png"), &grey(i));
        }
    }
    assert_eq!(load(&folder).unwrap().train.class_names, ["bus", "train"]);
}

#[test]
fn test_images_that_are_trained_on_are_named() {
    let folder = tempfile::tempdir().unwrap();
    for i in 0..20 {
        put(
            &folder,
            &format!("train/{}/{i}.png", ["a", "b"][i % 2]),
            &grey(i as u8),
        );
    }
    put(&folder, "test/a/new.png", &grey(100));
    put(
        &folder,
        "test/a/known.bmp",
        &encoded(GrayImage::from_pixel(4, 4, Luma([7])), ImageFormat::Bmp),
    );
    let notes = load(&folder).unwrap().notes;
    assert_eq!(notes.len(), 1, "{notes:?}");
    let pair =
        "1 of 2 test images has the pixels of a training image (test/a/known.bmp is train/b/7.png)";
    assert!(notes[0].contains(pair), "{notes:?}");
}

/// The folder beside the training images.
fn validation_name(folder: &TempDir) -> String {
    let names = fs::read_dir(folder.path()).unwrap();
    let mut names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.find(|name| name.starts_with("val")).unwrap()
}

#[test]
#[cfg(unix)]
fn links_are_followed_but_not_in_circles() {
    use std::os::unix::fs::symlink;
    let (folder, elsewhere) = (values(4), tempfile::tempdir().unwrap());
    put(&elsewhere, "200.png", &grey(200));
    symlink(elsewhere.path(), folder.path().join("a/more")).unwrap();
    symlink(folder.path().join("a"), folder.path().join("a/circle")).unwrap();
    // Not the pictures of every class, either.
    symlink("..", folder.path().join("a/up")).unwrap();
    symlink("nowhere.png", folder.path().join("a/broken.png")).unwrap();
    let splits = load(&folder).unwrap();
    let all = splits.train.len() + splits.test.len() + splits.validation.unwrap().len();
    assert_eq!(all, 9);
    assert_eq!(splits.notes.len(), 1, "{:?}", splits.notes);
    assert!(splits.notes[0].contains("1 files"), "{:?}", splits.notes);
    assert!(
        splits.notes[0].contains("a/broken.png"),
        "{:?}",
        splits.notes
    );
}

/// Two of these names look the same.
#[test]
#[cfg(target_os = "linux")]
fn classes_have_names_that_can_be_written() {
    use std::os::unix::ffi::OsStrExt;
    let folder = values(4);
    for byte in [0xfe, 0xff] {
        let class = folder.path().join(std::ffi::OsStr::from_bytes(&[byte]));
        fs::create_dir(&class).unwrap();
        (0..4).for_each(|i| fs::write(class.join(format!("{i}.png")), grey(i)).unwrap());
    }
    let error = load(&folder).unwrap_err();
    assert!(matches!(error, Error::Data { .. }), "{error}");
    assert!(error.to_string().contains("names in UTF-8"), "{error}");
}

#[test]
fn files_that_cannot_be_read_are_listed_once() {
    let folder = values(20);
    let noise = RgbImage::from_fn(64, 64, |x, y| {
        Rgb([x * 7 + y * 13, x * y, x ^ y].map(|v| v as u8))
    });
    let jpeg = encoded(noise.clone(), ImageFormat::Jpeg);
    put(&folder, "a/cut.jpg", &jpeg[..jpeg.len() / 2]);
    let whole = png(noise);
    put(&folder, "a/cut.png", &whole[..whole.len() / 2]);
    put(&folder, "b/empty.webp", b"");
    put(&folder, "b/text.png", b"this is a text");
    put(
        &folder,
        "b/iphone.heic",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    );
    // 60,000×60,000 pixels in a few bytes.
    let mut bomb = whole.clone();
    bomb[16..24].copy_from_slice(&[0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60]);
    let mut crc = Crc::new();
    crc.update(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&crc.sum().to_be_bytes());
    put(&folder, "b/bomb", &bomb);
    for i in 0..95 {
        put(&folder, &format!("b/noise{i:02}.png"), b"noise");
    }

    let splits = load(&folder).unwrap();
    let all = splits.train.len() + splits.test.len() + splits.validation.unwrap().len();
    assert_eq!(all, 40);
    let note = splits.notes.last().unwrap();
    assert!(note.starts_with("101 files cannot be read"), "{note}");
    assert!(note.ends_with("and 1 more"), "{note}");
    assert!(note.contains("a/cut.jpg (cut short)"), "{note}");
    assert!(note.contains("60000×60000 pixels"), "{note}");
    assert!(!note.contains('\n'), "{note}");
}

/// Whatever the bytes of a picture, loading returns.
#[test]
fn no_damage_brings_it_down() {
    let mut state = 0x2545_f491_u32;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as usize % below
    };
    let folder = values(3);
    for (format, ending) in FORMATS {
        let whole = encoded(quarters(), format);
        for i in 0..80 {
            let mut bytes = whole.clone();
            for _ in 0..=random(4) {
                let at = random(bytes.len());
                bytes[at] ^= 1 << random(8);
            }
            bytes.truncate(match i % 2 {
                0 => bytes.len(),
                _ => random(bytes.len()),
            });
            put(&folder, &format!("a/{i}.{ending}"), &bytes);
        }
    }
    let request = Request {
        image_size: Some([8, 8]),
        ..Request::default()
    };
    let splits = load_with(folder.path(), &request).unwrap();
    let all = splits.train.len() + splits.test.len() + splits.validation.unwrap().len();
    assert!((6..486).contains(&all), "{all}");
    assert!(
        splits.notes[0].contains("cannot be read"),
        "{:?}",
        splits.notes
    );
}

#[test]
fn bad_folders_are_refused_in_one_line() {
    type Make = fn(&TempDir);
    let cases: [(Make, &[&str]); 11] = [
        (|_| (), &["CLASS/*.jpg", "IDX", "found none"]),
        (
            |folder| {
                put(folder, "1.jpg", &grey(1));
                put(folder, "2.png", &grey(1));
            },
            &["found 2 pictures and no folder", "sort"],
        ),
        (
            |folder| {
                put(folder, "a/readme.txt", b"nothing");
                put(folder, "b/readme.txt", b"nothing");
            },
            &["expected pictures", "none among 2 files", "JPEG"],
        ),
        (
            |folder| {
                put(folder, "a/1.png", b"nothing");
                put(folder, "b/readme.txt", b"nothing");
            },
            &["no readable one", "a/1.png"],
        ),
        (
            |folder| {
                put(folder, "a/1.png", &grey(1));
                put(folder, "b/readme.txt", b"nothing");
            },
            &["at least 2 classes", "found one, a"],
        ),
        (
            |folder| {
                for name in ["a/1", "a/2", "a/3", "b/1", "b/2", "c/1", "c/2", "c/3"] {
                    put(folder, name, &grey(1));
                }
            },
            &[
                "at least 3 pictures of each class (training, validation, test), found 2 of b;",
                "--validation 0",
            ],
        ),
        (
            |folder| {
                for name in ["a/1", "a/2", "a/3", "b/1", "c/1", "c/2"] {
                    put(folder, name, &grey(1));
                }
            },
            &["found 1 of b and too few of 1 more; add some"],
        ),
        (
            |folder| {
                for name in ["train/a/1", "train/b/1", "test/a/1", "test/c/1"] {
                    put(folder, name, &grey(1));
                }
            },
            &[
                "only classes that there are training images of",
                "found c (test/c/1)",
            ],
        ),
        (
            |folder| {
                for name in ["train/a/1", "train/b/1", "test/a/1", "testing/a/1"] {
                    put(folder, name, &grey(1));
                }
            },
            &["one folder of test images, found test and testing"],
        ),
        (
            |folder| {
                for name in ["train/a/1", "train/b/1"] {
                    put(folder, name, &grey(1));
                }
                put(folder, "test/a/1.txt", b"nothing");
            },
            &["some to test on"],
        ),
        (
            |folder| {
                let jpeg = encoded(quarters(), ImageFormat::Jpeg);
                for name in ["train/a/1.jpg", "train/b/1.jpg", "test/a/1.jpg"] {
                    put(folder, name, &jpeg[..jpeg.len() - 20]);
                }
            },
            &["too many that are damaged", "train/a/1.jpg"],
        ),
    ];
    for (make, words) in cases {
        let folder = tempfile::tempdir().unwrap();
        make(&folder);
        let error = load(&folder).unwrap_err();
        assert!(matches!(error, Error::Data { .. }), "{error}");
        let message = error.to_string();
        assert_eq!(error.exit_code(), 2, "{message}");
        assert!(!message.contains('\n'), "{message}");
        for word in words {
            assert!(message.contains(word), "no {word:?} in {message}");
        }
    }

    let folder = values(5);
    let share = |validation, test| Request {
        validation: Some(validation),
        test: Some(test),
        ..Request::default()
    };
    let size = Request {
        image_size: Some([100_000, 1]),
        ..Request::default()
    };
    for (request, word) in [
        (share(1.0, 0.1), "--validation from 0 to below 1"),
        (share(-0.1, 0.1), "--validation from 0 to below 1"),
        (share(0.1, f64::NAN), "--test from 0 to below 1"),
        (share(0.5, 0.5), "something to train on"),
        (share(0.1, 0.0), "--test above 0"),
        (size, "--image-size of at most"),
    ] {
        let error = load_with(folder.path(), &request).unwrap_err();
        assert!(matches!(error, Error::Usage(_)), "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
    // What comes in one size and with test images takes neither.
    let fixed = |request: Request| data::load("mnist", &request, &mut |_, _| ());
    let size = |size| Request {
        image_size: Some([size; 2]),
        ..Request::default()
    };
    for request in [size(32), share(0.1, 0.1)] {
        let error = fixed(request).unwrap_err();
        assert!(matches!(error, Error::Usage(_)), "{error}");
    }
    assert_eq!(fixed(size(28)).unwrap().validation, None);
}

/// Sets back the time of every file, so that it counts as old.
fn age(folder: &Path) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            age(&path);
        } else {
            set_time(&path, 1_000_000);
        }
    }
}

fn set_time(path: &Path, seconds: u64) {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let file = File::options().append(true).open(path).unwrap();
    file.set_modified(time).unwrap();
}

/// A folder of pictures and one for the cache.
struct Cached {
    pictures: TempDir,
    cache: TempDir,
    request: Request,
}

impl Cached {
    fn new() -> Cached {
        let (pictures, cache) = (values(10), tempfile::tempdir().unwrap());
        age(pictures.path());
        let request = Request {
            cache: Some(cache.path().to_path_buf()),
            ..Request::default()
        };
        Cached {
            pictures,
            cache,
            request,
        }
    }

    /// The splits, and how many pictures were decoded for them.
    fn load(&self) -> (Splits, usize) {
        self.load_with(&self.request)
    }

    fn load_with(&self, request: &Request) -> (Splits, usize) {
        let mut decoded = 0;
        let spec = self.pictures.path().to_str().unwrap();
        let splits = data::load(spec, request, &mut |done, all| {
            assert!(done <= all);
            decoded = done;
        });
        (splits.unwrap(), decoded)
    }

    fn files(&self) -> Vec<PathBuf> {
        let files = fs::read_dir(self.cache.path().join("pictures")).unwrap();
        files.map(|file| file.unwrap().path()).collect()
    }
}

#[test]
fn the_cache_gives_the_same_and_serves_every_split() {
    let set = Cached::new();
    put(&set.pictures, "a/broken.png", &png(quarters())[..60]);
    put(&set.pictures, "a/other.txt", b"nothing");
    age(set.pictures.path());
    let (first, decoded) = set.load();
    assert_eq!(decoded, 21);
    assert!(first.notes.last().unwrap().contains("a/broken.png"));
    let (second, decoded) = set.load();
    assert_eq!((decoded, &second), (0, &first));
    let other = Request {
        split_seed: 3,
        validation: Some(0.3),
        ..set.request.clone()
    };
    let (third, decoded) = set.load_with(&other);
    assert_eq!(decoded, 0);
    let uncached = Request {
        cache: None,
        ..other
    };
    assert_eq!(set.load_with(&uncached), (third, 21));
    assert_eq!(set.files().len(), 1);
    // Another size is another set.
    let large = Request {
        image_size: Some([9, 9]),
        ..set.request.clone()
    };
    assert_eq!(set.load_with(&large).1, 21);
    assert_eq!(set.load_with(&large).1, 0);
    assert_eq!(set.load().1, 0);
    assert_eq!(set.files().len(), 2);
}

#[test]
fn whatever_changes_in_the_folder_is_seen() {
    let set = Cached::new();
    let path = |name: &str| set.pictures.path().join(name);
    let (before, decoded) = set.load();
    assert_eq!(decoded, 20);
    let expect_anew = |count: usize, what: &str| {
        let (splits, decoded) = set.load();
        assert_eq!(decoded, count, "{what}");
        let uncached = Request {
            cache: None,
            ..set.request.clone()
        };
        assert_eq!(splits, set.load_with(&uncached).0, "{what}");
        assert_eq!(set.load(), (splits, 0), "{what}");
    };
    set_time(&path("a/0.png"), 2_000_000);
    expect_anew(20, "touched");
    put(&set.pictures, "a/new.png", &grey(100));
    age(set.pictures.path());
    expect_anew(21, "added");
    fs::rename(path("a/new.png"), path("a/newer.png")).unwrap();
    expect_anew(21, "renamed");
    fs::rename(path("a/newer.png"), path("b/newer.png")).unwrap();
    fs::remove_file(path("b/newer.png")).unwrap();
    // As at first, but for the time.
    expect_anew(if cfg!(unix) { 20 } else { 0 }, "removed");
    put(&set.pictures, "a/0.png", &png(GrayImage::new(4, 4)));
    set_time(&path("a/0.png"), 3_000_000);
    expect_anew(20, "changed");
    // Of the same size, with the time set back: only the system knows.
    if cfg!(unix) {
        let bmp = |value| encoded(GrayImage::from_pixel(4, 4, Luma([value])), ImageFormat::Bmp);
        put(&set.pictures, "a/0.png", &bmp(8));
        age(set.pictures.path());
        expect_anew(20, "a file of another size");
        put(&set.pictures, "a/0.png", &bmp(10));
        age(set.pictures.path());
        expect_anew(20, "secretly changed");
    }
    assert_ne!(set.load().0, before);
    // A class by another name.
    fs::rename(path("a"), path("c")).unwrap();
    expect_anew(20, "a class renamed");
}

#[test]
fn what_just_changed_is_not_kept() {
    let set = Cached::new();
    let now = put(&set.pictures, "a/now.png", &grey(200));
    assert_eq!(set.load().1, 21);
    // It could change again and look the same.
    assert_eq!(set.load().1, 21);
    set_time(&now, 1_000_000);
    assert_eq!(set.load().1, 21);
    assert_eq!(set.load().1, 0);
    // However long the pictures take: what counts is when they were looked at.
    put(&set.pictures, "a/now.png", &grey(201));
    let spec = set.pictures.path().to_str().unwrap();
    let mut slow = |done: usize, _: usize| {
        if done == 1 {
            std::thread::sleep(Duration::from_millis(2100));
        }
    };
    data::load(spec, &set.request, &mut slow).unwrap();
    assert_eq!(set.load().1, 21);
}

#[test]
fn a_cache_that_cannot_be_used_is_none() {
    let set = Cached::new();
    let (splits, _) = set.load();
    let [file] = &set.files()[..] else {
        panic!("one file, found {:?}", set.files())
    };
    let whole = fs::read(file).unwrap();
    let mut damaged = whole.clone();
    damaged[whole.len() - 40] ^= 1;
    for bytes in [&damaged[..], &whole[..whole.len() - 1], b"", b"mine"] {
        fs::write(file, bytes).unwrap();
        let (mut found, decoded) = set.load();
        assert_eq!(decoded, 20);
        let note = found.notes.remove(0);
        assert!(note.contains("made anew"), "{note}");
        assert_eq!(found, splits);
        // It is whole again.
        assert_eq!(fs::read(file).unwrap(), whole);
        assert_eq!(set.load(), (splits.clone(), 0));
    }

    // A folder that cannot be written: a file is in its place.
    let path = put(&set.cache, "file", b"");
    let request = Request {
        cache: Some(path),
        ..set.request.clone()
    };
    let (mut found, decoded) = set.load_with(&request);
    assert_eq!(decoded, 20);
    let note = found.notes.remove(0);
    assert!(
        note.contains("not used") || note.contains("not kept"),
        "{note}"
    );
    found.notes.clear();
    assert_eq!(found, splits);
}

#[test]
fn pictures_to_test_on_are_brought_to_a_networks_shape() {
    let folder = tempfile::tempdir().unwrap();
    for i in 0..6 {
        put(
            &folder,
            &format!("{}/{i}.png", ["cat", "dog"][i % 2]),
            &grey(i as u8),
        );
    }
    let spec = folder.path().to_str().unwrap();
    let test = |shape| {
        data::load_test(spec, shape, None, &mut |_, _| ())
            .unwrap()
            .0
    };
    // All of them: there is no folder of test images.
    let mut dataset = test(Shape::new(8, 6, 3));
    assert_eq!((dataset.len(), dataset.shape), (6, Shape::new(8, 6, 3)));
    let known = ["bird", "cat", "cow", "dog"].map(String::from);
    let before = dataset.labels.clone();
    dataset.relabel(&known).unwrap();
    let expected: Vec<u32> = before.iter().map(|label| [1, 3][*label as usize]).collect();
    assert_eq!(dataset.labels, expected);
    assert_eq!((dataset.classes, &dataset.class_names[..]), (4, &known[..]));
    let mut dataset = test(Shape::new(4, 4, 1));
    assert_eq!(dataset.relabel(&known[..3]), Err("dog".into()));
    put(&folder, "train/cat/1.png", &grey(1));
    put(&folder, "test/dog/1.png", &grey(9));
    let dataset = test(Shape::new(1, 2, 1));
    assert_eq!(
        (dataset.images, dataset.class_names),
        (vec![9, 9], vec!["dog".into()])
    );
    // Folders called by numbers are classes by these names, not by their place.
    let numbers = tempfile::tempdir().unwrap();
    for i in 0..3 {
        put(&numbers, &format!("{i}/1.png"), &grey(i));
    }
    let spec = numbers.path().to_str().unwrap();
    let (mut dataset, _) =
        data::load_test(spec, Shape::new(1, 1, 1), None, &mut |_, _| ()).unwrap();
    let sorted = ["0", "1", "10", "11", "2"].map(String::from);
    dataset.relabel(&sorted).unwrap();
    let pairs: BTreeSet<_> = dataset.images.iter().zip(&dataset.labels).collect();
    assert_eq!(pairs, BTreeSet::from([(&0, &0), (&1, &1), (&2, &4)]));
    let (mut dataset, _) =
        data::load_test(spec, Shape::new(1, 1, 1), None, &mut |_, _| ()).unwrap();
    assert_eq!(dataset.relabel(&sorted[..4]), Err("2".into()));
    // Where numbers are no names they stay what they are.
    let mut mnist = data::load_test("mnist", Shape::new(28, 28, 1), None, &mut |_, _| ());
    let (dataset, _) = mnist.as_mut().unwrap();
    let labels = dataset.labels.clone();
    dataset.relabel(&known).unwrap();
    assert_eq!(dataset.labels, labels);
}

/// A picture like a photograph of one of four things: noise, a gradient, a disc or stripes, of any
/// size and colours, under uneven light and grain.
fn photograph(class: usize, number: u32) -> RgbImage {
    let mut state = 0x9e37_79b9_u32.wrapping_mul(4 * number + class as u32 + 1) | 1;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as f32 / (1 << 24) as f32
    };
    let (width, height) = (40.0 + 60.0 * random(), 40.0 + 60.0 * random());
    let colours = [
        [random(), random(), random()],
        [random(), random(), random()],
    ];
    let (angle, place) = (
        6.3 * random(),
        [0.35 + 0.3 * random(), 0.35 + 0.3 * random()],
    );
    let light = 0.3 * random();
    RgbImage::from_fn(width as u32, height as u32, |x, y| {
        let (u, v) = (x as f32 / width, y as f32 / height);
        let along = u * angle.cos() + v * angle.sin();
        let share = match class {
            0 => random(),
            1 => (along * 0.6 + 0.5).clamp(0.0, 1.0),
            2 => f32::from((u - place[0]).hypot(v - place[1]) < 0.27),
            _ => f32::from((along * 40.0).sin() > 0.0),
        };
        let grain = 0.06 * (random() - 0.5) + light * (u - 0.5);
        Rgb([0, 1, 2].map(|c| {
            // At least some contrast.
            let (dark, bright) = (0.35 * colours[0][c], 0.55 + 0.45 * colours[1][c]);
            (255.0 * (dark + (bright - dark) * share + grain)) as u8
        }))
    })
}

#[test]
fn photographs_train_through_the_whole_command() {
    let bench = tempfile::tempdir().unwrap();
    let classes = ["noise", "gradient", "disc", "stripes"];
    for i in 0..120 {
        let (class, number) = (i % 4, i as u32 / 4);
        let format = [ImageFormat::Jpeg, ImageFormat::Png][i / 4 % 2];
        let name = format!("photos/{}/{number}", classes[class]);
        put(&bench, &name, &encoded(photograph(class, number), format));
    }
    let run = |arguments: &str| {
        let output = Command::new(cargo_bin("wgrad"))
            .current_dir(bench.path())
            .env("HOME", bench.path())
            .env("XDG_CACHE_HOME", bench.path().join("cache"))
            .env_remove("RUST_LOG")
            .args(arguments.split_whitespace())
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (
            output.status.code(),
            text(&output.stdout),
            text(&output.stderr),
        )
    };
    age(&bench.path().join("photos"));
    let train = "train --data photos --test 0.2 --image-size 32 --device cpu --out run";
    let (code, out, err) = run(train);
    assert_eq!(code, Some(0), "{out}{err}");
    for words in [
        "84 training, 12 validation and 24 test images of 32×32×3 in 4 classes",
        "mobilenet-small, for images of 32×32×3",
    ] {
        let flat = out.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(flat.contains(words), "no {words:?} in {out}");
    }
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    let read = |file: &str| fs::read_to_string(bench.path().join(file)).unwrap();
    let config = json(&read("run/run.json"));
    let mut sorted = classes;
    sorted.sort_unstable();
    assert_eq!(config["model"]["class_names"], serde_json::json!(sorted));
    let data = &config["data"];
    assert_eq!(data["image_size"], serde_json::json!([32, 32]));
    assert_eq!(
        (&data["test"], &data["split_seed"]),
        (&0.2.into(), &0.into())
    );
    assert!(data["validation"].is_null());
    let images = ["training_images", "validation_images", "test_images"];
    assert_eq!(images.map(|key| data[key].as_u64().unwrap()), [84, 12, 24]);
    for hash in ["training_sha256", "validation_sha256", "test_sha256"] {
        assert_eq!(data[hash].as_str().unwrap().len(), 64);
    }

    // Chance is a quarter.
    let (code, out, err) = run("eval run --device cpu --json");
    assert_eq!(code, Some(0), "{out}{err}");
    let report = json(&out);
    assert_eq!(report["images"], 24);
    assert!(report["accuracy"].as_f64().unwrap() > 0.7, "{out}");
    assert_eq!(report["notes"], serde_json::json!([]));
    // All of them, by name: also where a class is missing, and the numbers of the others differ.
    fs::remove_dir_all(bench.path().join("photos/disc")).unwrap();
    let (code, out, err) = run("eval run --data photos --device cpu --json");
    assert_eq!(code, Some(0), "{out}{err}");
    let report = json(&out);
    assert_eq!(report["images"], 90);
    assert!(report["accuracy"].as_f64().unwrap() > 0.7, "{out}");
    let note = report["notes"][0].as_str().unwrap();
    assert!(note.contains("was trained on images of photos"), "{note}");

    // Others than it was tested on are no secret.
    for i in 0..20 {
        let more = encoded(photograph(i % 4, 100 + i as u32), ImageFormat::Png);
        put(
            &bench,
            &format!("photos/{}/more-{i}", classes[i % 4]),
            &more,
        );
    }
    let (code, out, err) = run("eval run --device cpu --json");
    assert_eq!(code, Some(0), "{out}{err}");
    let note = json(&out)["notes"][0].to_string();
    assert!(
        note.contains("is not as it was when the run in run was trained"),
        "{note}"
    );

    // Going on with what is left is refused, and so is another division.
    for (arguments, words) in [
        ("", "expected the training images that the run"),
        ("--validation 0.2", "expected --validation none"),
        ("--split-seed 4", "expected --split-seed 0"),
        ("--image-size 64", "expected --image-size 32x32"),
    ] {
        let (code, _, err) = run(&format!("train --resume run --epochs 31 {arguments}"));
        assert_eq!(code, Some(2), "{err}");
        assert!(err.contains(words), "no {words:?} in {err}");
        assert_eq!(err.lines().count(), 1, "{err}");
    }
    let cache = bench.path().join("cache/wgrad/pictures");
    if cfg!(target_os = "linux") {
        assert!(fs::read_dir(cache).unwrap().count() > 0);
    }
}
