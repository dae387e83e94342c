//! The virtual machine: which program runs it, on what processor, with which kernel.

use super::VmPlan;
use super::refusal::HostGap;
use crate::host::HostFacts;
use crate::spec::{Accel, SandboxSpec, VmmKind};

/// Interrupt lines that libkrun has for virtio devices on x86 (5 to 15), less those of its own
/// balloon and entropy source, of the console, and of the share that holds the agent.
const LIBKRUN_DEVICES: usize = 11 - 4;

/// Devices that the bus takes on which volumes are plugged in.
pub(super) const PLACES: usize = 32;

/// Kernel modules that every guest needs, unless they are built in.
const BASE_MODULES: [&str; 7] = [
    "virtio_pci",
    "virtio_mmio",
    "virtio_console",
    "virtio_blk",
    "virtiofs",
    "ext4",
    "overlay",
];

/// What carries the agent's stream in cloud-hypervisor.
const VSOCK_MODULE: &str = "vmw_vsock_virtio_transport";

/// Modules of the file systems that the guest can tell by their marks, for a disk image of which
/// nobody says what it holds.
const PROBED: [&str; 9] = [
    "xfs", "btrfs", "vfat", "exfat", "ntfs3", "f2fs", "squashfs", "erofs", "isofs",
];

/// Code pages that vfat asks for by itself.
const VFAT_PAGES: [&str; 3] = ["nls_cp437", "nls_ascii", "nls_iso8859_1"];

/// Chooses the VMM and its kernel. `disks` are the file systems of the mounted disks, where known.
pub(super) fn plan(
    spec: &SandboxSpec,
    facts: &HostFacts,
    devices: usize,
    disks: &[Option<String>],
    gaps: &mut Vec<HostGap>,
) -> VmPlan {
    let (vmm, accel, reason) = match choose(spec, facts, devices) {
        Ok(choice) => choice,
        Err(gap) => {
            gaps.push(gap);
            (VmmKind::Qemu, Accel::Tcg, String::new())
        }
    };
    let mut plan = VmPlan {
        vmm,
        accel,
        reason,
        cpus: spec.cpus,
        memory_bytes: spec.memory.bytes(),
        kernel: None,
        modules: None,
        module_names: Vec::new(),
    };
    // libkrun brings its own kernel.
    if vmm != VmmKind::Libkrun {
        match &facts.kernel {
            Ok(kernel) => {
                plan.kernel = Some(kernel.image.clone());
                plan.modules = kernel.modules.clone();
                plan.module_names = modules(disks);
                if vmm == VmmKind::CloudHypervisor {
                    plan.module_names.push(VSOCK_MODULE.to_owned());
                }
            }
            Err(why) => gaps.push(HostGap::Kernel(why.clone())),
        }
    }
    plan
}

fn choose(
    spec: &SandboxSpec,
    facts: &HostFacts,
    devices: usize,
) -> Result<(VmmKind, Accel, String), HostGap> {
    let programs = &facts.programs;
    let usable = facts.kvm.usable();
    let asked = spec.vmm.or(facts.preference.vmm);
    let asked_accel = spec.accel.or(facts.preference.accel);
    if asked_accel == Some(Accel::Kvm) && !facts.kvm.opens {
        return Err(HostGap::NoKvm);
    }
    // Asked for, it is tried as long as the device opens.
    let kvm = asked_accel == Some(Accel::Kvm) || (usable && asked_accel.is_none());
    let accel = if kvm { Accel::Kvm } else { Accel::Tcg };
    let chosen = |vmm, reason: &str| Ok((vmm, accel, reason.to_owned()));
    match asked {
        Some(VmmKind::Qemu) => {
            programs.qemu.as_ref().ok_or(HostGap::Vmm(VmmKind::Qemu))?;
            chosen(VmmKind::Qemu, "asked for")
        }
        Some(VmmKind::CloudHypervisor) => {
            let needed = programs.cloud_hypervisor.as_ref();
            needed.ok_or(HostGap::Vmm(VmmKind::CloudHypervisor))?;
            if !kvm {
                return Err(HostGap::NeedsKvm(VmmKind::CloudHypervisor));
            }
            chosen(VmmKind::CloudHypervisor, "asked for")
        }
        Some(VmmKind::Libkrun) => {
            if let Some(old) = &programs.unfit_libkrun {
                return Err(HostGap::UnfitLibkrun(old.clone()));
            }
            programs
                .libkrun
                .as_ref()
                .ok_or(HostGap::Vmm(VmmKind::Libkrun))?;
            if !kvm {
                return Err(HostGap::NeedsKvm(VmmKind::Libkrun));
            }
            if devices > LIBKRUN_DEVICES {
                return Err(HostGap::TooManyDevices {
                    devices,
                    most: LIBKRUN_DEVICES,
                });
            }
            chosen(VmmKind::Libkrun, "asked for")
        }
        None if kvm && programs.libkrun.is_some() && devices <= LIBKRUN_DEVICES => chosen(
            VmmKind::Libkrun,
            "hardware virtualisation is usable and libkrun was found",
        ),
        None if kvm && programs.cloud_hypervisor.is_some() => chosen(
            VmmKind::CloudHypervisor,
            "hardware virtualisation is usable and cloud-hypervisor was found",
        ),
        None => {
            programs.qemu.as_ref().ok_or(HostGap::Program("qemu"))?;
            let reason = match (kvm, facts.kvm.opens, asked_accel) {
                (true, _, _) if programs.libkrun.is_some() => {
                    "hardware virtualisation is usable, but libkrun takes fewer devices; QEMU was found"
                }
                (true, _, _) => "hardware virtualisation is usable, and QEMU was found",
                (_, _, Some(Accel::Tcg)) => "emulation was asked for",
                (_, true, _) => "/dev/kvm opens, but the processor has neither vmx nor svm",
                (_, false, _) => "/dev/kvm cannot be opened",
            };
            chosen(VmmKind::Qemu, reason)
        }
    }
}

pub(super) fn modules(disks: &[Option<String>]) -> Vec<String> {
    let mut names: Vec<&str> = BASE_MODULES.to_vec();
    for fstype in disks {
        match fstype.as_deref() {
            None => names.extend(PROBED),
            // Where the module has another name than the file system.
            Some("iso9660") => names.push("isofs"),
            Some("ext2" | "ext3") => names.push("ext4"),
            Some(named) => names.push(named),
        }
    }
    if names.contains(&"vfat") {
        names.extend(VFAT_PAGES);
    }
    let mut unique: Vec<String> = Vec::new();
    for name in names {
        if !unique.iter().any(|seen| seen == name) {
            unique.push(name.to_owned());
        }
    }
    unique
}
