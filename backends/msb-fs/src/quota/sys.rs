//! Memory that several processes count in, and locks between them.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags};

/// Numbers that every process which maps the same file sees change at once.
pub(super) struct Numbers {
    base: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: the mapping belongs to the value and holds nothing but atomic numbers.
unsafe impl Send for Numbers {}
// SAFETY: as above.
unsafe impl Sync for Numbers {}

impl Numbers {
    /// `len` numbers: those of `file`, which is long enough, or of this process alone.
    pub(super) fn map(file: Option<&File>, len: usize) -> io::Result<Self> {
        let bytes = len * size_of::<AtomicU64>();
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let base = match file {
            // SAFETY: a new mapping at an address of the kernel's choice.
            Some(file) => unsafe {
                rustix::mm::mmap(ptr::null_mut(), bytes, access, MapFlags::SHARED, file, 0)
            }?,
            // SAFETY: as above.
            None => unsafe {
                rustix::mm::mmap_anonymous(ptr::null_mut(), bytes, access, MapFlags::PRIVATE)
            }?,
        };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len })
    }

    pub(super) fn all(&self) -> &[AtomicU64] {
        // SAFETY: `map` made so many numbers, any bytes are some, and the mapping lives with self.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

impl Drop for Numbers {
    fn drop(&mut self) {
        let bytes = self.len * size_of::<AtomicU64>();
        // SAFETY: made in `map` with this length; no borrow outlives the value.
        unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), bytes) }.ok();
    }
}

/// What is done with a range of bytes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RangeLock {
    Shared,
    Exclusive,
    None,
}

/// Sets a lock of `file`'s open description on `len` bytes (zero: all) from `start` on. Without
/// `wait` a lock of another description is EAGAIN.
pub(crate) fn lock_range(
    file: &impl AsRawFd,
    kind: RangeLock,
    (start, len): (i64, i64),
    wait: bool,
) -> rustix::io::Result<()> {
    let kind = match kind {
        RangeLock::Shared => libc::F_RDLCK,
        RangeLock::Exclusive => libc::F_WRLCK,
        RangeLock::None => libc::F_UNLCK,
    };
    let range = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    let command = if wait {
        libc::F_OFD_SETLKW
    } else {
        libc::F_OFD_SETLK
    };
    loop {
        // SAFETY: the descriptor is open, and `range` lives until the call returns.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw const range) };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match rustix::io::Errno::from_io_error(&error) {
            Some(rustix::io::Errno::INTR) => {}
            Some(rustix::io::Errno::ACCESS) => return Err(rustix::io::Errno::AGAIN),
            error => return Err(error.unwrap_or(rustix::io::Errno::IO)),
        }
    }
}
