//! System calls with the flags that keep them inside the shared directory.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Statx, StatxFlags, Uid};
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

/// Attributes of an inode; the names are those of stat(2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(
    clippy::struct_field_names,
    reason = "known to everybody by these names"
)]
pub(crate) struct Stat {
    pub(crate) st_dev: u64,
    pub(crate) st_ino: u64,
    pub(crate) st_mode: u32,
    pub(crate) st_nlink: u32,
    pub(crate) st_uid: u32,
    pub(crate) st_gid: u32,
    pub(crate) st_rdev: u64,
    pub(crate) st_size: u64,
    pub(crate) st_blocks: u64,
    pub(crate) st_blksize: u32,
    pub(crate) st_atime: i64,
    pub(crate) st_mtime: i64,
    pub(crate) st_ctime: i64,
    pub(crate) st_atime_nsec: u32,
    pub(crate) st_mtime_nsec: u32,
    pub(crate) st_ctime_nsec: u32,
    /// When the inode was made, in nanoseconds, where the file system keeps that and it was asked.
    pub(crate) born: Option<i64>,
}

impl Stat {
    pub(crate) fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.st_mode)
    }

    /// The change time in nanoseconds; `None` when it lies too far away to be one.
    pub(crate) fn changed(&self) -> Option<i64> {
        nanoseconds(self.st_ctime, self.st_ctime_nsec)
    }

    /// What tells this inode from another one that has got its number later.
    pub(crate) fn born_or_changed(&self) -> Option<i64> {
        self.born.or_else(|| self.changed())
    }
}

impl From<Statx> for Stat {
    fn from(found: Statx) -> Self {
        let birth = found.stx_btime;
        let has_birth = found.stx_mask & StatxFlags::BTIME.bits() != 0;
        Self {
            st_dev: rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor),
            st_ino: found.stx_ino,
            st_mode: u32::from(found.stx_mode),
            st_nlink: found.stx_nlink,
            st_uid: found.stx_uid,
            st_gid: found.stx_gid,
            st_rdev: rustix::fs::makedev(found.stx_rdev_major, found.stx_rdev_minor),
            st_size: found.stx_size,
            st_blocks: found.stx_blocks,
            st_blksize: found.stx_blksize,
            st_atime: found.stx_atime.tv_sec,
            st_mtime: found.stx_mtime.tv_sec,
            st_ctime: found.stx_ctime.tv_sec,
            st_atime_nsec: found.stx_atime.tv_nsec,
            st_mtime_nsec: found.stx_mtime.tv_nsec,
            st_ctime_nsec: found.stx_ctime.tv_nsec,
            born: nanoseconds(birth.tv_sec, birth.tv_nsec).filter(|_| has_birth),
        }
    }
}

impl From<rustix::fs::Stat> for Stat {
    fn from(found: rustix::fs::Stat) -> Self {
        Self {
            st_dev: found.st_dev,
            st_ino: found.st_ino,
            st_mode: found.st_mode,
            st_nlink: u32::try_from(found.st_nlink).unwrap_or(u32::MAX),
            st_uid: found.st_uid,
            st_gid: found.st_gid,
            st_rdev: found.st_rdev,
            st_size: u64::try_from(found.st_size).unwrap_or(0),
            st_blocks: u64::try_from(found.st_blocks).unwrap_or(0),
            st_blksize: u32::try_from(found.st_blksize).unwrap_or(4096),
            st_atime: found.st_atime,
            st_mtime: found.st_mtime,
            st_ctime: found.st_ctime,
            st_atime_nsec: u32::try_from(found.st_atime_nsec).unwrap_or(0),
            st_mtime_nsec: u32::try_from(found.st_mtime_nsec).unwrap_or(0),
            st_ctime_nsec: u32::try_from(found.st_ctime_nsec).unwrap_or(0),
            born: None,
        }
    }
}

fn nanoseconds(seconds: i64, rest: u32) -> Option<i64> {
    seconds
        .checked_mul(1_000_000_000)?
        .checked_add(i64::from(rest))
}

/// What is asked of statx(2).
const FIELDS: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME);

/// Set once the kernel has refused a statx(2) without a path, which it takes since Linux 6.11.
static NEEDS_PATH: AtomicBool = AtomicBool::new(false);

/// Attributes of the file behind `fd`, which may be an O_PATH descriptor.
pub(crate) fn stat(fd: impl AsFd) -> Result<Stat, Errno> {
    let fd = fd.as_fd();
    if !NEEDS_PATH.load(Ordering::Relaxed) {
        match stat_pathless(fd) {
            Err(Errno::FAULT) => NEEDS_PATH.store(true, Ordering::Relaxed),
            result => return result,
        }
    }
    stat_by_empty_path(fd)
}

/// The same without the time of birth, which is a tenth cheaper: for who knows by the descriptor
/// which inode it is, and only asks what has become of it.
pub(crate) fn fstat(fd: impl AsFd) -> Result<Stat, Errno> {
    rustix::fs::fstat(fd).map(Stat::from)
}

/// With no path there is none to copy and to look at.
fn stat_pathless(fd: BorrowedFd<'_>) -> Result<Stat, Errno> {
    const { assert!(size_of::<Statx>() == size_of::<libc::statx>()) };
    let mut found = std::mem::MaybeUninit::<Statx>::uninit();
    // SAFETY: without a path the kernel reads nothing, and it writes one `statx` structure, which
    // `Statx` is, to `found`.
    let done = unsafe {
        libc::syscall(
            libc::SYS_statx,
            fd.as_raw_fd(),
            std::ptr::null::<libc::c_char>(),
            libc::AT_EMPTY_PATH,
            FIELDS.bits(),
            found.as_mut_ptr(),
        )
    };
    if done != 0 {
        return Err(last_error());
    }
    // SAFETY: the call has succeeded, and then it has filled the structure.
    Ok(Stat::from(unsafe { found.assume_init() }))
}

fn stat_by_empty_path(fd: BorrowedFd<'_>) -> Result<Stat, Errno> {
    rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, FIELDS).map(Stat::from)
}

/// The time in nanoseconds, by the clock with which file systems stamp changes: on a machine that is
/// short of CPU it can stand still for longer than any tick, and then nothing is known to be old.
/// By way of libc: what rustix does to find the vDSO is nothing for a process that is locked in.
pub(crate) fn file_time() -> i64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a place for a time. This clock exists since Linux 2.6.32.
    unsafe { libc::clock_gettime(libc::CLOCK_REALTIME_COARSE, &raw mut now) };
    now.tv_sec
        .saturating_mul(1_000_000_000)
        .saturating_add(now.tv_nsec)
}

/// Attributes of `name` in `dir`, of the link itself if it is one.
pub(crate) fn stat_in(dir: impl AsFd, name: &CStr) -> Result<Stat, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(dir, name, flags, FIELDS).map(Stat::from)
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

/// Whether the times of files behind `fd` tell any two changes apart when somebody has looked in
/// between: multigrain timestamps, which Linux has since 6.13 on these file systems. Only outside of the jail.
pub(crate) fn has_fine_times(fd: impl AsFd) -> bool {
    const BTRFS: i64 = 0x9123_683e;
    const EXT4: i64 = 0xef53;
    const TMPFS: i64 = 0x0102_1994;
    const XFS: i64 = 0x5846_5342;
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut parts = release.split(|letter: char| !letter.is_ascii_digit());
    let mut number = || parts.next()?.parse::<u32>().ok();
    let version = number().zip(number());
    let recent = version.is_some_and(|version| version >= (6, 13));
    recent
        && rustix::fs::fstatfs(fd)
            .is_ok_and(|found| [BTRFS, EXT4, TMPFS, XFS].contains(&found.f_type))
}

/// Number of getxattrat(2), the same on every architecture; since Linux 6.13.
pub(crate) const SYS_GETXATTRAT: libc::c_long = 464;

/// Argument of getxattrat(2).
#[repr(C)]
struct XattrArgs {
    value: u64,
    size: u32,
    flags: u32,
}

/// Reads an extended attribute of `name` in `dir`, of the link itself if it is one. ENOSYS on
/// kernels that cannot do so without opening the file.
pub(crate) fn getxattr_in(
    dir: impl AsFd,
    name: &CStr,
    attribute: &CStr,
    out: &mut [u8],
) -> Result<usize, Errno> {
    let mut args = XattrArgs {
        value: out.as_mut_ptr().expose_provenance() as u64,
        size: u32::try_from(out.len()).unwrap_or(u32::MAX),
        flags: 0,
    };
    // SAFETY: the names end in zero bytes, and `args` names the `out.len()` bytes of `out`, which
    // nobody else uses during the call.
    let len = unsafe {
        libc::syscall(
            SYS_GETXATTRAT,
            dir.as_fd().as_raw_fd(),
            name.as_ptr(),
            libc::AT_SYMLINK_NOFOLLOW,
            attribute.as_ptr(),
            &raw mut args,
            size_of::<XattrArgs>(),
        )
    };
    usize::try_from(len).map_err(|_| last_error())
}

/// Reads entries of the directory `dir` from where it stands into `buffer`, as getdents64(2) lays
/// them out; returns how many bytes they take.
pub(crate) fn read_dir(dir: impl AsFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: the kernel writes at most `buffer.len()` bytes to `buffer`.
    let len = unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            dir.as_fd().as_raw_fd(),
            buffer.as_mut_ptr(),
            buffer.len(),
        )
    };
    usize::try_from(len).map_err(|_| last_error())
}

/// A lock on bytes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RangeLock {
    Shared,
    Exclusive,
    None,
}

impl RangeLock {
    /// The lock on `len` bytes (zero: all) from `start` on, in the form of fcntl(2).
    fn on(self, (start, len): (i64, i64)) -> libc::flock {
        let kind = match self {
            Self::Shared => libc::F_RDLCK,
            Self::Exclusive => libc::F_WRLCK,
            Self::None => libc::F_UNLCK,
        };
        libc::flock {
            l_type: kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: start,
            l_len: len,
            l_pid: 0,
        }
    }
}

/// Sets a lock of `file`'s open description. Without `wait` a lock of another one is EAGAIN.
pub(crate) fn lock_range(
    file: &impl AsRawFd,
    kind: RangeLock,
    range: (i64, i64),
    wait: bool,
) -> Result<(), Errno> {
    let lock = kind.on(range);
    let command = if wait {
        libc::F_OFD_SETLKW
    } else {
        libc::F_OFD_SETLK
    };
    loop {
        // SAFETY: the descriptor is open, and `lock` lives until the call returns.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw const lock) };
        if result == 0 {
            return Ok(());
        }
        match last_error() {
            Errno::INTR => {}
            Errno::ACCESS => return Err(Errno::AGAIN),
            error => return Err(error),
        }
    }
}

/// A lock that somebody holds, with its first byte and length.
pub(crate) type HeldLock = (RangeLock, (i64, i64));

/// The first lock of another open description, or of a process of the host, that stands in the way
/// of `kind`; its range is the whole file with a length of zero.
pub(crate) fn lock_in_the_way(
    file: &impl AsRawFd,
    kind: RangeLock,
    range: (i64, i64),
) -> Result<Option<HeldLock>, Errno> {
    let mut lock = kind.on(range);
    // SAFETY: the descriptor is open, and `lock` is nobody else's until the call returns.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if result != 0 {
        return Err(last_error());
    }
    let range = (lock.l_start, lock.l_len);
    Ok(match libc::c_int::from(lock.l_type) {
        libc::F_RDLCK => Some((RangeLock::Shared, range)),
        libc::F_WRLCK => Some((RangeLock::Exclusive, range)),
        _ => None,
    })
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ways_to_ask_for_attributes_say_the_same() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"content").unwrap();
        let named = stat_in(
            CWD,
            &std::ffi::CString::new(file.path().to_str().unwrap()).unwrap(),
        );
        let place = rustix::fs::open(file.path(), OFlags::PATH, Mode::empty()).unwrap();
        for fd in [file.as_file().as_fd(), place.as_fd()] {
            let with = stat_by_empty_path(fd).unwrap();
            assert_eq!((with.st_size, with.kind()), (7, FileType::RegularFile));
            assert_eq!(Some(with), named.ok());
            assert_eq!(stat(fd), Ok(with));
            assert_eq!(fstat(fd), Ok(Stat { born: None, ..with }));
            // Older kernels say so, and are asked in the other way from then on.
            match stat_pathless(fd) {
                Err(error) => assert_eq!(error, Errno::FAULT),
                without => assert_eq!(without, Ok(with)),
            }
        }
        let device = std::fs::File::open("/dev/null").unwrap();
        let with = stat(&device).unwrap();
        assert_eq!(with.st_rdev, rustix::fs::makedev(1, 3));
        assert_eq!(fstat(&device), Ok(Stat { born: None, ..with }));
    }
}
