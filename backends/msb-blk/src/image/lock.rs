//! Keeps others from an image: one writer or many readers, held by the kernel until the file closes.
//!
//! Two kinds of lock, because there are two kinds of neighbours: flock(2) on the whole file, as `msb`
//! and this program take it, and the bytes QEMU locks in `block/file-posix.c`, so that a running disk
//! is refused by QEMU and qemu-img and theirs by us. There each permission has two bytes: one is
//! locked (shared) by who has it, the other by who bears nobody else having it.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::sys::{is_held, share};

const HAS: i64 = 100;
const BARS: i64 = 200;
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Locks an image for reading or for writing; `false` if somebody else uses it in a way that
/// excludes this.
///
/// # Errors
///
/// What the host reports.
pub(super) fn lock(file: BorrowedFd<'_>, read_only: bool) -> io::Result<bool> {
    let whole = if read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    match rustix::fs::flock(file, whole) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(false),
        Err(e) => return Err(e.into()),
    }
    match lock_as_qemu_does(file, read_only) {
        // Some file systems know only one kind of lock; the first one holds.
        Err(e)
            if matches!(
                e.raw_os_error(),
                Some(libc::EINVAL | libc::ENOLCK | libc::EOPNOTSUPP)
            ) =>
        {
            tracing::debug!(error = %e, "QEMU will not notice that the image is in use");
            Ok(true)
        }
        result => result,
    }
}

fn lock_as_qemu_does(file: BorrowedFd<'_>, read_only: bool) -> io::Result<bool> {
    let has: &[i64] = if read_only {
        &[CONSISTENT_READ]
    } else {
        &[CONSISTENT_READ, WRITE, RESIZE]
    };
    let bars = [WRITE, RESIZE];
    for at in has.iter().map(|p| HAS + p).chain(bars.map(|p| BARS + p)) {
        match share(file, at) {
            Ok(()) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Ok(false);
            }
            Err(e) => return Err(e),
        }
    }
    // Ours are taken, so of two that come at once at least one sees the other.
    for at in has.iter().map(|p| BARS + p).chain(bars.map(|p| HAS + p)) {
        if is_held(file, at)? {
            return Ok(false);
        }
    }
    Ok(true)
}
