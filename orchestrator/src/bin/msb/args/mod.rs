//! The command line as it was typed: every verb and its flags.

mod conf;
mod filter;
mod limit;
mod logs;
mod mount;
mod sandbox;
mod volume;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

pub(crate) use filter::{SandboxFilter, VolumeFilter, passes};
pub(crate) use logs::{LogSource, Logs};
pub(crate) use mount::{MountAdd, MountCommand, MountList, MountRemove};
pub(crate) use sandbox::{
    Create, Exec, ImageCommand, Inspect, Krun, Processes, Remove, Restart, Run, SandboxFlags,
    Sandboxes, Selection, Start, Stop, Supervise, Tied,
};
pub(crate) use volume::{VolumeCommand, VolumeCreate, VolumeInspect, VolumeList, VolumePrune};

/// Runs sandboxes in microVMs and gives them storage.
#[derive(Debug, Parser)]
#[command(name = "msb", version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) log: LogFlags,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How much is said about what is being done, on standard error.
#[derive(Debug, Args)]
#[group(multiple = false)]
#[command(next_help_heading = "Logging")]
pub(crate) struct LogFlags {
    /// Log errors only
    #[arg(long, global = true)]
    pub(crate) error: bool,
    /// Log what may be wrong; this is the default
    #[arg(long, global = true)]
    pub(crate) warn: bool,
    /// Log life-cycle events
    #[arg(long, global = true)]
    pub(crate) info: bool,
    /// Log what helps to find a fault
    #[arg(long, global = true)]
    pub(crate) debug: bool,
    /// Log everything
    #[arg(long, global = true)]
    pub(crate) trace: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command in a new sandbox and pass on its exit code
    Run(Box<Run>),
    /// Create a sandbox and leave it running
    Create(Box<Create>),
    /// Start stopped sandboxes
    Start(Start),
    /// Stop running sandboxes
    Stop(Stop),
    /// Stop sandboxes and start them again
    Restart(Restart),
    /// Run a command in a sandbox and pass on its exit code
    Exec(Exec),
    /// List sandboxes
    #[command(visible_alias = "list")]
    Ls(Sandboxes),
    /// List running sandboxes with what they use
    #[command(visible_alias = "status")]
    Ps(Processes),
    /// Show everything about a sandbox
    Inspect(Inspect),
    /// Show what a sandbox has printed
    Logs(Logs),
    /// Copy files and directories between the host and a running sandbox
    Cp(Copy),
    /// Remove sandboxes
    #[command(visible_alias = "remove")]
    Rm(Remove),
    /// Show what sandboxes, volumes and images take of the disk
    Df(DiskUsage),
    /// Look for what is missing on this machine and say how to get it
    Doctor(Format),
    /// Print what would be done for a sandbox, as JSON, without doing it
    Plan(Box<PlanFlags>),
    /// Manage images
    #[command(subcommand, visible_alias = "images")]
    Image(ImageCommand),
    /// Mount and unmount volumes while a sandbox runs
    #[command(subcommand)]
    Mount(MountCommand),
    /// Manage named volumes
    #[command(subcommand, visible_aliases = ["volumes", "vol", "vols"])]
    Volume(VolumeCommand),
    /// Print a completion script for a shell
    Completion {
        /// The shell
        shell: Shell,
    },
    /// Print the manual page, or write one for each verb into a folder
    Man {
        /// Folder, made when missing
        folder: Option<PathBuf>,
    },
    /// Be the supervisor of one sandbox
    #[command(hide = true)]
    Supervise(Supervise),
    /// Be another program, which ends when its parent does
    #[command(hide = true)]
    Tied(Tied),
    /// Be a VM of libkrun
    #[command(hide = true)]
    Krun(Krun),
}

/// The flags of `msb run`, for a plan only.
#[derive(Debug, Args)]
pub(crate) struct PlanFlags {
    #[command(flatten)]
    pub(crate) sandbox: SandboxFlags,
    /// Command to run
    #[arg(last = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

/// The flags of `msb cp`.
#[derive(Debug, Args)]
pub(crate) struct Copy {
    /// What is copied: a path of the host, or NAME:PATH in a sandbox; `PATH/.` means the content of
    /// a directory
    #[arg(value_name = "SOURCE")]
    pub(crate) from: String,
    /// Where it goes, likewise; into it when it is a directory
    #[arg(value_name = "DEST")]
    pub(crate) to: String,
    /// Print nothing
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// The flags of `msb df`.
#[derive(Debug, Args)]
pub(crate) struct DiskUsage {
    /// Each thing by itself
    #[arg(long)]
    pub(crate) verbose: bool,
    #[command(flatten)]
    pub(crate) format: Format,
}

/// How a result is printed.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Format {
    /// For people (`text`) or for programs (`json`)
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub(crate) format: OutputFormat,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    #[default]
    Text,
    Json,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// What each flag does is tested, and the table of the tests says where.
    #[test]
    fn the_table_of_the_tests_names_every_flag_of_every_verb() {
        let table = include_str!("../../../../../tests/README.md");
        let mut missing = Vec::new();
        let mut waiting = vec![(String::new(), Cli::command())];
        while let Some((above, command)) = waiting.pop() {
            let path = format!("{above}{}", command.get_name());
            let verb = path.trim_start_matches("msb ").to_owned();
            let below = command
                .get_subcommands()
                .filter(|below| !below.is_hide_set());
            waiting.extend(below.map(|below| (format!("{path} "), below.clone())));
            let rows: Vec<&str> = table.lines().filter(|row| names(row, &verb)).collect();
            let flags = command.get_arguments().filter_map(|flag| flag.get_long());
            let flags = flags.filter(|flag| !matches!(*flag, "help" | "version"));
            for flag in flags {
                let flag = format!("--{flag}");
                let named = |row: &&&str| {
                    let mut words = row.split(|c: char| c != '-' && !c.is_ascii_alphanumeric());
                    words.any(|word| word == flag)
                };
                if rows.iter().find(named).is_none() {
                    missing.push(format!("{verb} {flag}"));
                }
            }
        }
        assert!(missing.is_empty(), "{missing:#?}");
    }

    /// Whether the first cell of a row names the verb.
    fn names(row: &str, verb: &str) -> bool {
        let cell = row.split('|').nth(1).unwrap_or_default();
        cell.split('`').any(|word| word == verb)
    }
}
