//! `msb run` and `msb create`: a new sandbox, in the foreground or left running.

use std::process::ExitCode;
use std::time::Duration;

use microsandbox::rundir::Home;
use microsandbox::spec::SandboxSpec;
use microsandbox::{Error, ErrorKind, ExecOptions, Launch, Sandbox};

use crate::args::{Create, Run};
use crate::attach::{self, Joined};
use crate::output;
use crate::progress::Progress;

/// `msb create`.
pub(super) async fn create(args: &Create) -> Result<ExitCode, Error> {
    let mut spec = args.sandbox.spec(&super::current_dir()?)?;
    spec.ephemeral = false;
    let sandbox = launch(spec, args.replace.limit(), false, args.quiet).await?;
    if !args.quiet {
        output::print(&format!("{}\n", sandbox.name()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// `msb run`.
pub(super) async fn run(args: &Run) -> Result<ExitCode, Error> {
    let mut spec = args.sandbox.spec(&super::current_dir()?)?;
    spec.ephemeral &= !args.detach;
    let sandbox = launch(spec, args.replace.limit(), !args.detach, args.quiet).await?;
    let argv = sandbox.main_command(&args.command);
    let terminal = !args.detach && attach::wants_terminal(args.tty, args.no_tty);
    let options = options(argv, terminal)?;
    if args.detach {
        if !args.quiet {
            output::print(&format!("{}\n", sandbox.name()))?;
        }
        if args.command.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        let (Joined::Ended(code) | Joined::Interrupted(code)) =
            attach::leave(sandbox.exec_with(options)?).await?;
        return Ok(super::exit_code(code));
    }
    let joined = attach::join(sandbox.exec_with(options)?, terminal, true).await;
    // Whatever became of the command, nothing of the sandbox is to be left running.
    match joined {
        Ok(Joined::Ended(code) | Joined::Interrupted(code)) => {
            sandbox.stop().await?;
            Ok(super::exit_code(code))
        }
        Err(error) => {
            let _ = sandbox.stop().await;
            Err(error)
        }
    }
}

/// A command as it was typed, on a terminal of this program's size.
pub(super) fn options(argv: Vec<String>, terminal: bool) -> Result<ExecOptions, Error> {
    let mut argv = argv.into_iter();
    let program = argv
        .next()
        .ok_or_else(|| Error::new(ErrorKind::InvalidConfig, "no command is given"))?;
    let mut options = ExecOptions::new(program).args(argv);
    if terminal {
        let (rows, cols) = attach::terminal_size();
        options = options.terminal(rows, cols);
        if let Ok(kind) = std::env::var("TERM") {
            options = options.env("TERM", kind);
        }
    }
    Ok(options)
}

async fn launch(
    spec: SandboxSpec,
    replace: Option<Duration>,
    attached: bool,
    quiet: bool,
) -> Result<Sandbox, Error> {
    let home = Home::from_env()?;
    if replace.is_some() && home.sandbox(&spec.name).spec_path().exists() {
        super::lifecycle::remove(&home, spec.name.as_str(), replace, quiet).await?;
    }
    let progress = Progress::new(quiet);
    let tell = |step: &str| progress.step(step);
    Sandbox::launch(
        &home,
        spec,
        Launch {
            attached,
            progress: &tell,
        },
    )
    .await
}
