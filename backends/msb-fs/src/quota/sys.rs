//! Memory that several processes count in, and locks between them.

use std::fs::File;
use std::io;
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
