//! Everything that will be done for a sandbox, decided before anything is done.
//!
//! A plan is data: it can be printed (`msb plan`), compared and tested. It names files and
//! programs, but nothing in this folder touches them.

mod addition;
mod guest;
mod mounts;
mod refusal;
mod vm;

use std::path::PathBuf;

use msb_protocol::GuestPlan;
use serde::{Deserialize, Serialize};

pub use addition::Addition;
pub(crate) use addition::standing;
pub use refusal::{HostGap, Refusal, SourceProblem};

use crate::error::{Error, ErrorKind, MicrosandboxResult};
use crate::host::HostFacts;
use crate::spec::{
    Accel, CachePolicy, DiskImageFormat, GuestPath, HostPermissions, Mebibytes, NamedVolumeMode,
    SandboxName, SandboxSpec, StatVirtualization, VmmKind, VolumeName, VolumeRequest,
};

/// Least memory that a guest boots with: with 64 MiB the kernel stops without a word, with 80 it
/// barely runs.
const LEAST_MEMORY: Mebibytes = Mebibytes(96);

/// Least root disk that ext4 can be made on.
const LEAST_ROOT_DISK: Mebibytes = Mebibytes(1);

/// What will be done for one sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The sandbox.
    pub name: SandboxName,
    /// Named volumes that are looked up or made first, in the order of their names.
    pub volumes: Vec<VolumePlan>,
    /// One process each, in the order in which they are started: the root file system's first.
    pub backends: Vec<BackendPlan>,
    /// Files that are made before the backends start.
    pub disks: Vec<DiskPlan>,
    /// Volumes of the sandbox's own, made likewise.
    #[serde(default)]
    pub owned: Vec<OwnedPlan>,
    /// The virtual machine.
    pub vm: VmPlan,
    /// What the guest is told.
    pub guest: GuestPlan,
}

impl Plan {
    /// Decides what will be done, with everything that is wrong as one error.
    ///
    /// # Errors
    ///
    /// The first of [`Plan::new`]'s refusals, with the rest in [`Error::also`].
    pub fn decide(spec: &SandboxSpec, facts: &HostFacts) -> MicrosandboxResult<Self> {
        Self::new(spec, facts).map_err(|refusals| {
            let errors = refusals.into_iter().map(Error::from);
            let none = || {
                Error::new(
                    ErrorKind::InvalidConfig,
                    "the request cannot be carried out",
                )
            };
            Error::all(errors).unwrap_or_else(none)
        })
    }

    /// Decides what will be done for `spec` on a host about which `facts` are known.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with the request; only when nothing is, what the host lacks.
    pub fn new(spec: &SandboxSpec, facts: &HostFacts) -> Result<Self, Vec<Refusal>> {
        let mut refusals = Vec::new();
        if spec.cpus == 0 {
            let (given, least) = ("0".to_owned(), "1".to_owned());
            refusals.push(Refusal::TooSmall {
                what: "number of CPUs",
                given,
                least,
            });
        }
        check_size("memory", spec.memory, LEAST_MEMORY, &mut refusals);
        check_size("root disk", spec.root_disk, LEAST_ROOT_DISK, &mut refusals);
        let root = guest::root(spec, facts).map_err(|refusal| refusals.push(refusal));
        let mounted = mounts::plan(spec, facts, &mut refusals);
        let (Ok(root), true) = (root, refusals.is_empty()) else {
            return Err(refusals);
        };

        let mut disks = mounted.disks;
        disks.extend(root.probed.then_some(None));
        let mut backends = root.backends;
        backends.extend(mounted.backends);
        let mut gaps = programs(facts, &backends, &root.disks);
        let vm = vm::plan(spec, facts, backends.len(), &disks, &mut gaps);
        if !gaps.is_empty() {
            return Err(gaps.into_iter().map(Refusal::Host).collect());
        }
        Ok(Self {
            name: spec.name.clone(),
            volumes: mounted.volumes,
            backends,
            disks: root.disks,
            owned: mounted.owned,
            vm,
            guest: guest::plan(spec, root.guest, mounted.guest),
        })
    }
}

fn check_size(what: &'static str, given: Mebibytes, least: Mebibytes, refusals: &mut Vec<Refusal>) {
    if given < least {
        let (given, least) = (given.to_string(), least.to_string());
        refusals.push(Refusal::TooSmall { what, given, least });
    }
}

/// The programs that this plan needs and the host lacks.
fn programs(facts: &HostFacts, backends: &[BackendPlan], disks: &[DiskPlan]) -> Vec<HostGap> {
    let programs = &facts.programs;
    let shares = backends
        .iter()
        .any(|backend| matches!(backend.device, DevicePlan::Fs(_)));
    let blocks = backends
        .iter()
        .any(|backend| matches!(backend.device, DevicePlan::Blk(_)));
    [
        (shares, &programs.fs, "msb-fs"),
        (blocks, &programs.blk, "msb-blk"),
        (true, &programs.agent, "msb-agent"),
        (!disks.is_empty(), &programs.mkfs, "mkfs.ext4"),
    ]
    .into_iter()
    .filter(|(needed, found, _)| *needed && found.is_none())
    .map(|(_, _, name)| HostGap::Program(name))
    .collect()
}

/// A named volume that the sandbox mounts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumePlan {
    /// Its name.
    pub name: VolumeName,
    /// What is done when it exists or is missing.
    pub mode: NamedVolumeMode,
    /// What is asked of it.
    pub request: VolumeRequest,
    /// Whether it exists now.
    pub exists: bool,
}

/// One backend process and the device it serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendPlan {
    /// Tag of the share or serial number of the disk: up to 11 characters of the guest path, `_`,
    /// 8 hexadecimal digits of its SHA-256 (spec mounts 1.10). Names the socket as well.
    pub id: String,
    /// What a user would call it: `root image`, `root disk`, or the guest path of a mount.
    pub purpose: String,
    /// The device.
    pub device: DevicePlan,
}

impl BackendPlan {
    /// Whether it serves a mount, and not the root file system: it can be removed while the guest
    /// runs.
    pub fn is_mount(&self) -> bool {
        self.purpose.starts_with('/')
    }
}

/// The device that a backend serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum DevicePlan {
    /// A virtio-fs share served by `msb-fs`.
    Fs(FsPlan),
    /// A virtio-blk disk served by `msb-blk`.
    Blk(BlkPlan),
}

/// A share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsPlan {
    /// What is shared.
    pub source: ShareSource,
    /// Whether the server refuses every change.
    pub read_only: bool,
    /// Where metadata is kept.
    pub stat_virtualization: StatVirtualization,
    /// Modes of the host's files.
    pub host_permissions: HostPermissions,
    /// uid and gid as which the server's own files appear.
    pub default_owner: (u32, u32),
    /// uid and gid of every file without a recorded owner, in place of the identity map.
    pub owner: Option<(u32, u32)>,
    /// Cache policy other than the server's default.
    pub cache: Option<CachePolicy>,
    /// Nobody else changes the share while the guest uses it.
    pub exclusive: bool,
    /// Limit on the space that its files take.
    pub quota: Option<QuotaPlan>,
    /// Number of request queues.
    pub queues: u16,
}

/// A limit on the space that the files of a share take, counted in one place for all its servers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuotaPlan {
    /// The limit.
    pub bytes: u64,
    /// The file that holds the account; its folder is made first.
    pub account: PathBuf,
}

/// What a share shares.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "path", rename_all = "kebab-case")]
pub enum ShareSource {
    /// A directory, by its resolved absolute path.
    Directory(PathBuf),
    /// One file, by its resolved absolute path.
    File(PathBuf),
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkPlan {
    /// Its resolved absolute path.
    pub image: PathBuf,
    /// Its format.
    pub format: DiskImageFormat,
    /// Whether the server refuses every change.
    pub read_only: bool,
    /// Number of queues.
    pub queues: u16,
}

/// An ext4 disk that is made when it does not exist yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPlan {
    /// Where.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Volume label.
    pub label: String,
}

/// A volume of a sandbox's own, which lies in the sandbox's folder; made when it is not there yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnedPlan {
    /// Its guest path.
    pub target: GuestPath,
    /// The directory, or the image of the disk.
    pub path: PathBuf,
    /// Capacity of a disk in bytes; a directory has none.
    pub capacity_bytes: Option<u64>,
}

/// The virtual machine. Its devices are the plan's backends, in their order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmPlan {
    /// The program that runs it.
    pub vmm: VmmKind,
    /// How its processor is made.
    pub accel: Accel,
    /// Why these two were chosen, in words.
    pub reason: String,
    /// Number of virtual CPUs.
    pub cpus: u8,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Guest kernel image (QEMU, cloud-hypervisor).
    pub kernel: Option<PathBuf>,
    /// Folder of the guest kernel's modules.
    pub modules: Option<PathBuf>,
    /// Kernel modules that the initramfs must carry, by name.
    pub module_names: Vec<String>,
}

#[cfg(test)]
mod tests;
