//! A VM plan and the sockets of its devices → one VMM process.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::backend::Jail;
use crate::host::Programs;
use crate::plan::{BackendPlan, DevicePlan, VmPlan};
use crate::spec::VmmKind;
use crate::{Error, ErrorKind, MicrosandboxResult};

mod cloud_hypervisor;
mod confine;
mod libkrun;
mod monitor;
mod plug;
mod qemu;
#[allow(unsafe_code)]
mod sys;

pub use confine::{Reach, confine};
pub use libkrun::{become_machine, probe};
pub(crate) use plug::Plug;
pub(crate) use sys::close_inherited;

/// Quiet, so that a boot that works prints nothing; a panic ends the VM instead of hanging it. The
/// rest leaves out what takes long under emulation and what no guest of ours needs: self-tests, a
/// random number generator that times the processor.
const KERNEL_OPTIONS: &str = "console=ttyS0 quiet panic=-1 cryptomgr.notests \
    random.trust_cpu=on initcall_blacklist=jent_mod_init";

/// Everything that a VMM is given.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    /// Name of the sandbox.
    pub(crate) name: &'a str,
    pub(crate) vm: &'a VmPlan,
    /// Guest kernel (QEMU, cloud-hypervisor).
    pub(crate) kernel: Option<PathBuf>,
    /// Agent and kernel modules (QEMU, cloud-hypervisor).
    pub(crate) initramfs: Option<&'a Path>,
    /// Folder of its sockets.
    pub(crate) sockets: &'a Path,
    /// The devices, and the socket that each is served on.
    pub(crate) devices: Vec<(&'a BackendPlan, PathBuf)>,
    /// A socket that is listened on; whoever connects is the agent.
    pub(crate) agent: PathBuf,
    /// Takes what the guest's console prints.
    pub(crate) console: PathBuf,
}

/// One way of running a VM.
trait Driver {
    /// How the program is called in messages.
    fn name(&self) -> &'static str;

    /// Its program.
    fn program(&self, programs: &Programs) -> Option<PathBuf>;

    /// The arguments of the program.
    fn argv(&self, machine: &Machine, programs: &Programs) -> MicrosandboxResult<Vec<OsString>>;

    /// Name of the socket on which the supervisor listens for the agent.
    fn agent_socket(&self) -> String {
        "agent".to_owned()
    }

    /// Files and folders that it reads, beyond kernel and initramfs.
    fn reads(&self, _programs: &Programs) -> Vec<PathBuf> {
        Vec::new()
    }

    /// Whether the guest's console is a terminal on standard input; else the program writes the
    /// log by itself.
    fn console_is_a_terminal(&self) -> bool {
        false
    }
}

/// How a machine is started.
#[derive(Debug)]
pub(crate) struct Launch {
    /// The command that runs it. It ends with its parent.
    pub(crate) command: Command,
    /// What the guest prints comes out here, when it has to be copied to the log.
    pub(crate) console: Option<OwnedFd>,
}

fn driver(vmm: VmmKind) -> &'static dyn Driver {
    match vmm {
        VmmKind::Qemu => &qemu::Qemu,
        VmmKind::CloudHypervisor => &cloud_hypervisor::CloudHypervisor,
        VmmKind::Libkrun => &libkrun::Libkrun,
    }
}

/// Name of the socket on which the supervisor listens for the agent.
pub(crate) fn agent_socket(vmm: VmmKind) -> String {
    driver(vmm).agent_socket()
}

/// How the machine is started, confined unless the jails are turned off.
pub(crate) fn launch(
    machine: &Machine,
    programs: &Programs,
    jail: Jail,
) -> MicrosandboxResult<Launch> {
    let driver = driver(machine.vm.vmm);
    let program = driver.program(programs).ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            format!("{} was not found", driver.name()),
        )
        .with_hint("`msb doctor` says what is missing and how to get it")
    })?;
    // The log must exist for a rule to be made about it.
    File::create(&machine.console)
        .map_err(|error| Error::io("cannot make the log of the console", error))?;
    let reach = (jail != Jail::None).then(|| reach(driver, machine, &program, programs));
    let mut command = crate::supervisor::tied_to_parent(&program, reach.as_ref())?;
    command
        .args(driver.argv(machine, programs)?)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut console = None;
    if driver.console_is_a_terminal() {
        let (ours, theirs) =
            terminal().map_err(|error| Error::io("cannot make a terminal", error))?;
        command.stdin(Stdio::from(theirs));
        console = Some(ours);
    }
    Ok(Launch { command, console })
}

fn reach(driver: &dyn Driver, machine: &Machine, program: &Path, programs: &Programs) -> Reach {
    let mut reach = Reach {
        read: driver.reads(programs),
        write: vec![machine.sockets.to_owned(), machine.console.clone()],
    };
    let files = [machine.kernel.as_deref(), machine.initramfs, Some(program)];
    for file in files.into_iter().flatten() {
        reach.reads(file);
    }
    reach
}

/// A new terminal: our end and the machine's.
fn terminal() -> std::io::Result<(OwnedFd, OwnedFd)> {
    use rustix::fs::{Mode, OFlags};
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let name = ptsname(&ours, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let theirs = rustix::fs::open(name, flags, Mode::empty())?;
    Ok((ours, theirs))
}

fn no_kernel() -> Error {
    Error::new(ErrorKind::InvalidConfig, "there is no guest kernel")
        .with_hint("`msb doctor` says how to get one")
}

/// Number of request queues of a device.
fn queues(device: &DevicePlan) -> u16 {
    match device {
        DevicePlan::Fs(share) => share.queues,
        DevicePlan::Blk(disk) => disk.queues,
    }
}

#[cfg(test)]
mod tests;
