//! What a caller asked for: a sandbox and its mounts, valid by construction.
//!
//! Nothing here has looked at the world. Values that need a rule (names, guest paths, sizes) are
//! types that can only be made by checking it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

mod mount;
mod name;
mod option;
mod rule;
mod size;
mod source;

pub use mount::{MountError, MountFlag, MountProblem, parse_mount};
pub use msb_protocol::SecurityProfile;
pub use name::{GuestPath, NameError, SandboxName, VolumeName};
pub use option::OptionProblem;
pub use rule::RuleError;
pub use size::{Mebibytes, SizeError, SizeExt};
pub(crate) use source::absolute;

/// A sandbox as it was asked for.
///
/// ```
/// use microsandbox::{Sandbox, SizeExt};
///
/// let spec = Sandbox::builder("worker").image("alpine").cpus(2).memory(1.gib()).build()?;
/// assert_eq!((spec.name.as_str(), spec.cpus, spec.memory), ("worker", 2, 1.gib()));
/// # Ok::<(), microsandbox::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxSpec {
    /// Its name.
    pub name: SandboxName,
    /// Where its root file system comes from.
    pub image: ImageSource,
    /// Its volumes, in the order in which they were given.
    pub mounts: Vec<MountSpec>,
    /// Number of virtual CPUs.
    pub cpus: u8,
    /// Guest memory.
    pub memory: Mebibytes,
    /// Size of the disk that takes what the sandbox writes to its root file system.
    pub root_disk: Mebibytes,
    /// What user commands may do.
    pub security: SecurityProfile,
    /// What runs in it when nothing else is said, and as whom.
    pub process: ProcessSpec,
    /// Labels, as names and values.
    pub labels: BTreeMap<String, String>,
    /// Removed when it stops.
    pub ephemeral: bool,
    /// The VMM asked for; chosen by what the host has when absent.
    pub vmm: Option<VmmKind>,
    /// The accelerator asked for; chosen by what the host has when absent.
    pub accel: Option<Accel>,
}

/// What a command gets unless it says otherwise; absent values come from the image.
///
/// ```
/// use microsandbox::Sandbox;
///
/// let spec = Sandbox::builder("worker").image("python").workdir("/app").user("1000").build()?;
/// assert_eq!(spec.process.workdir.as_deref(), Some("/app"));
/// assert_eq!(spec.process.hostname, None);
/// # Ok::<(), microsandbox::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSpec {
    /// Program and leading arguments in place of the image's entrypoint.
    pub entrypoint: Option<Vec<String>>,
    /// Environment on top of the image's.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub workdir: Option<String>,
    /// User as `name`, `uid`, `name:group` or `uid:gid`.
    pub user: Option<String>,
    /// Host name of the guest; the sandbox's name when absent.
    pub hostname: Option<String>,
}

/// Where a root file system comes from.
///
/// ```
/// use microsandbox::{Sandbox, spec::ImageSource};
///
/// let spec = Sandbox::builder("worker").image("alpine:3.20").build()?;
/// let reference = "alpine:3.20".to_owned();
/// assert_eq!(spec.image, ImageSource::Stored { reference });
/// # Ok::<(), microsandbox::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum ImageSource {
    /// An image of the local store, such as `alpine` or `alpine:3.20`.
    Stored {
        /// Name and tag as given.
        reference: String,
    },
    /// A directory of the host that holds a root file system.
    Directory {
        /// Its absolute path.
        path: PathBuf,
    },
    /// A disk image that holds a root file system.
    Disk {
        /// Its absolute path.
        path: PathBuf,
        /// Its format.
        format: DiskImageFormat,
    },
}

/// One volume of a sandbox.
///
/// ```
/// use microsandbox::Sandbox;
///
/// let sb = Sandbox::builder("worker").image("alpine");
/// let spec = sb.volume("/tmp/scratch", |v| v.tmpfs().size(100).noexec()).build()?;
/// assert_eq!(spec.mounts[0].target.as_str(), "/tmp/scratch");
/// assert!(spec.mounts[0].noexec);
/// # Ok::<(), microsandbox::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountSpec {
    /// Where the guest sees it.
    pub target: GuestPath,
    /// What it is.
    pub source: MountSource,
    /// Whether the guest may write.
    pub access: Access,
    /// Nothing can be executed.
    pub noexec: bool,
    /// Set-id bits have no effect.
    pub nosuid: bool,
    /// Device files open no devices.
    pub nodev: bool,
}

/// What a volume is.
///
/// ```
/// use microsandbox::{Sandbox, SizeExt, spec::MountSource};
///
/// let sb = Sandbox::builder("worker").image("alpine");
/// let spec = sb.volume("/tmp/scratch", |v| v.tmpfs().size(100)).build()?;
/// assert_eq!(spec.mounts[0].source, MountSource::Tmpfs { size: Some(100.mib()) });
/// # Ok::<(), microsandbox::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum MountSource {
    /// A directory or one file of the host; which of the two, the host says, unless the caller did.
    Bind {
        /// Its absolute path.
        path: PathBuf,
        /// The kind the caller insists on.
        expect: Option<BindKind>,
        /// Whether the path may lead through symbolic links.
        follow_root_symlinks: bool,
        /// How its files appear.
        share: ShareOptions,
    },
    /// A named volume.
    Named {
        /// Its name.
        name: VolumeName,
        /// What to do when it exists or is missing.
        mode: NamedVolumeMode,
        /// What is asked of it.
        request: VolumeRequest,
        /// How its files appear; only for a directory volume.
        share: ShareOptions,
    },
    /// A disk image of the host.
    Disk {
        /// Its absolute path.
        path: PathBuf,
        /// Its format; from the extension when absent.
        format: Option<DiskImageFormat>,
        /// File system on it; found in the guest when absent.
        fstype: Option<String>,
    },
    /// A volume of the sandbox's own: made with it, kept over restarts, removed with it.
    Owned {
        /// What it is; labels say nothing about it.
        request: VolumeRequest,
        /// How its files appear; only for a directory.
        share: ShareOptions,
    },
    /// Memory of the guest.
    Tmpfs {
        /// Size limit; half the guest's memory when absent.
        size: Option<Mebibytes>,
    },
}

/// What kind of host object a bind mount shares.
///
/// ```
/// use microsandbox::spec::{BindKind, MountFlag, MountSource, parse_mount};
/// use std::path::Path;
///
/// let mount = parse_mount(MountFlag::File, "./app.toml:/app.toml:ro", Path::new("/"))?;
/// let file = Some(BindKind::File);
/// assert!(matches!(mount.source, MountSource::Bind { expect, .. } if expect == file));
/// # Ok::<(), microsandbox::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BindKind {
    /// A directory with everything below it.
    Directory,
    /// A single regular file.
    File,
}

/// How the files of a shared directory appear in the guest.
///
/// ```
/// use microsandbox::SizeExt;
/// use microsandbox::spec::{MountFlag, MountSource, parse_mount};
///
/// let mount = parse_mount(MountFlag::Dir, "./out:/out:quota=1G", "/".as_ref())?;
/// let MountSource::Bind { share, .. } = mount.source else { panic!() };
/// assert_eq!(share.quota, Some(1.gib()));
/// # Ok::<(), microsandbox::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareOptions {
    /// Where owners, modes and special files are kept; strict when absent.
    pub stat_virtualization: Option<StatVirtualization>,
    /// Modes of the host's files; private when absent.
    pub host_permissions: Option<HostPermissions>,
    /// Owner of every file that has no recorded owner, as uid and gid.
    pub owner: Option<(u32, u32)>,
    /// Limit on what the guest may add; for bind mounts only (a volume has its own).
    pub quota: Option<Mebibytes>,
    /// How much the guest keeps in its caches; the backend's default when absent.
    pub cache: Option<CachePolicy>,
}

/// Where owners, modes and special files of a share are kept (spec stat-virt 2.1).
///
/// ```
/// use microsandbox::{Sandbox, StatVirtualization};
///
/// let sb = Sandbox::builder("full").image("python").volume("/root/.cache/pip", |v| {
///     v.named("pip-cache").stat_virtualization(StatVirtualization::Relaxed)
/// });
/// assert!(sb.build().is_ok());
/// assert_eq!(StatVirtualization::default(), StatVirtualization::Strict);
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StatVirtualization {
    /// In extended attributes, without exception.
    #[default]
    Strict,
    /// In extended attributes where the host can; symbolic links are real ones.
    Relaxed,
    /// Nowhere: the guest sees the host's metadata.
    Off,
}

/// Modes that files made by the guest get on the host (spec stat-virt 2.1).
///
/// ```
/// use microsandbox::{HostPermissions, Sandbox};
///
/// let sb = Sandbox::builder("dev").image("python");
/// let sb = sb.volume("/out", |v| v.bind("./out").host_permissions(HostPermissions::Mirror));
/// assert!(sb.build().is_ok());
/// assert_eq!(HostPermissions::default(), HostPermissions::Private);
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostPermissions {
    /// For the host user alone: 0600 and 0700.
    #[default]
    Private,
    /// As the guest sets them, without set-id bits.
    Mirror,
}

/// How much the guest keeps of a share.
///
/// ```
/// use microsandbox::{CachePolicy, Sandbox};
///
/// let sb = Sandbox::builder("dev").image("python");
/// let sb = sb.volume("/app", |v| v.bind("./src").cache(CachePolicy::None));
/// assert!(sb.build().is_ok());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CachePolicy {
    /// Nothing: every look goes to the host.
    None,
    /// What is still valid when a file is opened.
    Auto,
    /// Names and attributes for long, data as `auto`.
    Metadata,
    /// Everything for long: only this guest changes the share.
    Always,
}

/// Whether the guest may write to a volume.
///
/// ```
/// use microsandbox::{Sandbox, spec::Access};
///
/// let sb = Sandbox::builder("dev").image("python");
/// let sb = sb.volume("/src", |v| v.bind("./src").readonly()).volume("/out", |v| v.bind("./out"));
/// let spec = sb.build()?;
/// assert_eq!(spec.mounts[0].access, Access::ReadOnly);
/// assert_eq!(spec.mounts[1].access, Access::ReadWrite);
/// # Ok::<(), microsandbox::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// It may.
    ReadWrite,
    /// It may not, whatever it does.
    ReadOnly,
}

/// Storage of a named volume.
///
/// ```no_run
/// use microsandbox::{SizeExt, Volume, VolumeKind};
///
/// # async fn example() -> microsandbox::MicrosandboxResult<()> {
/// let docker_data = Volume::builder("docker-data").disk().size(20.gib()).create().await?;
/// assert_eq!(docker_data.kind(), VolumeKind::Disk);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VolumeKind {
    /// A directory of the host.
    #[serde(rename = "dir")]
    Directory,
    /// A raw disk image with an ext4 file system.
    Disk,
}

impl fmt::Display for VolumeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Directory => "dir",
            Self::Disk => "disk",
        })
    }
}

/// What a mount of a named volume does about its existence.
///
/// ```
/// use microsandbox::{NamedVolumeMode, Sandbox, spec::MountSource};
///
/// let sb = Sandbox::builder("worker").image("python");
/// let spec = sb.volume("/cache", |v| v.named("pip-cache")).build()?;
/// let MountSource::Named { mode, .. } = &spec.mounts[0].source else { panic!() };
/// assert_eq!(*mode, NamedVolumeMode::Existing);
/// # Ok::<(), microsandbox::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NamedVolumeMode {
    /// It must exist.
    #[default]
    Existing,
    /// It is created and must not exist.
    Create,
    /// It is created when missing, and reused when it fits what is asked.
    EnsureExists,
}

/// What is asked of a named volume. Absent values fit anything.
///
/// ```
/// use microsandbox::{SizeExt, VolumeKind, spec::VolumeRequest};
///
/// let kind = Some(VolumeKind::Disk);
/// let request = VolumeRequest { kind, size: Some(20.gib()), ..VolumeRequest::default() };
/// assert_eq!(request.check(), Ok(()));
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRequest {
    /// Its kind; a directory when it has to be made.
    pub kind: Option<VolumeKind>,
    /// Capacity of a disk.
    pub size: Option<Mebibytes>,
    /// Quota of a directory.
    pub quota: Option<Mebibytes>,
    /// Labels that it must carry.
    pub labels: BTreeMap<String, String>,
}

/// Format of a disk image.
///
/// ```
/// use microsandbox::{DiskImageFormat, Sandbox};
///
/// let sb = Sandbox::builder("full").image("python");
/// let sb = sb.volume("/dataset", |v| v.disk("./dataset.img").format(DiskImageFormat::Qcow2));
/// assert!(sb.build().is_ok());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskImageFormat {
    /// The disk, byte for byte.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
    /// VMware's format.
    Vmdk,
}

/// The programs that can run the VM.
///
/// ```
/// use microsandbox::{Sandbox, VmmKind};
///
/// let sb = Sandbox::builder("worker").image("alpine").vmm(VmmKind::CloudHypervisor);
/// assert_eq!(sb.build()?.vmm, Some(VmmKind::CloudHypervisor));
/// assert_eq!(VmmKind::CloudHypervisor.to_string(), "cloud-hypervisor");
/// # Ok::<(), microsandbox::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmmKind {
    /// libkrun, as a library in a child process.
    Libkrun,
    /// cloud-hypervisor.
    CloudHypervisor,
    /// QEMU.
    Qemu,
}

impl fmt::Display for VmmKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Libkrun => "libkrun",
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Qemu => "QEMU",
        })
    }
}

/// How the VM's processor is made.
///
/// ```
/// use microsandbox::{Accel, Sandbox, VmmKind};
///
/// let sb = Sandbox::builder("ci").image("alpine").vmm(VmmKind::Qemu).accel(Accel::Tcg);
/// assert_eq!(sb.build()?.accel, Some(Accel::Tcg));
/// # Ok::<(), microsandbox::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// By the host's hardware.
    Kvm,
    /// By QEMU's translator.
    Tcg,
}
