//! Reads and writes on the host files an image consists of.
//!
//! [`HostFile`] is the only way image code reaches the host, so that a test can put a recorder or
//! a failing file below any format.

mod blocking;

pub use blocking::{BlockingFile, Caching};

use std::io;
use std::os::fd::BorrowedFd;

use msb_vhost::Segments;

/// When a write must be on stable storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// After the next [`HostFile::sync`].
    Later,
    /// Before the call returns, together with every earlier change of size of this file.
    Now,
}

/// Whether a read may wait for the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// It may.
    Allowed,
    /// It must fail with [`io::ErrorKind::WouldBlock`] instead; what was read so far is consumed.
    Never,
}

/// How a range is emptied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Emptying {
    /// Give the space back if that is possible; the content afterwards is unspecified.
    Discard,
    /// The range reads as zeroes afterwards, and its space may be given back.
    Unmap,
    /// The range reads as zeroes afterwards and keeps its space where the host can do that.
    Zero,
}

/// One file or block device of the host. Offsets and lengths are bytes.
///
/// All calls may run at the same time on several threads.
pub trait HostFile: Send + Sync {
    /// Its present size.
    ///
    /// # Errors
    ///
    /// What the host reports.
    fn size(&self) -> io::Result<u64>;

    /// Fills `buf` from `offset`; bytes beyond the end of the file are zero.
    ///
    /// # Errors
    ///
    /// What the host reports.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `buf` at `offset`.
    ///
    /// # Errors
    ///
    /// What the host reports; part of it may have been written.
    fn write_at(&self, buf: &[u8], offset: u64, durability: Durability) -> io::Result<()>;

    /// Moves `len` bytes at `offset` into the front of `to` and consumes what was filled; bytes
    /// beyond the end of the file are zero.
    ///
    /// # Errors
    ///
    /// What the host reports; `WouldBlock` when it would have to wait and must not.
    fn read_into(&self, to: &mut Segments, len: usize, offset: u64, wait: Wait) -> io::Result<()>;

    /// Writes the first `len` bytes of `from` at `offset` and consumes them.
    ///
    /// # Errors
    ///
    /// What the host reports; part of it may have been written.
    fn write_from(
        &self,
        from: &mut Segments,
        len: usize,
        offset: u64,
        durability: Durability,
    ) -> io::Result<()>;

    /// Empties a range without changing the size of the file.
    ///
    /// # Errors
    ///
    /// What the host reports.
    fn empty(&self, offset: u64, len: u64, how: Emptying) -> io::Result<()>;

    /// Grows or shrinks the file; a block device must already be large enough.
    ///
    /// # Errors
    ///
    /// What the host reports.
    fn set_size(&self, size: u64) -> io::Result<()>;

    /// Has the host hand out the blocks of a range that was never written, which reads as zeroes
    /// all the same. Only a hint.
    fn hand_out(&self, _offset: u64, _len: u64) {}

    /// Puts everything written so far on stable storage.
    ///
    /// # Errors
    ///
    /// What the host reports.
    fn sync(&self) -> io::Result<()>;

    /// Whether guest data goes past the page cache.
    fn avoids_cache(&self) -> bool {
        false
    }

    /// The descriptor for reads and writes that finish later through io_uring, when there is one.
    fn descriptor(&self) -> Option<BorrowedFd<'_>>;
}
