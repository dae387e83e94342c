//! Locks of the open file description, which belong to a file and not to a process.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

fn byte(at: i64, kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: libc::c_short::try_from(kind).unwrap_or(0),
        l_whence: 0,
        l_start: at,
        l_len: 1,
        l_pid: 0,
    }
}

/// Takes a shared lock on one byte, whether the file is that long or not.
///
/// # Errors
///
/// What fcntl(2) reports.
pub(super) fn share(file: BorrowedFd<'_>, at: i64) -> io::Result<()> {
    let lock = byte(at, libc::F_RDLCK);
    // SAFETY: the command reads a `flock`, and gets one that lives during the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether somebody else has a lock on this byte.
///
/// # Errors
///
/// What fcntl(2) reports.
pub(super) fn is_held(file: BorrowedFd<'_>, at: i64) -> io::Result<bool> {
    let mut lock = byte(at, libc::F_WRLCK);
    // SAFETY: the command reads and writes a `flock`, and gets one that lives during the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}
