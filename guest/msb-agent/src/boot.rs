//! Takes the guest from its first instruction to the point where commands can be run.

use std::os::fd::OwnedFd;
use std::time::Duration;

use msb_protocol::{FrameError, FromAgent, GuestPlan, PROTOCOL_VERSION, ToAgent};
use rustix::fs::{self, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use crate::modules::{ModuleError, Modules};
use crate::mounts::{self, Guest, MountError};
use crate::port::{Port, PortError};
use crate::serve::Server;
use crate::{describe, sys};

/// How long the first and the last words of a boot may take.
const SHORTLY: Duration = Duration::from_secs(2);
/// Files that a command may have open, and up to how many it may ask for.
const OPEN_FILES: Rlimit = Rlimit {
    current: Some(1 << 16),
    maximum: Some(1 << 20),
};

/// The guest cannot be set up, or can no longer be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// A mount failed.
    #[error("{step}")]
    Step {
        /// What was being done.
        step: String,
        /// Guest path of the mount concerned, if one is.
        target: Option<String>,
        /// Why it failed.
        #[source]
        source: MountError,
    },
    /// A kernel module failed.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// The host is gone or not one.
    #[error(transparent)]
    Port(#[from] PortError),
    /// The host said something else than `Boot`.
    #[error("the host did not begin with the plan")]
    NoPlan,
    /// The host's plan cannot be understood.
    #[error("the host's plan is of another version")]
    Plan(#[from] FrameError),
    /// The kernel refuses something elementary.
    #[error("{0}")]
    Kernel(&'static str, #[source] Errno),
}

/// Boots, serves the host until it is done, and leaves the guest ready to be powered off.
pub(crate) fn run() -> Result<(), BootError> {
    rustix::process::umask(Mode::empty());
    mounts::mount_own().map_err(|source| BootError::Step {
        step: "mount the agent's own file systems".into(),
        target: None,
        source,
    })?;
    let mut modules = Modules::read()?;
    modules.load_port()?;
    let mut port = Port::open()?;
    let kernel = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    port.send(
        0,
        &FromAgent::Hello {
            version: PROTOCOL_VERSION,
            kernel,
        },
    );
    port.flush(SHORTLY)?;
    match boot(&mut port, modules) {
        Ok((guest, plan)) => serve(port, guest, &plan),
        Err(error) => {
            port.send(0, &failure(&error));
            port.flush(SHORTLY)?;
            Err(error)
        }
    }
}

fn boot(port: &mut Port, modules: Modules) -> Result<(Guest, GuestPlan), BootError> {
    let ToAgent::Boot(plan) = port.wait_frame()?.message()? else {
        return Err(BootError::NoPlan);
    };
    // Nothing that runs in the sandbox may look into the agent.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).kernel("cannot hide the agent")?;
    set_clock(plan.time_ns).kernel("cannot set the clock")?;
    rustix::system::sethostname(plan.hostname.as_bytes()).kernel("cannot set the host name")?;
    let mut guest = Guest::new(modules, plan.security).map_err(|source| BootError::Step {
        step: "open the initramfs".into(),
        target: None,
        source,
    })?;
    for step in mounts::steps(&plan) {
        guest.apply(&step).map_err(|source| BootError::Step {
            step: step.describe(),
            target: step.target(),
            source,
        })?;
    }
    setrlimit(Resource::Nofile, OPEN_FILES).kernel("cannot raise the limit of open files")?;
    if let Err(error) = bring_loopback_up() {
        eprintln!("msb-agent: no loopback interface: {error}");
    }
    Ok((guest, *plan))
}

fn serve(port: Port, guest: Guest, plan: &GuestPlan) -> Result<(), BootError> {
    let children = sys::child_signals().kernel("cannot take signals")?;
    let pts = open_pts().kernel("cannot open /dev/pts")?;
    let mut server =
        Server::new(port, guest, plan.security, children, pts).kernel("cannot wait for events")?;
    server.say_ready(uptime_ms());
    Ok(server.run()?)
}

trait Elementary<T> {
    fn kernel(self, what: &'static str) -> Result<T, BootError>;
}

impl<T> Elementary<T> for Result<T, Errno> {
    fn kernel(self, what: &'static str) -> Result<T, BootError> {
        self.map_err(|error| BootError::Kernel(what, error))
    }
}

fn failure(error: &BootError) -> FromAgent {
    match error {
        BootError::Step {
            step,
            target,
            source,
        } => FromAgent::Failed {
            step: step.clone(),
            target: target.clone(),
            errno: source.errno(),
            message: describe(source),
        },
        other => FromAgent::Failed {
            step: "boot".into(),
            target: None,
            errno: None,
            message: describe(other),
        },
    }
}

fn set_clock(time_ns: u64) -> Result<(), Errno> {
    const SECOND: u64 = 1_000_000_000;
    let tv_sec = i64::try_from(time_ns / SECOND).map_err(|_| Errno::INVAL)?;
    let tv_nsec = i64::try_from(time_ns % SECOND).map_err(|_| Errno::INVAL)?;
    clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec })
}

fn uptime_ms() -> u64 {
    let time = clock_gettime(ClockId::Boottime);
    u64::try_from(time.tv_sec * 1000 + time.tv_nsec / 1_000_000).unwrap_or(0)
}

fn bring_loopback_up() -> Result<(), Errno> {
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    sys::loopback_up(&socket)
}

/// The terminals of the sandbox, held open so that nothing mounted over them is in the way.
fn open_pts() -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    fs::openat(CWD, "/dev/pts", flags, Mode::empty())
}
