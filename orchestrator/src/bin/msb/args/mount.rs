//! The flags of the verbs that change the mounts of a running sandbox.

use clap::{Args, Subcommand};

use super::Format;
use super::sandbox::MountFlags;

#[derive(Debug, Subcommand)]
pub(crate) enum MountCommand {
    /// Mount volumes, also for the next start; the flags are those of `run`
    Add(MountAdd),
    /// Unmount volumes, also for the next start
    #[command(visible_alias = "remove")]
    Rm(MountRemove),
    /// List the volumes of a sandbox
    #[command(visible_alias = "list")]
    Ls(MountList),
}

#[derive(Debug, Args)]
pub(crate) struct MountAdd {
    /// Name of the sandbox
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) mounts: MountFlags,
    /// Print nothing
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct MountRemove {
    /// Name of the sandbox
    pub(crate) name: String,
    /// Where the volumes are mounted
    #[arg(value_name = "GUEST_PATH", required = true)]
    pub(crate) paths: Vec<String>,
    /// Also while commands use them, which then fail
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Print nothing
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct MountList {
    /// Name of the sandbox
    pub(crate) name: String,
    /// Print guest paths only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) format: Format,
}
