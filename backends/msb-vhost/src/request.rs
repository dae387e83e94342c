//! One request of the driver: bytes to read, bytes to write, and its completion.
//!
//! The descriptor chain was read exactly once, checked and turned into host addresses before a
//! request is made. The bytes themselves stay in guest memory and may change at any time: read a
//! header once, into memory of one's own, and trust only that copy.

use std::any::Any;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

/// A request that still waits for its completion. Dropping it completes it with length zero, so
/// that no descriptor is ever lost.
pub struct Request {
    /// What the driver sends.
    pub readable: Segments,
    /// Where the device answers.
    pub writable: Segments,
    completion: Option<Box<dyn FnOnce(u32) + Send>>,
}

impl Request {
    /// Makes a request over plain buffers, for tests and fuzzing: the answer and its length are
    /// handed to `done`.
    pub fn new(
        readable: Segments,
        writable: Segments,
        done: impl FnOnce(u32) + Send + 'static,
    ) -> Self {
        Self { readable, writable, completion: Some(Box::new(done)) }
    }

    /// Ends the request: `written` bytes of the writable part, counted from its beginning, are the
    /// answer.
    pub fn complete(mut self, written: u32) {
        if let Some(done) = self.completion.take() {
            done(written);
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if let Some(done) = self.completion.take() {
            done(0);
        }
    }
}

/// The segments hold fewer bytes than were asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("request is {missing} bytes too short")]
pub struct ShortSegments {
    /// How many bytes are missing.
    pub missing: usize,
}

/// A list of spans of guest memory, consumed from the front.
#[derive(Clone)]
pub struct Segments {
    // Filled in by the transport.
    #[allow(dead_code)]
    keep: Arc<dyn Any + Send + Sync>,
}

#[allow(unused_variables, clippy::todo, missing_docs)]
impl Segments {
    /// Segments over one buffer of the process's own, for tests and fuzzing.
    pub fn from_vec(bytes: Vec<u8>) -> Self {
        todo!()
    }
    /// The bytes that are left, copied out without consuming them.
    pub fn to_vec(&self) -> Vec<u8> {
        todo!()
    }
    /// Number of bytes left.
    pub fn len(&self) -> usize {
        todo!()
    }
    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Splits off the first `at` bytes (fewer when there are fewer) and leaves the rest here.
    pub fn split_to(&mut self, at: usize) -> Segments {
        todo!()
    }
    /// Copies the first bytes into `out` and consumes them.
    ///
    /// # Errors
    ///
    /// [`ShortSegments`] when fewer are left; nothing is consumed then.
    pub fn read_exact(&mut self, out: &mut [u8]) -> Result<(), ShortSegments> {
        todo!()
    }
    /// Copies `data` over the first bytes and consumes them.
    ///
    /// # Errors
    ///
    /// [`ShortSegments`] when fewer are left; nothing is written then.
    pub fn write_all(&mut self, data: &[u8]) -> Result<(), ShortSegments> {
        todo!()
    }
    /// Fills the first `len` bytes (all that are left if fewer) with `byte` and consumes them;
    /// returns how many.
    pub fn fill(&mut self, byte: u8, len: usize) -> usize {
        todo!()
    }
    /// Reads up to `len` bytes from `file` at `offset` straight into the front of the segments with
    /// one preadv2(2) call, with the given RWF_ flags, and consumes what was read. At most IOV_MAX
    /// spans go into one call.
    ///
    /// # Errors
    ///
    /// What preadv2(2) reports.
    pub fn pread(&mut self, file: impl AsFd, len: usize, offset: u64, flags: i32) -> io::Result<usize> {
        todo!()
    }
    /// Writes up to `len` bytes from the front of the segments to `file` at `offset` with one
    /// pwritev2(2) call, with the given RWF_ flags, and consumes what was written.
    ///
    /// # Errors
    ///
    /// What pwritev2(2) reports.
    pub fn pwrite(&mut self, file: impl AsFd, len: usize, offset: u64, flags: i32) -> io::Result<usize> {
        todo!()
    }
    /// The spans as address and length, for system calls that take an iovec array and finish
    /// later (io_uring). They stay mapped as long as these segments, or a clone of them, live.
    pub fn spans(&self) -> &[libc::iovec] {
        todo!()
    }
}
