//! Carries the steps out, with detached mounts: nothing is seen in the guest before it is whole.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};

use msb_protocol::{GuestMount, GuestSource, MountFlags, SecurityProfile};
use rustix::fs::{self, AtFlags, CWD, Mode, OFlags, ResolveFlags, StatVfsMountFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
    open_tree, unmount,
};
use rustix::process::{chroot, fchdir};

use super::disk::{self, DiskError};
use super::furnish;
use super::system;
use super::target::{self, Kind, TargetError};
use super::{Layer, Step};
use crate::modules::{ModuleError, Modules};
use crate::sys;

/// Where a share that holds a single file is mounted while the file is picked out of it.
const STAGING: &str = "staging";

/// The guest's file systems, as far as the agent made them.
#[derive(Debug)]
pub(crate) struct Guest {
    /// The initramfs, which is the agent's working directory for good.
    home: OwnedFd,
    /// The root of the sandbox, once there is one.
    root: Option<OwnedFd>,
    modules: Modules,
    security: SecurityProfile,
    /// The volumes: target as the host names it, and path where it was found to be.
    volumes: Vec<(String, String)>,
}

/// A mount that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    /// The kernel refuses.
    #[error("{doing}{log}")]
    Kernel {
        /// What was being done.
        doing: String,
        /// What the kernel said about it.
        log: String,
        /// Its error.
        #[source]
        source: Errno,
    },
    /// There is no such disk, or no file system on it.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The mount point cannot be used.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// A kernel module cannot be loaded.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// The mount lacks a flag that was asked for.
    #[error("the mount does not have the flag {0}")]
    Flag(&'static str),
    /// The plan asks for something that makes no sense.
    #[error("{0}")]
    Plan(&'static str),
}

/// Gives the kernel's errors the words that go before them.
pub(crate) trait Doing<T> {
    /// Says what was being done.
    fn doing(self, what: impl Into<String>) -> Result<T, MountError>;
}

impl<T> Doing<T> for Result<T, Errno> {
    fn doing(self, what: impl Into<String>) -> Result<T, MountError> {
        self.map_err(|source| MountError::Kernel {
            doing: what.into(),
            log: String::new(),
            source,
        })
    }
}

impl MountError {
    /// The kernel's error, if it was one.
    pub(crate) fn errno(&self) -> Option<i32> {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(error) = cause {
            if let Some(errno) = error.downcast_ref::<Errno>() {
                return Some(errno.raw_os_error());
            }
            if let Some(error) = error.downcast_ref::<std::io::Error>() {
                return error.raw_os_error();
            }
            cause = error.source();
        }
        None
    }
}

impl Guest {
    /// The guest before anything is mounted for it.
    pub(crate) fn new(modules: Modules, security: SecurityProfile) -> Result<Self, MountError> {
        let home = open_folder(".").doing("open the initramfs")?;
        Ok(Self {
            home,
            root: None,
            modules,
            security,
            volumes: vec![],
        })
    }

    /// Carries one step out.
    pub(crate) fn apply(&mut self, step: &Step) -> Result<(), MountError> {
        match step {
            Step::Layer {
                layer,
                source,
                flags,
            } => {
                let mount = self.mount_source(source, *flags)?;
                attach_layer(&mount, *layer)
            }
            Step::Join { flags } => self.join_layers(*flags),
            Step::SwitchRoot => self.switch_root(),
            Step::System(system) => system::mount(self.root()?, *system),
            Step::Protect(path) => system::protect(self.root()?, path),
            Step::Furnish { hostname } => {
                furnish::furnish(self.root()?, hostname);
                Ok(())
            }
            Step::ForbidUserNamespaces => forbid_user_namespaces(),
            Step::Volume(volume) => self.mount_volume(volume),
        }
    }

    /// Mounts one more volume.
    pub(crate) fn add(&mut self, mount: &GuestMount) -> Result<(), MountError> {
        if self
            .volumes
            .iter()
            .any(|(target, _)| *target == mount.target)
        {
            return Err(MountError::Plan("something is mounted there already"));
        }
        system::check_free(self.root()?, &mount.target)?;
        let before = self.volumes.len();
        let added = self.apply(&super::volume_step(mount, self.security));
        if added.is_err() && self.volumes.len() > before {
            // It is attached and not what was asked for.
            self.remove(&mount.target, true)?;
        }
        added
    }

    /// Unmounts the volume that the host knows under `target`; a lazy one is only written out first.
    pub(crate) fn remove(&mut self, target: &str, lazy: bool) -> Result<(), MountError> {
        let index = self
            .volumes
            .iter()
            .rposition(|(volume, _)| volume == target);
        let index = index.ok_or(MountError::Plan("no volume is mounted there"))?;
        if let Some((_, path)) = self.volumes.get(index) {
            let mut flags = UnmountFlags::NOFOLLOW;
            if lazy {
                flags |= UnmountFlags::DETACH;
                let read = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let volume = fs::openat(CWD, path.as_str(), read, Mode::empty());
                if let Err(error) = volume.and_then(fs::syncfs) {
                    eprintln!("msb-agent: cannot write {path} out: {error}");
                }
            }
            unmount(path, flags).doing("cannot unmount")?;
        }
        self.volumes.remove(index);
        Ok(())
    }

    /// The root of the sandbox.
    pub(crate) fn root(&self) -> Result<&OwnedFd, MountError> {
        self.root
            .as_ref()
            .ok_or(MountError::Plan("there is no root file system yet"))
    }

    fn mount_source(
        &mut self,
        source: &GuestSource,
        flags: MountFlags,
    ) -> Result<OwnedFd, MountError> {
        match source {
            GuestSource::Share { tag } => self.mount_share(tag, flags),
            GuestSource::SharedFile { tag, name } => self.mount_file(tag, name, flags),
            GuestSource::Disk { serial, fstype } => {
                self.mount_disk(serial, fstype.as_deref(), flags)
            }
            GuestSource::Tmpfs { size_bytes, mode } => {
                let mode = format!("{mode:o}");
                let size = size_bytes.map(|size| size.to_string());
                let mut options = vec![("mode", Some(mode.as_str()))];
                options.extend(size.as_deref().map(|size| ("size", Some(size))));
                FileSystem {
                    kind: "tmpfs",
                    source: "tmpfs",
                    options: &options,
                }
                .mount(flags)
            }
        }
    }

    fn mount_share(&mut self, tag: &str, flags: MountFlags) -> Result<OwnedFd, MountError> {
        self.modules.load("virtiofs")?;
        let share = FileSystem {
            kind: "virtiofs",
            source: tag,
            options: &[],
        };
        disk::wait_for(|| match share.mount(flags) {
            // The kernel's answer to a tag that it does not know: the device may still come.
            Err(MountError::Kernel {
                source: Errno::INVAL,
                ..
            }) => None,
            result => Some(result),
        })
        .unwrap_or_else(|| share.mount(flags))
    }

    fn mount_disk(
        &mut self,
        serial: &str,
        fstype: Option<&str>,
        flags: MountFlags,
    ) -> Result<OwnedFd, MountError> {
        self.modules.load("virtio_blk")?;
        let name = disk::find(serial)?;
        let kind = match fstype {
            Some(kind) => kind,
            None => disk::file_system(&name)?,
        };
        self.modules.load_file_system(kind)?;
        let device = format!("/dev/{name}");
        let options = disk_options(kind, flags.read_only);
        let disk = FileSystem {
            kind,
            source: &device,
            options,
        };
        self.at_home(|| disk.mount(flags))?
    }

    /// Mounts the share where nobody sees it, and picks the one file out of it.
    fn mount_file(
        &mut self,
        tag: &str,
        name: &str,
        flags: MountFlags,
    ) -> Result<OwnedFd, MountError> {
        let share = self.mount_share(tag, flags)?;
        make_folder(STAGING)?;
        attach(&share, CWD, STAGING)?;
        let result = pick_file(name, flags);
        unmount(STAGING, UnmountFlags::DETACH).doing("detach the share of the file")?;
        result
    }

    fn join_layers(&mut self, flags: MountFlags) -> Result<(), MountError> {
        self.modules.load("overlay")?;
        make_folder("upper/upper")?;
        make_folder("upper/work")?;
        let options = [
            ("lowerdir", Some("/lower")),
            ("upperdir", Some("/upper/upper")),
            ("workdir", Some("/upper/work")),
            // Without it a directory of the image could not be renamed.
            ("redirect_dir", Some("on")),
        ];
        let joined = FileSystem {
            kind: "overlay",
            source: "overlay",
            options: &options,
        };
        attach_layer(&joined.mount(flags)?, Layer::Root)
    }

    fn switch_root(&mut self) -> Result<(), MountError> {
        let root = open_folder(Layer::Root.folder()).doing("open the root")?;
        attach(&root, CWD, "/")?;
        enter(&root).doing("enter the root")?;
        fchdir(&self.home).doing("return to the initramfs")?;
        self.root = Some(root);
        Ok(())
    }

    /// Does something with the initramfs as root directory, where `/dev` is the agent's own.
    fn at_home<T>(&self, work: impl FnOnce() -> T) -> Result<T, MountError> {
        let Some(root) = &self.root else {
            return Ok(work());
        };
        enter(&self.home).doing("enter the initramfs")?;
        let result = work();
        enter(root).doing("enter the root")?;
        fchdir(&self.home).doing("return to the initramfs")?;
        Ok(result)
    }

    fn mount_volume(&mut self, volume: &GuestMount) -> Result<(), MountError> {
        let kind = match volume.source {
            GuestSource::SharedFile { .. } => Kind::File,
            _ => Kind::Directory,
        };
        let point = target::open(self.root()?.as_fd(), &volume.target, kind)?;
        let path = fs::readlinkat(CWD, fd_path(&point), vec![]).doing("name the mount point")?;
        let path = path
            .into_string()
            .map_err(|_| MountError::Plan("the path is not UTF-8"))?;
        let mount = self.mount_source(&volume.source, volume.flags)?;
        let empty =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&mount, "", &point, "", empty).doing("cannot attach the mount")?;
        self.volumes.push((volume.target.clone(), path));
        let seen = target::resolve(self.root()?.as_fd(), &volume.target).doing("find the mount")?;
        verify(&seen, volume.flags)
    }
}

/// A file system to be mounted.
pub(super) struct FileSystem<'a> {
    /// The kernel's name of its kind.
    pub(super) kind: &'a str,
    /// What is mounted: a tag, a device, or just a name to be shown.
    pub(super) source: &'a str,
    /// Its own options.
    pub(super) options: &'a [(&'a str, Option<&'a str>)],
}

impl FileSystem<'_> {
    /// Makes a mount of it that is attached nowhere yet.
    pub(super) fn mount(&self, flags: MountFlags) -> Result<OwnedFd, MountError> {
        let Self { kind, source, .. } = self;
        let context = match fsopen(*kind, FsOpenFlags::FSOPEN_CLOEXEC) {
            Err(Errno::NODEV) => {
                return Err(Errno::NODEV).doing(format!("the guest kernel does not know {kind}"));
            }
            context => context.doing(format!("cannot prepare {kind}"))?,
        };
        self.configure(&context, flags.read_only)
            .map_err(|source_error| MountError::Kernel {
                doing: format!("cannot mount {source} as {kind}"),
                log: kernel_log(&context),
                source: source_error,
            })?;
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes(flags))
            .doing(format!("cannot mount {source} as {kind}"))
    }

    fn configure(&self, context: &OwnedFd, read_only: bool) -> Result<(), Errno> {
        fsconfig_set_string(context, "source", self.source)?;
        for (key, value) in self.options {
            match value {
                Some(value) => fsconfig_set_string(context, *key, *value)?,
                None => fsconfig_set_flag(context, *key)?,
            }
        }
        if read_only {
            fsconfig_set_flag(context, "ro")?;
        }
        fsconfig_create(context)
    }
}

/// What lets a file system be read although its journal was not replayed: nothing may be written.
fn disk_options(kind: &str, read_only: bool) -> &'static [(&'static str, Option<&'static str>)] {
    match (kind, read_only) {
        ("ext3" | "ext4", true) => &[("noload", None)],
        ("xfs", true) => &[("norecovery", None)],
        ("btrfs", true) => &[("rescue", Some("nologreplay"))],
        _ => &[],
    }
}

/// The reasons that a file system gave for its last error, each after a colon.
fn kernel_log(context: &OwnedFd) -> String {
    let mut log = String::new();
    let Ok(copy) = context.try_clone() else {
        return log;
    };
    let mut file = std::fs::File::from(copy);
    let mut line = [0; 512];
    while let Ok(count @ 1..) = file.read(&mut line) {
        let text = String::from_utf8_lossy(line.get(..count).unwrap_or_default()).into_owned();
        // Each line begins with its severity and a space.
        let text = text.trim_end();
        log.push_str(": ");
        log.push_str(text.get(2..).unwrap_or(text));
    }
    log
}

fn attributes(flags: MountFlags) -> MountAttrFlags {
    let mut attributes = MountAttrFlags::empty();
    attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, flags.read_only);
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, flags.noexec);
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOSUID, flags.nosuid);
    attributes.set(MountAttrFlags::MOUNT_ATTR_NODEV, flags.nodev);
    attributes
}

fn verify(mount: &OwnedFd, flags: MountFlags) -> Result<(), MountError> {
    let seen = fs::fstatvfs(mount).doing("cannot use the mount")?.f_flag;
    let wanted = [
        (flags.read_only, StatVfsMountFlags::RDONLY, "ro"),
        (flags.noexec, StatVfsMountFlags::NOEXEC, "noexec"),
        (flags.nosuid, StatVfsMountFlags::NOSUID, "nosuid"),
        (flags.nodev, StatVfsMountFlags::NODEV, "nodev"),
    ];
    match wanted
        .iter()
        .find(|(wanted, flag, _)| *wanted && !seen.contains(*flag))
    {
        Some((_, _, name)) => Err(MountError::Flag(name)),
        None => Ok(()),
    }
}

fn attach_layer(mount: &OwnedFd, layer: Layer) -> Result<(), MountError> {
    make_folder(layer.folder())?;
    attach(mount, CWD, layer.folder())
}

pub(super) fn attach(mount: &OwnedFd, at: impl AsFd, path: &str) -> Result<(), MountError> {
    move_mount(mount, "", at, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .doing(format!("cannot attach the mount at {path}"))
}

fn pick_file(name: &str, flags: MountFlags) -> Result<OwnedFd, MountError> {
    let staging = open_folder(STAGING).doing("open the share of the file")?;
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let file = fs::openat2(
        &staging,
        name,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        how,
    )
    .doing("cannot find the file in its share")?;
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mount =
        open_tree(&file, "", clone | OpenTreeFlags::AT_EMPTY_PATH).doing("cannot bind the file")?;
    sys::set_mount_attributes(&mount, u64::from(attributes(flags).bits()))
        .doing("cannot set the flags of the mount")?;
    Ok(mount)
}

fn forbid_user_namespaces() -> Result<(), MountError> {
    match std::fs::write("proc/sys/user/max_user_namespaces", "0") {
        // A kernel without user namespaces.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
            .doing("cannot set their limit"),
    }
}

fn make_folder(path: &str) -> Result<(), MountError> {
    match fs::mkdirat(CWD, path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error).doing(format!("cannot make the folder {path}")),
    }
}

fn open_folder(path: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::openat(CWD, path, flags, Mode::empty())
}

fn enter(folder: &OwnedFd) -> Result<(), Errno> {
    fchdir(folder)?;
    chroot(".")
}

/// The name of an open file in the agent's own `/proc`.
pub(super) fn fd_path(fd: &OwnedFd) -> String {
    use std::os::fd::AsRawFd;
    format!("proc/self/fd/{}", fd.as_raw_fd())
}

/// Whether the mount that `path` leads to is a mount point of its own.
pub(super) fn is_mount_root(fd: &OwnedFd) -> Result<bool, Errno> {
    let stat = fs::statx(fd, "", AtFlags::EMPTY_PATH, fs::StatxFlags::empty())?;
    Ok(stat
        .stx_attributes
        .contains(fs::StatxAttributes::MOUNT_ROOT))
}
