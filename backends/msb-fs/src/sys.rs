//! System calls with the flags that keep them inside the shared directory.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, RawDir, ResolveFlags, SeekFrom, Stat, Uid};
use rustix::io::Errno;
use rustix::path::Arg;

/// Opens `name`, one component, in `dir`, without following links or leaving the directory.
pub(crate) fn open_in(
    dir: impl AsFd,
    name: &CStr,
    flags: OFlags,
    mode: u32,
) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let mut flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    // openat2 refuses flags that mean nothing for a mere place.
    if !flags.contains(OFlags::PATH) {
        flags |= OFlags::NOCTTY;
    }
    // BENEATH makes the kernel give up when the tree is renamed at the same moment.
    for _ in 0..8 {
        match rustix::fs::openat2(dir.as_fd(), name, flags, Mode::from_raw_mode(mode), resolve) {
            Err(Errno::AGAIN) => {}
            result => return result,
        }
    }
    Err(Errno::AGAIN)
}

/// Attributes of `name` in `dir`, of the link itself if it is one.
pub(crate) fn stat_in(dir: impl AsFd, name: &CStr) -> Result<Stat, Errno> {
    rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT)
}

/// Set once the working directory is the folder of descriptors; like it, this is the process's.
static BESIDE: AtomicBool = AtomicBool::new(false);

/// Makes the folder of this process's descriptors the working directory. A jailed process has no
/// /proc to name it by.
///
/// # Errors
///
/// What fchdir(2) reports.
pub(crate) fn work_beside_descriptors(folder: impl AsFd) -> Result<(), Errno> {
    rustix::process::fchdir(folder)?;
    BESIDE.store(true, Ordering::Relaxed);
    Ok(())
}

/// The path by which the kernel reaches the file behind a descriptor again.
pub(crate) fn fd_path(fd: BorrowedFd<'_>) -> String {
    if BESIDE.load(Ordering::Relaxed) {
        fd.as_raw_fd().to_string()
    } else {
        format!("/proc/self/fd/{}", fd.as_raw_fd())
    }
}

/// Opens the file behind `fd` once more. The caller knows that it is a regular file or directory.
pub(crate) fn reopen(fd: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    rustix::fs::openat(CWD, fd_path(fd), flags, Mode::empty())
}

/// Changes the permission bits of the file behind `fd`, which may be an O_PATH descriptor.
pub(crate) fn chmod(fd: BorrowedFd<'_>, mode: u32) -> Result<(), Errno> {
    match rustix::fs::fchmod(fd, Mode::from_raw_mode(mode)) {
        Err(Errno::BADF) => rustix::fs::chmodat(
            CWD,
            fd_path(fd),
            Mode::from_raw_mode(mode),
            AtFlags::empty(),
        ),
        result => result,
    }
}

/// Changes the owner of the file behind `fd`, which may be an O_PATH descriptor.
pub(crate) fn chown(fd: BorrowedFd<'_>, uid: Option<u32>, gid: Option<u32>) -> Result<(), Errno> {
    let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
    match rustix::fs::chownat(fd, c"", uid, gid, AtFlags::EMPTY_PATH) {
        // An id that does not exist here: only a container has so few.
        Err(Errno::INVAL) => Err(Errno::PERM),
        result => result,
    }
}

/// Changes the owner of `name` in `dir`, of the link itself if it is one.
pub(crate) fn chown_in(dir: impl AsFd, name: &CStr, uid: u32, gid: u32) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    match rustix::fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::INVAL) => Err(Errno::PERM),
        result => result,
    }
}

/// Reads an extended attribute of the file behind `fd`, which may be an O_PATH descriptor.
pub(crate) fn getxattr(
    fd: BorrowedFd<'_>,
    name: impl Arg + Copy,
    out: &mut [u8],
) -> Result<usize, Errno> {
    match rustix::fs::fgetxattr(fd, name, &mut *out) {
        Err(Errno::BADF) => rustix::fs::getxattr(fd_path(fd), name, out),
        result => result,
    }
}

/// Sets an extended attribute of the file behind `fd`, which may be an O_PATH descriptor.
pub(crate) fn setxattr(
    fd: BorrowedFd<'_>,
    name: impl Arg + Copy,
    value: &[u8],
    flags: rustix::fs::XattrFlags,
) -> Result<(), Errno> {
    match rustix::fs::fsetxattr(fd, name, value, flags) {
        Err(Errno::BADF) => rustix::fs::setxattr(fd_path(fd), name, value, flags),
        result => result,
    }
}

/// Removes an extended attribute of the file behind `fd`, which may be an O_PATH descriptor.
pub(crate) fn removexattr(fd: BorrowedFd<'_>, name: impl Arg + Copy) -> Result<(), Errno> {
    match rustix::fs::fremovexattr(fd, name) {
        Err(Errno::BADF) => rustix::fs::removexattr(fd_path(fd), name),
        result => result,
    }
}

/// Names of the extended attributes of the file behind `fd`, each ended by a zero byte.
pub(crate) fn listxattr(fd: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    // The kernel's own limit, XATTR_LIST_MAX.
    let mut list = vec![0; 1 << 16];
    let len = match rustix::fs::flistxattr(fd, &mut list[..]) {
        Err(Errno::BADF) => rustix::fs::listxattr(fd_path(fd), &mut list[..])?,
        result => result?,
    };
    list.truncate(len);
    Ok(list)
}

/// One entry of a host directory.
pub(crate) struct RawEntry {
    /// Its name.
    pub(crate) name: std::ffi::CString,
    /// Its inode number.
    pub(crate) ino: u64,
    /// Its type as the directory tells it.
    pub(crate) kind: rustix::fs::FileType,
    /// Where the listing continues after it.
    pub(crate) next: u64,
}

/// Reads entries of `dir` from position `offset` on, as many as one system call returns.
pub(crate) fn read_dir(dir: impl AsFd, offset: u64) -> Result<Vec<RawEntry>, Errno> {
    rustix::fs::seek(dir.as_fd(), SeekFrom::Start(offset))?;
    let mut buffer = [const { MaybeUninit::<u8>::uninit() }; 1 << 15];
    let mut raw = RawDir::new(dir.as_fd(), &mut buffer);
    let mut entries = Vec::new();
    while let Some(entry) = raw.next() {
        let entry = entry?;
        entries.push(RawEntry {
            name: entry.file_name().to_owned(),
            ino: entry.ino(),
            kind: entry.file_type(),
            next: entry.next_entry_cookie(),
        });
        if raw.is_buffer_empty() {
            break;
        }
    }
    Ok(entries)
}
