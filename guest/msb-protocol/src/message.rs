//! The messages themselves, as JSON objects inside control frames.

use serde::{Deserialize, Serialize};

/// Number of a running command, chosen by the host; zero is the agent itself.
pub type Channel = u32;

/// A message from the host to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ToAgent {
    /// Sets the guest up. The first message, sent once.
    Boot(Box<GuestPlan>),
    /// Starts a command on the frame's channel. Its standard input comes as `Stdin` frames; an
    /// empty one closes it.
    Exec(Exec),
    /// Sends a signal to the process group of the channel's command.
    Signal {
        /// Signal number as in signal(7).
        signal: i32,
    },
    /// Changes the terminal size of the channel's command.
    Resize(WindowSize),
    /// Lets the channel's command send so many more bytes of output. A host that sends this right
    /// after `Exec` makes the agent wait for it whenever the sum is used up; a host that never
    /// does takes all output at once.
    OutputCredit {
        /// Number of bytes, standard output and standard error together.
        bytes: u64,
    },
    /// Mounts one more volume on the running guest.
    Mount(GuestMount),
    /// Unmounts the volume at `target`.
    Unmount {
        /// Guest path of the mount.
        target: String,
        /// Also while something uses it: it goes from sight at once, and for good with its last user.
        #[serde(default)]
        lazy: bool,
    },
    /// Ends the guest: signals the commands, syncs, unmounts, powers off.
    Shutdown {
        /// How long commands have after SIGTERM, in milliseconds.
        grace_ms: u64,
    },
}

/// A message from the agent to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum FromAgent {
    /// The agent runs and waits for `Boot`.
    Hello {
        /// [`crate::PROTOCOL_VERSION`] of the agent.
        version: u32,
        /// Kernel release, as `uname -r`.
        kernel: String,
    },
    /// Root file system and all mounts stand; commands are accepted.
    Ready {
        /// Milliseconds since the guest kernel started.
        uptime_ms: u64,
    },
    /// A step of the boot, a mount or an unmount failed. A failed boot ends the guest.
    Failed {
        /// What was being done, such as `mount /data`.
        step: String,
        /// Guest path of the mount concerned, if one is.
        target: Option<String>,
        /// errno of the failure, if it has one.
        errno: Option<i32>,
        /// What went wrong, in words.
        message: String,
    },
    /// `Mount` or `Unmount` was carried out.
    Done {
        /// Guest path of the mount concerned.
        target: String,
    },
    /// The channel's command runs.
    Started {
        /// Its process id in the guest.
        pid: i32,
    },
    /// The channel's command could not be started.
    ExecFailed {
        /// errno of the failure: ENOENT means not found, EACCES and ENOEXEC not executable.
        errno: i32,
        /// What went wrong, in words.
        message: String,
    },
    /// The channel's command took, or will never take, so many bytes of its standard input; see
    /// [`crate::STDIN_WINDOW`].
    StdinTaken {
        /// Number of bytes since the last such message.
        bytes: u64,
    },
    /// The channel's command ended and all its output has been sent.
    Exited(ExitStatus),
    /// The file systems are synced and unmounted; the power goes off next.
    Goodbye,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExitStatus {
    /// It returned this status.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

/// Everything the agent sets up before the first command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestPlan {
    /// Host name of the guest.
    pub hostname: String,
    /// Root file system.
    pub root: GuestRoot,
    /// Volumes, in the order in which they are mounted.
    pub mounts: Vec<GuestMount>,
    /// Security profile of user commands and mounts.
    pub security: SecurityProfile,
    /// Wall-clock time in nanoseconds since the epoch, to set the guest's clock.
    pub time_ns: u64,
}

/// Where the root file system comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum GuestRoot {
    /// A read-only lower layer and a disk for what is written, joined with overlayfs.
    Overlay {
        /// The image.
        lower: GuestSource,
        /// The sandbox's own disk.
        upper: GuestSource,
    },
    /// One file system, as it is.
    Plain {
        /// Where it comes from.
        source: GuestSource,
        /// Whether it is mounted read-only.
        read_only: bool,
    },
}

/// A file system that the guest can mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum GuestSource {
    /// A virtio-fs share.
    Share {
        /// Its tag.
        tag: String,
    },
    /// One file inside a virtio-fs share, bound onto the target.
    SharedFile {
        /// Tag of the share.
        tag: String,
        /// Name of the file in the share's root.
        name: String,
    },
    /// A virtio-blk disk.
    Disk {
        /// Its serial number.
        serial: String,
        /// File system on it; found by its superblock when absent.
        fstype: Option<String>,
    },
    /// Memory of the guest.
    Tmpfs {
        /// Size limit in bytes; the kernel's default when absent.
        size_bytes: Option<u64>,
        /// Mode of its root directory.
        mode: u32,
    },
}

/// One volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestMount {
    /// Absolute, normalised guest path.
    pub target: String,
    /// What is mounted there.
    pub source: GuestSource,
    /// How it is mounted.
    pub flags: MountFlags,
}

/// Mount flags of a volume.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountFlags {
    /// Nothing can be written.
    #[serde(default)]
    pub read_only: bool,
    /// Nothing can be executed.
    #[serde(default)]
    pub noexec: bool,
    /// Set-id bits have no effect.
    #[serde(default)]
    pub nosuid: bool,
    /// Device files do not open devices.
    #[serde(default)]
    pub nodev: bool,
}

/// What user commands may do inside the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SecurityProfile {
    /// Ordinary Linux behaviour.
    #[default]
    Default,
    /// `no_new_privs`, no mount administration, `nosuid,nodev` on every volume.
    Restricted,
}

/// A command to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// Program and arguments; the program is looked up in PATH when it holds no slash.
    pub argv: Vec<String>,
    /// Environment, as names and values.
    pub env: Vec<(String, String)>,
    /// Working directory, made when missing; `/` when absent.
    pub cwd: Option<String>,
    /// User as `name`, `uid`, `name:group` or `uid:gid`; root when absent.
    pub user: Option<String>,
    /// Runs on a terminal of this size when present.
    pub terminal: Option<WindowSize>,
    /// Limits of what it may use; others are as the agent's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub limits: Vec<ResourceLimit>,
    /// Work that is done in place of running a program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub builtin: Option<Builtin>,
}

/// How much of something a command may use, as setrlimit(2) has it; `u64::MAX` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResourceLimit {
    /// Of what.
    pub resource: Resource,
    /// What it may use, until it raises that itself.
    pub soft: u64,
    /// Up to where it may raise that.
    pub hard: u64,
}

/// Something that is limited, with the units of setrlimit(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resource {
    /// Address space, in bytes.
    As,
    /// Core file, in bytes.
    Core,
    /// Processor time, in seconds.
    Cpu,
    /// Data segment, in bytes.
    Data,
    /// Files that are written, each in bytes.
    Fsize,
    /// Number of file locks.
    Locks,
    /// Memory locked in RAM, in bytes.
    Memlock,
    /// POSIX message queues, in bytes.
    Msgqueue,
    /// Ceiling of the nice value, as 20 minus it.
    Nice,
    /// Number of open files.
    Nofile,
    /// Number of processes of the user.
    Nproc,
    /// Resident memory, in bytes; Linux ignores it.
    Rss,
    /// Ceiling of the real-time priority.
    Rtprio,
    /// Processor time without a blocking call under real-time scheduling, in microseconds.
    Rttime,
    /// Number of queued signals.
    Sigpending,
    /// Stack, in bytes.
    Stack,
}

/// Work that the agent does itself, in a process of its own that is confined as a command is.
///
/// What is copied is a tar archive whose first entry, named [`COPY_TOP`], is the file or directory
/// itself; everything else lies below it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "work", rename_all = "kebab-case")]
pub enum Builtin {
    /// Packs a file or directory onto standard output.
    Pack {
        /// Its guest path.
        path: String,
    },
    /// Unpacks what comes on standard input.
    Unpack {
        /// Guest path that it gets; if that is a directory, it is put into it.
        path: String,
        /// Name that it gets in a directory; without one, its content goes there.
        name: Option<String>,
    },
}

/// Name of what is copied, in the archive.
pub const COPY_TOP: &str = "top";

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Number of lines.
    pub rows: u16,
    /// Number of columns.
    pub cols: u16,
}
