//! later
use crate::cli::ServeArgs;
pub fn run(_: &ServeArgs) -> wgrad::Result<()> {
    Ok(())
}
