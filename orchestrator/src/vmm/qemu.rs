//! QEMU: works on any machine, with kvm where it is usable and emulation elsewhere.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::{Driver, KERNEL_OPTIONS, Machine, no_kernel, queues};
use crate::MicrosandboxResult;
use crate::backend::{DISK_QUEUE_SIZE, QUEUE_SIZE};
use crate::host::Programs;
use crate::plan::{BackendPlan, DevicePlan};
use crate::spec::Accel;

pub(super) struct Qemu;

impl Driver for Qemu {
    fn name(&self) -> &'static str {
        "QEMU"
    }

    fn program(&self, programs: &Programs) -> Option<PathBuf> {
        programs.qemu.clone()
    }

    fn argv(&self, machine: &Machine, _: &Programs) -> MicrosandboxResult<Vec<OsString>> {
        let kernel = machine.kernel.as_deref().ok_or_else(no_kernel)?;
        let mut line = CommandLine::default();
        line.option("-name", &[("guest", machine.name.as_ref())]);
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            line.0.push(flag.into());
        }
        line.words(&["-display", "none", "-monitor", "none", "-parallel", "none"]);
        // It opens what it needs and then neither starts programs nor changes who it is.
        line.words(&[
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny",
        ]);
        let accel = match machine.vm.accel {
            Accel::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Accel::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        };
        line.words(&accel);
        line.words(&[
            "-machine",
            "q35,usb=off,vmport=off,smbus=off,sata=off,hpet=off,i8042=off,memory-backend=memory",
        ]);
        line.words(&["-smp", &machine.vm.cpus.to_string()]);
        let bytes = machine.vm.memory_bytes.to_string();
        line.words(&["-m", &format!("{bytes}B")]);
        // The backends map the guest's memory, so it must be a file that can be passed to them.
        line.words(&[
            "-object",
            &format!("memory-backend-memfd,id=memory,size={bytes},share=on"),
        ]);
        line.0.extend(["-kernel".into(), kernel.into()]);
        if let Some(initramfs) = machine.initramfs {
            line.0.extend(["-initrd".into(), initramfs.into()]);
        }
        line.words(&["-append", &kernel_line(machine.vm.accel)]);
        line.option(
            "-chardev",
            &[
                ("", "file".as_ref()),
                ("id", "console".as_ref()),
                ("path", machine.console.as_ref()),
            ],
        );
        line.words(&["-serial", "chardev:console"]);
        line.option(
            "-chardev",
            &[
                ("", "socket".as_ref()),
                ("id", "agent".as_ref()),
                ("path", machine.agent.as_ref()),
            ],
        );
        line.words(&["-device", "virtio-serial-pci,max_ports=2"]);
        let port = format!(
            "virtserialport,chardev=agent,name={}",
            msb_protocol::PORT_NAME
        );
        line.words(&["-device", &port]);
        // It is asked for devices here; it connects by itself, so that nobody else can.
        line.option(
            "-chardev",
            &[
                ("", "socket".as_ref()),
                ("id", "monitor".as_ref()),
                ("path", machine.sockets.join(MONITOR).as_ref()),
            ],
        );
        line.words(&["-mon", "chardev=monitor,mode=control"]);
        // Where volumes are plugged in, also while the guest runs. One bridge with 32 places, which
        // ACPI serves, lets a device go within 0.2 s: a root port takes one device each, and with
        // PCIe's own hot-plug five seconds to let it go.
        line.words(&["-device", &format!("pci-bridge,id={BUS},chassis_nr=1")]);
        for (number, (plan, socket)) in machine.devices.iter().enumerate() {
            line.device(number, plan, socket);
        }
        Ok(line.0)
    }
}

/// Socket of the supervisor that QEMU connects to for what it is told while it runs.
pub(super) const MONITOR: &str = "monitor";

/// The bus of the devices that come and go.
pub(super) const BUS: &str = "plug";

/// QEMU's name of the device of a mount.
pub(super) fn device_id(plan: &BackendPlan) -> String {
    format!("m-{}", plan.id)
}

/// QEMU's name of the connection to the backend of a mount.
pub(super) fn chardev_id(plan: &BackendPlan) -> String {
    format!("c-{}", plan.id)
}

/// Emulated on a busy machine, the timer may tick too seldom for the kernel's check, and it panics.
fn kernel_line(accel: Accel) -> String {
    match accel {
        Accel::Kvm => KERNEL_OPTIONS.to_owned(),
        Accel::Tcg => format!("{KERNEL_OPTIONS} no_timer_check"),
    }
}

#[derive(Default)]
struct CommandLine(Vec<OsString>);

impl CommandLine {
    /// The device of a backend, and QEMU's connection to it.
    fn device(&mut self, number: usize, plan: &BackendPlan, socket: &Path) {
        let plugged = plan.is_mount();
        let chardev = if plugged {
            chardev_id(plan)
        } else {
            format!("device{number}")
        };
        let mut properties: Vec<(&str, &OsStr)> = vec![
            ("", "socket".as_ref()),
            ("id", chardev.as_ref()),
            ("path", socket.as_ref()),
        ];
        if matches!(plan.device, DevicePlan::Blk(_)) {
            // Seconds, as every version takes them: the supervisor starts a disk's backend again.
            properties.push(("reconnect", "1".as_ref()));
        }
        self.option("-chardev", &properties);
        let count = queues(&plan.device);
        let mut device = match plan.device {
            DevicePlan::Fs(_) => format!(
                "vhost-user-fs-pci,chardev={chardev},tag={},queue-size={QUEUE_SIZE},num-request-queues={count}",
                plan.id
            ),
            DevicePlan::Blk(_) => format!(
                "vhost-user-blk-pci,chardev={chardev},queue-size={DISK_QUEUE_SIZE},num-queues={count}"
            ),
        };
        if plugged {
            device.push_str(&format!(",bus={BUS},id={}", device_id(plan)));
        }
        self.words(&["-device", &device]);
    }

    fn words(&mut self, words: &[&str]) {
        self.0.extend(words.iter().map(OsString::from));
    }

    /// An option with properties, which commas separate; commas in values are doubled.
    fn option(&mut self, name: &str, properties: &[(&str, &OsStr)]) {
        let mut text = Vec::new();
        for (key, value) in properties {
            if !text.is_empty() {
                text.push(b',');
            }
            if !key.is_empty() {
                text.extend_from_slice(key.as_bytes());
                text.push(b'=');
            }
            for byte in value.as_bytes() {
                text.push(*byte);
                if *byte == b',' {
                    text.push(b',');
                }
            }
        }
        self.0.extend([name.into(), OsString::from_vec(text)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_in_paths_are_doubled() {
        let mut line = CommandLine::default();
        line.option(
            "-chardev",
            &[("", "file".as_ref()), ("path", "/a,b".as_ref())],
        );
        assert_eq!(line.0, ["-chardev", "file,path=/a,,b"]);
    }
}
