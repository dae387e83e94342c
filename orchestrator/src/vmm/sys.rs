//! The one system call of the VMM's confinement that has no safe wrapper.

use std::io;

use rustix::thread::UnshareFlags;

/// Moves this process, which has one thread, into new namespaces.
pub(super) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    debug_assert!(!flags.contains(UnshareFlags::FILES));
    // SAFETY: the table of descriptors stays shared, which is all that this call can break; every
    // caller passes namespace flags only.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(Into::into)
}
