//! Datasets in the formats of others: CIFAR's binary version, NumPy archives, Parquet of the Hugging
//! Face hub; and every way in which one can be broken. What the three programs themselves wrote is
//! here as base64, with the lines of Python that made it.

mod common;

use assert_cmd::cargo::cargo_bin;
use image::{ImageFormat, RgbImage};
use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use parquet::schema::types::SchemaDescriptor;
use serde_json::Value;
use std::fs::{self, File};
use std::io::{Cursor, Write};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use tempfile::TempDir;
use wgrad::Result;
use wgrad::data::survey::Survey;
use wgrad::data::{self, Dataset, Request, Splits};
use wgrad::error::Error;
use wgrad::model::Shape;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

fn load(path: &Path) -> Result<Splits> {
    load_as(path, &Request::default())
}

fn load_as(path: &Path, request: &Request) -> Result<Splits> {
    data::load(path.to_str().unwrap(), request, &mut |_, _| ())
}

/// Asserts that loading fails with a one-line data error about `file` that holds all `words`.
fn assert_refused(path: &Path, file: &Path, words: &[&str]) {
    match load(path) {
        Err(Error::Data { path: found, what }) => {
            assert_eq!(found, file, "{what}");
            assert!(!what.contains('\n'), "{what}");
            for word in words {
                assert!(what.contains(word), "expected {word:?} in: {what}");
            }
        }
        other => panic!("expected a data error with {words:?}, found {other:?}"),
    }
}

// CIFAR

/// Record of a picture whose red is `label`, whose green counts rows and whose blue counts columns.
fn record(labels: &[u8]) -> Vec<u8> {
    let plane = |value: &dyn Fn(usize, usize) -> u8| -> Vec<u8> {
        (0..1024).map(|i| value(i / 32, i % 32)).collect()
    };
    let label = *labels.last().unwrap();
    let (red, green, blue) = (
        plane(&|_, _| label),
        plane(&|row, _| row as u8),
        plane(&|_, column| 100 + column as u8),
    );
    [labels.to_vec(), red, green, blue].concat()
}

fn write_cifar_10(folder: &Path) {
    for batch in 1..6u8 {
        let records = [record(&[batch]), record(&[9 - batch])].concat();
        fs::write(folder.join(format!("data_batch_{batch}.bin")), records).unwrap();
    }
    fs::write(folder.join("test_batch.bin"), record(&[7])).unwrap();
    let names = "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n";
    fs::write(folder.join("batches.meta.txt"), names).unwrap();
}

#[test]
fn cifar_10_is_read_in_or_above_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let inner = folder.path().join("cifar-10-batches-bin");
    fs::create_dir(&inner).unwrap();
    write_cifar_10(&inner);
    let splits = load(folder.path()).unwrap();
    assert_eq!(splits.train.labels, [1, 8, 2, 7, 3, 6, 4, 5, 5, 4]);
    assert_eq!(splits.test.labels, [7]);
    assert_eq!(splits.train.shape, Shape::new(32, 32, 3));
    assert_eq!(splits.train.class_names[9], "truck");
    let set = &splits.train;
    for (image, label) in set.images.chunks(3072).zip(&set.labels) {
        for (i, pixel) in image.chunks(3).enumerate() {
            let expected = [*label as u8, (i / 32) as u8, 100 + (i % 32) as u8];
            assert_eq!(pixel, expected);
        }
    }
    let own = load(&inner).unwrap();
    assert_eq!((own.train, own.test), (splits.train, splits.test));
}

#[test]
fn cifar_100_has_the_fine_labels() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(
        path("train.bin"),
        [record(&[3, 99]), record(&[19, 0])].concat(),
    )
    .unwrap();
    fs::write(path("test.bin"), record(&[3, 42])).unwrap();
    let splits = load(folder.path()).unwrap();
    assert_eq!(
        (splits.train.labels, splits.test.labels),
        (vec![99, 0], vec![42])
    );
    assert_eq!(splits.train.classes, 100);
    assert_eq!(splits.train.class_names[42], "42");
    let names: String = (0..100).map(|i| format!("class {i}\r\n")).collect();
    fs::write(path("fine_label_names.txt"), names).unwrap();
    assert_eq!(
        load(folder.path()).unwrap().train.class_names[42],
        "class 42"
    );
}

#[test]
fn a_cifar_that_is_broken_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let broken = |file: &str, bytes: &[u8], words: &[&str]| {
        write_cifar_10(folder.path());
        fs::write(path(file), bytes).unwrap();
        assert_refused(folder.path(), &path(file), words);
    };
    let whole = record(&[1]);
    broken(
        "data_batch_3.bin",
        &whole[..3000],
        &["records of 3073", "0 and 3000 bytes", "cut short"],
    );
    broken(
        "test_batch.bin",
        &[&whole[..], &[1]].concat(),
        &["1 and 1 bytes"],
    );
    broken("test_batch.bin", &[], &["records of 3073"]);
    broken(
        "data_batch_5.bin",
        &[whole, record(&[10])].concat(),
        &["below 10", "found 10 in record 1"],
    );
    broken(
        "batches.meta.txt",
        b"airplane\n",
        &["each of 10 classes", "1 lines"],
    );
    write_cifar_10(folder.path());
    fs::remove_file(path("data_batch_4.bin")).unwrap();
    assert_refused(
        folder.path(),
        &path("data_batch_4.bin"),
        &["expected this file", "whole archive"],
    );
}

// NumPy

/// An array as NumPy writes it.
fn npy(dtype: &str, fortran: &str, shape: &str, elements: &[u8]) -> Vec<u8> {
    let text = format!("{{'descr': '{dtype}', 'fortran_order': {fortran}, 'shape': {shape}, }}");
    let mut array = b"\x93NUMPY\x01\x00".to_vec();
    array.extend((text.len() as u16).to_le_bytes());
    array.extend(text.bytes());
    array.extend(elements);
    array
}

fn bytes(shape: &str, elements: &[u8]) -> Vec<u8> {
    npy("|u1", "False", shape, elements)
}

fn write_npz(path: &Path, arrays: &[(&str, Vec<u8>)]) {
    let mut zip = ZipWriter::new(File::create(path).unwrap());
    for (i, (name, array)) in arrays.iter().enumerate() {
        // As np.savez_compressed and np.savez do.
        let method = match i % 2 {
            0 => zip::CompressionMethod::Deflated,
            _ => zip::CompressionMethod::Stored,
        };
        let options = SimpleFileOptions::default().compression_method(method);
        zip.start_file(format!("{name}.npy"), options).unwrap();
        zip.write_all(array).unwrap();
    }
    zip.finish().unwrap();
}

#[test]
fn archives_that_numpy_wrote_are_read() {
    // np.savez_compressed(f, x_train=np.arange(24, dtype=np.uint8).reshape(4, 2, 3),
    //     y_train=np.array([0, 2, 1, 2]), x_test=np.arange(12, dtype=np.uint8).reshape(2, 2, 3),
    //     y_test=np.array([[1], [0]], dtype='>i2'))
    const NUMPY: &str = "\
        UEsDBC0AAAAIAAAAIQBFgVML//////////8LABQAeF90cmFpbi5ucHkBABAAmAAAAAAAAABhAAAAAAAAAJvsF+obEMnIUMZQrZ6S\
        WpxcpG6loF5Taqiuo6Cell9UUpSYF59flJIKEndLzClOBYoXZyQWpAL5GiY6CkY6CsaaOgq1CuQBLgZGJmYWVjZ2Dk4ubh5ePn4B\
        QSFhEVExcQBQSwMELQAAAAgAAAAhAIfepmz//////////wsAFAB5X3RyYWluLm5weQEAEACgAAAAAAAAAEwAAAAAAAAAm+wX6hsQ\
        ychQxlCtnpJanFykbqWgbpNpoa6joJ6WX1RSlJgXn1+UkgoSd0vMKU4FihdnJBakAvkaJjqaOgq1ChQALgYoYILSjGh8AFBLAwQt\
        AAAACAAAACEAxSKEoP//////////CgAUAHhfdGVzdC5ucHkBABAAjAAAAAAAAABUAAAAAAAAAJvsF+obEMnIUMZQrZ6SWpxcpG6l\
        oF5Taqiuo6Cell9UUpSYF59flJIKEndLzClOBYoXZyQWpAL5GkY6CkBkrKmjUKtAHuBiYGRiZmFlY+fg5OIGAFBLAwQtAAAACAAA\
        ACEA/b+D1///////////CgAUAHlfdGVzdC5ucHkBABAAhAAAAAAAAABKAAAAAAAAAJvsF+obEMnIUMZQrZ6SWpxcpG6loG6XaaSu\
        o6Cell9UUpSYF59flJIKEndLzClOBYoXZyQWpAL5GkY6CoaaOgq1CmQDLgZGBgYAUEsBAi0DLQAAAAgAAAAhAEWBUwthAAAAmAAA\
        AAsAAAAAAAAAAAAAAIABAAAAAHhfdHJhaW4ubnB5UEsBAi0DLQAAAAgAAAAhAIfepmxMAAAAoAAAAAsAAAAAAAAAAAAAAIABngAA\
        AHlfdHJhaW4ubnB5UEsBAi0DLQAAAAgAAAAhAMUihKBUAAAAjAAAAAoAAAAAAAAAAAAAAIABJwEAAHhfdGVzdC5ucHlQSwECLQMt\
        AAAACAAAACEA/b+D10oAAACEAAAACgAAAAAAAAAAAAAAgAG3AQAAeV90ZXN0Lm5weVBLBQYAAAAABAAEAOIAAAA9AgAAAAA=";
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.npz");
    fs::write(&path, base64(NUMPY)).unwrap();
    let splits = load(&path).unwrap();
    assert_eq!(splits.train.shape, Shape::new(2, 3, 1));
    assert_eq!(splits.train.images, (0..24).collect::<Vec<u8>>());
    assert_eq!(splits.train.labels, [0, 2, 1, 2]);
    assert_eq!(splits.test.images, (0..12).collect::<Vec<u8>>());
    assert_eq!(splits.test.labels, [1, 0]);
    assert_eq!(splits.train.class_names, ["0", "1", "2"]);
    assert_eq!(splits.validation, None);
    // Two of the training images are the test images.
    assert!(
        splits.notes[0].contains("2 of 2 test images have the pixels"),
        "{:?}",
        splits.notes
    );
}

#[test]
fn layouts_and_integer_types_of_arrays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("medical.npz");
    let pixels: Vec<u8> = (0..24).collect();
    let four = |labels: Vec<u8>, dtype: &str, shape: &str| npy(dtype, "False", shape, &labels);
    write_npz(
        &path,
        &[
            // Red, green, blue in planes.
            ("Train_Images", bytes("(2, 3, 2, 2)", &pixels)),
            (
                "train_labels",
                four(
                    vec![1, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0],
                    "<u8",
                    "(2, 1)",
                ),
            ),
            // And in pixels.
            ("val_images", bytes("(2, 2, 2, 3)", &pixels)),
            (
                "val_labels",
                four(vec![0, 0, 0, 2, 0, 0, 0, 1], ">i4", "(2,)"),
            ),
            ("test_images", bytes("(1, 2, 2, 3)", &pixels[..12])),
            ("test_labels", npy("|i1", "True", "(1, 1)", &[0])),
        ],
    );
    let splits = load(&path).unwrap();
    assert_eq!(splits.train.shape, Shape::new(2, 2, 3));
    assert_eq!(
        splits.train.images[..12],
        [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    );
    assert_eq!(splits.train.images[12..15], [12, 16, 20]);
    assert_eq!(splits.train.labels, [1, 3]);
    let validation = splits.validation.unwrap();
    assert_eq!(
        (validation.images, validation.labels),
        (pixels.clone(), vec![2, 1])
    );
    assert_eq!(splits.test.images, pixels[..12]);
    assert_eq!(splits.test.classes, 4);

    // Another size than the arrays have, or a share to test on, cannot be had.
    for request in [
        Request {
            image_size: Some([3, 3]),
            ..Request::default()
        },
        Request {
            test: Some(0.2),
            ..Request::default()
        },
    ] {
        assert_eq!(load_as(&path, &request).unwrap_err().exit_code(), 2);
    }
}

#[test]
fn an_archive_that_is_broken_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.npz");
    let images = || bytes("(2, 2, 3)", &[7; 12]);
    let labels = || npy("<i4", "False", "(2,)", &[0, 0, 0, 0, 1, 0, 0, 0]);
    // The four arrays but for one.
    let with = |name: &str, array: Vec<u8>, words: &[&str]| {
        let mut arrays = vec![
            ("x_train", images()),
            ("y_train", labels()),
            ("x_test", images()),
            ("y_test", labels()),
        ];
        arrays.iter_mut().find(|entry| entry.0 == name).unwrap().1 = array;
        write_npz(&path, &arrays);
        assert_refused(&path, &path, &[&[name], words].concat());
    };
    with(
        "x_train",
        npy("<f4", "False", "(1, 1, 1)", &[0; 4]),
        &["uint8", "<f4"],
    );
    with(
        "x_train",
        npy("|u1", "True", "(2, 2, 3)", &[0; 12]),
        &["C order"],
    );
    with(
        "x_test",
        bytes("(2, 6)", &[0; 12]),
        &["(N, H, W)", "found (2, 6)"],
    );
    with(
        "x_test",
        bytes("(2, 9, 9, 9)", &[0; 1458]),
        &["1 or 3 channels", "(2, 9, 9, 9)"],
    );
    with(
        "x_train",
        bytes("(2, 2, 3)", &[0; 11]),
        &["expected 12 bytes", "found 11"],
    );
    with(
        "x_train",
        bytes("(2, 2, 3)", &[0; 13]),
        &["expected 12 bytes", "found more"],
    );
    with(
        "x_train",
        bytes("(0, 2, 3)", &[]),
        &["at least one element"],
    );
    with(
        "x_train",
        bytes("(4294967296, 4294967296, 4294967296)", &[0; 9]),
        &["that a file can hold"],
    );
    with(
        "y_train",
        npy("<f8", "False", "(2,)", &[0; 16]),
        &["integer type", "<f8"],
    );
    with(
        "y_train",
        npy("<i8", "False", "(1, 2)", &[0; 16]),
        &["one label per image", "(1, 2)"],
    );
    with(
        "y_train",
        npy("<i2", "False", "(2,)", &[0, 0, 0xfe, 0xff]),
        &["found -2 at 1"],
    );
    with(
        "y_train",
        npy("<u8", "False", "(2,)", &[0xff; 16]),
        &["below 65536"],
    );
    with(
        "y_test",
        npy("|u1", "False", "(3,)", &[0; 3]),
        &["each of the 2 images of x_test", "3 labels"],
    );
    with(
        "y_test",
        b"\x93NUMPY\x09\x00".to_vec(),
        &["NumPy's array format"],
    );
    with(
        "y_test",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}".to_vec(),
        &["a header with descr"],
    );
    with(
        "y_test",
        npy("V5", "False", "2", &[0; 12]),
        &["a header with descr"],
    );
    with("y_test", Vec::new(), &["NumPy's array format"]);

    // More than any machine has, and nothing behind it: said at once, nothing taken.
    let huge = bytes("(1099511627776, 28, 28)", &[0; 28]);
    write_npz(&path, &[("x_train", huge), ("y_train", labels())]);
    assert_refused(&path, &path, &["fit into the free memory"]);

    write_npz(&path, &[("arr_0", images()), ("y_train", labels())]);
    assert_refused(
        &path,
        &path,
        &["x_train or train_images", "found arr_0, y_train"],
    );
    write_npz(
        &path,
        &[
            ("x_train", images()),
            ("y_train", labels()),
            ("x_test", bytes("(2, 3, 2)", &[0; 12])),
            ("y_test", labels()),
        ],
    );
    assert_refused(&path, &path, &["2×3×1", "3×2×1"]);
    fs::write(&path, b"PK, but no archive").unwrap();
    assert_refused(&path, &path, &["NumPy archive"]);

    // Cut anywhere, or with any byte changed, it is read or refused in one line; never more.
    write_npz(
        &path,
        &[
            ("x_train", images()),
            ("y_train", labels()),
            ("x_test", images()),
            ("y_test", labels()),
        ],
    );
    survives_damage(&path);
}

/// Loads what is left when a file is cut and when single bytes are changed.
fn survives_damage(path: &Path) {
    let whole = fs::read(path).unwrap();
    load(path).unwrap();
    let check = |damaged: &[u8], what: &str| {
        fs::write(path, damaged).unwrap();
        if let Err(e) = load(path) {
            let message = e.to_string();
            assert!(!message.contains('\n'), "{what}: {message}");
            assert_eq!(e.exit_code(), 2, "{what}: {message}");
        }
    };
    for length in (0..whole.len()).step_by(7) {
        check(&whole[..length], "cut");
    }
    for at in 0..whole.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut damaged = whole.clone();
            damaged[at] ^= flip;
            check(&damaged, &format!("byte {at} xor {flip:02x}"));
        }
    }
    fs::write(path, whole).unwrap();
}

// Parquet

const BINARY: &str = "message schema { optional binary picture; optional int64 label; }";
const STRUCT: &str = "message schema { optional int64 fine_label; optional int64 coarse_label; optional binary note (UTF8); optional group img { optional binary bytes; optional binary path (UTF8); } }";

fn png(colour: [u8; 3], size: u32) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    RgbImage::from_pixel(size, size, image::Rgb(colour))
        .write_to(&mut bytes, ImageFormat::Png)
        .unwrap();
    bytes.into_inner()
}

/// A file with these pictures and labels in as many row groups as there are compressions.
fn write_parquet(
    path: &Path,
    schema: &str,
    rows: &[(Vec<u8>, i64)],
    compression: Compression,
    features: Option<&str>,
) {
    let pairs = features.map(|features| {
        let text = format!("{{\"info\": {{\"features\": {features}}}}}");
        vec![KeyValue::new("huggingface".into(), text)]
    });
    let properties = WriterProperties::builder()
        .set_compression(compression)
        .set_key_value_metadata(pairs)
        .build();
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let columns = SchemaDescriptor::new(schema.clone());
    let names: Vec<String> = columns
        .columns()
        .iter()
        .map(|c| c.path().string())
        .collect();
    let file = File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
    for rows in rows.chunks(rows.len().div_ceil(2).max(1)) {
        let mut group = writer.next_row_group().unwrap();
        let mut names = names.iter().cloned();
        while let Some(mut column) = group.next_column().unwrap() {
            let name = names.next().unwrap();
            let nested = if name.starts_with("img.") { 2 } else { 1 };
            match name.as_str() {
                "picture" | "img.bytes" => {
                    let values: Vec<ByteArray> =
                        rows.iter().map(|row| row.0.clone().into()).collect();
                    let levels = vec![nested; values.len()];
                    let typed = column.typed::<ByteArrayType>();
                    typed.write_batch(&values, Some(&levels), None).unwrap();
                }
                "img.path" | "note" => {
                    // None, of a picture that is there.
                    let levels = vec![nested - 1; rows.len()];
                    let typed = column.typed::<ByteArrayType>();
                    typed.write_batch(&[], Some(&levels), None).unwrap();
                }
                _ => {
                    let values: Vec<i64> = rows.iter().map(|row| row.1).collect();
                    let levels = vec![1; values.len()];
                    let typed = column.typed::<Int64Type>();
                    typed.write_batch(&values, Some(&levels), None).unwrap();
                }
            }
            column.close().unwrap();
        }
        group.close().unwrap();
    }
    writer.close().unwrap();
}

#[test]
fn parquet_that_pyarrow_wrote_is_read() {
    // image = pa.array([{'bytes': png(v), 'path': None} for v in [10, 200, 30]],   # 2×2, grey v
    //     pa.struct([('bytes', pa.binary()), ('path', pa.string())]))
    // t = pa.table({'image': image, 'label': pa.array([1, 0, 1], pa.int64())})
    // t = t.replace_schema_metadata({'huggingface': json.dumps({'info': {'features': {
    //     'image': {'_type': 'Image'}, 'label': {'names': ['cat', 'dog'], '_type': 'ClassLabel'}}}})})
    // pq.write_table(t, f, compression='snappy', write_statistics=False)
    const SNAPPY: &str = "\
        UEFSMRUEFcIDFfgBTBUGFQASAADhAVxHAAAAiVBORw0KGgoAAAANSUhEUgAAAAIBBLgIAAAAAFfdUvgAAAAOSURBVHicY+RiYGJg\
        AAAARAAOEMtMiAAAAABJRU5ErkJggr5LADg8wcDEwAAAA/oAzIAKlEXuSwAElGMJlkioACKTCzBiAAAAAElFTkSuQmCCFQAVFBUY\
        LBUGFRAVBhUGHAAAAAokAgAAAAYCAgMkABUEFQAVAkwVABUAEgAAABUAFQ4VEiwVBhUQFQYVBhwAAAAHGAIAAAAGAQAVBBUgFSRM\
        FQQVABIAABA8AQAAAAAAAAAAAAAAAAAAABUAFRIVFiwVBhUQFQYVBhwAAAAJIAIAAAAGAQEDAhUEGVw1ABgGc2NoZW1hFQQANQIY\
        BWltYWdlFQQAFQwlAhgFYnl0ZXMAFQwlAhgEcGF0aCUATBwAAAAVBCUCGAVsYWJlbAAWBhkcGTwmABwVDBk1AAYQGSgFaW1hZ2UF\
        Ynl0ZXMVAhYGFpwEFtYCJqACJggpLBUEFQAVAgAVABUQFQIAPBaqAxkGGTYAAAYAAAAmABwVDBk1AAYQGSgFaW1hZ2UEcGF0aBUC\
        FgYWUBZWJvwCJt4CKSwVBBUAFQIAFQAVEBUCADwWABkGGTYABgAAAAAmABwVBBk1AAYQGRgFbGFiZWwVAhYGFnQWfCb0Aya0Ayks\
        FQQVABUCABUAFRAVAgA8KQYZJgAGAAAAFuAFFgYmCBaoBAAZLBgLaHVnZ2luZ2ZhY2UYcHsiaW5mbyI6IHsiZmVhdHVyZXMiOiB7\
        ImltYWdlIjogeyJfdHlwZSI6ICJJbWFnZSJ9LCAibGFiZWwiOiB7Im5hbWVzIjogWyJjYXQiLCAiZG9nIl0sICJfdHlwZSI6ICJD\
        bGFzc0xhYmVsIn19fX0AGAxBUlJPVzpzY2hlbWEYzAQvLy8vLzdBQkFBQVFBQUFBQUFBS0FBNEFCZ0FGQUFnQUNnQUFBQUFCQkFB\
        UUFBQUFBQUFLQUF3QUFBQUVBQWdBQ2dBQUFLd0FBQUFFQUFBQUFRQUFBQXdBQUFBSUFBd0FCQUFJQUFnQUFBQ0FBQUFBQkFBQUFI\
        QUFBQUI3SW1sdVptOGlPaUI3SW1abFlYUjFjbVZ6SWpvZ2V5SnBiV0ZuWlNJNklIc2lYM1I1Y0dVaU9pQWlTVzFoWjJVaWZTd2dJ\
        bXhoWW1Wc0lqb2dleUp1WVcxbGN5STZJRnNpWTJGMElpd2dJbVJ2WnlKZExDQWlYM1I1Y0dVaU9pQWlRMnhoYzNOTVlXSmxiQ0o5\
        ZlgxOUFBQUFBQXNBQUFCb2RXZG5hVzVuWm1GalpRQUNBQUFBUUFBQUFBUUFBQUJ3Ly8vL0FBQUJBaEFBQUFBZ0FBQUFCQUFBQUFB\
        QUFBQUZBQUFBYkdGaVpXd0FBQUFJQUF3QUNBQUhBQWdBQUFBQUFBQUJRQUFBQUtqLy8vOEFBQUVOR0FBQUFDQUFBQUFFQUFBQUFn\
        QUFBRkFBQUFBVUFBQUFCUUFBQUdsdFlXZGxBQUFBb1AvLy85ai8vLzhBQUFFRkVBQUFBQmdBQUFBRUFBQUFBQUFBQUFRQUFBQndZ\
        WFJvQUFBQUFNai8vLzhRQUJRQUNBQUdBQWNBREFBQUFCQUFFQUFBQUFBQUFRUVFBQUFBSEFBQUFBUUFBQUFBQUFBQUJRQUFBR0o1\
        ZEdWekFBQUFCQUFFQUFRQUFBQT0AGCBwYXJxdWV0LWNwcC1hcnJvdyB2ZXJzaW9uIDI2LjAuMRk8HAAAHAAAHAAAACYEAABQQVIx";
    // pq.write_table(t, f, compression='zstd', write_statistics=False, store_schema=False)
    const ZSTD: &str = "\
        UEFSMRUEFcIDFfABTBUGFQASAAAotS/9IOF9AwAyxhckkBszBu+u3wzRtMv3c7mdUKpXrld/f0m7vOzFsen6L41bCE8B0iCgFLZM\
        ymiCbP4AvmYq5hCJics+5v4lC81gvX+UUXZm5dFArFu/B3Ic/wH0ox+uwqk/EZJqjzH5WwQAwE3GDFhAqktOFKIVABUUFSYsFQYV\
        EBUGFQYcAAAAKLUv/SAKUQAAAgAAAAYCAgMkABUEFQAVEkwVABUAEgAAKLUv/SAAAQAAFQAVDhUgLBUGFRAVBhUGHAAAACi1L/0g\
        BzkAAAIAAAAGAQAVBBUgFSJMFQQVABIAACi1L/0gEEUAABABAAEAMsACFQAVEhUkLBUGFRAVBhUGHAAAACi1L/0gCUkAAAIAAAAG\
        AQEDAhUEGVw1ABgGc2NoZW1hFQQANQIYBWltYWdlFQQAFQwlAhgFYnl0ZXMAFQwlAhgEcGF0aCUATBwAAAAVBCUCGAVsYWJlbAAW\
        BhkcGTwmABwVDBk1AAYQGSgFaW1hZ2UFYnl0ZXMVDBYGFpwEFtwCJpgCJggpLBUEFQAVAgAVABUQFQIAPBaqAxkGGTYAAAYAAAAm\
        ABwVDBk1AAYQGSgFaW1hZ2UEcGF0aBUMFgYWUBZ0JpIDJuQCKSwVBBUAFQIAFQAVEBUCADwWABkGGTYABgAAAAAmABwVBBk1AAYQ\
        GRgFbGFiZWwVDBYGFnQWiAEmlgQm2AMpLBUEFQAVAgAVABUQFQIAPCkGGSYABgAAABbgBRYGJggW2AQAKCBwYXJxdWV0LWNwcC1h\
        cnJvdyB2ZXJzaW9uIDI2LjAuMRk8HAAAHAAAHAAAAEcBAABQQVIx";
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("train-00000-of-00001.parquet"), base64(SNAPPY)).unwrap();
    fs::write(data.join("test-00000-of-00001.parquet"), base64(ZSTD)).unwrap();
    let splits = load(folder.path()).unwrap();
    assert_eq!(splits.train.class_names, ["cat", "dog"]);
    assert_eq!(splits.train.shape, Shape::new(2, 2, 1));
    for set in [&splits.train, &splits.test] {
        assert_eq!(set.labels, [1, 0, 1]);
        assert_eq!(
            set.images,
            [10, 10, 10, 10, 200, 200, 200, 200, 30, 30, 30, 30]
        );
    }
    assert_eq!(load(&data).unwrap().train, splits.train);
}

#[test]
fn a_dataset_in_several_files_with_pictures_of_all_sizes() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    // Classes by colour; 300 pictures, more than are decoded at a time.
    let row = |i: usize| {
        let class = i % 3;
        let mut colour = [20, 20, 20];
        colour[class] = 100 + (i % 100) as u8;
        (png(colour, 8 + (i % 5) as u32), class as i64)
    };
    let rows: Vec<_> = (0..400).map(row).collect();
    let features = r#"{"fine_label": {"_type": "ClassLabel", "names": ["r", "g", "b", "none"]}, "img": {"_type": "Image"}}"#;
    let write = |name: &str, rows: &[(Vec<u8>, i64)], compression| {
        write_parquet(&path(name), STRUCT, rows, compression, Some(features));
    };
    write(
        "train-00001-of-00002.parquet",
        &rows[300..],
        Compression::UNCOMPRESSED,
    );
    write(
        "train-00000-of-00002.parquet",
        &rows[..300],
        Compression::SNAPPY,
    );
    write(
        "validation-00000-of-00001.parquet",
        &rows[..6],
        Compression::GZIP(Default::default()),
    );
    write(
        "test.parquet",
        &rows[6..10],
        Compression::ZSTD(Default::default()),
    );

    let mut heard = Vec::new();
    let splits = data::load(
        folder.path().to_str().unwrap(),
        &Request {
            image_size: Some([4, 6]),
            ..Request::default()
        },
        &mut |done, all| heard.push((done, all)),
    )
    .unwrap();
    assert_eq!(splits.train.len(), 400);
    assert_eq!(splits.train.shape, Shape::new(4, 6, 3));
    assert_eq!(splits.train.class_names, ["r", "g", "b", "none"]);
    assert_eq!(
        splits.train.labels,
        (0..400).map(|i| i % 3).collect::<Vec<u32>>()
    );
    for (i, image) in splits.train.images.chunks(72).enumerate() {
        let class = i % 3;
        for pixel in image.chunks(3) {
            assert_eq!(pixel[class], 100 + (i % 100) as u8);
            assert_eq!(pixel[(class + 1) % 3], 20);
        }
    }
    assert_eq!(splits.validation.as_ref().unwrap().len(), 6);
    assert_eq!(splits.test.len(), 4);
    assert!(
        heard.is_sorted() && heard.last() == Some(&(410, 410)),
        "{heard:?}"
    );

    // Sizes differ: the usual one.
    assert_eq!(
        load(folder.path()).unwrap().train.shape,
        Shape::new(64, 64, 3)
    );

    // Without test images some are held back, and to decide by, too; with them nothing can be.
    let ask = Request {
        test: Some(0.2),
        ..Request::default()
    };
    assert!(
        load_as(folder.path(), &ask)
            .unwrap_err()
            .to_string()
            .contains("--test")
    );
    for file in ["validation-00000-of-00001.parquet", "test.parquet"] {
        fs::remove_file(path(file)).unwrap();
    }
    let none = Request {
        test: Some(0.0),
        ..Request::default()
    };
    let error = load_as(folder.path(), &none).unwrap_err();
    assert!(matches!(error, Error::Usage(_)), "{error}");
    assert!(error.to_string().contains("--test above 0"), "{error}");
    let splits = load_as(folder.path(), &ask).unwrap();
    assert_eq!(splits.test.len(), 81);
    assert_eq!(splits.validation.unwrap().len(), 33);
    assert_eq!(splits.train.len(), 286);
}

#[test]
fn pictures_that_cannot_be_read_are_left_out_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let mut rows: Vec<_> = (0..20)
        .map(|i| (png([i as u8 * 9, 0, 0], 5), i % 2))
        .collect();
    rows[3].0 = b"no picture".to_vec();
    rows[7].0 = Vec::new();
    let half = rows[11].0.len() / 2;
    rows[11].0.truncate(half);
    write_parquet(
        &path("train-0.parquet"),
        BINARY,
        &rows,
        Compression::SNAPPY,
        None,
    );
    write_parquet(
        &path("test-0.parquet"),
        BINARY,
        &rows[12..],
        Compression::SNAPPY,
        None,
    );
    let splits = load(folder.path()).unwrap();
    assert_eq!(splits.train.len(), 17);
    assert_eq!(splits.train.shape, Shape::new(5, 5, 3));
    let kept: Vec<u32> = (0..20u32).filter(|i| ![3, 7, 11].contains(i)).collect();
    assert_eq!(
        splits.train.labels,
        kept.iter().map(|i| i % 2).collect::<Vec<_>>()
    );
    let reds: Vec<u8> = splits
        .train
        .images
        .chunks(75)
        .map(|image| image[0])
        .collect();
    assert_eq!(reds, kept.iter().map(|i| *i as u8 * 9).collect::<Vec<_>>());
    let note = splits
        .notes
        .iter()
        .find(|note| note.contains("cannot be read"))
        .unwrap();
    for word in [
        "3 of 28 pictures",
        "train-0.parquet row 3",
        "row 7",
        "row 11",
    ] {
        assert!(note.contains(word), "{note}");
    }
}

#[test]
fn parquet_that_is_broken_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (train, test) = (path("train-0.parquet"), path("test-0.parquet"));
    let rows = |n: i64| -> Vec<_> { (0..n).map(|i| (png([i as u8, 0, 0], 3), i % 2)).collect() };
    let write = |file: &Path, schema: &str, rows: &[(Vec<u8>, i64)]| {
        write_parquet(file, schema, rows, Compression::SNAPPY, None);
    };
    write(&test, BINARY, &rows(2));
    assert_refused(folder.path(), folder.path(), &["train-….parquet"]);

    let other = "message schema { optional int64 label; optional int64 kind; }";
    write(&train, other, &rows(4));
    assert_refused(
        folder.path(),
        &train,
        &["column of encoded pictures", "label, kind"],
    );
    let other = "message schema { optional binary picture; optional int64 kind; }";
    write(&train, other, &rows(4));
    assert_refused(
        folder.path(),
        &train,
        &["integer column named label", "picture, kind"],
    );
    write(&train, STRUCT, &rows(4));
    assert_refused(
        folder.path(),
        &test,
        &["column 'img'", "as in the other files"],
    );

    let mut some = rows(4);
    some[2].1 = -1;
    write(&train, BINARY, &some);
    assert_refused(folder.path(), &train, &["found -1 in row 2"]);
    some[2].1 = 1 << 40;
    write(&train, BINARY, &some);
    assert_refused(folder.path(), &train, &["below 65536"]);
    some[2].1 = 2;
    let features = r#"{"label": {"_type": "ClassLabel", "names": ["a", "b"]}}"#;
    write_parquet(&train, BINARY, &some, Compression::SNAPPY, Some(features));
    assert_refused(folder.path(), folder.path(), &["below 2", "found 2"]);
    let none: Vec<_> = (0..4).map(|i| (b"none".to_vec(), i)).collect();
    write(&train, BINARY, &none);
    write(&test, BINARY, &none);
    assert_refused(
        folder.path(),
        folder.path(),
        &["column 'picture'", "none that can be read"],
    );

    fs::write(&train, b"PAR1 and nothing more").unwrap();
    assert_refused(folder.path(), &train, &["intact Parquet file"]);

    fs::create_dir(path("other")).unwrap();
    write(&train, BINARY, &rows(4));
    write(&path("other/train-0.parquet"), BINARY, &rows(4));
    assert_refused(folder.path(), folder.path(), &["several", "other"]);

    let single = tempfile::tempdir().unwrap();
    let single = single.path().join("train.parquet");
    write(&single, BINARY, &rows(6));
    survives_damage(&single);
}

// What is there twice

#[test]
fn images_in_training_and_test_are_named_and_all_twins_found() {
    let set = |images: &[[u8; 2]], labels: &[u32]| Dataset {
        images: images.concat(),
        labels: labels.to_vec(),
        shape: Shape::new(1, 2, 1),
        classes: 3,
        class_names: ["a", "b", "c"].map(String::from).to_vec(),
        files: Vec::new(),
    };
    let splits = Splits {
        name: "twins".into(),
        train: set(&[[1, 2], [3, 4], [1, 2], [5, 6], [1, 2]], &[0, 1, 0, 1, 1]),
        validation: Some(set(&[[3, 4], [9, 9]], &[1, 0])),
        test: set(&[[7, 7], [1, 2], [5, 6]], &[0, 0, 1]),
        notes: Vec::new(),
    };
    let survey = Survey::of(&splits);
    let places: Vec<Vec<_>> = survey
        .duplicates
        .iter()
        .map(|group| {
            group
                .iter()
                .map(|at| (at.split, at.image, at.class.as_str()))
                .collect()
        })
        .collect();
    assert_eq!(
        places,
        [
            vec![
                ("training", 0, "a"),
                ("training", 2, "a"),
                ("training", 4, "b"),
                ("test", 1, "a")
            ],
            vec![("training", 1, "b"), ("validation", 0, "b")],
            vec![("training", 3, "b"), ("test", 2, "b")],
        ]
    );
    assert_eq!(survey.repeated("training", "training"), 2);
    assert_eq!(survey.repeated("test", "training"), 2);
    assert_eq!(survey.repeated("validation", "training"), 1);
    assert_eq!(survey.repeated("test", "test"), 0);
    assert_eq!(survey.contradictions().count(), 1);
    let counts: Vec<_> = survey
        .classes
        .iter()
        .map(|c| (c.training, c.validation, c.test))
        .collect();
    assert_eq!(counts, [(2, 1, 2), (3, 1, 1), (0, 0, 0)]);
    assert_eq!(survey.imbalance, None);
    // Of 1 2 3 4 1 2 5 6 1 2.
    assert!((survey.mean[0] - 2.7 / 255.0).abs() < 1e-12);
    assert!((survey.deviation[0] - (101.0 / 10.0 - 2.7f64 * 2.7).sqrt() / 255.0).abs() < 1e-12);
}

// The command line

struct Home {
    folder: TempDir,
}

impl Home {
    fn new() -> Home {
        Home {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, arguments: &str) -> Output {
        Command::new(cargo_bin("wgrad"))
            .current_dir(self.folder.path())
            .env_remove("RUST_LOG")
            .env_remove("COLUMNS")
            .args(arguments.split_whitespace())
            .output()
            .unwrap()
    }

    fn good(&self, arguments: &str) -> String {
        let output = self.run(arguments);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{arguments}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The one line that a misuse ends in.
    fn bad(&self, arguments: &str) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments}");
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(error.trim_end().lines().count(), 1, "{error}");
        error
    }

    /// The first of MNIST's training images, of class `rare` but a few and not more than `most` of the
    /// others, with the first test images.
    fn skewed_mnist(&self, rare: u32, few: usize, most: usize) {
        let mnist = data::load("mnist", &Request::default(), &mut |_, _| ()).unwrap();
        let folder = self.path("skewed");
        fs::create_dir(&folder).unwrap();
        for (split, set, few, most) in [
            ("train", &mnist.train, few, most),
            ("test", &mnist.test, 200, 200),
        ] {
            let mut counts = [0; 10];
            let (mut pixels, mut labels) = (Vec::new(), Vec::new());
            for (image, label) in set.images.chunks(784).zip(&set.labels) {
                let count = &mut counts[*label as usize];
                if *count < if *label == rare { few } else { most } {
                    *count += 1;
                    pixels.extend_from_slice(image);
                    labels.push(*label as u8);
                }
            }
            let n = labels.len() as u32;
            let write = |name: &str, bytes| {
                fs::write(folder.join(format!("{split}-{name}")), bytes).unwrap()
            };
            write("images-idx3-ubyte", common::idx(&[n, 28, 28], &pixels));
            write("labels-idx1-ubyte", common::idx(&[n], &labels));
        }
    }
}

#[test]
fn data_tells_what_there_is() {
    let home = Home::new();
    common::write_model_and_data(home.folder.path());
    let words = |text: String| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let text = words(home.good("data shapes --out sheet.png"));
    for word in [
        "96 training, 40 test",
        "8×6×1",
        "every class has as many",
        "none: no two images",
        "25.0 %",
        "sheet.png",
    ] {
        assert!(text.contains(word), "expected {word} in:\n{text}");
    }
    let sheet = image::open(home.path("sheet.png")).unwrap();
    assert!(sheet.width() > 1000 && sheet.height() > 400);
    let json: Value =
        serde_json::from_str(&home.good("data shapes --json --validation 0.25")).unwrap();
    assert_eq!(json["images"]["training"], 72);
    assert_eq!(json["images"]["validation"], 24);
    assert_eq!(json["images"]["test"], 40);
    assert_eq!((&json["height"], &json["channels"]), (&8.into(), &1.into()));
    assert_eq!(json["classes"][3]["validation"], 6);
    assert_eq!(json["duplicates"], Value::Array(Vec::new()));
    assert_eq!(json["imbalance"], 1.0);
    assert!((0.1..0.5).contains(&json["mean"][0].as_f64().unwrap()));
    assert_eq!(json["sheet"], Value::Null);
    assert_eq!(json["picture_sizes"], Value::Array(Vec::new()));

    // Pictures of several sizes, one twice.
    for (class, size) in [
        ("red", 20),
        ("red", 20),
        ("red", 30),
        ("blue", 20),
        ("blue", 24),
        ("blue", 48),
    ]
    .into_iter()
    .chain((0..8).flat_map(|_| [("red", 20), ("blue", 20)]))
    {
        let folder = home.path("photos").join(class);
        fs::create_dir_all(&folder).unwrap();
        let number = fs::read_dir(&folder).unwrap().count();
        let colour = if class == "red" {
            [200, number.max(1) as u8, 0]
        } else {
            [0, number as u8, 200]
        };
        fs::write(folder.join(format!("{number}.png")), png(colour, size)).unwrap();
    }
    let text = words(home.good("data photos --image-size 16 --no-cache"));
    for word in [
        "19 of 20×20",
        "1 of 24×24",
        "1 other size, from 20×20 to 48×48",
        "16×16×3",
        "red",
    ] {
        assert!(text.contains(word), "expected {word} in:\n{text}");
    }
    let json = home.good("data photos --image-size 16 --no-cache --json");
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["picture_sizes"][0]["pictures"], 19);
    let twins = json["duplicates"][0].as_array().unwrap();
    assert_eq!(twins.len(), 2);
    for twin in twins {
        let (class, file) = (&twin["class"], twin["file"].as_str().unwrap());
        assert!(file.starts_with(class.as_str().unwrap()), "{twin}");
        assert!(home.path("photos").join(file).is_file(), "{twin}");
        assert!(text.contains(file), "expected {file} in:\n{text}");
    }
    assert!(home.bad("data nowhere").contains("nowhere"));
    assert!(home.bad("data shapes --data shapes").contains("--data"));
    assert!(home.run("data shapes --out missing/a.png").status.code() == Some(1));
}

/// Recall of class 3 after training on a set that has few of it.
fn recall_of_the_rare(home: &Home, run: &str, flags: &str) -> f64 {
    home.good(&format!(
        "train --data skewed --device cpu --model tiny --epochs 6 --lr 0.01 --batch-size 32 --out {run} {flags}"
    ));
    let json: Value =
        serde_json::from_str(&home.good(&format!("eval {run} --device cpu --json"))).unwrap();
    json["classes"][3]["recall"].as_f64().unwrap()
}

#[test]
fn a_rare_class_is_found_more_often_with_weights_or_a_balanced_sampler() {
    let home = Home::new();
    home.skewed_mnist(3, 8, 150);
    let plain = recall_of_the_rare(&home, "plain", "");
    let weighted = recall_of_the_rare(&home, "weighted", "--class-weights balanced");
    let sampled = recall_of_the_rare(&home, "sampled", "--sampler balanced");
    println!("recall of the rare class: {plain}, weighted {weighted}, sampled {sampled}");
    assert!(weighted > plain + 0.1, "{plain} {weighted}");
    assert!(sampled > plain + 0.1, "{plain} {sampled}");

    // As used: 1358 images in 10 classes.
    let read = |run: &str| -> Value {
        serde_json::from_str(&fs::read_to_string(home.path(run).join("run.json")).unwrap()).unwrap()
    };
    let weights = &read("weighted")["recipe"]["class_weights"];
    let weight = |class: usize| weights[class].as_f64().unwrap();
    assert!((weight(3) - 1358.0 / 80.0).abs() < 1e-5, "{weights}");
    assert!((weight(0) - 1358.0 / 1500.0).abs() < 1e-5, "{weights}");
    assert_eq!(read("sampled")["recipe"]["sampler"], "balanced");
    assert_eq!(read("plain")["recipe"]["class_weights"], Value::Null);
}

#[test]
fn a_balanced_run_that_is_resumed_ends_with_the_same_bits() {
    let home = Home::new();
    common::write_model_and_data(home.folder.path());
    fs::write(home.path("weights.txt"), "0 1\n1 0.5\n\n2 2\n3 1e0\n").unwrap();
    let train = "train --model small.toml --data shapes --device cpu --sampler balanced --class-weights weights.txt --epochs 3";
    let hash = |text: &str| {
        let line = text.lines().find(|line| line.starts_with("weights"));
        line.unwrap().to_string()
    };
    let whole = hash(&home.good(&format!("{train} --out whole")));
    home.good(&format!("{train} --out parts --stop-after 1"));
    // What is said again must be the same.
    for other in ["--sampler shuffle", "--class-weights balanced"] {
        let message = home.bad(&format!("train --resume parts {other}"));
        assert!(
            message.contains(&other[..9]) && message.contains("parts"),
            "{message}"
        );
    }
    let resumed =
        hash(&home.good("train --resume parts --sampler balanced --class-weights weights.txt"));
    assert_eq!(whole, resumed);
    let plain =
        home.good("train --model small.toml --data shapes --device cpu --epochs 3 --out plain");
    assert_ne!(whole, hash(&plain));
}

#[test]
fn class_weights_that_do_not_fit_are_refused() {
    let home = Home::new();
    common::write_model_and_data(home.folder.path());
    let with = |text: &str, words: &[&str]| {
        fs::write(home.path("w.txt"), text).unwrap();
        let message =
            home.bad("train --model small.toml --data shapes --device cpu --class-weights w.txt");
        for word in words {
            assert!(message.contains(word), "expected {word} in: {message}");
        }
        assert!(!home.path("runs").exists());
    };
    with("0 1\n1 1\n2 1\n", &["w.txt", "'3'", "none"]);
    with("0 1\n1 1\n2 1\n3 1\n4 1\n", &["line 5", "'4'"]);
    with("0 1\n1 1\n2 1\n3 1\n1 2\n", &["line 5", "second"]);
    with("0 1\n1 x\n2 1\n3 1\n", &["line 2", "above 0", "'x'"]);
    with("0 1\n1 0\n2 1\n3 1\n", &["line 2", "above 0", "'0'"]);
    with("0 1\n1 inf\n2 1\n3 1\n", &["line 2", "above 0"]);
    with("0\n", &["line 1", "name and a weight"]);
    let message = home.bad("train --model small.toml --data shapes --class-weights nowhere.txt");
    assert!(
        message.contains("nowhere.txt") && message.contains("balanced"),
        "{message}"
    );
    let message =
        home.bad("train --model mlp-sigmoid --device cpu --limit 100 --class-weights balanced");
    assert!(message.contains("softmax_cross_entropy"), "{message}");
    let message = home.bad("train --data shapes --sampler even");
    assert!(
        message.contains("--sampler") && message.contains("balanced"),
        "{message}"
    );
}

/// The bytes of base64 text.
fn base64(text: &str) -> Vec<u8> {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digit = |c| DIGITS.iter().position(|d| *d == c).map(|d| d as u32);
    let digits: Vec<u32> = text.bytes().filter_map(digit).collect();
    let group = |digits: &[u32]| {
        let bits = digits.iter().fold(0, |bits, digit| bits << 6 | digit);
        let bits = bits << (6 * (4 - digits.len()));
        bits.to_be_bytes()[1..digits.len()].to_vec()
    };
    digits.chunks(4).flat_map(group).collect()
}
