//! `wgrad compare`: several runs side by side.

use super::report::run_folders;
use super::{say, say_json, say_wrapped, table};
use crate::cli::CompareArgs;
use std::path::PathBuf;
use wgrad::report::compare::{Difference, cell, compare, figures, write};
use wgrad::train::Run;
use wgrad::{Error, Result};

/// Characters of a setting in a table; the page has the rest.
const CELL: usize = 40;

pub fn run(args: &CompareArgs) -> Result<()> {
    let folders = args.runs.iter().map(|path| run_folders(path));
    let folders: Vec<PathBuf> = folders.collect::<Result<Vec<_>>>()?.concat();
    if folders.len() < 2 {
        return Err(Error::Usage(format!(
            "expected at least two runs to compare, found {}; name several run folders, or one that `wgrad train --seeds` left",
            folders.len()
        )));
    }
    if args.out.exists() && !args.overwrite {
        return Err(Error::Usage(format!(
            "expected no file {}, found one; choose another --out, or add --overwrite to replace it",
            args.out.display()
        )));
    }
    let runs: Vec<Run> = folders
        .iter()
        .map(|f| Run::open(f))
        .collect::<Result<_>>()?;
    let comparison = compare(&runs);
    write(&args.out, &runs, &comparison)?;
    if args.json {
        let mut report = serde_json::Value::from(&comparison);
        report["page"] = args.out.display().to_string().into();
        return say_json(&report);
    }
    let numbers: Vec<String> = (1..=runs.len()).map(|i| format!("#{i}")).collect();
    if comparison.differences.is_empty() {
        say("nothing is different between the configurations of these runs")?;
    } else {
        let header = ["setting"]
            .into_iter()
            .chain(numbers.iter().map(String::as_str));
        let rows = comparison
            .differences
            .iter()
            .map(|Difference { key, values }| {
                let values = values.iter().map(|value| cell(value, CELL));
                [key.clone()].into_iter().chain(values).collect()
            });
        say(&table(&header.collect::<Vec<_>>(), rows, usize::MAX))?;
    }
    let rows = comparison.runs.iter().zip(&numbers).map(|(run, number)| {
        let [epochs, accuracy, loss, average, _, _, _, time, rate] = figures(run);
        let mut row = vec![
            format!("{number} {}", run.name),
            epochs,
            accuracy,
            loss,
            time,
            rate,
        ];
        if comparison
            .runs
            .iter()
            .any(|run| run.average_test_accuracy.is_some())
        {
            row.insert(3, average);
        }
        row
    });
    let rows: Vec<Vec<String>> = rows.collect();
    let mut header = vec![
        "run",
        "epochs",
        "test accuracy",
        "test loss",
        "time",
        "images/s",
    ];
    if rows.first().is_some_and(|row| row.len() > header.len()) {
        header.insert(3, "of the average");
    }
    say(&table(&header, rows, 1))?;
    if comparison.mean.is_some() {
        say_wrapped(&format!("mean     {}", comparison.mean_line()))?;
    }
    for note in &comparison.notes {
        say_wrapped(&format!("note     {note}"))?;
    }
    say(&format!("page     {}", args.out.display()))
}
