//! System calls that rustix does not wrap.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Sends `signal` to one thread of a process. Where a test harness has threads of its own, a signal
/// to the process would meet one that does not block it.
///
/// # Errors
///
/// What tgkill(2) reports.
pub fn signal_thread(process: u32, thread: u32, signal: i32) -> io::Result<()> {
    let number = |id| libc::c_long::from(i32::try_from(id).unwrap_or(-1));
    // SAFETY: the call takes three integers and touches no memory of this process.
    let result = unsafe {
        libc::syscall(
            libc::SYS_tgkill,
            number(process),
            number(thread),
            libc::c_long::from(signal),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Lets the calling thread act as `user`, with the group of the same number: files are made and
/// permissions checked as this user's. Zero is root again.
///
/// # Errors
///
/// When the thread is not root's.
pub fn act_as(user: u32) -> io::Result<()> {
    let ids = [
        (libc::SYS_setfsgid, "setfsgid"),
        (libc::SYS_setfsuid, "setfsuid"),
    ];
    for (number, name) in ids {
        // SAFETY: the calls take an integer, touch no memory, and change this thread alone.
        let changed = || unsafe { libc::syscall(number, libc::c_long::from(user)) };
        changed();
        // They return the number before, never an error.
        if changed() != libc::c_long::from(user) {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, name));
        }
    }
    Ok(())
}

/// Makes `groups` those of the calling thread beside its first one.
///
/// # Errors
///
/// What setgroups(2) reports.
pub fn join(groups: &[u32]) -> io::Result<()> {
    // SAFETY: the slice outlives the call, which reads as many numbers as it has, and the call
    // changes this thread alone.
    let result = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Cuts or extends the file at `path`, which is not opened for that.
///
/// # Errors
///
/// What truncate(2) reports.
pub fn truncate(path: &Path, length: u64) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let length = libc::off_t::try_from(length).map_err(io::Error::other)?;
    // SAFETY: the path ends in a zero byte and outlives the call.
    if unsafe { libc::truncate(path.as_ptr(), length) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
