//! The sandbox a backend locks itself into after it has opened its files.
//!
//! [`enter`] must be called while the process has one thread, after everything with a path was
//! opened; [`Report::seal`] before the socket is served. Between the two the device may be built:
//! it finds all layers up but the last, so it can still make an io_uring, which would not have
//! survived the fork. The layers, in this order:
//!
//! 1. descriptors that came through exec are closed, standard input becomes `/dev/null`, the
//!    environment is wiped;
//! 2. user, mount, pid, network, IPC, UTS and cgroup namespaces. The process forks: the child
//!    serves as first process of its pid namespace, the parent ([`waiter`]) holds nothing, passes
//!    signals on and ends as the child ended;
//! 3. a root that is the share itself (a clone with NOSUID, NODEV and NOSYMFOLLOW, and RDONLY for a
//!    read-only share) or an empty read-only tmpfs;
//! 4. identity: no supplementary groups, no capability in any of the five sets but those the caller
//!    names, locked securebits;
//! 5. resource limits, no new privileges, not dumpable, memory that was writable never executable,
//!    death with the parent;
//! 6. Landlock: the share, or nothing;
//! 7. seccomp: the calls the device needs, all others end the process;
//! 8. a look at its own `/proc` status, through a descriptor opened before.
//!
//! # Identity
//!
//! An ordinary user keeps its one uid, alone in a user namespace, and no capability. Root becomes
//! somebody else: a nobody for a disk, whose file is open already ([`Identity::Become`]), the
//! owner of a share ([`Identity::Owner`]). Only a server that gives files to others keeps uid 0,
//! with the capabilities its caller names ([`Identity::Keep`]), and in a user namespace that maps
//! every id to itself. There they count for inodes only, not for the kernel: they allow no mount
//! of the host, no device node, no raw disk, no network.

mod check;
mod credentials;
mod landlock;
mod namespaces;
mod root;
mod seccomp;
mod sys;
mod waiter;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::str::FromStr;

pub use rustix::thread::CapabilitySet;
pub use seccomp::{Call, Check};

/// How much of the jail is demanded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SandboxMode {
    /// Every layer, or the process does not start.
    Strict,
    /// The layers that the host allows; those that are missing are reported.
    BestEffort,
    /// As strict, but a call outside the list is only logged by the kernel: finds gaps in the list.
    Audit,
    /// No layer at all.
    None,
}

/// The word names no sandbox mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a sandbox is strict, best-effort, audit or none")]
pub struct UnknownMode;

impl FromStr for SandboxMode {
    type Err = UnknownMode;

    fn from_str(word: &str) -> Result<Self, UnknownMode> {
        match word {
            "strict" => Ok(Self::Strict),
            "best-effort" => Ok(Self::BestEffort),
            "audit" => Ok(Self::Audit),
            "none" => Ok(Self::None),
            _ => Err(UnknownMode),
        }
    }
}

/// What the process sees as its root directory.
#[derive(Debug)]
pub enum Root {
    /// An empty directory that cannot be written.
    Empty,
    /// The share: a directory, or a single file, which then lies beside an empty root.
    Share {
        /// The directory or file, opened in any way.
        source: OwnedFd,
        /// Whether it can be changed.
        read_only: bool,
        /// Whether pipes, sockets and the whiteouts of overlays may be made in it.
        special_files: bool,
    },
}

/// Who the process is inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// The user that started it; root with these of its capabilities, anybody else without any.
    Keep(CapabilitySet),
    /// When started by root, this user and group, without capabilities, in a user namespace where
    /// every id has its name; else as it is.
    Owner {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
    },
    /// When started by root, this user and group, without capabilities; else as it is.
    Become {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
    },
}

impl Identity {
    fn capabilities(self) -> CapabilitySet {
        match self {
            // In its own user namespace even an ordinary user would have some.
            Self::Keep(kept) if rustix::process::geteuid().is_root() => kept,
            Self::Keep(_) | Self::Owner { .. } | Self::Become { .. } => CapabilitySet::empty(),
        }
    }
}

/// What a backend asks for.
#[derive(Debug)]
pub struct Jail {
    /// How much is demanded.
    pub mode: SandboxMode,
    /// What is visible of the file system.
    pub root: Root,
    /// Who the process is.
    pub identity: Identity,
    /// Limit of open descriptors.
    pub open_files: u64,
}

/// One layer of the jail, as reports name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// A user namespace.
    UserNamespace,
    /// Mount, pid, network, IPC, UTS and cgroup namespaces.
    Namespaces,
    /// The root directory.
    Root,
    /// User, groups, capabilities.
    Credentials,
    /// Resource limits, no new privileges, not dumpable.
    Process,
    /// Landlock.
    Landlock,
    /// The system call filter.
    Seccomp,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UserNamespace => "user namespace",
            Self::Namespaces => "mount, pid, network, IPC, UTS and cgroup namespaces",
            Self::Root => "root directory",
            Self::Credentials => "credentials",
            Self::Process => "process limits",
            Self::Landlock => "Landlock",
            Self::Seccomp => "seccomp",
        })
    }
}

/// Why the process is not, or not wholly, in its jail.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The host does not allow a layer.
    #[error("sandbox layer {layer}: cannot {step}{hint}")]
    Layer {
        /// Which one.
        layer: Layer,
        /// What was tried.
        step: &'static str,
        /// The setting of the host that forbids it, where it is known; begins with a separator.
        hint: String,
        /// What the host said.
        source: io::Error,
    },
    /// It was called too late.
    #[error("{0} threads run already, the sandbox must be entered by a single one")]
    Threads(usize),
    /// The share cannot be used, in a jail or without.
    #[error("cannot {0} the share")]
    Share(&'static str, #[source] io::Error),
    /// A layer was put up but does not show.
    #[error("sandbox does not hold: {0}")]
    NotHeld(String),
}

impl JailError {
    fn layer(layer: Layer, step: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Layer {
            layer,
            step,
            hint: String::new(),
            source: source.into(),
        }
    }
}

/// What stands after [`enter`]. [`Report::seal`] must follow.
#[derive(Debug)]
#[must_use]
pub struct Report {
    /// The layers that the host did not allow, each with the reason; empty in strict mode.
    pub missing: Vec<JailError>,
    /// The share, valid inside: a directory opened for reading, or a file opened with O_PATH.
    pub share: Option<OwnedFd>,
    /// The folder of the process's own descriptors, to open one of them anew. Its `..` is itself.
    pub descriptors: Option<OwnedFd>,
    /// The version of Landlock in force, 0 for none.
    pub landlock_abi: u8,
    mode: SandboxMode,
    kept: CapabilitySet,
    status: Option<File>,
}

/// Locks the process in. On success only the process that serves returns from here; the one that
/// was started waits for it inside and ends as it ends.
///
/// # Errors
///
/// [`JailError`]: in strict mode when any layer is missing, otherwise when the share cannot be used.
pub fn enter(jail: Jail) -> Result<Report, JailError> {
    let mut report = Report {
        missing: Vec::new(),
        share: None,
        descriptors: None,
        landlock_abi: 0,
        mode: jail.mode,
        kept: jail.identity.capabilities(),
        status: None,
    };
    if jail.mode == SandboxMode::None {
        credentials::limit_descriptors(jail.open_files);
        root::stay(jail.root, &mut report)?;
        return Ok(report);
    }
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads != 1 {
        return Err(JailError::Threads(threads));
    }
    let strict = jail.mode != SandboxMode::BestEffort;
    let mut demand = Demand {
        strict,
        missing: Vec::new(),
    };

    sys::wipe_environment();
    let taken = namespaces::close_inherited();
    demand.layer(
        taken.map_err(|error| {
            JailError::layer(Layer::Process, "close inherited descriptors", error)
        }),
    )?;
    // In this order: should the parent end in between, the signal it asks for ends this process.
    let parent = rustix::process::getppid();
    let bond = rustix::process::parent_process_death_signal()
        .ok()
        .flatten();
    let own_users = demand
        .layer(namespaces::enter_user(jail.identity))?
        .is_some();
    let apart = demand.layer(namespaces::enter_others())?.is_some();
    let parent = if apart {
        Some(waiter::split(jail.identity, bond, parent)?)
    } else {
        None
    };

    report.status = check::open_status();
    let (read_only, special_files) = match jail.root {
        Root::Share {
            read_only,
            special_files,
            ..
        } => (read_only, special_files),
        Root::Empty => (false, false),
    };
    if apart {
        root::replace(jail.root, &mut report, &mut demand)?;
    } else {
        root::stay(jail.root, &mut report)?;
    }
    demand.layer(credentials::drop_privileges(jail.identity))?;
    credentials::limit_descriptors(jail.open_files);
    if own_users {
        credentials::limit_threads();
    }
    demand.layer(credentials::harden(bond, parent))?;
    let landlock = landlock::restrict(report.share.as_ref(), read_only, special_files);
    report.landlock_abi = demand.layer(landlock)?.unwrap_or_default();
    report.missing = demand.missing;
    Ok(report)
}

impl Report {
    /// Puts up the last layer: of all system calls, only those the transport and the C library need
    /// and those in `calls` are left, for every thread. Then looks whether all layers show.
    ///
    /// # Errors
    ///
    /// [`JailError`] when that cannot be done, or the process does not look as it should.
    pub fn seal(&mut self, calls: &[Call]) -> Result<(), JailError> {
        if self.mode == SandboxMode::None {
            return Ok(());
        }
        let strict = self.mode != SandboxMode::BestEffort;
        let mut demand = Demand {
            strict,
            missing: std::mem::take(&mut self.missing),
        };
        demand.layer(seccomp::install(calls, self.mode == SandboxMode::Audit))?;
        self.missing = demand.missing;
        if self.missing.is_empty() {
            check::holds(self.status.take(), self.kept)
        } else {
            Ok(())
        }
    }
}

/// Decides what a missing layer means.
struct Demand {
    strict: bool,
    missing: Vec<JailError>,
}

impl Demand {
    /// Takes note of a layer that failed, or gives its error back when it was demanded.
    fn layer<T>(&mut self, result: Result<T, JailError>) -> Result<Option<T>, JailError> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) if self.strict => Err(error),
            Err(error) => {
                self.missing.push(error);
                Ok(None)
            }
        }
    }
}
