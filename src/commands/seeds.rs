//! `wgrad train --seeds`: one run after the other, in folders of one folder.

use super::signals::Signals;
use super::train::{Planned, Prepared, carry_out, continued, plan, resume as resume_run};
use super::{note, say, say_wrapped, table, tell};
use crate::cli::{DataArgs, RecipeArgs, TrainArgs};
use std::path::Path;
use wgrad::report::tensorboard::TensorBoard;
use wgrad::train::{Config, Run, SeedRun, SeedsRecord};
use wgrad::{Error, Result};

/// New runs with these seeds.
pub(super) fn start(seeds: &[u64], args: &TrainArgs, signals: &Signals) -> Result<()> {
    let Planned {
        config,
        data,
        device,
        options,
        notes,
        ..
    } = plan(args)?;
    notes.iter().try_for_each(|line| note(line))?;
    let parent = match &args.out {
        Some(out) => {
            std::fs::create_dir_all(out).map_err(|e| Error::io("create", out, e))?;
            out.clone()
        }
        None => Run::free_folder(&config)?,
    };
    let mut record = SeedsRecord::new(seeds.to_vec());
    record.write(&parent, Vec::new())?;
    let prepared = Prepared {
        run: begin(&parent, &config, seeds[0])?,
        data,
        device,
        options,
    };
    announce(&record, &parent, seeds[0])?;
    let mut diverged = None;
    if let Err(e) = attempt(seeds[0], prepared, args, signals, &parent, &mut diverged) {
        // Nothing is left of a first run that could not begin.
        if !SeedsRecord::folder(&parent, seeds[0]).exists() {
            SeedsRecord::discard(&parent);
        }
        return Err(e);
    }
    // What the flags decided is in the configuration by now.
    let args = TrainArgs {
        model: None,
        data: DataArgs {
            no_cache: args.data.no_cache,
            ..DataArgs::default()
        },
        recipe: RecipeArgs::default(),
        seeds: None,
        init: None,
        out: None,
        ..args.clone()
    };
    go_on(&parent, &mut record, &config, &args, signals, diverged)
}

/// Trains one of the runs. A loss that is no number ends this one and not the others; `diverged` is the first
/// such error.
fn attempt(
    seed: u64,
    prepared: Prepared,
    args: &TrainArgs,
    signals: &Signals,
    parent: &Path,
    diverged: &mut Option<Error>,
) -> Result<()> {
    match carry_out(prepared, args, signals, Some(parent), None) {
        Err(e @ Error::Diverged { .. }) => {
            say_wrapped(&format!("seed     {seed} is given up: {e}"))?;
            diverged.get_or_insert(e);
            Ok(())
        }
        outcome => outcome,
    }
}

/// Runs of an earlier start, those that are finished left alone.
pub(super) fn resume(
    parent: &Path,
    mut record: SeedsRecord,
    args: &TrainArgs,
    signals: &Signals,
) -> Result<()> {
    if let Some(seed) = args.seed {
        return Err(Error::Usage(format!(
            "expected no --seed, as {} holds runs of several seeds, found {seed}; leave it out, or give the folder of one of them",
            parent.display()
        )));
    }
    let folders = record.seeds.iter().map(|s| SeedsRecord::folder(parent, *s));
    let begun = folders.filter(|folder| folder.join("run.json").exists());
    let begun: Vec<Run> = begun
        .map(|folder| Run::open(&folder))
        .collect::<Result<_>>()?;
    let Some(first) = begun.first() else {
        return Err(Error::checkpoint(
            parent,
            "expected the run of a first seed, found none; train again",
        ));
    };
    // Of finished runs, too, that nothing else is asked for.
    begun
        .iter()
        .try_for_each(|run| continued(run, args).map(|_| ()))?;
    let tensorboard = args.tensorboard || TensorBoard::is_in(first.folder());
    let args = TrainArgs {
        tensorboard,
        ..args.clone()
    };
    go_on(parent, &mut record, first.config(), &args, signals, None)
}

/// Trains what is not trained yet, new runs like this one but for their seeds; `diverged` is what became of the
/// first.
///
/// # Errors
/// What ends a run, and at last [`Error::Diverged`] where one of them did.
fn go_on(
    parent: &Path,
    record: &mut SeedsRecord,
    config: &Config,
    args: &TrainArgs,
    signals: &Signals,
    mut diverged: Option<Error>,
) -> Result<()> {
    for seed in record.seeds.clone() {
        let folder = SeedsRecord::folder(parent, seed);
        if !folder.join("run.json").exists() {
            begin(parent, config, seed)?;
        }
        // The first of new runs has just been tried.
        let given_up = diverged.is_some() && seed == record.seeds[0];
        if given_up || is_finished(&folder, args)? {
            continue;
        }
        announce(record, parent, seed)?;
        let args = TrainArgs {
            resume: Some(folder.clone()),
            ..args.clone()
        };
        let prepared = resume_run(&folder, &args)?;
        attempt(seed, prepared, &args, signals, parent, &mut diverged)?;
        record.write(parent, results(parent, record)?)?;
    }
    record.write(parent, results(parent, record)?)?;
    if !record.runs.is_empty() {
        report(record, parent)?;
    }
    diverged.map_or(Ok(()), Err)
}

/// Makes the folder of the run with this seed.
fn begin(parent: &Path, config: &Config, seed: u64) -> Result<Run> {
    let config = Config {
        id: None,
        seed,
        finished_epochs: 0,
        parameter_sha256: None,
        ..config.clone()
    };
    Run::create(Some(&SeedsRecord::folder(parent, seed)), config)
}

/// Whether a run has all the epochs that it planned or `--stop-after` asks for, or has ended early; one that is asked for
/// another number may have none of them.
fn is_finished(folder: &Path, args: &TrainArgs) -> Result<bool> {
    let run = Run::open(folder)?;
    let config = run.config();
    let planned = config.recipe.epochs;
    let wanted = args.stop_after.map_or(planned, |stop| stop.min(planned));
    let asked = args.recipe.epochs.is_some() || !args.recipe.set.is_empty();
    Ok(!asked && (config.finished_epochs >= wanted || run.out_of_patience()))
}

fn announce(record: &SeedsRecord, parent: &Path, seed: u64) -> Result<()> {
    let number = record.seeds.iter().take_while(|s| **s != seed).count() + 1;
    tell(&format!(
        "seed     {seed}, {number} of {} in {}",
        record.seeds.len(),
        parent.display()
    ))
}

/// What there is of each seed.
fn results(parent: &Path, record: &SeedsRecord) -> Result<Vec<SeedRun>> {
    let mut runs = Vec::new();
    for seed in &record.seeds {
        let folder = SeedsRecord::folder(parent, *seed);
        if !folder.join("run.json").exists() {
            continue;
        }
        let run = Run::open(&folder)?;
        if let Some(last) = run.metrics().last() {
            runs.push(SeedRun {
                seed: *seed,
                folder: format!("seed-{seed}"),
                epochs: last.epoch,
                test_loss: last.test_loss,
                test_accuracy: last.test_accuracy,
                average_test_accuracy: last.average_test_accuracy,
                seconds: run.metrics().iter().map(|epoch| epoch.seconds).sum(),
            });
        }
    }
    Ok(runs)
}

fn report(record: &SeedsRecord, parent: &Path) -> Result<()> {
    let averaged = record
        .runs
        .iter()
        .any(|r| r.average_test_accuracy.is_some());
    let percent = |accuracy: f64| format!("{:.2} %", 100.0 * accuracy);
    let rows = record.runs.iter().map(|run| {
        let mut row = vec![
            run.seed.to_string(),
            run.epochs.to_string(),
            format!("{:.1} s", run.seconds),
            format!("{:.4}", run.test_loss),
            percent(run.test_accuracy),
        ];
        row.extend(averaged.then(|| run.average_test_accuracy.map_or("—".into(), percent)));
        row
    });
    let mut header = vec!["seed", "epochs", "time", "test loss", "test accuracy"];
    header.extend(averaged.then_some("of the average"));
    say(&table(&header, rows, 0))?;
    for (of, mean, deviation) in [
        ("", record.mean, record.standard_deviation),
        (
            ", of the average of the weights",
            record.average_mean,
            record.average_standard_deviation,
        ),
    ] {
        let Some(mean) = mean else { continue };
        let deviation = deviation.map_or(String::new(), |d| {
            format!(" ± {:.2} (standard deviation)", 100.0 * d)
        });
        say_wrapped(&format!(
            "mean     {}{deviation} after the last epoch of {} runs{of}",
            percent(mean),
            record.runs.len()
        ))?;
    }
    say(&format!("runs     {}", parent.display()))
}
