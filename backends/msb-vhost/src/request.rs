//! One request of the driver: bytes to read, bytes to write, and its completion.
//!
//! The descriptor chain was read exactly once, checked and turned into host addresses before a
//! request is made. The bytes themselves stay in guest memory and may change at any time: read a
//! header once, into memory of one's own, and trust only that copy.

#![allow(unsafe_code)]

use std::any::Any;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::queue::Lease;
use crate::sys::Spans;

/// A request that still waits for its completion. Dropping it completes it with length zero, so
/// that no descriptor is ever lost.
pub struct Request {
    /// What the driver sends.
    pub readable: Segments,
    /// Where the device answers.
    pub writable: Segments,
    completion: Option<Completion>,
}

/// What is done with the answer.
pub(crate) struct Completion(Inner);

enum Inner {
    /// The chain goes back to its queue.
    Ring {
        lease: Arc<Lease>,
        head: u16,
        bytes: u64,
    },
    /// A test looks at it.
    Call(Box<dyn FnOnce(u32) + Send>),
}

impl Completion {
    pub(crate) fn ring(lease: Arc<Lease>, head: u16, bytes: u64) -> Self {
        Self(Inner::Ring { lease, head, bytes })
    }

    fn done(self, written: u32) {
        match self.0 {
            Inner::Ring { lease, head, bytes } => lease.complete(head, written, bytes),
            Inner::Call(done) => done(written),
        }
    }
}

impl Request {
    pub(crate) fn with_completion(
        readable: Segments,
        writable: Segments,
        completion: Completion,
    ) -> Self {
        Self {
            readable,
            writable,
            completion: Some(completion),
        }
    }

    /// Makes a request over plain buffers, for tests and fuzzing: the answer and its length are
    /// handed to `done`.
    pub fn new(
        readable: Segments,
        writable: Segments,
        done: impl FnOnce(u32) + Send + 'static,
    ) -> Self {
        Self {
            readable,
            writable,
            completion: Some(Completion(Inner::Call(Box::new(done)))),
        }
    }

    /// Ends the request: `written` bytes of the writable part, counted from its beginning, are the
    /// answer.
    pub fn complete(mut self, written: u32) {
        if let Some(completion) = self.completion.take() {
            completion.done(written);
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if let Some(completion) = self.completion.take() {
            completion.done(0);
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
    spans: Spans,
    first: usize,
    len: usize,
    aside: SmallVec<[libc::iovec; 1]>,
    keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the spans point into memory that `keep` holds mapped, and are only accessed with copies
// that tolerate concurrent change.
unsafe impl Send for Segments {}
// SAFETY: as above; shared access only reads the list of spans.
unsafe impl Sync for Segments {}

/// A buffer whose bytes may be written through its spans while it is shared.
struct Owned(#[allow(dead_code)] Box<[std::cell::UnsafeCell<u8>]>);

// SAFETY: the bytes are only accessed through raw copies, as guest memory is.
unsafe impl Send for Owned {}
// SAFETY: as above.
unsafe impl Sync for Owned {}

impl Segments {
    /// Segments over spans of memory that `keep` holds mapped.
    ///
    /// # Safety
    ///
    /// Every span must be valid for reads and writes as long as `keep` lives.
    pub(crate) unsafe fn from_spans(spans: Spans, keep: Arc<dyn Any + Send + Sync>) -> Self {
        let len = spans.iter().map(|span| span.iov_len).sum();
        Self {
            spans,
            first: 0,
            len,
            aside: SmallVec::new(),
            keep,
        }
    }

    /// Segments over spans that [`crate::sys::Memory::append`] found in the memory of `lease`.
    pub(crate) fn of_lease(spans: Spans, lease: &Arc<Lease>) -> Self {
        let lease = Arc::clone(lease);
        // SAFETY: `append` checked every span against a region that the lease's memory holds mapped.
        unsafe { Self::from_spans(spans, lease) }
    }

    /// Segments over one buffer of the process's own, for tests and fuzzing.
    pub fn from_vec(bytes: Vec<u8>) -> Self {
        let cells: Box<[_]> = bytes.into_iter().map(std::cell::UnsafeCell::new).collect();
        let mut spans = SmallVec::new();
        if !cells.is_empty() {
            spans.push(libc::iovec {
                iov_base: cells.as_ptr().cast_mut().cast(),
                iov_len: cells.len(),
            });
        }
        // SAFETY: the one span covers the boxed cells, which `keep` owns and never moves.
        unsafe { Self::from_spans(spans, Arc::new(Owned(cells))) }
    }

    /// The bytes of several segments, one after the other.
    pub fn joined(parts: impl IntoIterator<Item = Segments>) -> Self {
        let (mut spans, mut keep) = (Spans::new(), Vec::new());
        for part in parts {
            spans.extend_from_slice(part.spans());
            keep.push(part.keep);
        }
        // SAFETY: every span is one of a part, and `keep` holds what the parts held.
        unsafe { Self::from_spans(spans, Arc::new(keep)) }
    }

    /// The bytes that are left, copied out without consuming them.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.clone().read_exact(&mut bytes).ok();
        bytes
    }

    /// Number of bytes left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Splits off the first `at` bytes (fewer when there are fewer) and leaves the rest here.
    pub fn split_to(&mut self, at: usize) -> Segments {
        let mut front = SmallVec::new();
        let len = self.consume(at, |base, len| {
            front.push(libc::iovec {
                iov_base: base.cast(),
                iov_len: len,
            });
        });
        Segments {
            spans: front,
            first: 0,
            len,
            aside: SmallVec::new(),
            keep: Arc::clone(&self.keep),
        }
    }

    /// Keeps the first `len` bytes, and drops the rest.
    pub fn truncate(&mut self, len: usize) {
        let mut left = len.min(self.len);
        self.len = left;
        for place in self.first..self.spans.len() {
            if let Some(span) = self.spans.get_mut(place) {
                span.iov_len = span.iov_len.min(left);
                left -= span.iov_len;
            }
        }
    }

    /// Sets the first `len` bytes aside for [`Segments::write_aside`]: a header whose content is
    /// known after what follows it.
    ///
    /// # Errors
    ///
    /// [`ShortSegments`] when fewer are left; nothing is set aside then.
    pub fn set_aside(&mut self, len: usize) -> Result<(), ShortSegments> {
        self.require(len)?;
        let mut aside = SmallVec::new();
        self.consume(len, |base, len| {
            aside.push(libc::iovec {
                iov_base: base.cast(),
                iov_len: len,
            });
        });
        self.aside = aside;
        Ok(())
    }

    /// Copies `data` over the bytes that were set aside, which it fits.
    ///
    /// # Errors
    ///
    /// [`ShortSegments`] when `data` is longer; nothing is written then.
    pub fn write_aside(&mut self, data: &[u8]) -> Result<(), ShortSegments> {
        let room = self.aside.iter().map(|span| span.iov_len).sum::<usize>();
        if let Some(missing) = data.len().checked_sub(room).filter(|missing| *missing > 0) {
            return Err(ShortSegments { missing });
        }
        let mut from = data;
        for span in std::mem::take(&mut self.aside) {
            let (piece, rest) = from.split_at(span.iov_len.min(from.len()));
            // SAFETY: the span is mapped (`from_spans`) and as long as `piece` at least; `piece` is
            // not guest memory.
            unsafe { ptr::copy_nonoverlapping(piece.as_ptr(), span.iov_base.cast(), piece.len()) };
            from = rest;
        }
        Ok(())
    }

    /// Copies the first bytes into `out` and consumes them.
    ///
    /// # Errors
    ///
    /// [`ShortSegments`] when fewer are left; nothing is consumed then.
    pub fn read_exact(&mut self, out: &mut [u8]) -> Result<(), ShortSegments> {
        self.require(out.len())?;
        let mut to = out.as_mut_ptr();
        self.consume(out.len(), |from, len| {
            // SAFETY: the span is mapped (`from_spans`), `to` has at least `len` bytes left because
            // `consume` hands out `out.len()` in all, and the two do not overlap.
            unsafe { ptr::copy_nonoverlapping(from, to, len) };
            // SAFETY: stays within or one past the end of `out`.
            to = unsafe { to.add(len) };
        });
        Ok(())
    }

    /// Copies `data` over the first bytes and consumes them.
    ///
    /// # Errors
    ///
    /// [`ShortSegments`] when fewer are left; nothing is written then.
    pub fn write_all(&mut self, data: &[u8]) -> Result<(), ShortSegments> {
        self.require(data.len())?;
        let mut from = data.as_ptr();
        self.consume(data.len(), |to, len| {
            // SAFETY: as in `read_exact`, with the roles exchanged.
            unsafe { ptr::copy_nonoverlapping(from, to, len) };
            // SAFETY: stays within or one past the end of `data`.
            from = unsafe { from.add(len) };
        });
        Ok(())
    }

    /// Fills the first `len` bytes (all that are left if fewer) with `byte` and consumes them;
    /// returns how many.
    pub fn fill(&mut self, byte: u8, len: usize) -> usize {
        self.consume(len, |to, len| {
            // SAFETY: the span is mapped (`from_spans`).
            unsafe { ptr::write_bytes(to, byte, len) };
        })
    }

    /// Reads up to `len` bytes from `file` at `offset` straight into the front of the segments with
    /// one preadv2(2) call, with the given RWF_ flags, and consumes what was read. At most IOV_MAX
    /// spans go into one call.
    ///
    /// # Errors
    ///
    /// What preadv2(2) reports.
    pub fn pread(
        &mut self,
        file: impl AsFd,
        len: usize,
        offset: u64,
        flags: i32,
    ) -> io::Result<usize> {
        let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let (spans, count) = self.front(len);
        // SAFETY: the spans are mapped for writing (`from_spans`); the kernel bounds them by count.
        let read = unsafe {
            libc::preadv2(
                file.as_fd().as_raw_fd(),
                spans.as_ptr(),
                count,
                offset,
                flags,
            )
        };
        self.moved(read)
    }

    /// Writes up to `len` bytes from the front of the segments to `file` at `offset` with one
    /// pwritev2(2) call, with the given RWF_ flags, and consumes what was written.
    ///
    /// # Errors
    ///
    /// What pwritev2(2) reports.
    pub fn pwrite(
        &mut self,
        file: impl AsFd,
        len: usize,
        offset: u64,
        flags: i32,
    ) -> io::Result<usize> {
        let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let (spans, count) = self.front(len);
        // SAFETY: the spans are mapped for reading (`from_spans`); the kernel bounds them by count.
        let written = unsafe {
            libc::pwritev2(
                file.as_fd().as_raw_fd(),
                spans.as_ptr(),
                count,
                offset,
                flags,
            )
        };
        self.moved(written)
    }

    /// The spans as address and length, for system calls that take an iovec array and finish
    /// later (io_uring). They stay mapped as long as these segments, or a clone of them, live.
    pub fn spans(&self) -> &[libc::iovec] {
        self.spans.get(self.first..).unwrap_or_default()
    }

    fn require(&self, len: usize) -> Result<(), ShortSegments> {
        match len.checked_sub(self.len) {
            None | Some(0) => Ok(()),
            Some(missing) => Err(ShortSegments { missing }),
        }
    }

    /// The first `len` bytes as an array for one system call.
    fn front(&self, len: usize) -> (SmallVec<[libc::iovec; 16]>, i32) {
        let mut left = len;
        let mut spans = SmallVec::new();
        for span in self.spans().iter().take(libc::UIO_MAXIOV as usize) {
            if left == 0 {
                break;
            }
            let take = span.iov_len.min(left);
            spans.push(libc::iovec {
                iov_base: span.iov_base,
                iov_len: take,
            });
            left -= take;
        }
        let count = i32::try_from(spans.len()).unwrap_or(libc::UIO_MAXIOV);
        (spans, count)
    }

    fn moved(&mut self, result: isize) -> io::Result<usize> {
        let count = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        Ok(self.consume(count, |_, _| ()))
    }

    /// Hands the first `len` bytes to `each`, span by span, and drops them from the front.
    fn consume(&mut self, len: usize, mut each: impl FnMut(*mut u8, usize)) -> usize {
        let mut done = 0;
        while done < len {
            let Some(span) = self.spans.get_mut(self.first) else {
                break;
            };
            let take = span.iov_len.min(len - done);
            let base = span.iov_base.cast::<u8>();
            each(base, take);
            done += take;
            if take == span.iov_len {
                self.first += 1;
            } else {
                // SAFETY: `take` is less than the span's length, so the result stays inside it.
                span.iov_base = unsafe { base.add(take) }.cast();
                span.iov_len -= take;
            }
        }
        self.len -= done;
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_in_order_whatever_the_pieces() {
        let mut segments = Segments::from_vec((0..=9).collect());
        let mut front = segments.split_to(4);
        let mut two = [0; 2];
        front.read_exact(&mut two).unwrap();
        assert_eq!(
            (two, front.to_vec(), segments.len()),
            ([0, 1], vec![2, 3], 6)
        );
        assert_eq!(
            segments.read_exact(&mut [0; 7]),
            Err(ShortSegments { missing: 1 })
        );
        segments.write_all(&[7, 7]).unwrap();
        assert_eq!(segments.fill(1, 100), 4);
        assert!(segments.is_empty());
    }

    #[test]
    fn joined_segments_are_one_after_the_other() {
        let mut part = Segments::from_vec(vec![1, 2, 3]);
        part.read_exact(&mut [0]).unwrap();
        let mut joined = Segments::joined([part, Segments::from_vec(vec![4, 5])]);
        assert_eq!((joined.len(), joined.to_vec()), (4, vec![2, 3, 4, 5]));
        joined.split_to(3);
        assert_eq!(joined.to_vec(), [5]);
    }

    #[test]
    fn a_header_is_written_after_what_follows_it() {
        let whole = Segments::from_vec(vec![0; 8]);
        let mut segments = whole.clone();
        assert_eq!(segments.set_aside(9), Err(ShortSegments { missing: 1 }));
        segments.set_aside(3).unwrap();
        segments.write_all(&[5; 5]).unwrap();
        let long = segments.write_aside(&[1; 4]);
        assert_eq!(long, Err(ShortSegments { missing: 1 }));
        segments.write_aside(&[1, 2, 3]).unwrap();
        assert_eq!(whole.to_vec(), [1, 2, 3, 5, 5, 5, 5, 5]);
    }

    #[test]
    fn what_is_cut_off_cannot_be_reached() {
        let mut segments = Segments::from_vec((0..=9).collect());
        segments.truncate(20);
        assert_eq!(segments.len(), 10);
        segments.read_exact(&mut [0; 2]).unwrap();
        segments.truncate(3);
        assert_eq!(segments.to_vec(), [2, 3, 4]);
        assert_eq!(segments.fill(1, 9), 3);
    }
}
