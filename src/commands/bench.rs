//! `wgrad bench`: kernels and whole steps against the adapter's own peak.

use super::device::Device;
use super::progress::{self, Pulse};
use super::train::measure;
use super::{note, say, say_json, say_wrapped, table, tell, width};
use crate::cli::BenchArgs;
use serde_json::json;
use wgrad::model::load;
use wgrad::plan::Options;
use wgrad::report::bench::{self, Bound, KernelReport, Report, Settings, WINDOWS};
use wgrad::{Result, tune};

/// Columns from which on the table has room for tiles and for the fastest and slowest window.
const WIDE: usize = 150;

pub fn run(args: &BenchArgs) -> Result<()> {
    let definition = load(&args.model)?;
    let model = definition.resolve(definition.input, definition.classes)?;
    let mut recipe = definition.recipe.clone();
    // One step of them, whatever batch they are a part of.
    recipe.batch_size = args.batch_size.unwrap_or(recipe.step_batch());
    recipe.micro_batch = None;
    recipe.shards = None;
    recipe.precision = args.precision.unwrap_or(recipe.precision);
    // Nobody should wait for a measurement that cannot be compared in the end.
    let earlier = args.compare.as_deref().map(Report::read).transpose()?;
    let device = Device::open_adapter(args.device.as_deref())?;
    if let (Some(earlier), Some(path)) = (&earlier, &args.compare) {
        let adapter = bench::adapter_name(device.gpu().map(AsRef::as_ref));
        earlier.expect_comparable(path, &adapter, &model.name, recipe.batch_size)?;
    }
    let mut options = Options {
        family: args.kernels,
        ..Options::of(&recipe)
    };
    device.expect_kernels(&options)?;
    device.expect_memory(&model, &recipe, &options)?;
    if !args.no_check {
        device.check(&options)?;
    }
    let mut notes: Vec<String> = device.notice().map(String::from).into_iter().collect();
    if !args.no_tune {
        let (choices, measured) = measure(&device, &model, &recipe, &options)?;
        options.choices = choices;
        notes.extend(measured);
    }
    let prices = device.gpu().map(|gpu| {
        let folder = tune::cache_folder().filter(|_| !args.no_tune);
        let known = tune::known_prices(gpu.report(), folder.as_deref());
        known.unwrap_or(gpu.report().prices)
    });
    if !args.json {
        for line in notes {
            note(&line)?;
        }
        note(&format!("device  {}", device.description()))?;
        tell(&format!(
            "model   {}, batch size {}",
            model.name, recipe.batch_size
        ))?;
    }
    let settings = Settings {
        model: &model,
        recipe: &recipe,
        options: &options,
        steps_only: args.steps_only,
        prices,
    };
    let bar = progress::spinner();
    let pulse = Pulse::start(&bar, || None);
    let mut report = bench::run(device.gpu(), &settings, &mut |next| {
        bar.set_message(next.to_string());
    })?;
    drop(pulse);
    bar.finish_and_clear();
    if let Some(earlier) = &earlier {
        report.compare(earlier);
    }
    if args.json {
        return say_json(&json!(report));
    }
    if let Some(peak) = &report.peak {
        say(&format!(
            "peak    {:.1} GFLOP/s multiply-add, {:.1} GB/s copy",
            peak.gflops, peak.gb_per_second
        ))?;
        if let Some(prices) = &report.prices {
            say_wrapped(&format!("prices  {prices}"))?;
        }
        // What a narrow table leaves out, --json has.
        let wide = width() >= WIDE;
        let mut header = match wide {
            true => vec!["layer", "kernel", "tile", "ms", "min", "max"],
            false => vec!["layer", "kernel", "ms"],
        };
        header.extend(["GFLOP/s", "GB/s", "% of peak"]);
        if earlier.is_some() {
            header.push("× earlier");
        }
        let rows = report
            .kernels
            .iter()
            .map(|k| row(k, wide, earlier.is_some()));
        say(&table(&header, rows, if wide { 3 } else { 2 }))?;
    }
    say_wrapped(&step_lines(&report))
}

fn row(kernel: &KernelReport, wide: bool, compared: bool) -> Vec<String> {
    let ms = |seconds: f64| format!("{:.3}", 1e3 * seconds);
    let bound = match kernel.bound {
        Bound::Arithmetic => "arithmetic",
        Bound::Memory => "memory",
    };
    let mut row = vec![kernel.layer.clone(), kernel.kernel.clone()];
    if wide {
        row.push(kernel.variant.clone());
    }
    row.push(ms(kernel.seconds.median));
    if wide {
        row.extend([ms(kernel.seconds.min), ms(kernel.seconds.max)]);
    }
    row.extend([
        kernel.gflops.map_or(String::new(), |g| format!("{g:.1}")),
        format!("{:.1}", kernel.gb_per_second),
        format!("{bound} {:.0}", kernel.percent_of_peak),
    ]);
    if compared {
        row.push(kernel.ratio.map_or("new".into(), |r| format!("{r:.2}")));
    }
    row
}

fn step_lines(report: &Report) -> String {
    let rate = &report.step.images_per_second;
    let ratio = report.step.ratio;
    let ratio = ratio.map_or(String::new(), |r| format!(", {r:.2} × the earlier run"));
    let mut text = format!(
        "step    {:.0} images/s ({:.0} to {:.0} in {WINDOWS} windows){ratio}\nfirst   {:.2} s until the first step was through",
        rate.median, rate.min, rate.max, report.step.first_step_seconds
    );
    if let Some(busy) = report.step.busy_percent {
        text += &format!("\nbusy    {busy:.1} % of the time the GPU was at work, by its own clock");
    }
    if let Some(rss) = report.peak_rss_mb {
        text += &format!("\nmemory  {rss:.0} MB of the host's at most, up to the end of the steps");
    }
    text
}
