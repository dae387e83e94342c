//! `msb mount`: volumes that come and go while a sandbox runs.

use std::process::ExitCode;

use microsandbox::rundir::Home;
use microsandbox::spec::SandboxName;
use microsandbox::{Error, ErrorKind, Sandbox, mend};

use crate::args::{MountAdd, MountCommand, MountList, MountRemove, OutputFormat};
use crate::commands::{current_dir, mount_line};
use crate::output;

/// Carries out one of the verbs.
pub(crate) async fn mount(command: &MountCommand) -> Result<ExitCode, Error> {
    match command {
        MountCommand::Add(args) => add(args).await,
        MountCommand::Rm(args) => rm(args).await,
        MountCommand::Ls(args) => ls(args),
    }
}

async fn add(args: &MountAdd) -> Result<ExitCode, Error> {
    let mut mounts = args.mounts.specs(&current_dir()?)?;
    if mounts.is_empty() {
        return Err(
            Error::new(ErrorKind::InvalidConfig, "no volume is given").with_hint(format!(
                "write it as for `msb run`: msb mount add {} -v ./dir:/data",
                args.name
            )),
        );
    }
    // What lies below another is mounted after it.
    mounts.sort_by_key(|mount| mount.target.depth());
    let sandbox = connect(&args.name).await?;
    for mount in mounts {
        let target = mount.target.clone();
        sandbox.add_mount(mount).await?;
        if !args.quiet {
            output::done(&format!("Mounted {target}"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn rm(args: &MountRemove) -> Result<ExitCode, Error> {
    let sandbox = connect(&args.name).await?;
    for path in &args.paths {
        sandbox.unmount(path, args.force).await?;
        if !args.quiet {
            output::done(&format!("Unmounted {path}"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn ls(args: &MountList) -> Result<ExitCode, Error> {
    let name = SandboxName::try_from(args.name.clone())?;
    let mounts = Home::from_env()?.find_sandbox(&name)?.spec()?.mounts;
    if !args.quiet && args.format.format == OutputFormat::Json {
        output::json(&mounts)?;
        return Ok(ExitCode::SUCCESS);
    }
    for mount in &mounts {
        let line = if args.quiet {
            mount.target.to_string()
        } else {
            mount_line(mount)
        };
        output::print(&format!("{line}\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn connect(name: &str) -> Result<Sandbox, Error> {
    let home = Home::from_env()?;
    mend(&home);
    Sandbox::connect(&home, &SandboxName::try_from(name.to_owned())?).await
}
