//! `msb start`, `stop`, `restart` and `rm`: each for any number of sandboxes.

use std::process::ExitCode;
use std::time::Duration;

use microsandbox::rundir::Home;
use microsandbox::spec::SandboxName;
use microsandbox::{Error, ErrorKind, Launch, Sandbox, mend};

use crate::args::{Remove, Restart, Selection, Start, Stop};
use crate::output;
use crate::progress::Progress;

/// Time for a clean stop when a sandbox is removed by force.
const REMOVE_LIMIT: Duration = Duration::from_secs(10);

/// `msb start`.
pub(super) async fn start(args: &Start) -> Result<ExitCode, Error> {
    let home = Home::from_env()?;
    let mut tally = Tally::new(args.which.quiet);
    for name in select(&home, &args.which)? {
        tally.count(
            "Started",
            &name,
            start_one(&home, &name, args.which.quiet).await,
        );
    }
    Ok(tally.code())
}

/// `msb stop`.
pub(super) async fn stop(args: &Stop) -> Result<ExitCode, Error> {
    let home = Home::from_env()?;
    let mut tally = Tally::new(args.which.quiet);
    let limit = Duration::from_secs(args.timeout);
    for name in select(&home, &args.which)? {
        tally.count(
            "Stopped",
            &name,
            stop_one(&home, &name, args.force, limit, args.which.quiet).await,
        );
    }
    Ok(tally.code())
}

/// `msb restart`.
pub(super) async fn restart(args: &Restart) -> Result<ExitCode, Error> {
    let home = Home::from_env()?;
    let mut tally = Tally::new(args.which.quiet);
    let limit = Duration::from_secs(args.timeout);
    for name in select(&home, &args.which)? {
        let done = match stop_one(&home, &name, false, limit, args.which.quiet).await {
            Err(error) if error.kind() != ErrorKind::SandboxNotRunning => Err(error),
            // One that does not run is started.
            _ => start_one(&home, &name, args.which.quiet).await,
        };
        tally.count("Restarted", &name, done);
    }
    Ok(tally.code())
}

/// `msb rm`.
pub(super) async fn rm(args: &Remove) -> Result<ExitCode, Error> {
    let home = Home::from_env()?;
    let limit = args.force.then_some(REMOVE_LIMIT);
    let mut tally = Tally::new(args.which.quiet);
    for name in select(&home, &args.which)? {
        tally.count(
            "Removed",
            &name,
            remove(&home, &name, limit, args.which.quiet).await,
        );
    }
    Ok(tally.code())
}

/// Removes a sandbox; with a limit for its stop also one that runs.
pub(super) async fn remove(
    home: &Home,
    name: &str,
    limit: Option<Duration>,
    quiet: bool,
) -> Result<(), Error> {
    let name = SandboxName::try_from(name.to_owned())?;
    let dir = home.find_sandbox(&name)?;
    if let Some(limit) = limit
        && dir.is_running()
    {
        // Ended as `stop` ends it, so that volumes keep everything.
        let stopped = stop_one(home, name.as_str(), false, limit, quiet).await;
        if let Err(error) = stopped
            && dir.is_running()
        {
            return Err(error);
        }
    }
    mend(home);
    match dir.remove() {
        // An ephemeral sandbox goes when it stops.
        Err(error) if limit.is_some() && error.kind() == ErrorKind::SandboxNotFound => Ok(()),
        done => done,
    }
}

async fn start_one(home: &Home, name: &str, quiet: bool) -> Result<(), Error> {
    let name = SandboxName::try_from(name.to_owned())?;
    let progress = Progress::new(quiet);
    let tell = |step: &str| progress.step(step);
    let launch = Launch {
        attached: false,
        progress: &tell,
    };
    Sandbox::start(home, &name, launch).await.map(drop)
}

async fn stop_one(
    home: &Home,
    name: &str,
    force: bool,
    limit: Duration,
    quiet: bool,
) -> Result<(), Error> {
    let name = SandboxName::try_from(name.to_owned())?;
    let sandbox = Sandbox::connect(home, &name).await?;
    let progress = Progress::new(quiet);
    progress.step("stopping");
    if force {
        sandbox.kill().await
    } else {
        sandbox.stop_within(limit).await
    }
}

/// The names that were given, and those of sandboxes with all the labels that were given.
fn select(home: &Home, which: &Selection) -> Result<Vec<String>, Error> {
    let mut names = which.names.clone();
    if !which.labels.is_empty() {
        for dir in home.list_sandboxes()? {
            let labels = dir.spec().map(|spec| spec.labels).unwrap_or_default();
            let has = |(key, value): &(String, String)| labels.get(key) == Some(value);
            if which.labels.iter().all(has) {
                names.push(dir.name().to_string());
            }
        }
    }
    names.dedup();
    Ok(names)
}

/// Tells of each result and remembers whether one failed.
struct Tally {
    quiet: bool,
    failed: bool,
}

impl Tally {
    fn new(quiet: bool) -> Self {
        Self {
            quiet,
            failed: false,
        }
    }

    fn count(&mut self, verb: &str, name: &str, result: Result<(), Error>) {
        match result {
            Ok(()) if self.quiet => {}
            Ok(()) => output::done(&format!("{verb} {name}")),
            Err(error) => {
                self.failed = true;
                output::error(&error);
            }
        }
    }

    fn code(&self) -> ExitCode {
        if self.failed {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        }
    }
}
