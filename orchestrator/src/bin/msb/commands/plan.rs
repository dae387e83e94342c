//! `msb plan`: what would be done for a sandbox, without doing it.

use std::process::ExitCode;

use microsandbox::Error;
use microsandbox::host::HostFacts;
use microsandbox::plan::Plan;
use microsandbox::rundir::Home;

use crate::args::PlanFlags;
use crate::output;

use super::current_dir;

/// Prints the plan as JSON.
pub(crate) fn plan(flags: &PlanFlags) -> Result<ExitCode, Error> {
    let spec = flags.sandbox.spec(&current_dir()?)?;
    let facts = HostFacts::read(&spec, &Home::locate()?)?;
    let plan = Plan::decide(&spec, &facts)?;
    output::json(&plan)?;
    Ok(ExitCode::SUCCESS)
}
