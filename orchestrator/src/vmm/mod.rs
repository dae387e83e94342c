//! A VM plan and the sockets of its devices → one VMM process.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::host::Programs;
use crate::plan::{BackendPlan, DevicePlan, VmPlan};
use crate::spec::VmmKind;
use crate::{Error, ErrorKind, MicrosandboxResult};

mod qemu;

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
    /// The devices, and the socket that each is served on.
    pub(crate) devices: Vec<(&'a BackendPlan, PathBuf)>,
    /// A socket that is listened on; whoever connects is the agent.
    pub(crate) agent: PathBuf,
    /// Takes what the guest's console prints.
    pub(crate) console: PathBuf,
}

/// One way of running a VM.
trait Driver {
    /// Its program.
    fn program(&self, programs: &Programs) -> Option<PathBuf>;

    /// How the program is called in messages.
    fn name(&self) -> &'static str;

    /// The arguments of the program.
    fn argv(&self, machine: &Machine) -> MicrosandboxResult<Vec<OsString>>;
}

/// The command that runs the machine. It ends with its parent.
pub(crate) fn command(machine: &Machine, programs: &Programs) -> MicrosandboxResult<Command> {
    let driver: &dyn Driver = match machine.vm.vmm {
        VmmKind::Qemu => &qemu::Qemu,
        VmmKind::CloudHypervisor | VmmKind::Libkrun => {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "this VMM is not driven yet: use `--vmm qemu`",
            ));
        }
    };
    let program = driver.program(programs).ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            format!("{} was not found", driver.name()),
        )
        .with_hint("`msb doctor` says what is missing and how to get it")
    })?;
    let mut command = crate::supervisor::tied_to_parent(&program)?;
    command
        .args(driver.argv(machine)?)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    Ok(command)
}

/// Number of request queues of a device.
fn queues(device: &DevicePlan) -> u16 {
    match device {
        DevicePlan::Fs(share) => share.queues,
        DevicePlan::Blk(disk) => disk.queues,
    }
}
