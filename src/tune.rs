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

/// Time that measuring may take on first use of a model on an adapter, of which compiling may take half.
pub const BUDGET: Duration = Duration::from_secs(4);

/// Tiles that are measured for a product.
const CANDIDATES: usize = 6;

/// How often each of them is timed, in turns, so that a clock that speeds up changes all of them; the fastest counts.
const ROUNDS: usize = 3;

/// How long a GPU is kept busy before: from idle it takes so long to come to its full speed.
const WARM_UP: Duration = Duration::from_millis(300);

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
/// chosen: the fastest is held against it, then the next. `adapter` is that of `gpu`, see [`priced`].
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
    let known = |cache: &Cache, product: &Product| {
        let mut choices = cache.choices.iter();
        choices.find(|k| product.takes(k, adapter)).map(|k| k.tile)
    };
    let candidates = products.iter().map(|product| match known(&cache, product) {
        Some(_) => Vec::new(),
        None => candidates(product, adapter),
    });
    let candidates: Vec<_> = candidates.collect();
    let compiled = compile(gpu, &candidates, budget / 2)?;
    let (mut choices, mut measured) = (Vec::with_capacity(products.len()), 0);
    for (i, product) in products.iter().enumerate() {
        let tile = match known(&cache, product) {
            Some(tile) => tile,
            None if start.elapsed() >= budget => product.tile,
            None => {
                let left = budget.saturating_sub(start.elapsed());
                let share = left / (products.len() - i) as u32;
                let idle = measured == 0 && !adapter.software;
                let warm_up = if idle { WARM_UP } else { Duration::ZERO };
                let bench = Bench::new(gpu, product, warm_up)?;
                let fastest = bench.fastest(&candidates[i], compiled, share, &mut notes)?;
                let fastest =
                    fastest.ok_or_else(|| none_agrees(product, candidates[i].len(), adapter))?;
                cache.choices.push(fastest);
                measured += 1;
                fastest.tile
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

/// The product in the tiles that are measured: the built-in choice, then the others in the order of their prices. What
/// those say is slow is not even compiled.
fn candidates(product: &Product, adapter: &AdapterReport) -> Vec<Product> {
    let others = product.tiles_on(adapter);
    let others = others.into_iter().filter(|tile| *tile != product.tile);
    let tiles = std::iter::once(product.tile).chain(others.take(CANDIDATES - 1));
    tiles.map(|tile| product.with_tile(tile)).collect()
}

/// Compiles the first candidates of all products side by side, then their second ones and so on, until `budget` is
/// used up; how many of each are then compiled.
fn compile(gpu: &Gpu, candidates: &[Vec<Product>], budget: Duration) -> Result<usize> {
    let start = Instant::now();
    for rank in 0..CANDIDATES {
        if start.elapsed() >= budget {
            return Ok(rank);
        }
        let candidates = candidates.par_iter().filter_map(|of_one| of_one.get(rank));
        candidates.try_for_each(|candidate| gpu.compile(&spec(candidate)))?;
    }
    Ok(CANDIDATES)
}

/// The candidate that takes the least time of those that are right, and those that were found not to be. Those behind
/// the first `compiled`, and what is not timed before `time_is_up`, come last, in their order. `prepare` makes of a
/// candidate what `seconds` takes.
fn fastest<T>(
    candidates: &[Product],
    compiled: usize,
    prepare: impl Fn(&Product) -> Result<T>,
    mut seconds: impl FnMut(&T) -> Result<f64>,
    time_is_up: impl Fn() -> bool,
    mut right: impl FnMut(&Product) -> Result<bool>,
) -> Result<(Option<Product>, Vec<Product>)> {
    let mut times = vec![f64::INFINITY; candidates.len()];
    let mut prepared = Vec::new();
    for _ in 0..ROUNDS {
        for (i, candidate) in candidates.iter().take(compiled).enumerate() {
            if time_is_up() {
                break;
            }
            if prepared.len() == i {
                prepared.push(prepare(candidate)?);
            }
            times[i] = times[i].min(seconds(&prepared[i])?);
            log::debug!("{candidate}: {:.3} ms", times[i] * 1e3);
        }
    }
    let mut order: Vec<_> = times.into_iter().zip(candidates).collect();
    order.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut wrong = Vec::new();
    for (_, candidate) in order {
        if right(candidate)? {
            return Ok((Some(*candidate), wrong));
        }
        wrong.push(*candidate);
    }
    Ok((None, wrong))
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
#[derive(Default)]
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

/// The kernel of `product` on x, parameters, dy, its result and its index, in this order.
fn spec(product: &Product) -> KernelSpec {
    let (lens, results) = (lens(product), product.result_elements());
    let [x, parameters, dy] = [0, 1, 2].map(|i| View::whole(i, dtype(product), lens[i]));
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

/// Elements of x, parameters and dy.
fn lens(product: &Product) -> [usize; 3] {
    let g = &product.geometry;
    [
        product.batch * g.input.elements(),
        g.parameter_elements(),
        product.batch * g.output.elements(),
    ]
}

/// A product on buffers with made-up numbers, in any tile.
struct Bench<'a> {
    gpu: &'a Gpu,
    /// x, parameters, dy.
    operands: [Buffer; 3],
    /// What it gives by the plain family.
    reference: Found,
    /// Where results go that nobody reads, and their indices.
    rest: [Buffer; 2],
}

impl<'a> Bench<'a> {
    /// The product's operands and its result; and the GPU busy for `warm_up`.
    fn new(gpu: &'a Gpu, product: &Product, warm_up: Duration) -> Result<Bench<'a>> {
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
        let upload = |len| match dtype(product) {
            Dtype::F16 => {
                let halves: Vec<f16> = values(len).into_iter().map(f16::from_f32).collect();
                gpu.upload("tuning", &halves)
            }
            _ => gpu.upload("tuning", &values(len)),
        };
        let [x, parameters, dy] = lens(product).map(upload);
        let operands = [x?, parameters?, dy?];
        let rest = [
            gpu.buffer("tuning", result_words(product))?,
            gpu.buffer("tuning", indices(product))?,
        ];
        let mut bench = Bench {
            gpu,
            operands,
            reference: Found::default(),
            rest,
        };
        bench.reference = bench.by_the_plain_family(product)?;
        let (start, dispatch) = (Instant::now(), bench.dispatch(product, &bench.rest)?);
        while start.elapsed() < warm_up {
            bench.seconds(&dispatch, 1)?;
        }
        Ok(bench)
    }

    /// The fastest of the candidates that are right.
    fn fastest(
        &self,
        candidates: &[Product],
        compiled: usize,
        budget: Duration,
        notes: &mut Vec<String>,
    ) -> Result<Option<Product>> {
        let start = Instant::now();
        let (fastest, wrong) = fastest(
            candidates,
            compiled,
            |candidate| {
                let dispatch = self.dispatch(candidate, &self.rest)?;
                let once = self.seconds(&dispatch, 1)?.min(self.seconds(&dispatch, 1)?);
                // Long enough to be measured.
                let repeat = (0.002 / once.max(1e-6)).clamp(1.0, 50.0) as usize;
                Ok((dispatch, repeat))
            },
            |(dispatch, repeat)| self.seconds(dispatch, *repeat),
            || start.elapsed() >= budget,
            |candidate| Ok(self.run(candidate)?.agrees_with(&self.reference)),
        )?;
        notes.extend(wrong.iter().map(|candidate| {
            format!("{candidate}: differs from the plain kernel on this adapter and is not used; please report it with the output of `wgrad verify`")
        }));
        Ok(fastest)
    }

    /// The dispatch of `product` on the buffers of its result and its index.
    fn dispatch(&self, product: &Product, [y, index]: &[Buffer; 2]) -> Result<Dispatch> {
        let [x, parameters, dy] = &self.operands;
        let buffers = [x, parameters, dy, y, index];
        self.gpu.dispatch_on(&spec(product), &buffers)
    }

    /// The same with new buffers, poisoned: what a kernel leaves unwritten equals nothing.
    fn poisoned(&self, product: &Product) -> Result<(Dispatch, [Buffer; 2])> {
        let poisoned = |len: usize| self.gpu.upload("tuning", &vec![f32::NAN; len]);
        let buffers = [
            poisoned(result_words(product))?,
            poisoned(indices(product))?,
        ];
        Ok((self.dispatch(product, &buffers)?, buffers))
    }

    /// What `product` gives by the plain family, which pools in a kernel of its own.
    fn by_the_plain_family(&self, product: &Product) -> Result<Found> {
        let gpu = self.gpu;
        let plain = Product {
            pool: None,
            ..product.with_tile(Tile::Plain)
        };
        let Some(window) = product.pool else {
            return self.run(&plain);
        };
        let (dispatch, [y, _]) = self.poisoned(&plain)?;
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

    fn run(&self, product: &Product) -> Result<Found> {
        let (dispatch, [result, index]) = self.poisoned(product)?;
        self.gpu.submit("tuning", &[&dispatch], 1)?;
        Found::read(self.gpu, product, &result, &index)
    }

    /// Seconds of one of `repeat` runs.
    fn seconds(&self, dispatch: &Dispatch, repeat: usize) -> Result<f64> {
        let start = Instant::now();
        self.gpu.submit("tuning", &[dispatch], repeat)?;
        self.gpu.wait_all()?;
        Ok(start.elapsed().as_secs_f64() / repeat as f64)
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
        let choose = |right: fn(usize) -> bool, compiled: usize, late: bool| {
            fastest(
                &all,
                compiled,
                |p| Ok(at(p)),
                |p| Ok([5.0, 4.0, 1.0, 2.0, 3.0][*p]),
                || late,
                |p| Ok(right(at(p))),
            )
            .unwrap()
        };
        assert_eq!(choose(|_| true, 5, false), (Some(all[2]), vec![]));
        assert_eq!(choose(|i| i != 2, 5, false), (Some(all[3]), vec![all[2]]));
        // Late: the first that is right, not the built-in one where that is wrong.
        assert_eq!(choose(|i| i > 0, 5, true), (Some(all[1]), vec![all[0]]));
        assert_eq!(choose(|_| false, 5, true), (None, all.clone()));
        // Where the time was enough to compile the first ones alone, the others are for when those are wrong.
        assert_eq!(choose(|_| true, 2, false), (Some(all[1]), vec![]));
        let wrong = vec![all[1], all[0], all[2]];
        assert_eq!(choose(|i| i > 2, 2, false), (Some(all[3]), wrong));
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
            let bench = Bench::new(&gpu, &product, Duration::ZERO).unwrap();
            let [found, expected] = [&product, &narrow].map(|p| {
                let found = bench.run(p).unwrap();
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
        let bench = Bench::new(&gpu, &flat, Duration::ZERO).unwrap();
        let reference = &bench.reference;
        assert!(!reference.index.is_empty());
        let found = bench.run(&flat).unwrap();
        assert!(found.agrees_with(reference));
        // The values differ, and so does an index alone.
        assert!(!bench.run(&upright).unwrap().agrees_with(reference));
        let index = vec![0; reference.index.len()];
        assert!(!Found { index, ..found }.agrees_with(reference));
    }
}
