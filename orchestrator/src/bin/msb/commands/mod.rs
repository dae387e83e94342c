//! One function per verb: what was typed becomes a call of the library, its result text.

mod copy;
mod exec;
mod image;
mod lifecycle;
mod list;
mod logs;
mod run;
mod usage;
mod volume;

use std::env;
use std::path::PathBuf;
use std::process::ExitCode;

use microsandbox::supervisor::{become_tied, supervise};
use microsandbox::vmm::{Reach, become_machine, probe};
use microsandbox::{Error, ErrorKind};
use tokio::runtime::Builder;
use tracing::level_filters::LevelFilter;

pub(crate) use list::mount_line;

use crate::args::{Cli, Command, Krun, Tied};
use crate::{machine, mounts, output};

/// Carries out a command line; whatever goes wrong is told on standard error.
pub(crate) fn run(cli: Cli) -> ExitCode {
    start_log(&cli);
    let done = match cli.command {
        // These three are whole processes of their own, on their main thread.
        Command::Supervise(args) => supervise(&args.folder).map(|()| ExitCode::SUCCESS),
        Command::Tied(args) => tied(args),
        Command::Krun(args) => krun(&args).map(|()| ExitCode::SUCCESS),
        command => in_event_loop(command),
    };
    done.unwrap_or_else(|error| {
        output::error(&error);
        ExitCode::FAILURE
    })
}

/// What happens is told on standard error, which of a supervisor is its log.
fn start_log(cli: &Cli) {
    let supervises = matches!(cli.command, Command::Supervise(_));
    let level = match &cli.log {
        log if log.trace => LevelFilter::TRACE,
        log if log.debug => LevelFilter::DEBUG,
        log if log.info || supervises => LevelFilter::INFO,
        log if log.error => LevelFilter::ERROR,
        _ => LevelFilter::WARN,
    };
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false);
    if supervises {
        log.init();
    } else {
        log.without_time().init();
    }
}

fn tied(args: Tied) -> Result<ExitCode, Error> {
    let reach = args.confined.then_some(Reach {
        read: args.read,
        write: args.write,
    });
    become_tied(args.parent, reach.as_ref(), &args.argv).map(|()| ExitCode::SUCCESS)
}

fn krun(args: &Krun) -> Result<(), Error> {
    match (&args.probe, &args.machine) {
        (Some(library), _) => probe(library),
        (None, machine) => become_machine(machine.as_deref().unwrap_or_default()),
    }
}

fn in_event_loop(command: Command) -> Result<ExitCode, Error> {
    let events = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Error::io("cannot start the event loop", error))?;
    let done = events.block_on(dispatch(command));
    // Output that nobody reads any more is not waited for.
    events.shutdown_background();
    done
}

async fn dispatch(command: Command) -> Result<ExitCode, Error> {
    match command {
        Command::Run(args) => run::run(&args).await,
        Command::Create(args) => run::create(&args).await,
        Command::Start(args) => lifecycle::start(&args).await,
        Command::Stop(args) => lifecycle::stop(&args).await,
        Command::Restart(args) => lifecycle::restart(&args).await,
        Command::Rm(args) => lifecycle::rm(&args).await,
        Command::Cp(args) => copy::cp(&args).await,
        Command::Df(args) => usage::df(&args),
        Command::Exec(args) => exec::exec(&args).await,
        Command::Ls(args) => list::ls(&args),
        Command::Ps(args) => list::ps(&args),
        Command::Inspect(args) => list::inspect(&args),
        Command::Logs(args) => logs::logs(&args).await,
        Command::Image(command) => image::image(&command),
        Command::Mount(command) => mounts::mount(&command).await,
        Command::Volume(command) => volume::volume(command).await,
        Command::Plan(flags) => machine::plan(&flags),
        Command::Doctor(format) => machine::doctor(format),
        Command::Completion { shell } => machine::completion(shell),
        Command::Man { folder } => machine::man(folder.as_deref()),
        Command::Supervise(_) | Command::Tied(_) | Command::Krun(_) => Err(Error::new(
            ErrorKind::Unsupported,
            "this verb is a process of its own",
        )),
    }
}

/// A command's exit code as this program's own.
pub(crate) fn exit_code(code: i32) -> ExitCode {
    u8::try_from(code & 0xff).map_or(ExitCode::FAILURE, ExitCode::from)
}

/// The folder that relative host paths are taken from.
pub(crate) fn current_dir() -> Result<PathBuf, Error> {
    env::current_dir().map_err(|error| Error::io("cannot find the current directory", error))
}
