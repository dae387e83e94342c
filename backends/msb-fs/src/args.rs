//! The command line: what was typed, and what follows from it.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{ArgGroup, Parser, ValueEnum};
use msb_vhost::jail::{SandboxMode, UnknownMode};
use tracing::level_filters::LevelFilter;

use crate::device::TAG_LEN;
use crate::tree::{Caching, Ownership, Rules, Source, StatVirt};

/// Serves a host directory or file to a virtual machine over vhost-user-fs.
#[derive(Debug, Parser)]
#[command(name = "msb-fs", version, about)]
#[command(group = ArgGroup::new("endpoint").args(["socket_path", "fd", "print_capabilities"]).required(true))]
#[command(after_help = "Exit status: 0 ended by the front end or a signal, \
    1 source refused or socket failed, 2 wrong flags.")]
pub struct Args {
    /// Listen on this Unix socket.
    #[arg(long, value_name = "PATH", alias = "socket")]
    pub socket_path: Option<PathBuf>,

    /// Use this inherited listening socket.
    #[arg(long, value_name = "N")]
    pub fd: Option<RawFd>,

    /// Serve this directory.
    #[arg(long, value_name = "DIR")]
    pub shared_dir: Option<PathBuf>,

    /// Serve this regular file, as the only entry of an otherwise empty directory.
    #[arg(long, value_name = "FILE", conflicts_with = "shared_dir")]
    pub shared_file: Option<PathBuf>,

    /// Name by which the guest mounts it, 1 to 36 bytes.
    #[arg(long, value_name = "TAG", default_value = "msb", value_parser = tag)]
    pub tag: [u8; TAG_LEN],

    /// Refuse every change.
    #[arg(long)]
    pub readonly: bool,

    /// How ownership and modes in the guest are kept apart from those of the host.
    #[arg(long, value_enum, default_value_t = StatVirtArg::Strict)]
    pub stat_virt: StatVirtArg,

    /// Whether the host's files keep 0600 and 0700, or get the guest's permission bits as well.
    #[arg(long, value_enum, default_value_t = HostPermsArg::Private)]
    pub host_perms: HostPermsArg,

    /// Owner shown for files of the user who runs this program.
    #[arg(long, value_name = "UID:GID", default_value = "0:0", value_parser = owner)]
    pub default_owner: (u32, u32),

    /// Owner shown for all files that have no override.
    #[arg(long, value_name = "UID:GID", value_parser = owner)]
    pub owner: Option<(u32, u32)>,

    /// What the guest may remember without asking again.
    #[arg(long, value_enum)]
    pub cache: Option<CacheArg>,

    /// Nobody but this guest changes the files while they are served.
    #[arg(long)]
    pub exclusive: bool,

    /// Let the guest collect writes in its page cache.
    #[arg(long)]
    pub writeback: bool,

    /// Announce host mount points to the guest, which then mounts them as well.
    #[arg(long, overrides_with = "no_announce_submounts")]
    pub announce_submounts: bool,

    /// Undoes --announce-submounts.
    #[arg(long)]
    pub no_announce_submounts: bool,

    /// Limit of the space used, in bytes. Accepted; not enforced yet.
    #[arg(long, value_name = "BYTES")]
    pub quota: Option<u64>,

    /// Number of request queues.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=63))]
    pub num_request_queues: u16,

    /// Largest size of a queue, a power of two.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = queue_size)]
    pub queue_size: u16,

    /// End when the parent process ends.
    #[arg(long)]
    pub exit_with_parent: bool,

    /// Accept another front end after one has gone.
    #[arg(long)]
    pub reconnect: bool,

    /// How the process locks itself in before it serves: strict (all layers, or it does not
    /// start), best-effort (what the host allows; virtiofsd's `namespace` and `chroot` mean the
    /// same), audit (strict, but system calls that are not expected are only logged by the kernel)
    /// or none.
    #[arg(long, value_name = "MODE", default_value = "best-effort", value_parser = sandbox_mode)]
    pub sandbox: SandboxMode,

    /// off, error, warn, info, debug or trace.
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: LevelFilter,

    /// Print what this program can do as JSON, and end.
    #[arg(long)]
    pub print_capabilities: bool,

    /// Options in the manner of older programs: source=DIR, cache=MODE, announce_submounts,
    /// writeback.
    #[arg(short = 'o', value_name = "LIST", hide = true)]
    pub options: Vec<String>,

    /// Flags of virtiofsd that this program knows and has no use for.
    #[command(flatten)]
    pub ignored: Ignored,
}

/// What virtiofsd's users pass and what changes nothing here.
#[derive(Debug, clap::Args)]
#[allow(missing_docs, reason = "named and described by virtiofsd")]
pub struct Ignored {
    #[arg(long, hide = true)]
    pub socket_group: Option<String>,
    #[arg(long, hide = true)]
    pub thread_pool_size: Option<u32>,
    #[arg(long, hide = true)]
    pub xattr: bool,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub posix_acl: Option<String>,
    #[arg(long, hide = true)]
    pub xattrmap: Option<String>,
    #[arg(long, hide = true)]
    pub seccomp: Option<String>,
    #[arg(long, hide = true)]
    pub inode_file_handles: Option<String>,
    #[arg(long, hide = true)]
    pub allow_mmap: bool,
    #[arg(long, hide = true)]
    pub no_readdirplus: bool,
    #[arg(long, hide = true)]
    pub allow_direct_io: bool,
    #[arg(long, hide = true)]
    pub modcaps: Option<String>,
    #[arg(long, hide = true)]
    pub syslog: bool,
    #[arg(long, hide = true)]
    pub rlimit_nofile: Option<u64>,
    #[arg(short = 'd', hide = true)]
    pub debug: bool,
    #[arg(short = 'f', hide = true)]
    pub foreground: bool,
    #[arg(long, hide = true)]
    pub killpriv_v2: bool,
    #[arg(long, hide = true)]
    pub no_killpriv_v2: bool,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub security_label: Option<String>,
    #[arg(long, hide = true)]
    pub uid_map: Vec<String>,
    #[arg(long, hide = true)]
    pub gid_map: Vec<String>,
    #[arg(long, hide = true)]
    pub translate_uid: Vec<String>,
    #[arg(long, hide = true)]
    pub translate_gid: Vec<String>,
    #[arg(long, hide = true)]
    pub preserve_noatime: bool,
    #[arg(long, hide = true)]
    pub migration_mode: Option<String>,
    #[arg(long, hide = true)]
    pub migration_on_error: Option<String>,
    #[arg(long, hide = true)]
    pub migration_verify_handles: bool,
    #[arg(long, hide = true)]
    pub migration_confirm_paths: bool,
}

/// A mode of stat virtualisation as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StatVirtArg {
    /// Everything is virtual; the host must store extended attributes.
    Strict,
    /// As strict, with real symbolic links, on any host file system.
    Relaxed,
    /// Nothing is virtual.
    Off,
}

/// What happens to the host's permission bits, as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum HostPermsArg {
    /// They let nobody else in.
    Private,
    /// They follow the guest's.
    Mirror,
}

/// A cache mode as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CacheArg {
    /// Nothing is remembered.
    #[value(alias = "none")]
    Never,
    /// A second, and data until the file changes.
    Auto,
    /// Everything.
    Always,
    /// Names and attributes only.
    Metadata,
}

/// What [`Args::print_capabilities`] asks for.
pub const CAPABILITIES: &str = r#"{"type":"fs","features":["separate-options"]}"#;

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
    /// Nobody else changes it.
    pub exclusive: bool,
    /// Its name.
    pub tag: [u8; TAG_LEN],
    /// Number of request queues.
    pub request_queues: u16,
    /// Largest size of a queue.
    pub queue_size: u16,
    /// Whether another front end may follow.
    pub reconnect: bool,
    /// Whether the process ends with its parent.
    pub exit_with_parent: bool,
    /// How the process locks itself in.
    pub sandbox: SandboxMode,
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
}

impl TryFrom<Args> for Config {
    type Error = ArgsError;

    fn try_from(mut args: Args) -> Result<Self, ArgsError> {
        args.apply_options()?;
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
        let mode = match args.stat_virt {
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
                writeback: args.writeback,
                submounts: args.announce_submounts && !args.no_announce_submounts,
            },
            exclusive: args.exclusive,
            sandbox: args.sandbox,
            tag: args.tag,
            request_queues: args.num_request_queues,
            queue_size: args.queue_size,
            reconnect: args.reconnect,
            exit_with_parent: args.exit_with_parent,
        })
    }
}

impl Args {
    /// Takes over what `-o` lists say.
    fn apply_options(&mut self) -> Result<(), ArgsError> {
        for option in self.options.iter().flat_map(|list| list.split(',')) {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            match name {
                "source" => self.shared_dir = Some(value.into()),
                "cache" => {
                    let cache = CacheArg::from_str(value, false);
                    self.cache = Some(cache.map_err(|_| ArgsError::Option(option.to_owned()))?);
                }
                "announce_submounts" => self.announce_submounts = true,
                "writeback" => self.writeback = true,
                "sandbox" | "xattr" | "no_xattr" | "flock" | "no_flock" | "posix_lock"
                | "no_posix_lock" | "allow_direct_io" | "no_writeback" | "modcaps"
                | "log_level" | "timeout" | "" => {}
                _ => return Err(ArgsError::Option(option.to_owned())),
            }
        }
        Ok(())
    }
}

fn tag(text: &str) -> Result<[u8; TAG_LEN], String> {
    let mut tag = [0; TAG_LEN];
    match tag.get_mut(..text.len()) {
        Some(place) if !text.is_empty() => {
            place.copy_from_slice(text.as_bytes());
            Ok(tag)
        }
        _ => Err(format!("must have 1 to {TAG_LEN} bytes")),
    }
}

fn owner(text: &str) -> Result<(u32, u32), String> {
    let (uid, gid) = text.split_once(':').ok_or("must have the form UID:GID")?;
    let number = |text: &str| match text.parse() {
        // The largest number means "no change" to chown(2), and is nobody's.
        Ok(u32::MAX) | Err(_) => Err(format!("{text:?} is not a user or group number")),
        Ok(number) => Ok(number),
    };
    Ok((number(uid)?, number(gid)?))
}

/// Reads a mode of the sandbox, in our words or virtiofsd's.
fn sandbox_mode(text: &str) -> Result<SandboxMode, String> {
    match text {
        "namespace" | "chroot" => Ok(SandboxMode::BestEffort),
        word => word.parse().map_err(|error: UnknownMode| error.to_string()),
    }
}

fn queue_size(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(size) if size.is_power_of_two() && size <= 32768 => Ok(size),
        _ => Err("must be a power of two up to 32768".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(line: &str) -> Result<Config, String> {
        let args = Args::try_parse_from(line.split_whitespace())
            .map_err(|error| error.kind().to_string())?;
        Config::try_from(args).map_err(|error| error.to_string())
    }

    #[test]
    fn command_lines_of_other_programs_are_understood() {
        for line in [
            "msb-fs --fd 3 --shared-dir /x --cache never --sandbox namespace --xattr \
             --thread-pool-size=4 --rlimit-nofile=9 --log-level debug --uid-map=:0:1000:1: \
             --uid-map=:1:100000:9: --gid-map=:0:1000:1: --readonly",
            "msb-fs --syslog --cache=auto --shared-dir=/x --fd=3 --thread-pool-size=1 \
             --announce-submounts",
            "msb-fs --socket-path s --shared-dir /x --cache metadata --thread-pool-size=1 \
             -o announce_submounts",
            "msb-fs --fd=3 -o source=/x,cache=always,sandbox=chroot,xattr,no_flock -d",
            "msb-fs --socket-path=s --shared-dir=/x --posix-acl --security-label \
             --inode-file-handles=never --tag t",
        ] {
            config(line).unwrap();
        }
    }

    #[test]
    fn contradictions_are_refused() {
        assert!(config("msb-fs --fd 3").is_err());
        assert!(config("msb-fs --shared-dir /x").is_err());
        assert!(config("msb-fs --fd 3 --shared-dir /x --shared-file /y").is_err());
        assert!(config("msb-fs --fd 3 --shared-dir /x --tag=").is_err());
        assert!(config("msb-fs --fd 3 --shared-dir /x --owner 1").is_err());
        assert!(config("msb-fs --fd 3 --shared-dir /x --queue-size 3").is_err());
        assert!(config("msb-fs --fd 3 --shared-dir /x --stat-virt off --owner 1:1").is_err());
        let off = "msb-fs --fd 3 --shared-dir /x --stat-virt off --host-perms mirror";
        assert_eq!(config(off).err(), Some(ArgsError::Mirror.to_string()));
    }

    #[test]
    fn exclusive_files_may_be_remembered() {
        let caching = |line| config(line).unwrap().rules.caching;
        assert_eq!(caching("msb-fs --fd 3 --shared-dir /x"), Caching::Auto);
        let exclusive = "msb-fs --fd 3 --shared-dir /x --exclusive";
        assert_eq!(caching(exclusive), Caching::Always);
        let never = "msb-fs --fd 3 --shared-dir /x --exclusive --cache none";
        assert_eq!(caching(never), Caching::Never);
    }
}
