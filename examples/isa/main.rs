//! What the kernels of a step become on AMD chips, by Mesa's RADV, which compiles for a chip that is not
//! there (and runs nothing): registers, spills, workgroup memory, occupancy, and of the matrix products what
//! their loops are made of.
//!
//!     cargo run --release --example isa -- MODEL... [--chip C]... [--family F] [--batch N] [--evaluate]
//!         [--only TEXT] [--all-tiles] [--checked] [--check] [--json] [--dump DIR]
//!
//! All counts are exact. `--check` prints only what misses its bounds (`bounds.rs`) and ends with 1 where
//! something does, with 77 where there is no such driver. `--json` prints every statistic and the assembly, an
//! object a line for each kernel of the step.

mod assembly;
mod bounds;
mod driver;

use assembly::Loops;
use driver::{Compiled, Driver, Kernel};
use serde_json::json;
use std::collections::HashMap;
use std::process::ExitCode;
use wgrad::kernels::conv2d::Product;
use wgrad::kernels::{AdapterReport, KernelSpec, Work};
use wgrad::plan::{Mode, Options, Plan, Target};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const CHIPS: [&str; 3] = ["vega10", "navi21", "gfx1100"];

/// The flags that a value follows.
const VALUED: [&str; 5] = ["--chip", "--family", "--batch", "--only", "--dump"];

struct Arguments(Vec<String>);

impl Arguments {
    fn has(&self, flag: &str) -> bool {
        self.0.iter().any(|a| a == flag)
    }

    fn values(&self, flag: &str) -> Vec<&str> {
        let pairs = self.0.windows(2).filter(|pair| pair[0] == flag);
        pairs.map(|pair| pair[1].as_str()).collect()
    }

    fn models(&self) -> Vec<&str> {
        let mut before = "";
        let mut models = Vec::new();
        for argument in &self.0 {
            if !argument.starts_with("--") && !VALUED.contains(&before) {
                models.push(argument.as_str());
            }
            before = argument;
        }
        models
    }
}

/// A kernel of a step.
struct Named {
    spec: KernelSpec,
    kernel: Kernel,
    /// How often a step has it; 0 for what is there already.
    times: usize,
}

impl Named {
    fn name(&self) -> String {
        name(&self.spec)
    }

    fn product(&self) -> Option<&Product> {
        match &self.spec.work {
            Work::Product(product) => Some(product),
            _ => None,
        }
    }
}

fn name(spec: &KernelSpec) -> String {
    format!("{} {}", spec.layer, spec.entry)
}

fn main() -> ExitCode {
    let arguments = Arguments(std::env::args().skip(1).collect());
    let models = arguments.models().into_iter();
    let kernels: Result<Vec<_>> = models
        .map(|model| Ok((model, kernels(model, &arguments)?)))
        .collect();
    let kernels = match kernels {
        Ok(kernels) if !kernels.is_empty() => kernels,
        Ok(_) => return misuse("expected the name of a model, found none"),
        Err(e) => return misuse(&e.to_string()),
    };
    if let Some(dir) = arguments.values("--dump").first() {
        dump(dir, &kernels);
    }
    let chips = match arguments.values("--chip") {
        chips if chips.is_empty() => CHIPS.to_vec(),
        chips => chips,
    };
    let (mut absent, mut count, mut misses) = (false, 0, 0);
    for chip in chips {
        let Some(driver) = Driver::open(chip) else {
            println!(
                "skipped: expected Mesa's RADV with a null device for {chip}, found none; install mesa-vulkan-drivers, 22.3 or newer"
            );
            absent = true;
            continue;
        };
        // Equal kernels of several models are compiled once.
        let mut known: HashMap<&Kernel, Compiled> = HashMap::new();
        for (model, kernels) in &kernels {
            if !arguments.has("--check") && !arguments.has("--json") {
                println!("{model} on {chip}, {}\n{HEAD}", driver.version());
            }
            for named in kernels {
                if !driver.can(&named.kernel) {
                    println!(
                        "{model} on {chip}, {}: not for subgroups of this size",
                        named.name()
                    );
                    continue;
                }
                let found = known
                    .entry(&named.kernel)
                    .or_insert_with(|| driver.compile(&named.kernel));
                let loops = named.product().map(|_| Loops::of(found.assembly()));
                if arguments.has("--json") {
                    println!("{}", line(named, found));
                } else if named.times == 0 {
                    continue;
                } else if arguments.has("--check") {
                    count += 1;
                    for miss in bounds::misses(chip, named.product(), loops.as_ref(), found) {
                        println!("{model} on {chip}, {}: {miss}", named.name());
                        misses += 1;
                    }
                } else {
                    println!("{}", row(named, found, loops.as_ref()));
                }
            }
        }
    }
    if arguments.has("--check") {
        println!("{count} kernels, {misses} bounds missed");
    }
    match (misses, absent) {
        (0, false) => ExitCode::SUCCESS,
        (0, true) => ExitCode::from(77),
        _ => ExitCode::FAILURE,
    }
}

fn misuse(what: &str) -> ExitCode {
    eprintln!("isa: {what}");
    ExitCode::from(2)
}

/// The kernels of a step, in order.
fn kernels(model: &str, arguments: &Arguments) -> Result<Vec<Named>> {
    let definition = wgrad::model::load(model)?;
    let model = definition.resolve(definition.input, definition.classes)?;
    let batch = match arguments.values("--batch").first() {
        Some(batch) => batch
            .parse()
            .map_err(|_| format!("expected a number after --batch, found '{batch}'"))?,
        None => definition.recipe.batch_size,
    };
    let family = *arguments.values("--family").first().unwrap_or(&"workgroup");
    let options = Options {
        family: Some(family.parse()?),
        ..Options::of(&definition.recipe)
    };
    let adapter = AdapterReport {
        max_workgroup_storage_bytes: 64 << 10,
        max_storage_binding_bytes: 4 << 30,
        max_buffer_bytes: 4 << 30,
        ..AdapterReport::imagined(false)
    };
    let mode = match arguments.has("--evaluate") {
        true => Mode::Evaluate,
        false => Mode::Train(definition.recipe.optimizer),
    };
    let plan = Plan::new(&model, batch, mode, &options, Target::Gpu(&adapter))?;
    let only = arguments.values("--only");
    let wanted = |spec: &&KernelSpec| only.iter().all(|text| name(spec).contains(text));
    let mut kernels: Vec<Named> = Vec::new();
    for spec in plan.specs().filter(wanted) {
        let tiles = match &spec.work {
            Work::Product(product) if arguments.has("--all-tiles") => product
                .tiles_on(&adapter)
                .into_iter()
                .map(|tile| product.with_tile(tile))
                .collect(),
            Work::Product(product) => vec![*product],
            _ => Vec::new(),
        };
        let mut specs = vec![spec.clone(); tiles.len().max(1)];
        specs
            .iter_mut()
            .zip(tiles)
            .for_each(|(spec, product)| spec.set_product(product));
        for spec in specs {
            let kernel = Kernel::new(&spec, &adapter, arguments.has("--checked"));
            let before = kernels.iter_mut().find(|other| other.kernel == kernel);
            let times = usize::from(before.is_none());
            before.into_iter().for_each(|first| first.times += 1);
            kernels.push(Named {
                spec,
                kernel,
                times,
            });
        }
    }
    Ok(kernels)
}

fn dump(dir: &str, kernels: &[(&str, Vec<Named>)]) {
    std::fs::create_dir_all(dir).expect("the folder can be made");
    for (model, kernels) in kernels {
        for (i, named) in kernels.iter().enumerate() {
            let name = format!("{model}-{i:03}-{}.wgsl", named.name().trim_start());
            let path = std::path::Path::new(dir).join(name.replace(' ', "-"));
            std::fs::write(path, &named.kernel.source).expect("it can be written");
        }
    }
}

fn line(named: &Named, found: &Compiled) -> String {
    let spec = &named.spec;
    let mut meta = json!({"entry": spec.entry, "layer": spec.layer, "groups": spec.groups});
    if let Some(product) = named.product() {
        let [m, n, k] = product.dimensions();
        let more = json!({
            "tile": product.tile.to_string(), "splits": product.splits(), "slices": product.slices(),
            "m": m, "n": n, "k": k, "flops": product.flops(), "tileparams": product.tile,
        });
        for (key, value) in more.as_object().expect("an object") {
            meta[key] = value.clone();
        }
    }
    let mut all = found.0.clone();
    all.insert("file".into(), named.name().into());
    all.insert("meta".into(), meta);
    json!(all).to_string()
}

const HEAD: &str = "layer     kernel                      VGPRs spilled  bytes waves | tile               parts  fma: hot block  reads branches";

fn row(named: &Named, found: &Compiled, loops: Option<&Loops>) -> String {
    let entry = named.spec.entry.trim_start_matches("conv2d_");
    let entry = match named.times {
        1 => entry.to_string(),
        times => format!("{entry} ({times} of them)"),
    };
    let row = format!(
        "{:9} {entry:27} {:5} {:7} {:6} {:5}",
        named.spec.layer,
        found.number("VGPRs"),
        found.spilled(),
        found.number("LDS size"),
        found.number("Subgroups per SIMD"),
    );
    let (Some(product), Some(loops)) = (named.product(), loops) else {
        return row;
    };
    let tile = product.tile.to_string();
    let tile = tile
        .trim_start_matches("workgroup ")
        .split(" (")
        .next()
        .unwrap_or("");
    format!(
        "{row} | {tile:18} {:>3}x{} {:9.3} {:5.3} {:6.3} {:8}",
        product.splits(),
        product.slices(),
        loops.hot.share(),
        loops.block.share(),
        loops.block.reads_per_multiply_add(),
        loops.hot.branches,
    )
}
