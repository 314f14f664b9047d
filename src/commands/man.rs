//! `wgrad man`: manual pages, from what `--help` says.

use super::{say, say_wrapped};
use crate::cli::{self, ManArgs};
use clap_mangen::{Man, generate_to};
use std::path::Path;
use wgrad::{Error, Result};

pub fn run(args: &ManArgs) -> Result<()> {
    let Some(folder) = &args.folder else {
        let mut page = Vec::new();
        let rendered = Man::new(cli::command()).render(&mut page);
        rendered.map_err(|e| Error::io("write", Path::new("standard output"), e))?;
        return say(String::from_utf8_lossy(&page).trim_end());
    };
    std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    generate_to(cli::command(), folder).map_err(|e| Error::io("write", folder, e))?;
    say_wrapped(&format!(
        "pages    {0}; read one by man {0}/wgrad-train.1",
        folder.display()
    ))
}
