//! libkrun: a library that turns its process into the VM, so `msb` is started anew for it.
//!
//! The driver renders a [`Machine`] for that process; [`become_machine`] is what it does. The
//! library's own file server gets no host directory: it serves the agent, from memory. Everything
//! else comes from our backends, and the kernel from libkrunfw.

mod filter;
#[allow(unsafe_code)]
mod sys;

use std::ffi::{CStr, CString, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Driver, queues};
use crate::backend::{DISK_QUEUE_SIZE, QUEUE_SIZE};
use crate::host::Programs;
use crate::plan::DevicePlan;
use crate::{Error, ErrorKind, MicrosandboxResult};
use sys::{Context, Refused};

/// Virtio's numbers of the two kinds of devices.
const FILE_SYSTEM: u32 = 26;
const BLOCK: u32 = 2;

/// Folders that the agent mounts on and cannot make itself, for this root takes none.
const FOLDERS: [&CStr; 7] = [
    c"dev", c"proc", c"sys", c"lower", c"upper", c"root", c"staging",
];

/// The library logs warnings and errors.
const WARNINGS: u32 = 2;

pub(super) struct Libkrun;

/// What the process that becomes the machine is told, as JSON on its command line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Machine {
    library: PathBuf,
    cpus: u8,
    memory_mib: u32,
    /// The program that is PID 1.
    init: PathBuf,
    /// Socket that the agent's stream is connected to.
    agent: PathBuf,
    devices: Vec<Device>,
}

/// A device of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Device {
    kind: u32,
    name: String,
    socket: PathBuf,
    queue_sizes: Vec<u16>,
}

/// Why a libkrun cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unusable {
    #[error("it cannot be loaded: {0}")]
    Load(String),
    #[error("it has no function {0}: it is older than vhost-user devices")]
    Symbol(&'static str),
    #[error("its kernel cannot be loaded: {0}")]
    Kernel(String),
    #[error("it was built without its feature vhost-user")]
    NoVhostUser,
}

impl Driver for Libkrun {
    fn name(&self) -> &'static str {
        "libkrun"
    }

    fn program(&self, _programs: &Programs) -> Option<PathBuf> {
        crate::supervisor::msb_program().ok()
    }

    fn argv(
        &self,
        machine: &super::Machine,
        programs: &Programs,
    ) -> MicrosandboxResult<Vec<OsString>> {
        let missing = |what: &str| {
            Error::new(ErrorKind::Unsupported, format!("{what} was not found"))
                .with_hint("`msb doctor` says what is missing and how to get it")
        };
        let mebibytes = machine.vm.memory_bytes.div_ceil(1 << 20);
        let described = Machine {
            library: programs.libkrun.clone().ok_or_else(|| missing("libkrun"))?,
            cpus: machine.vm.cpus,
            memory_mib: u32::try_from(mebibytes).unwrap_or(u32::MAX),
            init: programs.agent.clone().ok_or_else(|| missing("msb-agent"))?,
            agent: machine.agent.clone(),
            devices: machine
                .devices
                .iter()
                .map(|(plan, socket)| device(&plan.id, &plan.device, socket))
                .collect(),
        };
        let text = serde_json::to_string(&described).map_err(|error| {
            Error::new(
                ErrorKind::InvalidConfig,
                "a path is not UTF-8, which libkrun needs",
            )
            .with_source(error)
        })?;
        Ok(vec!["krun".into(), text.into()])
    }

    fn reads(&self, programs: &Programs) -> Vec<PathBuf> {
        let folder = programs.libkrun.as_deref().and_then(Path::parent);
        let agent = programs.agent.clone();
        folder
            .map(Path::to_owned)
            .into_iter()
            .chain(agent)
            .collect()
    }

    fn console_is_a_terminal(&self) -> bool {
        true
    }
}

fn device(id: &str, device: &DevicePlan, socket: &Path) -> Device {
    let count = usize::from(queues(device));
    let (kind, queue_sizes) = match device {
        // One more queue for what must not wait.
        DevicePlan::Fs(_) => (FILE_SYSTEM, vec![QUEUE_SIZE; count + 1]),
        DevicePlan::Blk(_) => (BLOCK, vec![DISK_QUEUE_SIZE; count]),
    };
    Device {
        kind,
        name: id.to_owned(),
        socket: socket.to_owned(),
        queue_sizes,
    }
}

/// Becomes the machine that `text` describes. Its console is the terminal on standard input. When
/// that succeeds, the process ends with the machine.
///
/// # Errors
///
/// When the machine cannot be started.
pub fn become_machine(text: &str) -> MicrosandboxResult<()> {
    let machine: Machine = serde_json::from_str(text).map_err(|error| {
        Error::new(
            ErrorKind::InvalidConfig,
            "the machine is not described well",
        )
        .with_source(error)
    })?;
    let library = &machine.library;
    let context = Context::open(library).map_err(|why| unusable(library, &why))?;
    let init = std::fs::read(&machine.init)
        .map_err(|error| Error::io(format!("cannot read `{}`", machine.init.display()), error))?;
    let stream = UnixStream::connect(&machine.agent)
        .map_err(|error| Error::io("cannot connect to the supervisor", error))?;
    // The library takes no terminal with the number zero.
    let terminal = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|error| Error::io("there is no console", error))?;
    let refused = |error: Refused| {
        let lacks_devices = error.lacks_devices();
        let refused = Error::new(ErrorKind::BootStart, error.to_string());
        let refused = refused.with_source(error.into_reason());
        if lacks_devices {
            refused.with_hint(Unusable::NoVhostUser.to_string())
        } else {
            refused
        }
    };
    context.set_log_level(WARNINGS).map_err(refused)?;
    context
        .set_machine(machine.cpus, machine.memory_mib)
        .and_then(|()| context.set_init(init.leak(), &FOLDERS))
        .map_err(refused)?;
    let port = CString::new(msb_protocol::PORT_NAME).unwrap_or_default();
    context
        .add_ports(for_good(terminal), &port, for_good(stream.into()))
        .map_err(refused)?;
    for device in &machine.devices {
        let socket = CString::new(device.socket.as_os_str().as_bytes());
        let (Ok(socket), Ok(name)) = (socket, CString::new(device.name.as_str())) else {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                "a name holds a zero byte",
            ));
        };
        context
            .add_device(device.kind, &socket, &name, &device.queue_sizes)
            .map_err(refused)?;
    }
    // Like the other layers around a VMM: one that the host does not allow is said and left out.
    if let Err(error) = filter::install() {
        tracing::warn!("the VMM runs without a system call filter: {error}");
    }
    Err(refused(context.start()))
}

/// Tries whether the library can do what is needed of it, without starting a machine.
///
/// # Errors
///
/// [`ErrorKind::Unsupported`] with the reason.
pub fn probe(library: &Path) -> MicrosandboxResult<()> {
    let context = Context::open(library).map_err(|why| unusable(library, &why))?;
    // Nothing is connected before the start.
    let added = context.add_device(BLOCK, &c"/nonexistent".into(), &c"probe".into(), &[1]);
    context.free();
    match added {
        Err(error) if error.lacks_devices() => Err(unusable(library, &Unusable::NoVhostUser)),
        _ => Ok(()),
    }
}

fn unusable(library: &Path, why: &Unusable) -> Error {
    let message = format!("`{}` cannot be used: {why}", library.display());
    Error::new(ErrorKind::Unsupported, message).with_hint(match why {
        Unusable::Kernel(_) => {
            "put libkrunfw.so.5 beside it (Debian: the package libkrunfw5), or choose --vmm qemu"
        }
        _ => {
            "libkrun's main branch, built with `make BLK=1 VHOST_USER=1`, has what is needed; \
             name it in MSB_LIBKRUN, or choose --vmm qemu"
        }
    })
}

/// A descriptor that stays open as long as the process lives.
fn for_good(fd: OwnedFd) -> BorrowedFd<'static> {
    let fd: &'static OwnedFd = Box::leak(Box::new(fd));
    fd.as_fd()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_survives_its_command_line() {
        let machine = Machine {
            library: "/usr/lib/libkrun.so.1".into(),
            cpus: 2,
            memory_mib: 512,
            init: "/usr/libexec/msb-agent".into(),
            agent: "/run/a b".into(),
            devices: vec![Device {
                kind: BLOCK,
                name: "root".into(),
                socket: "/run/d0".into(),
                queue_sizes: vec![DISK_QUEUE_SIZE],
            }],
        };
        let text = serde_json::to_string(&machine).unwrap();
        assert_eq!(serde_json::from_str::<Machine>(&text).unwrap(), machine);
        assert!(become_machine("{}").is_err());
    }

    #[test]
    fn the_functions_are_those_of_the_header() {
        assert_eq!(sys::SYMBOLS.len(), 15);
        assert!(sys::SYMBOLS.contains(&"krun_add_vhost_user_device"));
    }

    #[test]
    fn what_is_no_library_is_said_to_be_none() {
        let error = probe(Path::new("/nonexistent/libkrun.so")).unwrap_err();
        assert!(
            error.to_string().contains("/nonexistent/libkrun.so"),
            "{error}"
        );
        assert!(error.hint().is_some());
    }
}
