//! `wgrad man`: manual pages, from what `--help` says.

use super::{say, say_wrapped};
use crate::cli::{self, ManArgs};
use clap_mangen::Man;
use std::path::Path;
use wgrad::{Error, Result};

pub fn run(args: &ManArgs) -> Result<()> {
    let mut command = cli::command().disable_help_subcommand(true);
    // Gives the commands their whole names.
    command.build();
    let Some(folder) = &args.folder else {
        return say(page(&Man::new(command))?.trim_end());
    };
    std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    let all: Vec<clap::Command> = command.get_subcommands().cloned().collect();
    for command in all.into_iter().chain([command]) {
        let man = Man::new(command);
        let path = folder.join(man.get_filename());
        std::fs::write(&path, page(&man)?).map_err(|e| Error::io("write", &path, e))?;
    }
    say_wrapped(&format!(
        "pages    {0}; read one by man {0}/wgrad-train.1",
        folder.display()
    ))
}

/// A page in ASCII, which every program that formats one reads.
fn page(man: &Man) -> Result<String> {
    let mut bytes = Vec::new();
    let rendered = man.render(&mut bytes);
    rendered.map_err(|e| Error::io("write", Path::new("a manual page"), e))?;
    let text = String::from_utf8_lossy(&bytes);
    let escaped = text.chars().map(|c| match c {
        c if c.is_ascii() => c.to_string(),
        c => format!("\\[u{:04X}]", u32::from(c)),
    });
    Ok(escaped.collect())
}
