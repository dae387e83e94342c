//! The system calls of the VMM's confinement that have no safe wrapper.

use std::io;

use rustix::thread::UnshareFlags;

/// Moves this process, which has one thread, into new namespaces.
pub(super) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    debug_assert!(!flags.contains(UnshareFlags::FILES));
    // SAFETY: the table of descriptors stays shared, which is all that this call can break; every
    // caller passes namespace flags only.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(Into::into)
}

/// Closes what the caller of this program left open for it by accident: all but standard input,
/// output and error. To be called before anything is opened.
pub(crate) fn close_inherited() {
    // SAFETY: the call takes integers only; nothing owns these descriptors yet, for this process has
    // opened none.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
}
