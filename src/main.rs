mod cli;
mod commands;

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::parse().and_then(|command| command.map_or(Ok(()), commands::run)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // Where nobody listens to errors, the exit code has to do.
            let _ = writeln!(std::io::stderr(), "error: {e}");
            ExitCode::from(e.exit_code())
        }
    }
}
