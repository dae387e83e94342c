//! The file systems of the kernel that every Linux program expects.

use std::os::fd::{AsFd, OwnedFd};

use msb_protocol::MountFlags;
use rustix::fs::{self, AtFlags, CWD, FileType, Mode, OFlags, makedev, mknodat, symlinkat};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::System;
use super::apply::{self, Doing, FileSystem, MountError, fd_path, is_mount_root};
use super::target::{self, Kind};
use crate::sys;

/// Devices that reach no disk, port or memory: name, major and minor number.
const SAFE_DEVICES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];

/// Mounts the file systems that the agent itself needs, in the initramfs.
pub(crate) fn mount_own() -> Result<(), MountError> {
    for (kind, folder) in [("devtmpfs", "dev"), ("proc", "proc"), ("sysfs", "sys")] {
        match fs::mkdirat(CWD, folder, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error).doing(format!("cannot make the folder {folder}")),
        }
        let mount = FileSystem {
            kind,
            source: kind,
            options: &[],
        }
        .mount(MountFlags::default())?;
        apply::attach(&mount, CWD, folder)?;
    }
    Ok(())
}

/// Mounts one of them in the sandbox.
pub(super) fn mount(root: &OwnedFd, system: System) -> Result<(), MountError> {
    let flags = |noexec, nodev| MountFlags {
        noexec,
        nosuid: true,
        nodev,
        read_only: false,
    };
    let make = |kind, options, flags| {
        FileSystem {
            kind,
            source: kind,
            options,
        }
        .mount(flags)
    };
    let path = system.target();
    let mount = match system {
        System::Proc => make("proc", &[], flags(true, true))?,
        System::Sys => make("sysfs", &[], flags(true, true))?,
        System::Cgroup => match make("cgroup2", &[], flags(true, true)) {
            Err(_) => return Ok(()),
            Ok(mount) => mount,
        },
        System::Dev => {
            let mount = make("devtmpfs", &[("mode", Some("0755"))], flags(false, false))?;
            fill_dev(&mount)?;
            mount
        }
        System::SafeDev => {
            let options = [("mode", Some("0755")), ("size", Some("1m"))];
            let mount = FileSystem {
                kind: "tmpfs",
                source: "dev",
                options: &options,
            }
            .mount(flags(true, false))?;
            add_safe_devices(&mount)?;
            fill_dev(&mount)?;
            mount
        }
        System::Pts => {
            let options = [
                ("mode", Some("620")),
                ("gid", Some("5")),
                ("ptmxmode", Some("666")),
            ];
            make("devpts", &options, flags(true, false))?
        }
        System::Shm => make("tmpfs", &[("mode", Some("1777"))], flags(true, true))?,
        System::Run if is_in_use(root, path) => return Ok(()),
        System::Run => make("tmpfs", &[("mode", Some("0755"))], flags(false, true))?,
    };
    let point = target::open(root.as_fd(), path, Kind::Directory)?;
    let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(&mount, "", &point, "", empty).doing("cannot attach the mount")
}

/// Makes what lies at `path` read-only.
pub(super) fn protect(root: &OwnedFd, path: &str) -> Result<(), MountError> {
    let place = match target::resolve(root.as_fd(), path) {
        Err(Errno::NOENT) => return Ok(()),
        place => place.doing("cannot open it")?,
    };
    let read_only = u64::from(MountAttrFlags::MOUNT_ATTR_RDONLY.bits());
    if is_mount_root(&place).doing("cannot look at it")? {
        return sys::set_mount_attributes(&place, read_only).doing("cannot make it read-only");
    }
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mount =
        open_tree(&place, "", clone | OpenTreeFlags::AT_EMPTY_PATH).doing("cannot bind it")?;
    sys::set_mount_attributes(&mount, read_only).doing("cannot make it read-only")?;
    let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(&mount, "", &place, "", empty).doing("cannot attach the mount")
}

/// The folders and links of `/dev` that the kernel does not make.
fn fill_dev(dev: &OwnedFd) -> Result<(), MountError> {
    for folder in ["pts", "shm"] {
        ignore_existing(fs::mkdirat(dev, folder, Mode::from_raw_mode(0o755))).doing("fill /dev")?;
    }
    for (to, name) in LINKS {
        ignore_existing(symlinkat(to, dev, name)).doing("fill /dev")?;
    }
    Ok(())
}

fn add_safe_devices(dev: &OwnedFd) -> Result<(), MountError> {
    let mode = Mode::from_raw_mode(0o666);
    for (name, major, minor) in SAFE_DEVICES {
        mknodat(
            dev,
            name,
            FileType::CharacterDevice,
            mode,
            makedev(major, minor),
        )
        .and_then(|()| fs::chmodat(dev, name, mode, AtFlags::empty()))
        .doing("fill /dev")?;
    }
    Ok(())
}

fn ignore_existing(result: Result<(), Errno>) -> Result<(), Errno> {
    if result == Err(Errno::EXIST) {
        Ok(())
    } else {
        result
    }
}

/// Whether the image keeps something there, such as the socket folder of a database.
fn is_in_use(root: &OwnedFd, path: &str) -> bool {
    let Ok(place) = target::resolve(root.as_fd(), path) else {
        return false;
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(folder) = fs::openat(&place, ".", flags, Mode::empty()) else {
        return false;
    };
    let is_entry = |entry: &fs::DirEntry| !matches!(entry.file_name().to_bytes(), b"." | b"..");
    fs::Dir::new(folder).is_ok_and(|entries| entries.flatten().any(|entry| is_entry(&entry)))
}

/// Refuses what a running guest cannot do without as a mount point. Its image or its user may have
/// made a link that leads there, which only the guest sees.
pub(super) fn check_free(root: &OwnedFd, target: &str) -> Result<(), MountError> {
    let point = match target::resolve(root.as_fd(), target) {
        Err(Errno::NOENT) => return Ok(()),
        point => point.doing("cannot reach the mount point")?,
    };
    if is_mount_root(&point).doing("cannot look at the mount point")? {
        return Err(MountError::Plan("something is mounted there already"));
    }
    let path = fs::readlinkat(CWD, fd_path(&point), vec![]).doing("name the mount point")?;
    let own = ["/proc", "/sys", "/dev"].iter().any(|place| {
        let rest = path.to_bytes().strip_prefix(place.as_bytes());
        rest.is_some_and(|rest| rest.first().is_none_or(|byte| *byte == b'/'))
    });
    if own {
        return Err(MountError::Plan(
            "the path leads into a place of the system",
        ));
    }
    Ok(())
}
