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
/// Runs that have a column each; of more, each value has a row.
const MOST_COLUMNS: usize = 4;

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
    let differences = &comparison.differences;
    if differences.is_empty() {
        say("nothing is different between the configurations of these runs")?;
    } else if runs.len() <= MOST_COLUMNS {
        let header = ["setting"]
            .into_iter()
            .chain(numbers.iter().map(String::as_str));
        let rows = differences.iter().map(|Difference { key, values }| {
            let values = values.iter().map(|value| cell(value, CELL));
            [key.clone()].into_iter().chain(values).collect()
        });
        say(&table(&header.collect::<Vec<_>>(), rows, usize::MAX))?;
    } else {
        let rows = differences.iter().flat_map(by_value);
        say(&table(&["setting", "value", "runs"], rows, usize::MAX))?;
    }
    let averaged = comparison
        .runs
        .iter()
        .any(|run| run.average_test_accuracy.is_some());
    let rows = comparison.runs.iter().zip(&numbers).map(|(run, number)| {
        let [epochs, accuracy, loss, average, _, _, _, time, rate] = figures(run);
        // As much as 80 columns have room for; the page has all.
        let last = if averaged { average } else { rate };
        let name = format!("{number} {}", run.name);
        vec![name, epochs, accuracy, loss, time, last]
    });
    let last = if averaged { "average" } else { "images/s" };
    let header = ["run", "epochs", "test accuracy", "test loss", "time", last];
    say(&table(&header, rows, 1))?;
    if comparison.mean.is_some() {
        say_wrapped(&format!("mean     {}", comparison.mean_line()))?;
    }
    for note in &comparison.notes {
        say_wrapped(&format!("note     {note}"))?;
    }
    say(&format!("page     {}", args.out.display()))
}

/// A row for each value of a setting, with the runs that have it.
fn by_value(Difference { key, values }: &Difference) -> Vec<Vec<String>> {
    let mut rows: Vec<Vec<String>> = Vec::new();
    for (i, value) in values.iter().enumerate() {
        let (value, number) = (cell(value, CELL), format!("#{}", i + 1));
        match rows.iter_mut().find(|row| row[1] == value) {
            Some(row) => row[2] += &format!(" {number}"),
            None => {
                let key = if rows.is_empty() {
                    key.clone()
                } else {
                    String::new()
                };
                rows.push(vec![key, value, number]);
            }
        }
    }
    rows
}
