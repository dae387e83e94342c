//! What a VMM's process may still reach: its program and libraries, and the files of its sandbox.
//!
//! It is put up by the process that becomes the VMM, right before it does: no new privileges, no
//! network, no capability but root's over files, and Landlock. A VMM is not as hostile as a
//! backend, whose jail is demanded; here a layer that the host does not allow is said and left out.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};
use rustix::process::{getegid, geteuid};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};

use super::sys;

/// The newest version whose rights are asked for; older kernels grant what they know.
const NEWEST: ABI = ABI::V9;

/// Where programs and libraries lie, and what they look up about the machine as they start. The
/// folder of the process itself is meant by `/proc/self`.
const SYSTEM: [&str; 16] = [
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/sys/vm",
    "/sys/devices/system",
    "/sys/kernel/mm",
    "/dev/urandom",
    "/dev/random",
];

/// The devices that a VMM drives.
const DEVICES: [&str; 2] = ["/dev/kvm", "/dev/null"];

/// Files beyond those of the system.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reach {
    /// Files and folders that are read, and programs that are run.
    pub read: Vec<PathBuf>,
    /// Files and folders that are written, and sockets that are used.
    pub write: Vec<PathBuf>,
}

/// Confines this process, and the program it becomes, to `reach`. It must have one thread.
pub fn confine(reach: &Reach) {
    for (layer, put_up) in [
        (
            "namespaces of its own",
            leave_namespaces as fn(&Reach) -> io::Result<()>,
        ),
        ("fewer capabilities", |_| drop_capabilities()),
        ("no new privileges", |_| {
            Ok(rustix::thread::set_no_new_privs(true)?)
        }),
        ("Landlock", restrict_files),
    ] {
        if let Err(error) = put_up(reach) {
            tracing::warn!("the VMM runs without {layer}: {error}");
        }
    }
}

/// Leaves network, IPC and host name behind. The pid stays, by which the supervisor knows it.
fn leave_namespaces(_reach: &Reach) -> io::Result<()> {
    let others = UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    if geteuid().is_root() {
        return sys::unshare(others);
    }
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    sys::unshare(others | UnshareFlags::NEWUSER)?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/gid_map", format!("{group} {group} 1"))?;
    fs::write("/proc/self/uid_map", format!("{user} {user} 1"))
}

/// Root keeps its power over files, which Landlock bounds: the state folder may belong to another
/// user. An ordinary user's capabilities in its namespace end with the program it becomes.
fn drop_capabilities() -> io::Result<()> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let kept = CapabilitySet::DAC_OVERRIDE;
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if capability == kept {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // Beyond the last one that this kernel knows.
            Err(rustix::io::Errno::INVAL) => break,
            other => other?,
        }
    }
    rustix::thread::clear_ambient_capability_set()?;
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

fn restrict_files(reach: &Reach) -> io::Result<()> {
    let looks = make_bitflags!(AccessFs::{Execute | ReadFile | ReadDir});
    let drives = make_bitflags!(AccessFs::{ReadFile | WriteFile | IoctlDev});
    let uses = AccessFs::from_all(NEWEST)
        & !make_bitflags!(AccessFs::{Execute | IoctlDev | MakeBlock | MakeChar});
    let paths = |paths: &[&str]| -> Vec<PathBuf> { paths.iter().map(PathBuf::from).collect() };
    let rules = [
        (paths(&SYSTEM), looks),
        (paths(&DEVICES), drives),
        (reach.read.clone(), looks),
        (reach.write.clone(), uses),
    ];
    apply(&rules).map_err(io::Error::other)
}

fn apply(rules: &[(Vec<PathBuf>, BitFlags<AccessFs>)]) -> Result<(), RulesetError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    for (paths, rights) in rules {
        for path in paths {
            // What this machine does not have needs no rule.
            let Ok(place) = PathFd::new(path) else {
                continue;
            };
            let rights = if path.is_dir() {
                *rights
            } else {
                *rights & AccessFs::from_file(NEWEST)
            };
            ruleset = ruleset.add_rule(PathBeneath::new(place, rights))?;
        }
    }
    if ruleset.restrict_self()?.ruleset == RulesetStatus::NotEnforced {
        tracing::warn!("this kernel has no Landlock: the VMM can read what its user can");
    }
    Ok(())
}

impl Reach {
    /// The flags of `msb tied` that ask for it.
    pub(crate) fn flags(&self) -> Vec<std::ffi::OsString> {
        let flag =
            |name: &'static str| move |path: &PathBuf| [name.into(), path.as_os_str().to_owned()];
        let read = self.read.iter().flat_map(flag("--read"));
        let write = self.write.iter().flat_map(flag("--write"));
        read.chain(write).collect()
    }

    /// Adds something that is read.
    pub(super) fn reads(&mut self, path: &Path) {
        self.read.push(path.to_owned());
    }
}
