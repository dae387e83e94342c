//! The command line: what was typed, and what follows from it.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Parser, ValueEnum};
use msb_vhost::jail::{SandboxMode, UnknownMode};
use tracing::level_filters::LevelFilter;

use crate::device::TAG_LEN;

mod config;

pub use config::{ArgsError, Config, Quota, Socket};

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

    /// How ownership and modes in the guest are kept apart from those of the host: strict, unless
    /// the program was started under the name virtiofsd, which has always been off.
    #[arg(long, value_enum)]
    pub stat_virt: Option<StatVirtArg>,

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

    /// Announce host mount points to the guest, which then mounts them as well; the default.
    #[arg(long, overrides_with = "no_announce_submounts")]
    pub announce_submounts: bool,

    /// Show host mount points as if they were directories of the share like others.
    #[arg(long)]
    pub no_announce_submounts: bool,

    /// Limit of open files, at least 128; 0 leaves it as it is. Without this it is raised as far as
    /// it goes.
    #[arg(long, value_name = "N")]
    pub rlimit_nofile: Option<u64>,

    /// Limit of the space that the files of the directory take, in bytes or with K, M, G or T.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub quota: Option<u64>,

    /// File that holds the account of the quota, made when absent. All servers of one directory
    /// name the same file; without it this server counts alone.
    #[arg(long, value_name = "PATH", requires = "quota")]
    pub quota_file: Option<PathBuf>,

    /// Who sees the guest's file locks: itself alone, or host and other guests as well.
    #[arg(long, value_enum, default_value_t = LocksArg::Guest)]
    pub locks: LocksArg,

    /// Serve access control lists, and apply default ones to new files.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        value_name = "BOOL")]
    pub posix_acl: Option<bool>,

    /// Group that may connect to the socket.
    #[arg(long, value_name = "GROUP", requires = "socket_path")]
    pub socket_group: Option<String>,

    /// Number of request queues.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=63))]
    pub num_request_queues: u16,

    /// Largest size of a queue, a power of two.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = queue_size)]
    pub queue_size: u16,

    /// End when the parent process ends; with a PID, also when the parent is not that process
    /// any more.
    #[arg(long, value_name = "PID", num_args = 0..=1, require_equals = true, default_missing_value = "0")]
    pub exit_with_parent: Option<u32>,

    /// Accept another front end after one has gone.
    #[arg(long)]
    pub reconnect: bool,

    /// How long a queue whose requests come in quick succession looks for the next one before it
    /// sleeps, in microseconds; 0 never does, and an idle share sleeps in any case.
    #[arg(long, value_name = "US", default_value_t = 10, value_parser = clap::value_parser!(u64).range(..=1000))]
    pub poll_max_us: u64,

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

    /// Tell more: the same as --log-level debug.
    #[arg(short = 'd', hide = true)]
    pub debug: bool,

    /// Options in the manner of older programs: source=DIR, cache=MODE, announce_submounts,
    /// writeback, posix_acl, flock, posix_lock.
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
    pub thread_pool_size: Option<u32>,
    #[arg(long, hide = true)]
    pub xattr: bool,
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

/// A kind of lock keeping as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LocksArg {
    /// The guest's kernel.
    #[value(alias = "none")]
    Guest,
    /// The host's kernel.
    Host,
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

impl Args {
    /// Reads the command line of this process. Under the name virtiofsd, which management programs
    /// know, it does what that program does: owners and modes are the host's.
    ///
    /// # Errors
    ///
    /// What [`Parser::try_parse_from`] reports, help and version included.
    pub fn of_process() -> Result<Self, clap::Error> {
        // Whoever asks for the capabilities gets them, whatever else the line says.
        if std::env::args_os().any(|word| word == "--print-capabilities") {
            return Self::try_parse_from(["msb-fs", "--print-capabilities"]);
        }
        let mut args = Self::try_parse()?;
        let name = std::env::args_os().next().map(PathBuf::from);
        let name = name.as_deref().and_then(Path::file_name);
        if name.is_some_and(|name| name.as_encoded_bytes().starts_with(b"virtiofsd")) {
            args.stat_virt.get_or_insert(StatVirtArg::Off);
        }
        Ok(args)
    }

    /// How much is told.
    pub fn log_level(&self) -> LevelFilter {
        let more = self.debug && self.log_level < LevelFilter::DEBUG;
        if more {
            LevelFilter::DEBUG
        } else {
            self.log_level
        }
    }

    /// Takes over what `-o` lists say.
    fn apply_options(&mut self) -> Result<(), ArgsError> {
        let lists = std::mem::take(&mut self.options);
        for option in lists.iter().flat_map(|list| list.split(',')) {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            let unknown = || ArgsError::Option(option.to_owned());
            match name {
                "source" => self.shared_dir = Some(value.into()),
                "cache" => {
                    self.cache = Some(CacheArg::from_str(value, false).map_err(|_| unknown())?);
                }
                "sandbox" => self.sandbox = sandbox_mode(value).map_err(|_| unknown())?,
                "log_level" => self.log_level = value.parse().map_err(|_| unknown())?,
                "announce_submounts" => self.no_announce_submounts = false,
                "no_announce_submounts" => self.no_announce_submounts = true,
                "writeback" => self.writeback = true,
                "no_writeback" => self.writeback = false,
                "flock" | "posix_lock" => self.locks = LocksArg::Host,
                "posix_acl" => self.posix_acl = Some(true),
                "no_posix_acl" => self.posix_acl = Some(false),
                "xattrmap" => self.ignored.xattrmap = Some(value.to_owned()),
                "no_flock" | "no_posix_lock" | "xattr" | "no_xattr" | "readdirplus"
                | "no_readdirplus" | "allow_direct_io" | "no_allow_direct_io" | "killpriv_v2"
                | "no_killpriv_v2" | "security_label" | "no_security_label" | "modcaps"
                | "rlimit_nofile" | "thread_pool_size" | "timeout" | "" => {}
                _ => return Err(unknown()),
            }
        }
        Ok(())
    }

    /// What changes nothing here although whoever typed it may count on it.
    fn remarks(&self) -> Vec<&'static str> {
        let mut remarks = Vec::new();
        if self.ignored.xattrmap.is_some() {
            remarks.push(
                "--xattrmap is not applied: --stat-virt strict and relaxed keep security.* and \
                 trusted.* below user.msb., off uses the host's names",
            );
        }
        let mapped = [
            &self.ignored.uid_map,
            &self.ignored.gid_map,
            &self.ignored.translate_uid,
            &self.ignored.translate_gid,
        ];
        if mapped.iter().any(|list| !list.is_empty()) && self.stat_virt != Some(StatVirtArg::Off) {
            remarks.push("id maps are not applied: --stat-virt records the guest's owners instead");
        } else if mapped.iter().any(|list| !list.is_empty()) {
            remarks.push("id maps are not applied: the guest sees the host's ids");
        }
        if self.ignored.migration_mode.is_some() {
            remarks.push("--migration-mode is not applied: the share cannot be migrated");
        }
        remarks
    }
}

/// A number of bytes, with one of the letters K, M, G and T for powers of 1024.
fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        Some(b'T' | b't') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let count = digits.parse::<u64>().ok();
    count
        .and_then(|count| count.checked_mul(1 << shift))
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| "must be a number of bytes above zero, or one with K, M, G or T".to_owned())
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
    use crate::tree::Caching;

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
            "msb-fs --socket-path=s -o source=/x,no_readdirplus,posix_acl,log_level=warn -f",
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
    fn what_is_accepted_and_not_done_is_said() {
        let remarks = |line| config(line).unwrap().remarks.len();
        assert_eq!(remarks("msb-fs --fd 3 --shared-dir /x --xattr"), 0);
        assert_eq!(remarks("msb-fs --fd 3 --shared-dir /x --xattrmap=:a:"), 1);
        assert_eq!(remarks("msb-fs --fd 3 -o source=/x,xattrmap=:a:"), 1);
        assert_eq!(
            remarks("msb-fs --fd 3 --shared-dir /x --uid-map=:0:1:1:"),
            1
        );
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("3G"), Ok(3 << 30));
        assert_eq!(size("20m"), Ok(20 << 20));
        for bad in ["", "0", "G", "-1", "1.5G", "99999999T", "1GiB"] {
            assert!(size(bad).is_err(), "{bad}");
        }
        let limit = |line| config(line).unwrap().quota.map(|quota| quota.bytes);
        assert_eq!(limit("msb-fs --fd 3 --shared-dir /x"), None);
        assert_eq!(
            limit("msb-fs --fd 3 --shared-dir /x --quota 1M"),
            Some(1 << 20)
        );
        assert!(config("msb-fs --fd 3 --shared-file /x --quota 1M").is_err());
        assert!(config("msb-fs --fd 3 --shared-dir /x --quota-file /q").is_err());
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
