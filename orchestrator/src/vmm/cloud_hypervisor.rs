//! cloud-hypervisor: needs hardware virtualisation; the agent's stream is its vsock.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use msb_protocol::{VSOCK_PORT, VSOCK_WORD};

use super::{Driver, KERNEL_OPTIONS, Machine, no_kernel, queues};
use crate::backend::{DISK_QUEUE_SIZE, QUEUE_SIZE};
use crate::host::Programs;
use crate::plan::{BackendPlan, DevicePlan};
use crate::{Error, ErrorKind, MicrosandboxResult};

pub(super) struct CloudHypervisor;

/// Name of the socket that stands for its vsock.
const VSOCK: &str = "vsock";

/// The guest's address on its vsock; every VM has a host of its own, so all may have the same.
const GUEST: u32 = 3;

impl Driver for CloudHypervisor {
    fn name(&self) -> &'static str {
        "cloud-hypervisor"
    }

    fn program(&self, programs: &Programs) -> Option<PathBuf> {
        programs.cloud_hypervisor.clone()
    }

    fn argv(&self, machine: &Machine, _: &Programs) -> MicrosandboxResult<Vec<OsString>> {
        let kernel = machine.kernel.as_deref().ok_or_else(no_kernel)?;
        let mut argv: Vec<OsString> = vec!["--kernel".into(), kernel.into()];
        if let Some(initramfs) = machine.initramfs {
            argv.extend(["--initramfs".into(), initramfs.into()]);
        }
        let sockets = value(machine.sockets)?;
        let mut option = |name: &str, value: String| argv.extend([name.into(), value.into()]);
        option("--cmdline", format!("{KERNEL_OPTIONS} {VSOCK_WORD}"));
        option("--cpus", format!("boot={}", machine.vm.cpus));
        // The backends map the guest's memory, so it must be a file that can be passed to them.
        option(
            "--memory",
            format!("size={},shared=on", machine.vm.memory_bytes),
        );
        option("--serial", format!("file={}", value(&machine.console)?));
        option("--console", "off".to_owned());
        option(
            "--vsock",
            format!(
                "cid={GUEST},socket={}",
                value(&machine.sockets.join(VSOCK))?
            ),
        );
        option(
            "--api-socket",
            format!("path={}", value(&api(machine.sockets))?),
        );
        option("--seccomp", "true".to_owned());
        // Beside our own rules: what the VMM itself knows to be enough.
        argv.push("--landlock".into());
        let mut option = |name: &str, value: String| argv.extend([name.into(), value.into()]);
        option("--landlock-rules", format!("path={sockets},access=rw"));
        let mut shares = Vec::new();
        let mut disks = Vec::new();
        for (plan, socket) in &machine.devices {
            let socket = value(socket)?;
            let count = queues(&plan.device);
            let name = if plan.is_mount() {
                format!(",id={}", device_id(plan))
            } else {
                String::new()
            };
            match plan.device {
                DevicePlan::Fs(_) => shares.push(format!(
                    "tag={},socket={socket},num_queues={count},queue_size={QUEUE_SIZE}{name}",
                    plan.id
                )),
                DevicePlan::Blk(_) => disks.push(format!(
                    "vhost_user=on,socket={socket},num_queues={count},queue_size={DISK_QUEUE_SIZE}{name}"
                )),
            }
        }
        for (name, values) in [("--fs", shares), ("--disk", disks)] {
            if !values.is_empty() {
                argv.push(name.into());
                argv.extend(values.into_iter().map(OsString::from));
            }
        }
        Ok(argv)
    }

    fn agent_socket(&self) -> String {
        // It connects to the socket that is named after its own and the port that the guest asks for.
        format!("{VSOCK}_{VSOCK_PORT}")
    }
}

/// Its name of the device of a mount.
pub(super) fn device_id(plan: &BackendPlan) -> String {
    format!("m-{}", plan.id)
}

/// Its control socket.
pub(super) fn api(sockets: &Path) -> PathBuf {
    sockets.join("api")
}

/// A path as the value of a property: quoted, where a comma would end it.
fn value(path: &Path) -> MicrosandboxResult<String> {
    match path.to_str() {
        Some(text) if !text.contains(['"', ',', '[']) => Ok(text.to_owned()),
        Some(text) if !text.contains('"') => Ok(format!("\"{text}\"")),
        _ => Err(Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "cloud-hypervisor cannot be given the path `{}`",
                path.display()
            ),
        )
        .with_hint("move it, or choose --vmm qemu")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_quoted_where_they_must_be() {
        assert_eq!(value(Path::new("/run/d0")).unwrap(), "/run/d0");
        assert_eq!(value(Path::new("/a,b")).unwrap(), "\"/a,b\"");
        assert!(value(Path::new("/a\"b")).is_err());
        assert_eq!(CloudHypervisor.agent_socket(), "vsock_7173");
    }
}
