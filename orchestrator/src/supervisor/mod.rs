//! The process that is a running sandbox: it owns the locks, the children and the control socket.
//!
//! Whoever starts a sandbox starts this process and hands it one end of a socket pair as standard
//! input. It takes the sandbox's lock, starts backends and VMM, serves clients until the sandbox is
//! to end, and takes everything down in reverse order. When it is killed, the kernel ends its
//! children and frees its locks; sockets that are left are swept by the next command.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use crate::agent::{self, FrameReader, FrameSender};
use crate::plan::Plan;
use crate::rundir::{self, Home, SandboxDir, SandboxLock, SandboxState, SocketDir, Status};
use crate::spec::SandboxName;
use crate::vmm::Reach;
use crate::{Error, ErrorKind, MicrosandboxResult};

mod boot;
mod child;
pub(crate) mod control;
mod guest;
mod hub;
mod plug;
mod revive;
mod verify;

use boot::Parts;
use control::{Failure, FromSupervisor, ToSupervisor};

/// How long the caller may take to say what is to be started.
const START_LIMIT: Duration = Duration::from_secs(30);

/// How often the sandbox's lock is tried, ten milliseconds apart.
const LOCK_ATTEMPTS: usize = 30;

/// How long a VMM may take to end by itself.
const VMM_LIMIT: Duration = Duration::from_secs(1);

/// How long backends may take to flush and end after the VMM has gone.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);

/// Is the supervisor of the sandbox in `folder`, until that ends.
///
/// Must be called on the main thread of a process of its own, whose standard input is a socket and
/// which has opened nothing else.
///
/// # Errors
///
/// When it cannot even tell its caller what is wrong; everything else is told over the socket.
pub fn supervise(folder: &Path) -> MicrosandboxResult<()> {
    crate::vmm::close_inherited();
    // It was started by a name that says nothing.
    let _ = rustix::thread::set_name(c"msb-supervisor");
    // Out of the caller's terminal: what Ctrl-C means is the caller's decision.
    let _ = rustix::process::setsid();
    let events = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io("cannot start the event loop", error))?;
    let done = events.block_on(run(folder));
    // Tasks that still wait for a file or a child are not waited for.
    events.shutdown_timeout(Duration::from_millis(100));
    done
}

/// The program that can be called again as `msb`.
///
/// # Errors
///
/// [`ErrorKind::Unsupported`] when a program that uses the library has no `msb` to call.
pub(crate) fn msb_program() -> MicrosandboxResult<PathBuf> {
    let own = std::env::current_exe().unwrap_or_default();
    let is_msb = own
        .file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.strip_suffix(" (deleted)").unwrap_or(name) == "msb");
    if is_msb {
        // The same file, even when another has been installed in its place meanwhile.
        return Ok(PathBuf::from("/proc/self/exe"));
    }
    let named = std::env::var_os("MSB_PATH").map(PathBuf::from);
    let folder = std::env::var_os("MSB_BIN_DIR").map(|folder| PathBuf::from(folder).join("msb"));
    let beside = own.parent().map(|folder| folder.join("msb"));
    let candidates = named.into_iter().chain(folder).chain(beside);
    candidates
        .filter(|path| path.is_file())
        .find_map(|path| std::path::absolute(path).ok())
        .or_else(|| crate::host::in_path("msb"))
        .ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, "the program `msb` was not found")
                .with_hint("install it in PATH, or set MSB_PATH to it")
        })
}

/// A command for `program` that the kernel ends when this process dies, confined to `reach` if that
/// is given.
pub(crate) fn tied_to_parent(program: &Path, reach: Option<&Reach>) -> MicrosandboxResult<Command> {
    let mut command = Command::new(msb_program()?);
    command.arg("tied").arg(std::process::id().to_string());
    if let Some(reach) = reach {
        command.arg("--confined").args(reach.flags());
    }
    command.arg("--").arg(program);
    Ok(command)
}

/// Becomes `argv`, to be killed when the process `parent` dies, and confined to `reach` if that is
/// given. This process must have opened nothing.
///
/// # Errors
///
/// When the parent has died already or the program cannot be run.
pub fn become_tied(
    parent: u32,
    reach: Option<&Reach>,
    argv: &[std::ffi::OsString],
) -> MicrosandboxResult<()> {
    use std::os::unix::process::CommandExt;
    let cannot = |error: std::io::Error| Error::io("cannot start the program", error);
    crate::vmm::close_inherited();
    // Before the rest, for a change of identity clears the setting below.
    if let Some(reach) = reach {
        crate::vmm::confine(reach);
    }
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(|errno| cannot(errno.into()))?;
    let now = rustix::process::getppid().map(rustix::process::Pid::as_raw_nonzero);
    if now.map(|pid| i64::from(pid.get())) != Some(i64::from(parent)) {
        return Err(Error::new(
            ErrorKind::BootStart,
            "the supervisor has ended already",
        ));
    }
    let [program, arguments @ ..] = argv else {
        return Err(Error::new(ErrorKind::InvalidConfig, "no program is given"));
    };
    // The setting above survives this call (prctl(2), PR_SET_PDEATHSIG).
    Err(cannot(Command::new(program).args(arguments).exec()))
}

/// Starts a supervisor and gives back the connection to it.
pub(crate) fn spawn(dir: &SandboxDir) -> MicrosandboxResult<StdUnixStream> {
    let cannot = |error| Error::io("cannot start the supervisor", error);
    let (ours, theirs) = StdUnixStream::pair().map_err(cannot)?;
    let log = File::options()
        .create(true)
        .append(true)
        .open(dir.supervisor_log())
        .map_err(cannot)?;
    let child = Command::new(msb_program()?)
        .arg("supervise")
        .arg(dir.path())
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::from(log))
        .spawn()
        .map_err(cannot)?;
    // It outlives most of its callers; one that does not is reaped here.
    std::thread::Builder::new()
        .name("msb-reaper".to_owned())
        .spawn(move || {
            let mut child = child;
            let _ = child.wait();
        })
        .map_err(cannot)?;
    Ok(ours)
}

/// The client that started this supervisor.
struct Owner {
    reader: FrameReader,
    sender: FrameSender,
    writer: JoinHandle<()>,
    attached: bool,
}

impl Owner {
    fn tell(&self, message: &FromSupervisor) {
        self.sender.message(0, message);
    }
}

/// What a supervisor works with.
struct Sandbox {
    home: Home,
    dir: SandboxDir,
    sockets: SocketDir,
    plan: Plan,
    state: SandboxState,
    log: File,
}

impl Sandbox {
    fn record(&mut self, status: Status) {
        self.state.status = status;
        if let Err(error) = self.dir.write_state(&self.state) {
            tracing::error!("the state could not be written: {error}");
        }
    }
}

async fn run(folder: &Path) -> MicrosandboxResult<()> {
    let (mut owner, plan) = greet().await?;
    let prepared = prepare(folder, plan);
    let (mut sandbox, lock) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            owner.tell(&FromSupervisor::Failed {
                failure: Failure::of(&error),
            });
            farewell(owner.sender, owner.writer).await;
            return Ok(());
        }
    };
    let mut parts = Parts::default();
    let outcome = match boot::boot(&mut sandbox, &mut parts, &mut owner).await {
        Ok(link) => {
            let boot_ms = sandbox.state.started_at_ms.map_or(0, |start| {
                rundir::millis(SystemTime::now()).saturating_sub(start)
            });
            sandbox.state.boot_ms = Some(boot_ms);
            sandbox.record(Status::Running);
            if let Err(error) = sandbox.dir.commit() {
                tracing::error!("the sandbox stays provisional: {error}");
            }
            if let Some(volumes) = parts.volumes.take() {
                volumes.keep(&sandbox.home);
            }
            owner.tell(&FromSupervisor::Ready { boot_ms });
            hub::serve(&mut sandbox, &mut parts, owner, link).await
        }
        Err(error) => hub::Outcome::unstarted(owner, &error),
    };
    take_down(sandbox, parts, lock, outcome).await;
    Ok(())
}

/// Meets the caller on standard input and learns what to start.
async fn greet() -> MicrosandboxResult<(Owner, Box<Plan>)> {
    let cannot = |error| Error::io("standard input is not the caller's socket", error);
    let fd = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(cannot)?;
    let stream = StdUnixStream::from(fd);
    stream.set_nonblocking(true).map_err(cannot)?;
    let stream = UnixStream::from_std(stream).map_err(cannot)?;
    let (mut reader, sender, writer) = agent::split(stream);
    let first = tokio::time::timeout(START_LIMIT, reader.next()).await;
    let Ok(Ok(Some(frame))) = first else {
        return Err(Error::new(
            ErrorKind::Io,
            "the caller did not say what to start",
        ));
    };
    match frame.message() {
        Ok(ToSupervisor::Start { plan, attached }) => Ok((
            Owner {
                reader,
                sender,
                writer,
                attached,
            },
            plan,
        )),
        _ => Err(Error::new(
            ErrorKind::Io,
            "the caller did not say what to start",
        )),
    }
}

/// Takes the sandbox's lock and records that it starts.
fn prepare(folder: &Path, plan: Box<Plan>) -> MicrosandboxResult<(Sandbox, SandboxLock)> {
    let home = folder.parent().and_then(Path::parent).ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidConfig,
            "the folder is not one of a sandbox",
        )
    })?;
    let home = Home::at(home)?;
    let name = SandboxName::try_from(plan.name.to_string())?;
    let dir = home.sandbox(&name);
    let lock = lock(&dir)?.ok_or_else(|| {
        Error::new(
            ErrorKind::SandboxStillRunning,
            format!("sandbox `{name}` is running already"),
        )
        .with_value(name.as_str())
    })?;
    let cannot = |error| Error::io("cannot write the sandbox's log", error);
    let log = File::options()
        .create(true)
        .append(true)
        .open(dir.supervisor_log())
        .map_err(cannot)?;
    rundir::write_json(&dir.plan_path(), &plan)?;
    let mut sandbox = Sandbox {
        sockets: home.socket_dir(&name),
        home,
        dir,
        plan: *plan,
        state: SandboxState {
            pid: Some(std::process::id()),
            started_at_ms: Some(rundir::millis(SystemTime::now())),
            ..SandboxState::created()
        },
        log,
    };
    sandbox.record(Status::Starting);
    Ok((sandbox, lock))
}

/// The sandbox's lock; whoever only sweeps gives it back at once.
fn lock(dir: &SandboxDir) -> MicrosandboxResult<Option<SandboxLock>> {
    for _ in 0..LOCK_ATTEMPTS {
        if let Some(lock) = dir.try_lock()? {
            return Ok(Some(lock));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(None)
}

/// Ends the children in reverse order of their start, then frees the lock, then lets clients know.
async fn take_down(
    mut sandbox: Sandbox,
    mut parts: Parts,
    lock: SandboxLock,
    outcome: hub::Outcome,
) {
    let plug = &mut parts.plug;
    if let Some(vmm) = &mut parts.vmm {
        // One that can be asked takes its sockets with it.
        let running = vmm.status().is_none();
        let asked = async { running && plug.shut_down().await };
        if tokio::time::timeout(VMM_LIMIT, asked).await == Ok(true) {
            vmm.ended_within(VMM_LIMIT).await;
        }
        vmm.kill().await;
    }
    // A backend ends by itself when the VMM it served has gone; one that was never connected to
    // has to be told.
    for backend in parts.backends.iter_mut().rev() {
        if !parts.connected || !backend.ended_within(FLUSH_LIMIT).await {
            backend.end(FLUSH_LIMIT).await;
        }
    }
    // Volumes that were made for a sandbox that never ran are taken back.
    let volumes = parts.volumes.take();
    let home = sandbox.home.clone();
    drop(parts);
    sandbox.sockets.remove();
    sandbox.state.pid = None;
    sandbox.state.failure = outcome
        .failure
        .as_ref()
        .map(|failure| failure.message.clone());
    let status = if outcome.failure.is_some() {
        Status::Failed
    } else {
        Status::Stopped
    };
    sandbox.record(status);
    let ephemeral = sandbox.dir.spec().is_ok_and(|spec| spec.ephemeral);
    if (ephemeral || sandbox.dir.is_provisional())
        && let Err(error) = sandbox.dir.remove_locked(&lock)
    {
        tracing::error!("the sandbox could not be removed: {error}");
    }
    drop(lock);
    if let Some(volumes) = volumes {
        volumes.roll_back(&home);
    }
    for (sender, writer) in outcome.clients {
        if let Some(failure) = &outcome.failure {
            sender.message(
                0,
                &FromSupervisor::Failed {
                    failure: failure.clone(),
                },
            );
        }
        sender.message(0, &FromSupervisor::Stopped);
        farewell(sender, writer).await;
    }
}

/// Waits a moment until what was said has been written.
async fn farewell(sender: FrameSender, writer: JoinHandle<()>) {
    drop(sender);
    let _ = tokio::time::timeout(Duration::from_secs(2), writer).await;
}
