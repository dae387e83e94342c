//! `msb exec`: a command in a sandbox; one that does not run is started first.

use std::process::ExitCode;
use std::time::Duration;

use microsandbox::rundir::Home;
use microsandbox::spec::SandboxName;
use microsandbox::{Error, ErrorKind, Launch, Sandbox};

use crate::args::Exec;
use crate::attach::{self, Joined};
use crate::output;
use crate::progress::Progress;

/// Exit code of a command that took too long, as timeout(1) gives it.
const TIMED_OUT: i32 = 124;

/// `msb exec`.
pub(super) async fn exec(args: &Exec) -> Result<ExitCode, Error> {
    let home = Home::from_env()?;
    let name = SandboxName::try_from(args.name.clone())?;
    let sandbox = match Sandbox::connect(&home, &name).await {
        Err(error) if error.kind() == ErrorKind::SandboxNotRunning => {
            let progress = Progress::new(args.quiet);
            let tell = |step: &str| progress.step(step);
            Sandbox::start(
                &home,
                &name,
                Launch {
                    attached: false,
                    progress: &tell,
                },
            )
            .await?
        }
        connected => connected?,
    };
    let terminal = !args.detach && attach::wants_terminal(args.tty, args.no_tty);
    let mut options = super::run::options(args.command.clone(), terminal)?;
    let process = args.process.spec()?;
    for (name, value) in process.env {
        options = options.env(name, value);
    }
    if let Some(folder) = process.workdir {
        options = options.cwd(folder);
    }
    if let Some(user) = process.user {
        options = options.user(user);
    }
    for limit in &args.limits {
        options = options.rlimit(limit.resource, limit.soft, limit.hard);
    }
    if let Some(seconds) = args.timeout {
        options = options.timeout(Duration::from_secs(seconds));
    }
    let handle = sandbox.exec_with(options)?;
    let joined = if args.detach {
        attach::leave(handle).await
    } else {
        attach::join(handle, terminal, !args.no_stdin).await
    };
    let joined = match joined {
        Err(error) if error.kind() == ErrorKind::ExecTimeout => {
            output::error(&error);
            Joined::Ended(TIMED_OUT)
        }
        joined => joined?,
    };
    let (Joined::Ended(code) | Joined::Interrupted(code)) = joined;
    Ok(super::exit_code(code))
}
