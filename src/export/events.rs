//! TensorBoard's event files: protocol-buffer messages in the framing of TensorFlow's records.
//!
//! ```text
//! record = length (u64) · masked CRC-32C of it (u32) · message · masked CRC-32C of it (u32)      little-endian
//! masked(crc) = (crc rotated right by 15) + 0xa282ead8
//! ```
//!
//! The messages are those of TensorFlow's `event.proto` and `summary.proto`, as far as they are used here.
//! Sources: <https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details>,
//! <https://github.com/tensorflow/tensorboard/tree/master/tensorboard/compat/proto>.

use crate::error::{Error, Result};
use prost::{Enumeration, Message, Oneof};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(SummaryMessage),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(enumeration = "Status", tag = "1")]
    status: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
enum Status {
    Unspecified = 0,
    Start = 1,
}

#[derive(Clone, PartialEq, Message)]
struct SummaryMessage {
    #[prost(message, repeated, tag = "1")]
    values: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(oneof = "Content", tags = "2, 4, 5")]
    content: Option<Content>,
}

#[derive(Clone, PartialEq, Oneof)]
enum Content {
    #[prost(float, tag = "2")]
    Scalar(f32),
    #[prost(message, tag = "4")]
    Image(Picture),
    #[prost(message, tag = "5")]
    Histogram(Histogram),
}

#[derive(Clone, PartialEq, Message)]
struct Picture {
    #[prost(int32, tag = "1")]
    height: i32,
    #[prost(int32, tag = "2")]
    width: i32,
    /// 3: red, green and blue.
    #[prost(int32, tag = "3")]
    colourspace: i32,
    #[prost(bytes = "vec", tag = "4")]
    encoded: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Histogram {
    #[prost(double, tag = "1")]
    min: f64,
    #[prost(double, tag = "2")]
    max: f64,
    #[prost(double, tag = "3")]
    count: f64,
    #[prost(double, tag = "4")]
    sum: f64,
    #[prost(double, tag = "5")]
    sum_squares: f64,
    /// Upper limit of each bucket.
    #[prost(double, repeated, tag = "6")]
    limits: Vec<f64>,
    #[prost(double, repeated, tag = "7")]
    buckets: Vec<f64>,
}

/// What is told of one step: values by their tags, of which TensorBoard puts those with the same text before
/// a slash into one group.
#[derive(Clone, Debug, Default)]
pub struct Summary(Vec<Value>);

/// Buckets of a histogram; TensorBoard shows 30.
const BUCKETS: usize = 60;

impl Summary {
    /// A number; of one that is not finite there is nothing to tell.
    pub fn scalar(&mut self, tag: &str, value: f64) {
        if value.is_finite() {
            self.add(tag, Content::Scalar(value as f32));
        }
    }

    /// How `values` are distributed, in buckets of equal width from the smallest to the largest; of none or only
    /// of values that are not finite, which are left out, there is nothing to tell.
    pub fn histogram(&mut self, tag: &str, values: &[f32]) {
        let finite = || {
            values
                .iter()
                .filter(|x| x.is_finite())
                .map(|x| f64::from(*x))
        };
        let min = finite().fold(f64::INFINITY, f64::min);
        let max = finite().fold(f64::NEG_INFINITY, f64::max);
        if min > max {
            return;
        }
        // Equal values have a bucket of a width, too.
        let width = match (max - min) / BUCKETS as f64 {
            0.0 => f64::from(f32::EPSILON) * max.abs().max(f64::from(f32::MIN_POSITIVE)),
            width => width,
        };
        let mut buckets = vec![0.0; BUCKETS];
        for x in finite() {
            buckets[(((x - min) / width) as usize).min(BUCKETS - 1)] += 1.0;
        }
        let limits = (1..=BUCKETS).map(|i| min + width * i as f64).collect();
        self.add(
            tag,
            Content::Histogram(Histogram {
                min,
                max,
                count: finite().count() as f64,
                sum: finite().sum(),
                sum_squares: finite().map(|x| x * x).sum(),
                limits,
                buckets,
            }),
        );
    }

    /// A picture in colours, as the bytes of a PNG file.
    ///
    /// # Errors
    /// [`Error::Shape`] where it is none.
    pub fn png(&mut self, tag: &str, png: Vec<u8>) -> Result<()> {
        let (width, height) =
            image::ImageReader::with_format(std::io::Cursor::new(&png), image::ImageFormat::Png)
                .into_dimensions()
                .map_err(|e| Error::Shape {
                    operation: "png",
                    what: format!("expected the bytes of a PNG file, found something else ({e})"),
                })?;
        self.add(
            tag,
            Content::Image(Picture {
                height: height as i32,
                width: width as i32,
                colourspace: 3,
                encoded: png,
            }),
        );
        Ok(())
    }

    fn add(&mut self, tag: &str, content: Content) {
        self.0.push(Value {
            tag: tag.into(),
            content: Some(content),
        });
    }
}

/// An event file that grows.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Makes a new file in `folder`, which is made too, behind those that are there. What these have at `step`
    /// and after counts no more: it comes again in this one.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(folder: &Path, step: u64) -> Result<EventFile> {
        fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
        // Files are read by the order of their names, which begin with the time.
        let earlier = EventFile::list(folder)?;
        let seconds = |path: &PathBuf| -> Option<u64> {
            let name = path.file_name()?.to_str()?;
            name.strip_prefix(PREFIX)?.split('.').next()?.parse().ok()
        };
        let latest = earlier.iter().filter_map(seconds).max().unwrap_or(0);
        // No two begin in the same second.
        let seconds = (now() as u64).max(latest + 1);
        let path = folder.join(format!("{PREFIX}{seconds:010}.wgrad"));
        let file = File::create_new(&path).map_err(|e| Error::io("create", &path, e))?;
        let mut events = EventFile { path, file };
        events.put(0, What::FileVersion("brain.Event:2".into()))?;
        let log = SessionLog {
            status: Status::Start as i32,
        };
        events.put(step, What::SessionLog(log))?;
        Ok(events)
    }

    /// The event files in a folder; none where there is no folder.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn list(folder: &Path) -> Result<Vec<PathBuf>> {
        let entries = match fs::read_dir(folder) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|e| Error::io("read", folder, e))?,
        };
        let mut files = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| Error::io("read", folder, e))?;
            if entry.file_name().to_string_lossy().starts_with(PREFIX) {
                files.push(entry.path());
            }
        }
        files.sort();
        Ok(files)
    }

    /// Adds what there is to tell of a step, counted from the start of the training; in one write, so that a reader
    /// never waits for the rest of it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add(&mut self, step: u64, summary: Summary) -> Result<()> {
        if summary.0.is_empty() {
            return Ok(());
        }
        let values = summary.0;
        self.put(step, What::Summary(SummaryMessage { values }))
    }

    fn put(&mut self, step: u64, what: What) -> Result<()> {
        let event = Event {
            wall_time: now(),
            step: step as i64,
            what: Some(what),
        };
        let record = record(&event.encode_to_vec());
        let written = self.file.write_all(&record);
        written.map_err(|e| Error::io("write", &self.path, e))
    }
}

const PREFIX: &str = "events.out.tfevents.";

/// Seconds since 1970.
fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |time| time.as_secs_f64())
}

fn record(message: &[u8]) -> Vec<u8> {
    let masked = |bytes: &[u8]| {
        let crc = crc32c::crc32c(bytes);
        crc.rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
    };
    let length = (message.len() as u64).to_le_bytes();
    [&length, &masked(&length)[..], message, &masked(message)].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first record of every file that TensorFlow and PyTorch write, with its time set to 0; made by
    /// `tensorboard.summary.writer.record_writer.RecordWriter` (TensorBoard 2.21) of
    /// `Event(wall_time=0, file_version="brain.Event:2")`.
    #[test]
    fn a_record_is_framed_as_tensorflow_frames_it() {
        let event = Event {
            wall_time: 0.0,
            step: 0,
            what: Some(What::FileVersion("brain.Event:2".into())),
        };
        let bytes = record(&event.encode_to_vec());
        assert_eq!(bytes, GOLDEN);
    }
    const GOLDEN: &[u8] = b"\x0f\0\0\0\0\0\0\0mS+\t\x1a\rbrain.Event:2\xfc\x98Q)";

    #[test]
    fn a_histogram_counts_every_value_once() {
        let told = |values: &[f32]| {
            let mut summary = Summary::default();
            summary.histogram("x", values);
            match summary.0.pop()?.content? {
                Content::Histogram(histogram) => Some(histogram),
                _ => None,
            }
        };
        let values: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let histogram = told(&values).unwrap();
        assert_eq!(histogram.count, 1000.0);
        assert_eq!(histogram.buckets.iter().sum::<f64>(), 1000.0);
        assert_eq!(histogram.limits.len(), histogram.buckets.len());
        assert!(histogram.limits.is_sorted() && histogram.min < histogram.limits[0]);
        let below = |limit: f64| values.iter().filter(|x| f64::from(**x) < limit).count() as f64;
        let so_far: f64 = histogram.buckets[..20].iter().sum();
        assert_eq!(so_far, below(histogram.limits[19]));
        // Equal values, none, and some that are no numbers.
        for value in [0.0, 2.5, -1e30] {
            let histogram = told(&[value; 7]).unwrap();
            assert_eq!(histogram.buckets.iter().sum::<f64>(), 7.0);
            assert!(histogram.limits.is_sorted_by(|a, b| a < b), "{histogram:?}");
            assert!(histogram.limits[0] > histogram.max);
        }
        assert!(told(&[]).is_none() && told(&[f32::NAN]).is_none());
        assert_eq!(told(&[f32::NAN, 1.0, f32::INFINITY]).unwrap().count, 1.0);
    }
}
