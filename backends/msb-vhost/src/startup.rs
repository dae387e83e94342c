//! What a backend process sets up before anything else: its log and its bond to the parent.

use std::io;

use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use tracing::level_filters::LevelFilter;

/// Sends the log to standard error, from `level` on.
pub fn start_log(level: LevelFilter) {
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .init();
}

/// Ends this process when its parent ends.
///
/// # Errors
///
/// When the kernel refuses, or the parent has gone already.
pub fn exit_with_parent() -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::TERM))?;
    // The parent may have ended before the call: then a reaper has adopted this process.
    match getppid() {
        Some(parent) if parent.as_raw_pid() != 1 => Ok(()),
        _ => Err(io::Error::other("the parent process has gone")),
    }
}
