//! `wgrad verify`: every kernel against its CPU twin, every twin against finite differences.

use super::device::Device;
use super::progress::{self, Pulse};
use super::{say, say_json, say_wrapped, table, width};
use crate::cli::VerifyArgs;
use rayon::prelude::*;
use serde_json::json;
use std::collections::HashSet;
use std::path::Path;
use wgrad::gpu::{AdapterReport, GPU_HINT};
use wgrad::kernels::Work;
use wgrad::verify::{Fingerprint, Outcome};
use wgrad::{Error, Result, cpu, verify};

/// Columns from which on the table has room for the worst case of each kernel.
const WIDE: usize = 120;

/// Cases whose kernels are compiled side by side before they run: drivers of GPUs take longer to compile one than
/// all else about it takes.
const COMPILED_TOGETHER: usize = 64;

pub fn run(args: &VerifyArgs) -> Result<()> {
    let device = Device::open_adapter(args.device.as_deref())?;
    if device.notice().is_some() {
        // Asked to prove the kernels, finding nothing that runs them is a failure.
        return Err(Error::NoAdapter(format!(
            "expected a hardware adapter to verify for --device auto, found none; {GPU_HINT}, or leave --device out to verify a software adapter"
        )));
    }
    if args.only.is_some() && device.gpu().is_none() {
        return Err(Error::Usage(
            "expected an adapter for --only, found --device cpu; leave one of them out".into(),
        ));
    }
    if let (Some(folder), Some(gpu)) = (&args.dump, device.gpu()) {
        dump(folder, gpu.report())?;
    }
    let checks = match args.only {
        Some(_) => Vec::new(),
        None => cpu::finite_difference_checks(),
    };
    let mut outcomes: Vec<Outcome> = checks
        .into_iter()
        .map(|check| Outcome {
            kernel: format!("{} (CPU twin)", check.name),
            variant: "finite differences in f64".into(),
            worst: check.worst,
            tolerance: check.tolerance,
            passed: check.passes(),
            detail: None,
        })
        .collect();
    let mut left_out = Vec::new();
    match device.gpu() {
        Some(gpu) => {
            let fixed = match args.only {
                Some(_) => Vec::new(),
                None => verify::cases(gpu.report()),
            };
            let draws = match args.only {
                Some(index) => index..index + 1,
                None => 0..args.random,
            };
            let drawn = draws.flat_map(|index| {
                let cases = verify::drawn(gpu.report(), args.seed, index);
                cases.into_iter().map(move |case| (Some(index), case))
            });
            let fixed = fixed.into_iter().map(|case| (None, case));
            let mut cases: Vec<_> = fixed.chain(drawn).collect();
            let all = cases.len();
            verify::thin_out(&mut cases, args.every, |(_, case)| &case.kernel);
            if cases.len() < all {
                let skipped = all - cases.len();
                left_out.push(format!(
                    "{skipped} of {all} cases: skipped, as --every {} says",
                    args.every
                ));
            }
            let bar = progress::bar(cases.len() as u64, "checking", "{pos}/{len} {msg}");
            let pulse = Pulse::start(&bar, || None);
            // The steps below run without these checks, as a training does.
            gpu.check_products(true);
            for some in cases.chunks(COMPILED_TOGETHER) {
                let kernels = some.par_iter().flat_map_iter(|(_, case)| case.kernels());
                kernels.try_for_each(|kernel| gpu.compile(&kernel))?;
                for (draw, case) in some {
                    // Whoever stops it early has seen whether something was wrong until then.
                    let out = outcomes.iter().filter(|o| !o.passed).count();
                    bar.set_message(match out {
                        0 => case.kernel.clone(),
                        out => format!("{}, {out} out of tolerance", case.kernel),
                    });
                    let mut outcome = case.run(gpu)?;
                    if let (Some(detail), Some(index)) = (&mut outcome.detail, draw) {
                        *detail += &format!("; repeat with: {}", repeat(args, *index));
                    }
                    outcomes.push(outcome);
                    bar.inc(1);
                }
            }
            gpu.check_products(false);
            if args.only.is_none() {
                let steps = verify::steps(Some(gpu), &mut |what| bar.set_message(what.to_string()));
                outcomes.extend(steps?);
            }
            drop(pulse);
            bar.finish_and_clear();
            left_out.extend(verify::left_out(gpu.report()));
        }
        None => {
            outcomes.extend(verify::steps(None, &mut |_| ())?);
            left_out.push("kernels: skipped, there is no adapter to run them".into());
        }
    }
    let failed = outcomes.iter().filter(|o| !o.passed).count();
    let description = device.gpu().map(|gpu| gpu.report().line());
    let fingerprint = device.gpu().map(|gpu| Fingerprint::of(gpu)).transpose()?;
    if args.json {
        say_json(&json!({
            "adapter": device.gpu().map(|gpu| gpu.report()),
            "arithmetic": fingerprint,
            "passed": failed == 0,
            "left_out": left_out,
            "seed": args.seed,
            "random": args.random,
            "cases": outcomes
                .iter()
                .map(|o| json!({
                    "kernel": o.kernel,
                    "variant": o.variant,
                    "worst_error": o.worst,
                    "tolerance": o.tolerance,
                    "passed": o.passed,
                    "detail": o.detail,
                }))
                .collect::<Vec<_>>(),
        }))?;
    } else {
        say_wrapped(&format!(
            "adapter  {}",
            description.as_deref().unwrap_or("none")
        ))?;
        if let Some(fingerprint) = &fingerprint {
            let header = ["arithmetic", "how this device calculates"];
            say(&table(&header, fingerprint.rows(), header.len()))?;
        }
        let random = match args.only {
            Some(index) => format!("geometry {index}"),
            None => format!("{} geometries", args.random),
        };
        say(&format!("random   {random} of seed {}", args.seed))?;
        let mut header = vec!["kernel", "cases", "error", "tolerance", ""];
        if width() >= WIDE {
            header.push("worst case");
        }
        let mut rows = rows(&outcomes);
        rows.iter_mut().for_each(|row| row.truncate(header.len()));
        say(&table(&header, rows, header.len()))?;
        for outcome in outcomes.iter().filter(|o| !o.passed) {
            let detail = outcome.detail.as_deref().unwrap_or("out of tolerance");
            say_wrapped(&format!(
                "{}, {}: {detail}",
                outcome.kernel, outcome.variant
            ))?;
        }
        for line in &left_out {
            say_wrapped(line)?;
        }
    }
    if failed > 0 {
        return Err(Error::Verify(format!(
            "expected every case within its tolerance, found {failed} of {} out; please report them with the adapter and driver",
            outcomes.len()
        )));
    }
    if !args.json {
        say(&format!(
            "all {} cases are within their tolerance",
            outcomes.len()
        ))?;
    }
    Ok(())
}

/// The command that runs random geometry `index` alone.
fn repeat(args: &VerifyArgs, index: usize) -> String {
    let device = args.device.as_ref();
    let device = device.map_or(String::new(), |name| format!(" --device '{name}'"));
    format!("wgrad verify{device} --seed {} --only {index}", args.seed)
}

/// Writes the source of every kernel that `verify` runs.
fn dump(folder: &Path, adapter: &AdapterReport) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    let mut sources = HashSet::new();
    for kernel in verify::kernels(adapter)? {
        let source = kernel.source()?.into_owned();
        if sources.contains(&source) {
            continue;
        }
        let family = match &kernel.work {
            Work::Product(product) => format!("-{}", product.tile.family()),
            _ => String::new(),
        };
        let file = format!("{:03}-{}{family}.wgsl", sources.len(), kernel.entry);
        let file = folder.join(file);
        std::fs::write(&file, &source).map_err(|e| Error::io("write", &file, e))?;
        sources.insert(source);
    }
    Ok(())
}

/// One row per kernel, with the case that comes closest to its tolerance (or is farthest out).
fn rows(outcomes: &[Outcome]) -> Vec<Vec<String>> {
    let mut names: Vec<&str> = Vec::new();
    for outcome in outcomes {
        if !names.contains(&outcome.kernel.as_str()) {
            names.push(&outcome.kernel);
        }
    }
    names
        .into_iter()
        .flat_map(|name| {
            let cases: Vec<_> = outcomes.iter().filter(|o| o.kernel == name).collect();
            let worst = cases
                .iter()
                .max_by(|a, b| closeness(a).total_cmp(&closeness(b)))?;
            let failed = cases.iter().filter(|o| !o.passed).count();
            Some(vec![
                name.to_string(),
                cases.len().to_string(),
                format!("{:.1e}", worst.worst),
                format!("{:.1e}", worst.tolerance),
                match failed {
                    0 => "ok".into(),
                    n => format!("{n} OUT"),
                },
                worst.variant.clone(),
            ])
        })
        .collect()
}

/// Error by tolerance, with everything that failed above everything that passed.
fn closeness(outcome: &Outcome) -> f64 {
    if !outcome.passed {
        return f64::INFINITY;
    }
    match outcome.worst {
        0.0 => 0.0,
        worst => worst / outcome.tolerance,
    }
}
