//! Tiles chosen by measurement, on the real shapes, and kept in the user's cache folder.
//!
//! For real GPUs only: on a software adapter the built-in choice follows from known prices. What is
//! chosen here becomes part of the run's record, so that the outcome of a training never depends on
//! timing noise twice.

use crate::error::{Error, Result};
use crate::gpu::{AdapterReport, Buffer, Dispatch, Gpu};
use crate::kernels::conv2d::{self, Pass, Product, Tile};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time that measuring may take on first use of a model on an adapter.
pub const BUDGET: Duration = Duration::from_secs(2);

/// What [`choose`] decided.
#[derive(Debug)]
pub struct Tuned {
    /// One product for each one asked for, with the fastest tile found.
    pub choices: Vec<Product>,
    /// How many of them were measured now (the others were in the cache, or the time was up).
    pub measured: usize,
    /// Why the cache was not read or not written, in one line.
    pub note: Option<String>,
}

/// A cache file: choices for one adapter with one driver by one version of wgrad.
#[derive(Serialize, Deserialize)]
struct Cache {
    key: Key,
    choices: Vec<Product>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Key {
    adapter: String,
    backend: String,
    driver: String,
    version: String,
}

impl Key {
    fn of(adapter: &AdapterReport) -> Key {
        Key {
            adapter: adapter.name.clone(),
            backend: adapter.backend.clone(),
            driver: adapter.driver.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }

    fn file(&self, folder: &Path) -> PathBuf {
        let text = format!("{self:?}");
        let hash = <sha2::Sha256 as sha2::Digest>::digest(text.as_bytes());
        let name: String = hash[..8].iter().map(|b| format!("{b:02x}")).collect();
        folder.join(format!("tiles-{name}.json"))
    }
}

/// The folder for the cache, where the platform has one.
pub fn cache_folder() -> Option<PathBuf> {
    directories::ProjectDirs::from("", "", "wgrad").map(|dirs| dirs.cache_dir().to_path_buf())
}

/// The fastest tile for each of `products`: from the cache in `folder` where it is there, else
/// measured, until `budget` is used up; what is left keeps its built-in choice. `progress` hears how
/// many products are done. A tile whose result differs from the plain family's is never chosen.
///
/// # Errors
/// What the device reports. An unusable cache is no error but a note.
pub fn choose(
    gpu: &Gpu,
    products: &[Product],
    folder: Option<&Path>,
    budget: Duration,
    progress: &mut dyn FnMut(usize),
) -> Result<Tuned> {
    let key = Key::of(gpu.report());
    let file = folder.map(|folder| key.file(folder));
    let (mut known, mut note) = match &file {
        Some(file) => read(file, &key),
        None => (Vec::new(), None),
    };
    let start = Instant::now();
    let (mut choices, mut measured) = (Vec::with_capacity(products.len()), 0);
    for (i, product) in products.iter().enumerate() {
        let fits = |k: &&Product| k.same_work(product) && k.tile.fits(gpu.report());
        let choice = match known.iter().find(fits) {
            Some(choice) => *choice,
            None if start.elapsed() >= budget => *product,
            None => {
                let left = budget.saturating_sub(start.elapsed());
                let share = left / (products.len() - i) as u32;
                let fastest = measure(gpu, product, share)?;
                known.push(fastest);
                measured += 1;
                fastest
            }
        };
        choices.push(choice);
        progress(i + 1);
    }
    if let (Some(file), true) = (&file, measured > 0) {
        let cache = Cache {
            key,
            choices: known,
        };
        if let Err(e) = write(file, &cache) {
            note.get_or_insert(format!("the choice of tiles is not kept: {e}"));
        }
    }
    Ok(Tuned {
        choices,
        measured,
        note,
    })
}

fn read(file: &Path, key: &Key) -> (Vec<Product>, Option<String>) {
    let text = match std::fs::read(file) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return (Vec::new(), None),
        Err(e) => {
            return (
                Vec::new(),
                Some(format!("{}: ignored: {e}", file.display())),
            );
        }
    };
    match serde_json::from_slice::<Cache>(&text) {
        Ok(cache) if cache.key == *key => (cache.choices, None),
        Ok(_) => {
            let what = "ignored: it is for another adapter, driver or version";
            (Vec::new(), Some(format!("{}: {what}", file.display())))
        }
        Err(e) => {
            let what = "ignored: expected a cache of tiles, found";
            (Vec::new(), Some(format!("{}: {what}: {e}", file.display())))
        }
    }
}

/// In one go, so that two processes never see half a cache.
fn write(file: &Path, cache: &Cache) -> Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    let text = serde_json::to_vec_pretty(cache).map_err(|e| Error::io("write", file, e.into()))?;
    crate::files::replace(file, &text)
}

/// The product with the fastest of its family's tiles; with its own where no other one is right.
fn measure(gpu: &Gpu, product: &Product, budget: Duration) -> Result<Product> {
    let start = Instant::now();
    let operands = Operands::new(gpu, product)?;
    let reference = operands.run(gpu, &product.with_tile(Tile::Plain))?;
    let mut fastest = (f64::INFINITY, *product);
    // The built-in choice comes first: whatever the time allows, it has been measured.
    let others = Tile::all(product.tile.family(), gpu.report());
    let others = others.into_iter().filter(|tile| *tile != product.tile);
    for tile in std::iter::once(product.tile).chain(others) {
        if start.elapsed() >= budget && fastest.0.is_finite() {
            break;
        }
        let candidate = product.with_tile(tile);
        if !close(&operands.run(gpu, &candidate)?, &reference) {
            log::warn!("{candidate}: differs from the plain kernel, not used");
            continue;
        }
        let seconds = operands.time(gpu, &candidate)?;
        log::debug!("{candidate}: {:.3} ms", seconds * 1e3);
        if seconds < fastest.0 {
            fastest = (seconds, candidate);
        }
    }
    Ok(fastest.1)
}

/// Whether two results agree but for the order of their additions. False for NaN.
fn close(found: &[f64], reference: &[f64]) -> bool {
    let largest = reference.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    found.len() == reference.len()
        && found
            .iter()
            .zip(reference)
            .all(|(f, r)| (f - r).abs() <= 1e-4 * largest)
}

/// Buffers with made-up numbers for a product.
struct Operands {
    x: Buffer,
    parameters: Buffer,
    dy: Buffer,
}

impl Operands {
    fn new(gpu: &Gpu, product: &Product) -> Result<Operands> {
        let g = &product.geometry;
        // Signed, without a period that a tile could share.
        let values = |len: usize| -> Vec<f32> {
            (0..len as u32)
                .map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0)
                .collect()
        };
        let [x, p, dy] = [
            product.batch * g.input.elements(),
            g.weight_elements() + g.output.channels,
            product.batch * g.output.elements(),
        ];
        Ok(Operands {
            x: gpu.upload("tuning", &values(x))?,
            parameters: gpu.upload("tuning", &values(p))?,
            dy: gpu.upload("tuning", &values(dy))?,
        })
    }

    /// The dispatch of `product` and its result buffer.
    fn dispatch(&self, gpu: &Gpu, product: &Product) -> Result<(Dispatch, Buffer)> {
        let result = gpu.buffer("tuning", product.result_elements())?;
        let (x, parameters, dy) = (&self.x, &self.parameters, &self.dy);
        let dispatch = match product.pass {
            Pass::Forward => {
                let index = gpu.buffer("tuning", product.result_elements().div_ceil(4))?;
                let index = product.pool.map(|_| &index);
                conv2d::conv2d_forward(gpu, product, x, parameters, &result, index)?
            }
            Pass::BackwardWeight => conv2d::conv2d_backward_weight(gpu, product, x, dy, &result)?,
            Pass::BackwardInput => {
                let mask = product.relu.then_some(x);
                conv2d::conv2d_backward_input(gpu, product, dy, parameters, &result, mask)?
            }
        };
        Ok((dispatch, result))
    }

    /// The result of `product`, its splits added up. The plain family pools nothing along, so the
    /// products compared here are those before the pooling.
    fn run(&self, gpu: &Gpu, product: &Product) -> Result<Vec<f64>> {
        let unpooled = Product {
            pool: None,
            ..*product
        };
        let (dispatch, result) = self.dispatch(gpu, &unpooled)?;
        gpu.submit("tuning", &[&dispatch], 1)?;
        let values: Vec<f32> = gpu.read("tuning", &result)?;
        let len = values.len() / product.splits;
        let mut sums = vec![0.0; len];
        for part in values.chunks_exact(len) {
            for (sum, value) in sums.iter_mut().zip(part) {
                *sum += f64::from(*value);
            }
        }
        Ok(sums)
    }

    /// Seconds of one run: the fastest of a few windows, each long enough to be measured.
    fn time(&self, gpu: &Gpu, product: &Product) -> Result<f64> {
        let (dispatch, _result) = self.dispatch(gpu, product)?;
        let window = |repeat: usize| -> Result<f64> {
            let start = Instant::now();
            gpu.submit("tuning", &[&dispatch], repeat)?;
            gpu.wait_all()?;
            Ok(start.elapsed().as_secs_f64() / repeat as f64)
        };
        let first = window(1)?.min(window(1)?);
        let repeat = (0.002 / first.max(1e-6)).clamp(1.0, 50.0) as usize;
        let mut fastest = first;
        for _ in 0..3 {
            fastest = fastest.min(window(repeat)?);
        }
        Ok(fastest)
    }
}
