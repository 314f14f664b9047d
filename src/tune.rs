//! Prices and tiles by measurement, kept in the user's cache folder.
//!
//! [`priced`] measures what operations cost on a device, once, in milliseconds: by these prices the built-in choice of
//! a tile goes. On real GPUs [`choose`] then measures the tiles that are best by price, on the real shapes. A tile
//! decides the time and nothing else: the order of every sum follows from the product's shape, see
//! [`Product::splits`].

use crate::error::{Error, Result};
use crate::gpu::{AdapterReport, Buffer, Dispatch, Gpu};
use crate::kernels::conv2d::{self, Family, Pass, Product, Tile};
use crate::kernels::probe::{PER_ROUND, PROBE_ELEMENTS, probe_prices};
use crate::kernels::{Dtype, KernelSpec, Prices, View, WORKGROUP_SIZE, pool};
use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time that measuring may take on first use of a model on an adapter.
pub const BUDGET: Duration = Duration::from_secs(2);

/// Tiles that are measured for a product.
const CANDIDATES: usize = 6;

/// What [`choose`] decided.
#[derive(Debug)]
pub struct Tuned {
    /// One product for each one asked for, with the fastest tile found.
    pub choices: Vec<Product>,
    /// How many of them were measured now (the others were in the cache, or the time was up).
    pub measured: usize,
    /// Why the cache was not read or not written, and which tiles are wrong here, a line each.
    pub notes: Vec<String>,
}

/// A cache file: prices and choices for one adapter with one driver by one version of wgrad; each choice is for its
/// family of tiles.
#[derive(Serialize, Deserialize)]
struct Cache {
    key: Key,
    #[serde(default)]
    prices: Option<Prices>,
    choices: Vec<Product>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Key {
    adapter: String,
    backend: String,
    driver: String,
    version: String,
}

impl Cache {
    fn new(key: Key) -> Cache {
        Cache {
            key,
            prices: None,
            choices: Vec::new(),
        }
    }
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

/// An adapter with its prices, see [`priced`].
#[derive(Debug)]
pub struct Priced {
    /// What plans are made for.
    pub adapter: AdapterReport,
    /// Whether the prices were measured now.
    pub measured: bool,
    /// Why the cache was not read or not written, or the prices are the assumed ones all the same, a line each.
    pub notes: Vec<String>,
}

/// The adapter of `gpu` with its prices: from the cache in `folder` where they are there, else measured. Without a
/// folder, where every run would measure them anew, and without timestamps they stay the assumed ones.
///
/// # Errors
/// What the device reports. An unusable cache is no error but a note, nor are prices that cannot be right, which are
/// not kept.
pub fn priced(gpu: &Gpu, folder: Option<&Path>) -> Result<Priced> {
    let mut priced = Priced {
        adapter: gpu.report().clone(),
        measured: false,
        notes: Vec::new(),
    };
    let (Some(folder), true) = (folder, gpu.report().timestamp_query) else {
        return Ok(priced);
    };
    let assumed = priced.adapter.prices;
    let key = Key::of(gpu.report());
    let file = key.file(folder);
    let (mut cache, note) = read(&file, key);
    priced.notes.extend(note);
    match cache.prices {
        Some(prices) if prices.plausible(&assumed) => priced.adapter.prices = prices,
        _ => {
            let prices = measured_prices(gpu)?;
            if !prices.plausible(&assumed) {
                priced.notes.push(format!(
                    "{}: measured prices of operations that cannot be right ({prices:?}); tiles are chosen by the assumed ones",
                    gpu.report().name
                ));
                return Ok(priced);
            }
            (priced.adapter.prices, priced.measured) = (prices, true);
            cache.prices = Some(prices);
            if let Err(e) = write(&file, &cache) {
                priced
                    .notes
                    .push(format!("the prices of operations are not kept: {e}"));
            }
        }
    }
    Ok(priced)
}

/// The prices of `adapter` that the cache in `folder` has, without touching the device.
pub fn known_prices(adapter: &AdapterReport, folder: Option<&Path>) -> Option<Prices> {
    let key = Key::of(adapter);
    let file = key.file(folder?);
    let prices = read(&file, key).0.prices;
    prices.filter(|prices| prices.plausible(&adapter.prices))
}

/// How often each loop of `probe_prices` is timed; the fastest counts.
const TURNS: usize = 8;

/// Workgroups and rounds of each loop of `probe_prices`: on a software adapter less than a millisecond's work of one
/// core, so that some turns are not interrupted; on a GPU enough for all its cores.
fn probe_size(software: bool) -> (usize, [u32; 4]) {
    match software {
        true => (1, [1024, 256, 256, 256]),
        false => (1024, [128; 4]),
    }
}

/// Times every loop of `probe_prices` against none, by the clock of the device.
fn measured_prices(gpu: &Gpu) -> Result<Prices> {
    let adapter = gpu.report();
    let (groups, rounds) = probe_size(adapter.software);
    let invocations = groups * WORKGROUP_SIZE;
    // Nothing overflows, and nothing becomes denormal: a slow decay towards 1.
    let factors = gpu.upload("prices", &[1.0f32 - 1.0 / 1024.0, 1.0 / 1024.0])?;
    let source = gpu.upload("prices", &vec![1.0f32; PROBE_ELEMENTS])?;
    let y = gpu.buffer("prices", invocations)?;
    let view = |tensor, dtype, len| View::whole(tensor, dtype, len);
    let spec = probe_prices(
        invocations,
        view(0, Dtype::U32, PER_ROUND.len()),
        view(1, Dtype::F32, 2),
        view(2, Dtype::F32, PROBE_ELEMENTS),
        view(3, Dtype::F32, invocations),
    );
    // The last one goes through none of the loops.
    let dispatch = |only: usize| {
        let rounds = [0, 1, 2, 3].map(|i| if i == only { rounds[i] } else { 0 });
        let rounds = gpu.upload("prices", &rounds)?;
        gpu.dispatch_on(&spec, &[&rounds, &factors, &source, &y])
    };
    let dispatches = (0..=4).map(dispatch).collect::<Result<Vec<_>>>()?;
    // In turns, so that a clock that speeds up changes all of them.
    let turns: Vec<_> = (0..TURNS).flat_map(|_| &dispatches).collect();
    let spans = gpu.profile(&turns)?;
    let fastest = |which: usize| {
        let turns = spans.iter().skip(which).step_by(dispatches.len());
        turns.map(|s| s.end - s.begin).fold(f64::INFINITY, f64::min)
    };
    let lanes = match adapter.subgroup_size {
        Some([lanes, _]) if adapter.software => lanes.max(1) as usize,
        _ => invocations,
    };
    let subgroups = (invocations / lanes) as f64;
    let seconds = [0, 1, 2, 3].map(|i| {
        let loops = fastest(i) - fastest(4);
        loops / (f64::from(rounds[i]) * subgroups)
    });
    Ok(Prices::of(seconds, adapter.software))
}

/// The fastest tile for each of `products`, of the same family: from the cache in `folder` where it is
/// there, else measured, those that are best by the prices of `adapter`, until `budget` is used up; what is left keeps
/// its own. `progress` hears how many products are done. A tile whose result differs from the plain family's is never
/// chosen. `adapter` is that of `gpu`, see [`priced`].
///
/// # Errors
/// [`Error::Verify`] for a product that none of its family's tiles computes as the plain family does,
/// or what the device reports. An unusable cache is no error but a note.
pub fn choose(
    gpu: &Gpu,
    adapter: &AdapterReport,
    products: &[Product],
    folder: Option<&Path>,
    budget: Duration,
    progress: &mut dyn FnMut(usize),
) -> Result<Tuned> {
    let key = Key::of(adapter);
    let file = folder.map(|folder| key.file(folder));
    let (mut cache, note) = match &file {
        Some(file) => read(file, key),
        None => (Cache::new(key), None),
    };
    let mut notes = Vec::from_iter(note);
    let start = Instant::now();
    let (mut choices, mut measured) = (Vec::with_capacity(products.len()), 0);
    for (i, product) in products.iter().enumerate() {
        let tile = match cache.choices.iter().find(|k| product.takes(k, adapter)) {
            Some(choice) => choice.tile,
            None if start.elapsed() >= budget => product.tile,
            None => {
                let left = budget.saturating_sub(start.elapsed());
                let share = left / (products.len() - i) as u32;
                let tile = measure(gpu, adapter, product, share, &mut notes)?;
                cache.choices.push(product.with_tile(tile));
                measured += 1;
                tile
            }
        };
        choices.push(product.with_tile(tile));
        progress(i + 1);
    }
    if let (Some(file), true) = (&file, measured > 0)
        && let Err(e) = write(file, &cache)
    {
        notes.push(format!("the choice of tiles is not kept: {e}"));
    }
    Ok(Tuned {
        choices,
        measured,
        notes,
    })
}

/// What is kept in `file` under `key`; nothing where it cannot be used, and why.
fn read(file: &Path, key: Key) -> (Cache, Option<String>) {
    let ignored = |what: String| Some(format!("{}: ignored: {what}", file.display()));
    let text = match std::fs::read(file) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return (Cache::new(key), None),
        Err(e) => return (Cache::new(key), ignored(e.to_string())),
    };
    match serde_json::from_slice::<Cache>(&text) {
        Ok(cache) if cache.key == key => (cache, None),
        Ok(_) => {
            let what = "it is for another adapter, driver or version";
            (Cache::new(key), ignored(what.into()))
        }
        Err(e) => {
            let what = format!("expected a cache of tiles, found: {e}");
            (Cache::new(key), ignored(what))
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

/// The fastest tile of the product's family.
fn measure(
    gpu: &Gpu,
    adapter: &AdapterReport,
    product: &Product,
    budget: Duration,
    notes: &mut Vec<String>,
) -> Result<Tile> {
    let start = Instant::now();
    let operands = Operands::new(gpu, product)?;
    let reference = operands.reference(gpu, product)?;
    // The built-in choice comes first: whatever the time allows, it has been measured. The others come
    // in the order of their prices; what those say is slow is not even compiled.
    let others = product.tiles_on(adapter);
    let others = others.into_iter().filter(|tile| *tile != product.tile);
    let tiles = std::iter::once(product.tile).chain(others.take(CANDIDATES - 1));
    let candidates: Vec<_> = tiles.map(|tile| product.with_tile(tile)).collect();
    if start.elapsed() < budget {
        let compiled = candidates.par_iter();
        compiled.try_for_each(|candidate| gpu.compile(&operands.spec(candidate)))?;
    }
    let (fastest, wrong) = fastest(
        candidates.into_iter(),
        |candidate| Ok(operands.run(gpu, candidate)?.agrees_with(&reference)),
        |candidate| operands.time(gpu, candidate),
        || start.elapsed() >= budget,
    )?;
    let fastest = fastest.ok_or_else(|| none_agrees(product, wrong.len(), adapter))?;
    notes.extend(wrong.iter().map(|candidate| {
        format!("{candidate}: differs from the plain kernel on this adapter and is not used; please report it with the output of `wgrad verify`")
    }));
    Ok(fastest.tile)
}

/// The candidate that takes the least time of those that are right, and those that are not. Once
/// `time_is_up`, the first that is right will do.
fn fastest(
    candidates: impl Iterator<Item = Product>,
    mut right: impl FnMut(&Product) -> Result<bool>,
    mut seconds: impl FnMut(&Product) -> Result<f64>,
    time_is_up: impl Fn() -> bool,
) -> Result<(Option<Product>, Vec<Product>)> {
    let (mut fastest, mut wrong) = (None, Vec::new());
    for candidate in candidates {
        if time_is_up() && fastest.is_some() {
            break;
        }
        if !right(&candidate)? {
            wrong.push(candidate);
            continue;
        }
        let seconds = seconds(&candidate)?;
        log::debug!("{candidate}: {:.3} ms", seconds * 1e3);
        if fastest.is_none_or(|(least, _)| seconds < least) {
            fastest = Some((seconds, candidate));
        }
    }
    Ok((fastest.map(|(_, candidate)| candidate), wrong))
}

fn none_agrees(product: &Product, tiles: usize, adapter: &AdapterReport) -> Error {
    let family = product.tile.family();
    let others = Family::ALL.into_iter();
    let takes = |other: &Family| other.for_product(product.half, adapter) == *other;
    let others: Vec<_> = others
        .filter(|other| *other != family && other.supported(adapter) && takes(other))
        .map(|other| format!("--kernels {other}"))
        .collect();
    let other = match others.is_empty() {
        true => "--device cpu".into(),
        false => others.join(" or "),
    };
    Error::Verify(format!(
        "{} on {} inputs of {}: expected a tile of the {family} family that computes what the plain family does, found none of {tiles} on {}; use {other}, and please report it with the output of `wgrad verify`",
        product.pass.name(),
        product.batch,
        product.geometry.input,
        adapter.line(),
    ))
}

/// What a product gave.
struct Found {
    /// The result, its splits added up.
    values: Vec<f64>,
    /// How far from them another result may be, as a share of the largest.
    margin: f64,
    /// Of the max-pooling, four to a word; empty without.
    index: Vec<u32>,
}

impl Found {
    fn read(gpu: &Gpu, product: &Product, result: &Buffer, index: &Buffer) -> Result<Found> {
        let partials: Vec<f32> = match result_dtype(product) {
            Dtype::F16 => {
                let halves: Vec<f16> = gpu.read("tuning", result)?;
                let values = halves[..product.result_elements()].iter();
                values.map(|half| half.to_f32()).collect()
            }
            _ => gpu.read("tuning", result)?,
        };
        let mut values = vec![0.0; partials.len() / product.splits()];
        for part in partials.chunks_exact(values.len()) {
            for (sum, value) in values.iter_mut().zip(part) {
                *sum += f64::from(*value);
            }
        }
        Ok(Found {
            values,
            // Halves that are a bit apart differ by a 1024th at most.
            margin: if product.half { 1e-3 } else { 1e-4 },
            index: match product.pool {
                Some(_) => gpu.read("tuning", index)?,
                None => Vec::new(),
            },
        })
    }

    fn agrees_with(&self, reference: &Found) -> bool {
        close(&self.values, &reference.values, reference.margin) && self.index == reference.index
    }
}

/// Whether two results agree but for the order of their additions. False for NaN.
fn close(found: &[f64], reference: &[f64], margin: f64) -> bool {
    let largest = reference.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    found.len() == reference.len()
        && found
            .iter()
            .zip(reference)
            .all(|(f, r)| (f - r).abs() <= margin * largest)
}

/// What a product's operands are stored as.
fn dtype(product: &Product) -> Dtype {
    match product.half {
        true => Dtype::F16,
        false => Dtype::F32,
    }
}

/// What its result is.
fn result_dtype(product: &Product) -> Dtype {
    match product.pass {
        Pass::BackwardWeight => Dtype::F32,
        _ => dtype(product),
    }
}

/// Words of a product's result.
fn result_words(product: &Product) -> usize {
    result_dtype(product).words(product.result_elements())
}

/// Words of the index of a product's max-pooling; one where it has none.
fn indices(product: &Product) -> usize {
    product.pool.map_or(1, |_| product.result_elements() / 4)
}

/// Buffers with made-up numbers for a product.
struct Operands {
    x: Buffer,
    parameters: Buffer,
    dy: Buffer,
    /// Their elements.
    lens: [usize; 3],
}

impl Operands {
    fn new(gpu: &Gpu, product: &Product) -> Result<Operands> {
        let g = &product.geometry;
        // Signed, without a period that a tile could share. Where the largest of a window is sought
        // they are multiples of 1/4, whose sums have no rounding errors that could decide it, and
        // many windows have ties; as halves they are small, so that sums have none either.
        let values = |len: usize| -> Vec<f32> {
            let hash = |i: u32| i.wrapping_mul(2_654_435_761);
            let value = |i: u32| match product.pool {
                Some(_) if product.half => (hash(i) >> 30) as f32 / 4.0 - 0.25,
                Some(_) => (hash(i) >> 29) as f32 / 4.0 - 1.0,
                None => (hash(i) >> 8) as f32 / (1 << 23) as f32 - 1.0,
            };
            (0..len as u32).map(value).collect()
        };
        let lens = [
            product.batch * g.input.elements(),
            g.parameter_elements(),
            product.batch * g.output.elements(),
        ];
        let upload = |len| match dtype(product) {
            Dtype::F16 => {
                let halves: Vec<f16> = values(len).into_iter().map(f16::from_f32).collect();
                gpu.upload("tuning", &halves)
            }
            _ => gpu.upload("tuning", &values(len)),
        };
        let [x, parameters, dy] = lens.map(upload);
        Ok(Operands {
            x: x?,
            parameters: parameters?,
            dy: dy?,
            lens,
        })
    }

    /// The kernel of `product` on x, parameters, dy, its result and its index, in this order.
    fn spec(&self, product: &Product) -> KernelSpec {
        let results = product.result_elements();
        let [x, parameters, dy] = [0, 1, 2].map(|i| View::whole(i, dtype(product), self.lens[i]));
        let y = View::whole(3, result_dtype(product), results);
        match product.pass {
            Pass::Forward => {
                let index = product.pool.map(|_| View::whole(4, Dtype::U8, results));
                conv2d::conv2d_forward(*product, x, parameters, y, index)
            }
            Pass::BackwardWeight => conv2d::conv2d_backward_weight(*product, x, dy, y),
            Pass::BackwardInput => {
                let mask = product.relu.then_some(x);
                conv2d::conv2d_backward_input(*product, dy, parameters, y, mask)
            }
        }
    }

    /// The dispatch of `product` on the buffers of its result and its index.
    fn dispatch(&self, gpu: &Gpu, product: &Product, [y, index]: [&Buffer; 2]) -> Result<Dispatch> {
        let buffers = [&self.x, &self.parameters, &self.dy, y, index];
        gpu.dispatch_on(&self.spec(product), &buffers)
    }

    /// The same with new buffers, poisoned: what a kernel leaves unwritten equals nothing.
    fn poisoned(&self, gpu: &Gpu, product: &Product) -> Result<(Dispatch, Buffer, Buffer)> {
        let poisoned = |len: usize| gpu.upload("tuning", &vec![f32::NAN; len]);
        let result = poisoned(result_words(product))?;
        let index = poisoned(indices(product))?;
        let dispatch = self.dispatch(gpu, product, [&result, &index])?;
        Ok((dispatch, result, index))
    }

    /// What `product` gives by the plain family, which pools in a kernel of its own.
    fn reference(&self, gpu: &Gpu, product: &Product) -> Result<Found> {
        let plain = Product {
            pool: None,
            ..product.with_tile(Tile::Plain)
        };
        let Some(window) = product.pool else {
            return self.run(gpu, &plain);
        };
        let (dispatch, y, _) = self.poisoned(gpu, &plain)?;
        let results = product.result_elements();
        let pooled = gpu.buffer("tuning", result_words(product))?;
        let index = gpu.buffer("tuning", results / 4)?;
        let pool = pool::maxpool2d_forward(
            &window,
            product.batch,
            View::whole(0, dtype(product), plain.result_elements()),
            View::whole(1, dtype(product), results),
            View::whole(2, Dtype::U8, results),
        );
        let pool = gpu.dispatch_on(&pool, &[&y, &pooled, &index])?;
        gpu.submit("tuning", &[&dispatch, &pool], 1)?;
        Found::read(gpu, product, &pooled, &index)
    }

    fn run(&self, gpu: &Gpu, product: &Product) -> Result<Found> {
        let (dispatch, result, index) = self.poisoned(gpu, product)?;
        gpu.submit("tuning", &[&dispatch], 1)?;
        Found::read(gpu, product, &result, &index)
    }

    /// Seconds of one run: the fastest of a few windows, each long enough to be measured.
    fn time(&self, gpu: &Gpu, product: &Product) -> Result<f64> {
        let result = gpu.buffer("tuning", result_words(product))?;
        let index = gpu.buffer("tuning", indices(product))?;
        let dispatch = self.dispatch(gpu, product, [&result, &index])?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Conv2d, Pool2d, Shape};

    fn candidates() -> Vec<Product> {
        let (adapter, family) = (AdapterReport::imagined(false), Family::Workgroup);
        let geometry = Conv2d::new(Shape::new(8, 8, 4), 8, [3, 3], [1, 1], [1, 1]).unwrap();
        let product =
            Product::new(geometry, 5, Pass::Forward, true, None, family, &adapter).unwrap();
        let tiles = product.tiles_on(&adapter).into_iter().take(5);
        tiles.map(|tile| product.with_tile(tile)).collect()
    }

    #[test]
    fn the_fastest_that_is_right_is_chosen() {
        let all = candidates();
        let at = |p: &Product| all.iter().position(|c| c == p).unwrap();
        let choose = |right: fn(usize) -> bool, late: bool| {
            fastest(
                all.iter().copied(),
                |p| Ok(right(at(p))),
                |p| Ok([5.0, 4.0, 1.0, 2.0, 3.0][at(p)]),
                || late,
            )
            .unwrap()
        };
        assert_eq!(choose(|_| true, false), (Some(all[2]), vec![]));
        assert_eq!(choose(|i| i != 2, false), (Some(all[3]), vec![all[2]]));
        // Late: the first that is right, not the built-in one where that is wrong.
        assert_eq!(choose(|i| i > 0, true), (Some(all[1]), vec![all[0]]));
        assert_eq!(choose(|_| false, true), (None, all.clone()));
    }

    #[test]
    fn where_no_tile_is_right_the_error_says_what_to_do() {
        let error = none_agrees(&candidates()[0], 5, &AdapterReport::imagined(false));
        assert_eq!(error.exit_code(), 1);
        let line = error.to_string();
        for part in [
            "conv2d_forward on 5 inputs of 8×8×4",
            "found none of 5 on a GPU",
            "--kernels subgroup or --kernels plain",
        ] {
            assert!(line.contains(part), "{line}");
        }
        assert_eq!(line.lines().count(), 1);
    }

    /// On the software adapter: loads of 64-bit words give the bits that those of 32 give.
    #[test]
    fn wide_loads_change_no_bit() {
        let gpu = Gpu::open(&crate::gpu::Choice::Best).expect("an adapter");
        let mut compared = 0;
        for pass in Pass::ALL {
            let geometry = Conv2d::new(Shape::new(7, 6, 8), 12, [3, 3], [1, 1], [1, 1]).unwrap();
            let family = Family::Subgroup;
            let product = Product::new(geometry, 9, pass, false, None, family, gpu.report());
            let product = product.unwrap();
            let Some(narrow) = product.tile.narrow() else {
                println!("skipped: {} has no 64-bit integers", gpu.report().name);
                continue;
            };
            let narrow = product.with_tile(narrow);
            let [text, narrow_text] = [&product, &narrow].map(|p| p.source().unwrap());
            assert!(text.contains("u64") && !narrow_text.contains("u64"));
            let operands = Operands::new(&gpu, &product).unwrap();
            let [found, expected] = [&product, &narrow].map(|p| {
                let found = operands.run(&gpu, p).unwrap();
                found
                    .values
                    .into_iter()
                    .map(f64::to_bits)
                    .collect::<Vec<_>>()
            });
            assert!(found == expected, "{product}");
            compared += 1;
        }
        assert!(compared == 0 || compared == Pass::ALL.len());
    }

    /// On the software adapter: the reference of a pooled product is the plain kernel and the pooling
    /// after it, and a kernel that pools otherwise does not agree with it.
    #[test]
    fn pooled_products_are_held_against_the_pooling_of_the_plain_result() {
        let gpu = Gpu::open(&crate::gpu::Choice::Best).expect("an adapter");
        let candidate = candidates()[0];
        let window = |kernel| Some(Pool2d::new(candidate.geometry.output, kernel, kernel).unwrap());
        let of = |pool| Product { pool, ..candidate };
        let (flat, upright) = (of(window([1, 2])), of(window([2, 1])));
        let operands = Operands::new(&gpu, &flat).unwrap();
        let reference = operands.reference(&gpu, &flat).unwrap();
        assert!(!reference.index.is_empty());
        let found = operands.run(&gpu, &flat).unwrap();
        assert!(found.agrees_with(&reference));
        // The values differ, and so does an index alone.
        assert!(
            !operands
                .run(&gpu, &upright)
                .unwrap()
                .agrees_with(&reference)
        );
        let index = vec![0; reference.index.len()];
        assert!(!Found { index, ..found }.agrees_with(&reference));
    }
}
