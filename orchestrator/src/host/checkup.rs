//! What a machine has and lacks for running sandboxes, with the command that mends it.

use std::fs;

use rustix::fs::XattrFlags;
use serde::Serialize;

use super::{KernelFacts, KvmFacts, Programs, in_path};
use crate::rundir::Home;

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What.
    pub subject: &'static str,
    /// How it is.
    pub verdict: Verdict,
    /// What was found, in words.
    pub detail: String,
    /// What to do about it.
    pub remedy: Option<String>,
}

/// How a thing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Fine,
    /// Sandboxes run without it, but slower or with less.
    Lacking,
    /// No sandbox runs without it.
    Broken,
}

/// Looks at everything that a sandbox may need. A file is made in `home` and removed again.
pub fn examine(home: &Home) -> Vec<Finding> {
    let programs = Programs::find();
    let kvm = KvmFacts::read();
    let mut findings = vec![processor(kvm), vmm(kvm, &programs), kernel(home)];
    let beside = "put it beside `msb`, or set MSB_BIN_DIR to its folder (make build makes it)";
    for (subject, found, remedy) in [
        ("msb-fs", programs.fs, beside),
        ("msb-blk", programs.blk, beside),
        ("msb-agent", programs.agent, beside),
        ("mkfs.ext4", programs.mkfs, "apt-get install e2fsprogs"),
        ("debugfs", in_path("debugfs"), "apt-get install e2fsprogs"),
    ] {
        findings.push(match found {
            Some(path) => fine(subject, path.display().to_string()),
            None => finding(subject, Verdict::Broken, "was not found", remedy),
        });
    }
    findings.push(attributes(home));
    findings
}

fn fine(subject: &'static str, detail: impl Into<String>) -> Finding {
    Finding {
        subject,
        verdict: Verdict::Fine,
        detail: detail.into(),
        remedy: None,
    }
}

fn finding(
    subject: &'static str,
    verdict: Verdict,
    detail: impl Into<String>,
    remedy: impl Into<String>,
) -> Finding {
    Finding {
        subject,
        verdict,
        detail: detail.into(),
        remedy: Some(remedy.into()),
    }
}

fn processor(kvm: KvmFacts) -> Finding {
    let subject = "virtualisation";
    match (kvm.opens, kvm.processor) {
        (true, true) => fine(subject, "/dev/kvm opens and the processor has it"),
        (false, true) => finding(
            subject,
            Verdict::Lacking,
            "the processor has it, but /dev/kvm cannot be opened: guests are emulated",
            "modprobe kvm_intel or kvm_amd; usermod -aG kvm $USER, then log in again",
        ),
        (_, false) => finding(
            subject,
            Verdict::Lacking,
            "the processor does not offer it: guests are emulated, which is slow",
            "turn it on in the firmware, or nested virtualisation in the hypervisor below",
        ),
    }
}

fn vmm(kvm: KvmFacts, programs: &Programs) -> Finding {
    let subject = "VMM";
    let usable = [
        (
            programs.libkrun.as_ref().filter(|_| kvm.usable()),
            "libkrun",
        ),
        (
            programs.cloud_hypervisor.as_ref().filter(|_| kvm.usable()),
            "cloud-hypervisor",
        ),
        (programs.qemu.as_ref(), "QEMU"),
    ];
    let mut found: Vec<String> = usable
        .iter()
        .filter_map(|(path, name)| path.map(|path| format!("{name} ({})", path.display())))
        .collect();
    found.extend(programs.unfit_libkrun.clone());
    if usable.iter().all(|(path, _)| path.is_none()) {
        let detail = if found.is_empty() {
            "none was found".to_owned()
        } else {
            found.join("; ")
        };
        return finding(
            subject,
            Verdict::Broken,
            detail,
            "apt-get install qemu-system-x86",
        );
    }
    fine(subject, found.join(", "))
}

fn kernel(home: &Home) -> Finding {
    let subject = "guest kernel";
    let remedy = "tests/setup.sh FOLDER unpacks Debian's, then set MSB_KERNEL=FOLDER/kernel";
    match KernelFacts::find(home) {
        Ok(KernelFacts {
            image,
            modules: Some(_),
        }) => fine(subject, image.display().to_string()),
        Ok(KernelFacts {
            image,
            modules: None,
        }) => finding(
            subject,
            Verdict::Lacking,
            format!(
                "{} has no modules beside it: disks and overlays must be built in",
                image.display()
            ),
            remedy,
        ),
        Err(why) => finding(subject, Verdict::Broken, why, remedy),
    }
}

/// Whether owners and modes of guests can be recorded where our own state lies.
fn attributes(home: &Home) -> Finding {
    let subject = "MSB_HOME";
    let place = home.path().display();
    let probe = home.path().join(".probe");
    let tried = fs::write(&probe, "")
        .map_err(|error| error.to_string())
        .and_then(|()| {
            rustix::fs::setxattr(
                probe.as_path(),
                "user.msb.probe",
                b"x".as_slice(),
                XattrFlags::empty(),
            )
            .map_err(|errno| format!("no extended attributes there: {errno}"))
        });
    let _ = fs::remove_file(&probe);
    match tried {
        Ok(()) => fine(
            subject,
            format!("{place} is writable and keeps extended attributes"),
        ),
        Err(why) => finding(
            subject,
            Verdict::Broken,
            format!("{place}: {why}"),
            "set MSB_HOME to a folder on ext4, xfs or btrfs",
        ),
    }
}
