//! Starts the parts of a sandbox one after the other, up to an agent that is ready.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use msb_protocol::{Frame, FromAgent, PROTOCOL_VERSION, ToAgent};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::child::Child;
use super::control::{FromSupervisor, SOCKET};
use super::revive::Spare;
use super::{Owner, Sandbox, verify};
use crate::agent::{self, FrameReader, FrameSender};
use crate::backend::{self, Jail};
use crate::host::Programs;
use crate::image::Image;
use crate::plan::{BackendPlan, DevicePlan, OwnedPlan};
use crate::spec::{Accel, VmmKind};
use crate::vmm::{self, Machine, Plug};
use crate::volume::{self, Prepared};
use crate::{Error, ErrorKind, MicrosandboxResult};

/// How long a guest may take to reach its agent.
const KVM_LIMIT: Duration = Duration::from_secs(30);
const TCG_LIMIT: Duration = Duration::from_secs(180);

/// How long backends may take to say why they ended, after the VMM has lost them.
const CAUSE_LIMIT: Duration = Duration::from_millis(500);

/// Lines of the console that are shown when a guest does not come up.
const CONSOLE_LINES: usize = 8;

/// Number of the VMM among the children.
const VMM: usize = usize::MAX;

/// Everything that was started, for whoever takes it down.
#[derive(Default)]
pub(super) struct Parts {
    /// In the order of their start.
    pub(super) backends: Vec<Child>,
    /// Number of the next backend.
    pub(super) next: usize,
    /// What is needed to start some of them again.
    pub(super) spares: Vec<Spare>,
    pub(super) vmm: Option<Child>,
    /// Through which the VMM is given devices.
    pub(super) plug: Plug,
    /// The VMM has connected to its backends, so that they end when it does.
    pub(super) connected: bool,
    pub(super) control: Option<UnixListener>,
    /// Numbers of children that have ended; the VMM's is [`VMM`].
    pub(super) ends: Option<mpsc::UnboundedReceiver<usize>>,
    /// For those that are started later.
    pub(super) send_end: Option<mpsc::UnboundedSender<usize>>,
    /// Named volumes that were made for this start.
    pub(super) volumes: Option<Prepared>,
    image: Option<std::fs::File>,
}

impl Parts {
    /// Why the sandbox cannot go on, if a child has ended that should not have.
    pub(super) fn broken(&self) -> Option<Error> {
        let failed = self.backends.iter().find(|backend| backend.failed());
        // Without a VMM the backends end as they should, and are not the cause.
        let vmm = self.vmm.as_ref().filter(|vmm| vmm.status().is_some());
        let ended = |backend: &&Child| backend.needed && backend.status().is_some();
        let ended = self.backends.iter().find(ended);
        let ended_by_itself =
            |what, child: &Child| format!("{what}{} ended: {}", child.purpose, child.last_words());
        let message = match (failed, vmm, ended) {
            (Some(backend), _, _) => ended_by_itself("the backend of ", backend),
            (None, Some(vmm), _) => ended_by_itself("", vmm),
            // It was let go of, though nobody unplugged it: cloud-hypervisor makes its devices, and its
            // console's log, anew when the guest restarts.
            (None, None, Some(backend)) => {
                format!("the machine restarted: it let go of {}", backend.purpose)
            }
            (None, None, None) => return None,
        };
        Some(Error::new(ErrorKind::BootStart, message))
    }
}

/// The connection to the agent.
pub(super) struct Link {
    pub(super) reader: FrameReader,
    pub(super) sender: FrameSender,
}

/// Starts everything. What was started before an error stays in `parts`.
pub(super) async fn boot(
    sandbox: &mut Sandbox,
    parts: &mut Parts,
    owner: &mut Owner,
) -> MicrosandboxResult<Link> {
    let cannot = |error| Error::io("cannot listen to signals", error);
    let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
    let interrupted = || Error::new(ErrorKind::BootStart, "the start was interrupted");
    let Owner { reader, sender, .. } = owner;
    tokio::select! {
        link = start(sandbox, parts, sender) => link,
        _ = terminate.recv() => Err(interrupted()),
        _ = interrupt.recv() => Err(interrupted()),
        // The caller says nothing while it waits; if it goes, nobody wants the sandbox.
        _ = reader.next() => Err(interrupted()),
    }
}

async fn start(
    sandbox: &mut Sandbox,
    parts: &mut Parts,
    owner: &FrameSender,
) -> MicrosandboxResult<Link> {
    let tell = |step: &str| {
        owner.message(
            0,
            &FromSupervisor::Progress {
                step: step.to_owned(),
            },
        )
    };
    let programs = Programs::find();
    lock_image(sandbox, parts)?;
    make_disks(sandbox, parts, tell)?;
    sandbox.sockets.create()?;
    let control = listen(&sandbox.sockets.socket(SOCKET)?)?;
    parts.control = Some(tokio_listener(control)?);
    let (send_end, ends) = mpsc::unbounded_channel();
    parts.ends = Some(ends);
    parts.send_end = Some(send_end.clone());

    tell("starting backends");
    let jail = Jail::from_env()?;
    let mut sockets = Vec::new();
    for (number, plan) in sandbox.plan.backends.iter().enumerate() {
        let socket = sandbox.sockets.socket(&format!("d{number}"))?;
        let listener = listen(&socket)?;
        let vm = &sandbox.plan.vm;
        let spare = Spare::keep(number, plan, vm, &listener, &send_end)?;
        parts.spares.extend(spare);
        let child = start_backend(sandbox, plan, number, jail, listener, &send_end)?;
        parts.backends.push(child);
        sockets.push(socket);
    }
    parts.next = sockets.len();

    tell("booting");
    let agent = vmm::agent_socket(sandbox.plan.vm.vmm);
    let agent = sandbox.sockets.socket(&agent)?;
    let listener = tokio_listener(listen(&agent)?)?;
    parts.plug = Plug::prepare(sandbox.plan.vm.vmm, sandbox.sockets.path())?;
    let (kernel, initramfs) = boot_files(sandbox, &programs)?;
    for (plan, backend) in sandbox.plan.backends.iter().zip(&parts.backends) {
        verify::verify(plan, backend, jail).await?;
    }
    if let Some(error) = parts.broken() {
        return Err(error);
    }
    let machine = Machine {
        name: sandbox.dir.name().as_str(),
        vm: &sandbox.plan.vm,
        kernel,
        initramfs: initramfs.as_deref(),
        sockets: sandbox.sockets.path(),
        devices: sandbox.plan.backends.iter().zip(sockets).collect(),
        agent,
        console: sandbox.dir.console_log(),
    };
    parts.vmm = Some(start_vmm(sandbox, &machine, &programs, jail, send_end)?);
    let limit = boot_limit(sandbox.plan.vm.accel);
    let reached = tokio::time::timeout(limit, reach_agent(sandbox, parts, &listener)).await;
    let link = reached.unwrap_or_else(|_| {
        Err(Error::new(
            ErrorKind::BootStart,
            format!(
                "the guest did not reach its agent within {} seconds",
                limit.as_secs()
            ),
        ))
    });
    link.map_err(|error| with_console(error, &sandbox.dir.console_log()))
}

/// Finds or makes what the sandbox keeps its files on.
fn make_disks(sandbox: &Sandbox, parts: &mut Parts, tell: impl Fn(&str)) -> MicrosandboxResult<()> {
    let (plan, name) = (&sandbox.plan, sandbox.dir.name());
    let disks = || plan.disks.iter().filter(|disk| !disk.path.exists());
    let is_missing = |own: &OwnedPlan| !own.path.exists();
    if !plan.volumes.is_empty() || plan.owned.iter().any(is_missing) || disks().next().is_some() {
        tell("making disks");
    }
    let prepared = volume::prepare(&sandbox.home, name, &plan.volumes, &plan.owned)?;
    parts.volumes = Some(prepared);
    disks().try_for_each(|disk| volume::make_ext4(&disk.path, disk.size_bytes, &disk.label))
}

/// Starts the backend of `plan` on `listener`.
pub(super) fn start_backend(
    sandbox: &Sandbox,
    plan: &BackendPlan,
    number: usize,
    jail: Jail,
    listener: StdUnixListener,
    ends: &mpsc::UnboundedSender<usize>,
) -> MicrosandboxResult<Child> {
    if let DevicePlan::Fs(share) = &plan.device
        && let Some(accounts) = share.quota.as_ref().and_then(|q| q.account.parent())
    {
        crate::rundir::make_dir(accounts)
            .map_err(|error| Error::io("cannot make the folder of quotas", error))?;
    }
    let command = backend::command(plan, &Programs::find(), jail, listener)?;
    let purpose = purpose(&plan.purpose);
    Child::start(purpose, command, &sandbox.log, number, ends.clone())
}

fn start_vmm(
    sandbox: &Sandbox,
    machine: &Machine,
    programs: &Programs,
    jail: Jail,
    ends: mpsc::UnboundedSender<usize>,
) -> MicrosandboxResult<Child> {
    let launch = vmm::launch(machine, programs, jail)?;
    if let Some(console) = launch.console {
        keep_console(console, &machine.console)?;
    }
    Child::start(
        "the VMM".to_owned(),
        launch.command,
        &sandbox.log,
        VMM,
        ends,
    )
}

/// How long the guest may take.
fn boot_limit(accel: Accel) -> Duration {
    named_limit().unwrap_or(match accel {
        Accel::Kvm => KVM_LIMIT,
        Accel::Tcg => TCG_LIMIT,
    })
}

/// What `MSB_BOOT_LIMIT` says, in seconds, for machines on which everything in a guest takes longer
/// than anywhere else.
pub(super) fn named_limit() -> Option<Duration> {
    let named = std::env::var("MSB_BOOT_LIMIT").ok()?;
    named.parse().ok().map(Duration::from_secs)
}

/// Keeps the image from being removed while the sandbox runs.
fn lock_image(sandbox: &Sandbox, parts: &mut Parts) -> MicrosandboxResult<()> {
    for plan in &sandbox.plan.backends {
        let DevicePlan::Fs(share) = &plan.device else {
            continue;
        };
        let crate::plan::ShareSource::Directory(path) = &share.source else {
            continue;
        };
        let Some(folder) = Image::folder_of_rootfs(path) else {
            continue;
        };
        let lock = Image::lock_for_use(folder)
            .map_err(|error| Error::io(format!("cannot lock `{}`", folder.display()), error))?;
        parts.image = Some(lock);
    }
    Ok(())
}

/// Waits for the agent and sets the guest up.
async fn reach_agent(
    sandbox: &Sandbox,
    parts: &mut Parts,
    listener: &UnixListener,
) -> MicrosandboxResult<Link> {
    let lost = |error| Error::io("the connection to the agent failed", error);
    let stream = tokio::select! {
        accepted = listener.accept() => accepted.map_err(lost)?.0,
        error = death(parts) => return Err(error),
    };
    // The VMM opens its devices' sockets before the guest's first instruction.
    let (reader, sender, _) = agent::split(stream);
    let mut link = Link { reader, sender };
    loop {
        let frame = tokio::select! {
            frame = link.reader.next() => frame,
            error = death(parts) => return Err(error),
        };
        let frame = match frame {
            Ok(Some(frame)) => frame,
            // The VMM has gone, or is about to: its end tells more.
            Ok(None) => return Err(death(parts).await),
            Err(error) => {
                return Err(
                    Error::new(ErrorKind::BootStart, "the agent's end broke").with_source(error)
                );
            }
        };
        parts.connected = true;
        if hear(sandbox, &mut link, &frame)? {
            return Ok(link);
        }
    }
}

/// Answers the agent; true when the guest is ready.
fn hear(sandbox: &Sandbox, link: &mut Link, frame: &Frame) -> MicrosandboxResult<bool> {
    let message = frame.message::<FromAgent>().map_err(|error| {
        Error::new(
            ErrorKind::BootStart,
            "the agent sent no message of the protocol",
        )
        .with_source(error)
    })?;
    match message {
        FromAgent::Hello { version, .. } if version != PROTOCOL_VERSION => Err(Error::new(
            ErrorKind::BootStart,
            format!("the agent speaks version {version} of the protocol, not {PROTOCOL_VERSION}"),
        )
        .with_hint("msb and msb-agent must come from the same release")),
        FromAgent::Hello { .. } => {
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            let mut plan = sandbox.plan.guest.clone();
            plan.time_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
            link.sender.message(0, &ToAgent::Boot(Box::new(plan)));
            Ok(false)
        }
        FromAgent::Ready { .. } => Ok(true),
        FromAgent::Failed {
            step,
            errno,
            message,
            ..
        } => {
            let errno = errno.map_or_else(String::new, |errno| {
                format!(" ({})", std::io::Error::from_raw_os_error(errno))
            });
            Err(Error::new(
                ErrorKind::BootStart,
                format!("in the guest, {step}: {message}{errno}"),
            ))
        }
        _ => Ok(false),
    }
}

/// Waits until a child has ended, and finds out which one was the cause.
async fn death(parts: &mut Parts) -> Error {
    // Left in its place, for this future may be dropped before it is done.
    if let Parts {
        backends,
        ends: Some(ends),
        ..
    } = parts
    {
        ends.recv().await;
        // A VMM that lost its backend may end first; the backend knows why.
        let settled =
            async { while !backends.iter().any(Child::failed) && ends.recv().await.is_some() {} };
        let _ = tokio::time::timeout(CAUSE_LIMIT, settled).await;
    }
    parts
        .broken()
        .unwrap_or_else(|| Error::new(ErrorKind::BootStart, "the guest went away"))
}

/// What the VM boots from: kernel and initramfs, both kept for the next one. libkrun has its own.
fn boot_files(
    sandbox: &Sandbox,
    programs: &Programs,
) -> MicrosandboxResult<(Option<PathBuf>, Option<PathBuf>)> {
    let vm = &sandbox.plan.vm;
    if vm.vmm == VmmKind::Libkrun {
        return Ok((None, None));
    }
    let agent = programs.agent.as_ref().ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            "the program `msb-agent` was not found",
        )
        .with_hint("install it beside msb, or set MSB_BIN_DIR to its folder")
    })?;
    let home = sandbox.dir.path().parent().and_then(Path::parent);
    let cache = home.unwrap_or(Path::new("/")).join("cache");
    crate::rundir::make_dir(&cache).map_err(|error| Error::io("cannot make the cache", error))?;
    let image = vm.kernel.as_deref();
    let kernel = image.map(|image| crate::vmlinux::unpacked(image, &cache));
    let modules = vm.modules.as_deref();
    let initramfs = crate::initramfs::build(agent, modules, &vm.module_names, &cache)?;
    Ok((kernel.transpose()?, Some(initramfs)))
}

pub(super) fn purpose(name: &str) -> String {
    if name.starts_with('/') {
        format!("mount {name}")
    } else {
        name.to_owned()
    }
}

pub(super) fn listen(path: &Path) -> MicrosandboxResult<StdUnixListener> {
    StdUnixListener::bind(path)
        .map_err(|error| Error::io(format!("cannot bind `{}`", path.display()), error))
}

fn tokio_listener(listener: StdUnixListener) -> MicrosandboxResult<UnixListener> {
    listener
        .set_nonblocking(true)
        .and_then(|()| UnixListener::from_std(listener))
        .map_err(|error| Error::io("cannot listen on a socket", error))
}

/// Copies what a guest prints on a terminal to its log, until the VMM has ended.
fn keep_console(console: OwnedFd, log: &Path) -> MicrosandboxResult<()> {
    let cannot = |error| Error::io("cannot keep the guest's console", error);
    let mut log = File::options().append(true).open(log).map_err(cannot)?;
    let mut console = File::from(console);
    std::thread::Builder::new()
        .name("msb-console".to_owned())
        // The end of the terminal shows as an error; a full disk only ends the log.
        .spawn(move || std::io::copy(&mut console, &mut log))
        .map_err(cannot)?;
    Ok(())
}

/// Adds what the guest printed last, which is often the only trace.
pub(super) fn with_console(error: Error, console: &Path) -> Error {
    let text = std::fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty())
        .collect();
    let (before, last) = lines.split_at(lines.len().saturating_sub(CONSOLE_LINES));
    if last.is_empty() {
        return error;
    }
    // The registers, which come last, do not say what it was.
    let panic = before.iter().find(|line| line.contains("Kernel panic"));
    let last: Vec<&str> = panic.into_iter().chain(last).copied().collect();
    error.with_hint(format!(
        "the guest's console ends with:\n{}",
        last.join("\n")
    ))
}
