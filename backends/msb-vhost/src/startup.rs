//! What a backend process sets up before anything else: its log and its bond to the parent.

use std::error::Error;
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

/// Ends this process when its parent ends. The parent is the process `expected`, or any if that is
/// zero.
///
/// # Errors
///
/// When the kernel refuses, or the parent has gone already.
pub fn exit_with_parent(expected: u32) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::TERM))?;
    // The parent may have ended before the call: then a reaper has adopted this process, which need
    // not be process 1 (prctl(2), PR_SET_CHILD_SUBREAPER). Only a known parent can be told from it.
    let parent = getppid().map_or(0, |parent| parent.as_raw_pid().unsigned_abs());
    if parent > 1 && (expected == 0 || parent == expected) {
        Ok(())
    } else {
        Err(io::Error::other("the parent process has gone"))
    }
}

/// What an error says, with its reasons behind it.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
