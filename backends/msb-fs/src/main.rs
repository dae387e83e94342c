//! Reads the flags, opens what they name, and serves it.

#![forbid(unsafe_code)]

use std::error::Error;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::Arc;

use clap::CommandFactory;
use clap::error::ErrorKind;
use msb_fs::args::{Args, CAPABILITIES, Config, Socket};
use msb_fs::device::FsDevice;
use msb_fs::quota::Account;
use msb_fs::sandbox;
use msb_fs::session::Session;
use msb_fs::socket::{self, PidFile};
use msb_fs::tree::Tree;
use msb_vhost::jail;
use msb_vhost::{Endpoint, Options, chain};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// With fewer descriptors nothing can be served.
const FEWEST_FILES: u64 = 128;
/// Descriptors for which there is room from the start: 128 KiB in the kernel.
const ROOM_FOR_FILES: u64 = 1 << 14;
/// Limit of descriptors where the host sets none.
const OPEN_FILES: u64 = 1 << 20;

fn main() -> ExitCode {
    let args = match Args::of_process() {
        Ok(args) => args,
        Err(error) => {
            error.print().ok();
            return if error.use_stderr() {
                ExitCode::from(2)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    if args.print_capabilities {
        writeln!(std::io::stdout(), "{CAPABILITIES}").ok();
        return ExitCode::SUCCESS;
    }
    msb_vhost::start_log(args.log_level());
    let config = match Config::try_from(args) {
        Ok(config) => config,
        Err(error) => {
            let mut command = Args::command();
            command
                .error(ErrorKind::ArgumentConflict, error)
                .print()
                .ok();
            return ExitCode::from(2);
        }
    };
    match run(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            writeln!(std::io::stderr(), "msb-fs: {}", chain(&*error)).ok();
            ExitCode::FAILURE
        }
    }
}

fn run(config: &Config) -> Result<(), Box<dyn Error>> {
    if let Some(parent) = config.exit_with_parent {
        msb_vhost::exit_with_parent(parent)?;
    }
    for remark in &config.remarks {
        tracing::warn!("{remark}");
    }
    set_limits(config.open_files);
    let tree = Tree::new(&config.source, config.rules)?;
    let (endpoint, _pid_file) = match &config.socket {
        Socket::Path(path) => {
            let pid_file = PidFile::beside(path)?;
            let endpoint = Endpoint::bind(path)?;
            if let Some(group) = &config.socket_group {
                socket::open_to_group(path, group)?;
            }
            (endpoint, Some(pid_file))
        }
        Socket::Descriptor(fd) => (Endpoint::from_fd(*fd)?, None),
    };
    let account = match &config.quota {
        Some(quota) if !config.rules.readonly => Some(
            Account::open(quota.file.as_deref(), quota.bytes, tree.place()?)
                .map_err(|source| QuotaError { source })?,
        ),
        _ => None,
    };
    let place = tree.place()?;
    let rules = *tree.rules();
    let jail = sandbox::jail(
        config.sandbox,
        place,
        rules.readonly,
        rules.ownership.mode,
        tree.owner()?,
        getrlimit(Resource::Nofile).current.unwrap_or(OPEN_FILES),
    );
    let mut report = jail::enter(jail)?;
    let (Some(share), Some(descriptors)) = (report.share.take(), report.descriptors.take()) else {
        return Err("the share was lost on the way into the sandbox".into());
    };
    make_room_for_descriptors(&share);
    let mut tree = tree.settle(share, descriptors)?;
    let limited = account.is_some();
    if let Some(account) = account {
        tree = tree.limited(account)?;
    }
    report.seal(&sandbox::calls(&rules, limited))?;
    for missing in &report.missing {
        tracing::warn!("{}", chain(missing));
    }
    let session = Session::new(tree);
    let device = FsDevice::new(
        session,
        config.tag,
        config.request_queues,
        config.queue_size,
    );
    let options = Options {
        name: "msb-fs",
        reconnect: config.reconnect,
        poll_limit: config.poll_limit,
    };
    // Kata Containers waits for exactly these words.
    tracing::info!("Waiting for vhost-user socket connection");
    msb_vhost::serve(&endpoint, &Arc::new(device), options)?;
    Ok(())
}

/// The account of the quota cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the account of --quota")]
struct QuotaError {
    source: std::io::Error,
}

/// Makes the kernel's table of descriptors large while there is one thread. With more it waits,
/// each time that the table doubles, until no CPU looks at the old one any more: 10 to 30 ms in
/// which the queue that has opened a file stands still.
fn make_room_for_descriptors(any: impl AsFd) {
    let limit = getrlimit(Resource::Nofile).current;
    let wanted = limit.map_or(ROOM_FOR_FILES, |limit| limit.min(ROOM_FOR_FILES));
    if let Some(last) = wanted
        .checked_sub(1)
        .and_then(|last| i32::try_from(last).ok())
    {
        // The highest number there is room for; closed at once. Without it, all works but slower.
        rustix::io::fcntl_dupfd_cloexec(any, last).ok();
    }
}

/// Sets how many descriptors the process may hold, and gives new files
/// the modes that they are created with.
fn set_limits(wanted: Option<u64>) {
    let limit = getrlimit(Resource::Nofile);
    let current = match wanted {
        Some(0) => limit.current,
        Some(wanted) => {
            let wanted = wanted.max(FEWEST_FILES);
            Some(limit.maximum.map_or(wanted, |most| wanted.min(most)))
        }
        None => limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current, ..limit }) {
        tracing::warn!(%error, "cannot set the limit of open files");
    }
    rustix::process::umask(rustix::fs::Mode::empty());
}
