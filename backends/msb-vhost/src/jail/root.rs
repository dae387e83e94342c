//! Replaces the root directory by the share, or by nothing.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};

use super::{Demand, JailError, Layer, Report, Root, sys};

/// Mount attributes of everything that is visible inside.
const HARMLESS: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;

/// A directory that exists on every host; the new root lies over it for a moment.
const STEPPING_STONE: &str = "/proc";

/// Makes `root` the root directory of the mount namespace this process is in.
pub(super) fn replace(
    root: Root,
    report: &mut Report,
    demand: &mut Demand,
) -> Result<(), JailError> {
    let replaced = match &root {
        Root::Empty => enter_empty().map(|()| (None, None)),
        Root::Share {
            source, read_only, ..
        } => enter_share(source.as_fd(), *read_only).map(|(s, d)| (Some(s), Some(d))),
    };
    match demand.layer(replaced)? {
        Some((share, descriptors)) => {
            report.share = share;
            report.descriptors = descriptors;
            Ok(())
        }
        None => stay(root, report),
    }
}

/// Leaves the root directory as it is.
pub(super) fn stay(root: Root, report: &mut Report) -> Result<(), JailError> {
    if let Root::Share { source, .. } = root {
        report.share = Some(readable(source));
        let descriptors = open_path("/proc/self/fd");
        report.descriptors =
            Some(descriptors.map_err(|error| JailError::Share("find the descriptors of", error))?);
    }
    Ok(())
}

fn enter_empty() -> Result<(), JailError> {
    let empty = empty_tree().map_err(|error| failed("make an empty one", error))?;
    detach_from_host().map_err(|error| failed("make the host's mounts private", error))?;
    pivot(empty.as_fd()).map_err(|error| failed("change to it", error))
}

fn enter_share(source: BorrowedFd<'_>, read_only: bool) -> Result<(OwnedFd, OwnedFd), JailError> {
    let tree = clone_share(source, read_only)?;
    let descriptors = open_path("/proc/self/fd").and_then(|fd| clone_tree(&fd));
    let descriptors = descriptors.map_err(|error| failed("clone /proc/self/fd", error))?;
    sys::set_mount_attributes(descriptors.as_fd(), HARMLESS | libc::MOUNT_ATTR_RDONLY)
        .map_err(|error| failed("restrict /proc/self/fd", error))?;
    let stat = rustix::fs::fstat(&tree).map_err(|error| failed("look at the share", error))?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        detach_from_host().map_err(|error| failed("make the host's mounts private", error))?;
        pivot(tree.as_fd()).map_err(|error| failed("change to the share", error))?;
        Ok((readable(tree), descriptors))
    } else {
        enter_empty()?;
        Ok((tree, descriptors))
    }
}

/// Clones the mounts of the share, which was opened in the namespace that was left.
fn clone_share(source: BorrowedFd<'_>, read_only: bool) -> Result<OwnedFd, JailError> {
    // A descriptor keeps to the mounts it was opened in; only those of this namespace can be
    // cloned. The name may have got another meaning meanwhile, so the file itself is compared.
    let found = fs::read_link(format!("/proc/self/fd/{}", source.as_raw_fd()))
        .and_then(|path| open_path(&path))
        .map_err(|error| failed("find the share again", error))?;
    let same = same_file(source, found.as_fd()).map_err(|e| failed("look at the share", e))?;
    if !same {
        let moved = io::Error::other("it was moved or replaced meanwhile");
        return Err(failed("find the share again", moved));
    }
    let tree = clone_tree(&found).map_err(|error| failed("clone the share", error))?;
    let mut attributes = HARMLESS | libc::MOUNT_ATTR_NOSYMFOLLOW;
    if read_only {
        attributes |= libc::MOUNT_ATTR_RDONLY;
    }
    sys::set_mount_attributes(tree.as_fd(), attributes)
        .map_err(|error| failed("restrict the clone of the share", error))?;
    Ok(tree)
}

fn empty_tree() -> io::Result<OwnedFd> {
    let tmpfs = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(tmpfs.as_fd(), "size", "4096")?;
    rustix::mount::fsconfig_set_string(tmpfs.as_fd(), "nr_inodes", "1")?;
    rustix::mount::fsconfig_set_string(tmpfs.as_fd(), "mode", "0555")?;
    rustix::mount::fsconfig_create(tmpfs.as_fd())?;
    let tree = rustix::mount::fsmount(
        tmpfs.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_RDONLY,
    )?;
    let attributes = HARMLESS | libc::MOUNT_ATTR_NOSYMFOLLOW | libc::MOUNT_ATTR_RDONLY;
    sys::set_mount_attributes(tree.as_fd(), attributes)?;
    Ok(tree)
}

fn clone_tree(of: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    Ok(rustix::mount::open_tree(of.as_fd(), "", flags)?)
}

/// Keeps what is mounted here from showing up in the namespace that was left.
fn detach_from_host() -> io::Result<()> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    Ok(rustix::mount::mount_change("/", private)?)
}

/// Makes the detached mount `tree` the root and lets go of everything else.
fn pivot(tree: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(tree, "", CWD, STEPPING_STONE, flags)?;
    rustix::process::fchdir(tree)?;
    // The old root is put on top of the new one, from where it is taken away at once.
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir("/")?)
}

/// A directory that was opened as a path only, opened for reading if it may be.
fn readable(dir: OwnedFd) -> OwnedFd {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(&dir, ".", flags, Mode::empty()).unwrap_or(dir)
}

fn open_path(path: impl rustix::path::Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

fn same_file(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> io::Result<bool> {
    let (one, other) = (rustix::fs::fstat(one)?, rustix::fs::fstat(other)?);
    Ok(one.st_dev == other.st_dev && one.st_ino == other.st_ino)
}

fn failed(step: &'static str, source: impl Into<io::Error>) -> JailError {
    JailError::layer(Layer::Root, step, source)
}
