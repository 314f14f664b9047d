//! `wgrad bench`: kernels and whole steps against the adapter's own peak.

use super::device::Device;
use super::train::measure;
use super::{say, say_json, table};
use crate::cli::BenchArgs;
use indicatif::ProgressBar;
use serde_json::json;
use wgrad::model::load;
use wgrad::network::Options;
use wgrad::report::bench::{self, Bound, KernelReport, Report, Settings, WINDOWS};
use wgrad::{Error, Result};

pub fn run(args: &BenchArgs) -> Result<()> {
    let definition = load(&args.model)?;
    let model = definition.resolve(definition.input, definition.classes)?;
    let mut recipe = definition.recipe.clone();
    recipe.batch_size = args.batch_size.unwrap_or(recipe.batch_size);
    if recipe.batch_size == 0 {
        return Err(Error::Usage(
            "expected --batch-size of at least 1, found 0; leave it out for the model's own".into(),
        ));
    }
    // Nobody should wait for a measurement that cannot be compared in the end.
    let earlier = args.compare.as_deref().map(Report::read).transpose()?;
    let device = Device::open(&args.device)?;
    if let (Some(earlier), Some(path)) = (&earlier, &args.compare) {
        let adapter = bench::adapter_name(device.gpu().map(AsRef::as_ref));
        earlier.expect_comparable(path, &adapter, &model.name, recipe.batch_size)?;
    }
    let mut options = Options {
        family: args.kernels,
        ..Options::default()
    };
    device.expect_kernels(&options)?;
    let mut notes: Vec<String> = device.notice().map(String::from).into_iter().collect();
    if !args.no_tune {
        let (choices, measured) = measure(&device, &model, recipe.batch_size, &options)?;
        options.choices = choices;
        notes.extend(measured);
    }
    if !args.json {
        for note in notes {
            say(&note)?;
        }
        say(&format!("device  {}", device.description()))?;
        say(&format!(
            "model   {}, batch size {}",
            model.name, recipe.batch_size
        ))?;
    }
    let settings = Settings {
        model: &model,
        recipe: &recipe,
        options: &options,
        steps_only: args.steps_only,
    };
    let bar = ProgressBar::new_spinner();
    let mut report = bench::run(device.gpu(), &settings, &mut |next| {
        bar.set_message(next.to_string());
        bar.tick();
    })?;
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
        let mut header = vec![
            "layer",
            "kernel",
            "tile",
            "ms",
            "min",
            "max",
            "GFLOP/s",
            "GB/s",
            "% of peak",
        ];
        if earlier.is_some() {
            header.push("× earlier");
        }
        let rows = report.kernels.iter().map(|k| row(k, earlier.is_some()));
        say(&table(&header, rows, 3))?;
    }
    say(&step_lines(&report))
}

fn row(kernel: &KernelReport, compared: bool) -> Vec<String> {
    let ms = |seconds: f64| format!("{:.3}", 1e3 * seconds);
    let bound = match kernel.bound {
        Bound::Arithmetic => "arithmetic",
        Bound::Memory => "memory",
    };
    let mut row = vec![
        kernel.layer.clone(),
        kernel.kernel.clone(),
        kernel.variant.clone(),
        ms(kernel.seconds.median),
        ms(kernel.seconds.min),
        ms(kernel.seconds.max),
        kernel.gflops.map_or(String::new(), |g| format!("{g:.1}")),
        format!("{:.1}", kernel.gb_per_second),
        format!("{bound} {:.0}", kernel.percent_of_peak),
    ];
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
