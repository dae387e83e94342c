//! The root file system, and what the guest is told of it all.

use std::path::PathBuf;

use msb_protocol::{GuestMount, GuestPlan, GuestRoot, GuestSource};

use super::mounts::{disk_file, lookup, queues};
use super::refusal::{Refusal, SourceProblem};
use super::{BackendPlan, BlkPlan, DevicePlan, DiskPlan, FsPlan, ShareSource};
use crate::host::{HostFacts, PathKind};
use crate::spec::{DiskImageFormat, HostPermissions, ImageSource, SandboxSpec, StatVirtualization};

const IMAGE: &str = "root_image";
const DISK: &str = "root_disk";

/// The root file system's devices, the disk that has to be made, and how the guest joins them.
pub(super) struct Root {
    pub(super) backends: Vec<BackendPlan>,
    pub(super) disks: Vec<DiskPlan>,
    pub(super) guest: GuestRoot,
    /// A disk image of the user's, whose file system the guest has to find out.
    pub(super) probed: bool,
}

/// Plans the root file system: a read-only image under a disk of the sandbox's own, or a disk image
/// as it is.
pub(super) fn root(spec: &SandboxSpec, facts: &HostFacts) -> Result<Root, Refusal> {
    let (path, metadata) = match &spec.image {
        ImageSource::Stored { reference } => {
            let found = facts.stored_image.clone();
            let path = found.ok_or_else(|| Refusal::NoImage(reference.clone()))?;
            (path, StatVirtualization::Strict)
        }
        ImageSource::Directory { path } => {
            let found = lookup(facts, path);
            let refuse = |problem| {
                Err(Refusal::Source {
                    path: path.clone(),
                    problem,
                })
            };
            match found.kind {
                // A directory that nobody prepared: what has no recorded owner is the host's.
                PathKind::Directory => (found.resolved, StatVirtualization::Relaxed),
                PathKind::Missing(why) => return refuse(SourceProblem::Missing(why)),
                PathKind::File | PathKind::Other(_) => return refuse(SourceProblem::NotADirectory),
            }
        }
        ImageSource::Disk { path, format } => {
            let image = disk_file(path, lookup(facts, path))?.resolved;
            return Ok(plain(spec, image, *format));
        }
    };
    let size_bytes = spec.root_disk.bytes();
    let disk = facts
        .home
        .join("sandboxes")
        .join(spec.name.as_str())
        .join("root.raw");
    let image = FsPlan {
        source: ShareSource::Directory(path),
        read_only: true,
        stat_virtualization: metadata,
        host_permissions: HostPermissions::Private,
        // An image belongs to its root, whoever the commands run as.
        default_owner: (0, 0),
        owner: None,
        cache: None,
        exclusive: true,
        quota: None,
        queues: queues(spec),
    };
    Ok(Root {
        backends: vec![
            backend(IMAGE, "root image", DevicePlan::Fs(image)),
            backend(
                DISK,
                "root disk",
                disk_plan(spec, disk.clone(), DiskImageFormat::Raw),
            ),
        ],
        disks: vec![DiskPlan {
            path: disk,
            size_bytes,
            label: "msb-root".to_owned(),
        }],
        guest: GuestRoot::Overlay {
            lower: GuestSource::Share {
                tag: IMAGE.to_owned(),
            },
            upper: GuestSource::Disk {
                serial: DISK.to_owned(),
                fstype: Some("ext4".to_owned()),
            },
        },
        probed: false,
    })
}

fn plain(spec: &SandboxSpec, image: PathBuf, format: DiskImageFormat) -> Root {
    Root {
        backends: vec![backend(DISK, "root disk", disk_plan(spec, image, format))],
        disks: Vec::new(),
        guest: GuestRoot::Plain {
            source: GuestSource::Disk {
                serial: DISK.to_owned(),
                fstype: None,
            },
            read_only: false,
        },
        probed: true,
    }
}

fn backend(id: &str, purpose: &str, device: DevicePlan) -> BackendPlan {
    BackendPlan {
        id: id.to_owned(),
        purpose: purpose.to_owned(),
        device,
    }
}

fn disk_plan(spec: &SandboxSpec, image: PathBuf, format: DiskImageFormat) -> DevicePlan {
    DevicePlan::Blk(BlkPlan {
        image,
        format,
        read_only: false,
        queues: queues(spec),
    })
}

/// What the agent is told. The clock is left at zero: whoever boots the guest knows the time.
pub(super) fn plan(spec: &SandboxSpec, root: GuestRoot, mounts: Vec<GuestMount>) -> GuestPlan {
    let hostname = spec
        .process
        .hostname
        .clone()
        .unwrap_or_else(|| spec.name.to_string());
    GuestPlan {
        hostname,
        root,
        mounts,
        security: spec.security,
        time_ns: 0,
    }
}
