//! Everything that will be done for a sandbox, decided before anything is done.
//!
//! A plan is data: it can be printed (`msb plan`), compared and tested. It names files and
//! programs, but nothing in this folder touches them.

use std::path::PathBuf;

use msb_protocol::GuestPlan;
use serde::{Deserialize, Serialize};

use crate::spec::{
    Accel, CachePolicy, DiskImageFormat, HostPermissions, SandboxName, StatVirtualization, VmmKind,
};

/// What will be done for one sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The sandbox.
    pub name: SandboxName,
    /// One process each, in the order in which they are started: the root file system's first.
    pub backends: Vec<BackendPlan>,
    /// Files that are made before the backends start.
    pub disks: Vec<DiskPlan>,
    /// The virtual machine.
    pub vm: VmPlan,
    /// What the guest is told.
    pub guest: GuestPlan,
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
    /// Limit on what the guest may add, in bytes.
    pub quota_bytes: Option<u64>,
    /// Number of request queues.
    pub queues: u16,
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
