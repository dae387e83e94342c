//! What follows from the flags: one configuration, checked.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use msb_vhost::jail::SandboxMode;

use super::{Args, CacheArg, HostPermsArg, LocksArg, StatVirtArg};
use crate::device::TAG_LEN;
use crate::tree::{Caching, Ownership, Rules, Source, StatVirt};

/// Where the front end comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Socket {
    /// It connects to this path.
    Path(PathBuf),
    /// It connects to this inherited socket.
    Descriptor(RawFd),
}

/// What follows from the flags.
#[derive(Debug)]
pub struct Config {
    /// Where the front end comes from.
    pub socket: Socket,
    /// What is served.
    pub source: Source,
    /// How it is served.
    pub rules: Rules,
    /// Limit of its space, and the file that accounts for it.
    pub quota: Option<Quota>,
    /// Its name.
    pub tag: [u8; TAG_LEN],
    /// Limit of open files, when it is not to be raised.
    pub open_files: Option<u64>,
    /// Number of request queues.
    pub request_queues: u16,
    /// Largest size of a queue.
    pub queue_size: u16,
    /// Whether another front end may follow.
    pub reconnect: bool,
    /// How long a queue looks for requests before it sleeps.
    pub poll_limit: Duration,
    /// The parent that the process ends with; zero stands for whichever it has.
    pub exit_with_parent: Option<u32>,
    /// How the process locks itself in.
    pub sandbox: SandboxMode,
    /// Group that may connect.
    pub socket_group: Option<String>,
    /// What was asked for and is not done, as whole sentences.
    pub remarks: Vec<&'static str>,
}

/// A limit of space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quota {
    /// So many bytes.
    pub bytes: u64,
    /// Account that all servers of the directory share.
    pub file: Option<PathBuf>,
}

/// Flags that do not go together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArgsError {
    /// Nothing to serve.
    #[error("one of --shared-dir and --shared-file is required")]
    Source,
    /// Nowhere to listen.
    #[error("one of --socket-path and --fd is required")]
    Socket,
    /// Without virtualisation the host has the guest's permission bits anyway.
    #[error("--host-perms mirror needs --stat-virt strict or relaxed")]
    Mirror,
    /// Without virtualisation the owners are those of the host.
    #[error("--owner needs --stat-virt strict or relaxed")]
    Owner,
    /// An option of `-o` that nobody knows.
    #[error("unknown option {0:?} after -o")]
    Option(String),
    /// A file that the host replaces has no account of its own.
    #[error("--quota needs --shared-dir")]
    QuotaOfFile,
}

impl TryFrom<Args> for Config {
    type Error = ArgsError;

    fn try_from(mut args: Args) -> Result<Self, ArgsError> {
        args.apply_options()?;
        let remarks = args.remarks();
        let socket = match (args.socket_path, args.fd) {
            (Some(path), _) => Socket::Path(path),
            (None, Some(fd)) => Socket::Descriptor(fd),
            (None, None) => return Err(ArgsError::Socket),
        };
        let source = match (args.shared_dir, args.shared_file) {
            (Some(path), _) => Source::Directory(path),
            (None, Some(path)) => Source::File(path),
            (None, None) => return Err(ArgsError::Source),
        };
        let mode = match args.stat_virt.unwrap_or(StatVirtArg::Strict) {
            StatVirtArg::Strict => StatVirt::Strict,
            StatVirtArg::Relaxed => StatVirt::Relaxed,
            StatVirtArg::Off => StatVirt::Off,
        };
        let mirror = args.host_perms == HostPermsArg::Mirror;
        if mode == StatVirt::Off && mirror {
            return Err(ArgsError::Mirror);
        }
        if mode == StatVirt::Off && args.owner.is_some() {
            return Err(ArgsError::Owner);
        }
        let quota = args.quota.map(|bytes| Quota {
            bytes,
            file: args.quota_file,
        });
        if quota.is_some() && matches!(source, Source::File(_)) {
            return Err(ArgsError::QuotaOfFile);
        }
        let caching = match args.cache {
            Some(CacheArg::Never) => Caching::Never,
            Some(CacheArg::Metadata) => Caching::Metadata,
            Some(CacheArg::Always) => Caching::Always,
            Some(CacheArg::Auto) => Caching::Auto,
            None if args.exclusive => Caching::Always,
            None => Caching::Auto,
        };
        Ok(Self {
            socket,
            source,
            rules: Rules {
                readonly: args.readonly,
                ownership: Ownership {
                    mode,
                    mirror,
                    default_owner: args.default_owner,
                    owner: args.owner,
                },
                caching,
                exclusive: args.exclusive,
                writeback: args.writeback,
                submounts: !args.no_announce_submounts,
                lists: args.posix_acl == Some(true),
                locks: args.locks == LocksArg::Host,
            },
            quota,
            sandbox: args.sandbox,
            tag: args.tag,
            open_files: args.rlimit_nofile,
            request_queues: args.num_request_queues,
            queue_size: args.queue_size,
            reconnect: args.reconnect,
            poll_limit: Duration::from_micros(args.poll_max_us),
            exit_with_parent: args.exit_with_parent,
            socket_group: args.socket_group,
            remarks,
        })
    }
}
