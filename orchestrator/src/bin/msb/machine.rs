//! Verbs about this machine: what would be done on it, what it lacks, how a shell completes.

use std::io;
use std::path::Path;
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;
use microsandbox::Error;
use microsandbox::host::{Finding, HostFacts, Verdict, examine};
use microsandbox::plan::Plan;
use microsandbox::rundir::Home;

use crate::args::{Cli, Format, OutputFormat, PlanFlags};
use crate::commands::current_dir;
use crate::output;

/// `msb plan`: prints what would be done for a sandbox, without doing it.
pub(crate) fn plan(flags: &PlanFlags) -> Result<ExitCode, Error> {
    let spec = flags.sandbox.spec(&current_dir()?)?;
    let facts = HostFacts::read(&spec, &Home::locate()?)?;
    let plan = Plan::decide(&spec, &facts)?;
    output::json(&plan)?;
    Ok(ExitCode::SUCCESS)
}

/// `msb doctor`: what is there and what is missing. Fails when no sandbox can run.
pub(crate) fn doctor(format: Format) -> Result<ExitCode, Error> {
    let findings = examine(&Home::from_env()?);
    if format.format == OutputFormat::Json {
        output::json(&findings)?;
    } else {
        output::print(&findings.iter().map(describe).collect::<String>())?;
    }
    let broken = findings
        .iter()
        .any(|finding| finding.verdict == Verdict::Broken);
    Ok(if broken {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn describe(finding: &Finding) -> String {
    let mark = match finding.verdict {
        Verdict::Fine => "✓",
        Verdict::Lacking => "!",
        Verdict::Broken => "✗",
    };
    let remedy = finding
        .remedy
        .as_ref()
        .map(|remedy| format!("  → {remedy}\n"));
    format!(
        "{mark} {:<15}{}\n{}",
        finding.subject,
        finding.detail,
        remedy.unwrap_or_default()
    )
}

/// `msb completion`: prints what a shell needs to complete the command line.
pub(crate) fn completion(shell: Shell) -> Result<ExitCode, Error> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "msb", &mut script);
    let text = String::from_utf8(script)
        .map_err(|error| Error::io("cannot write the script", io::Error::other(error)))?;
    output::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// `msb man`: the manual page of `msb`, or into a folder one for each verb as well.
pub(crate) fn man(folder: Option<&Path>) -> Result<ExitCode, Error> {
    let Some(folder) = folder else {
        let mut page = Vec::new();
        clap_mangen::Man::new(Cli::command())
            .render(&mut page)
            .map_err(|error| Error::io("cannot write the manual page", error))?;
        output::print(&String::from_utf8_lossy(&page))?;
        return Ok(ExitCode::SUCCESS);
    };
    let cannot = |error| Error::io(format!("cannot write to `{}`", folder.display()), error);
    std::fs::create_dir_all(folder).map_err(cannot)?;
    clap_mangen::generate_to(Cli::command(), folder).map_err(cannot)?;
    Ok(ExitCode::SUCCESS)
}
