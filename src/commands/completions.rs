//! `wgrad completions`: what a shell completes.

use super::say;
use crate::cli::{self, CompletionsArgs};
use clap_complete::generate;
use wgrad::Result;

pub fn run(args: &CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    generate(args.shell, &mut cli::command(), "wgrad", &mut script);
    say(String::from_utf8_lossy(&script).trim_end())
}
