//! One function per verb: what was typed becomes a call of the library, its result text.

mod volume;

use std::env;
use std::path::PathBuf;
use std::process::ExitCode;

use microsandbox::{Error, ErrorKind};
use tokio::runtime::Builder;

use crate::args::{Cli, Command};
use crate::{machine, output};

/// Carries out a command line; whatever goes wrong is told on standard error.
pub(crate) fn run(cli: Cli) -> ExitCode {
    let done = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Error::io("cannot start the event loop", error))
        .and_then(|events| events.block_on(dispatch(cli.command)));
    done.unwrap_or_else(|error| {
        output::error(&error);
        ExitCode::FAILURE
    })
}

async fn dispatch(command: Command) -> Result<ExitCode, Error> {
    match command {
        Command::Volume(command) => volume::volume(command).await,
        Command::Plan(flags) => machine::plan(&flags),
        Command::Doctor(format) => machine::doctor(format),
        Command::Completion { shell } => machine::completion(shell),
        // Verbs whose module is still to come.
        other => Err(Error::new(
            ErrorKind::Unsupported,
            format!("not there yet: {other:?}"),
        )),
    }
}

/// The folder that relative host paths are taken from.
pub(crate) fn current_dir() -> Result<PathBuf, Error> {
    env::current_dir().map_err(|error| Error::io("cannot find the current directory", error))
}
