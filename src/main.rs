mod cli;
mod commands;

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    // Mesa's device-selection layer asks the desktop session which GPU is in use, and complains on
    // standard error where there is no session, on a server say. There it has nothing to select.
    if cfg!(target_os = "linux") && std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // SAFETY: nothing else runs yet, so nothing reads the environment at the same time.
        unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
    }
    match cli::parse().and_then(|cli| cli.map_or(Ok(()), commands::run)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // Where nobody listens to errors, the exit code has to do.
            let _ = writeln!(std::io::stderr(), "error: {e}");
            if e.is_device_failure() {
                // A driver that hangs may be at work still, and crash in what it does at a tidy exit.
                signal_hook::low_level::exit(e.exit_code().into());
            }
            ExitCode::from(e.exit_code())
        }
    }
}
