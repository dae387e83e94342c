//! The io_uring of a queue: the one place where the kernel gets addresses to fill later.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, types};
use msb_vhost::Segments;

/// The spans of one read, at an address that does not change until it is submitted.
struct Spans(Box<[libc::iovec]>);

// SAFETY: the addresses are never dereferenced here, only handed to the kernel; the memory behind
// them is kept by the `Segments` next to them, which are `Send` themselves.
unsafe impl Send for Spans {}

struct Read<T> {
    segments: Segments,
    spans: Spans,
    tag: T,
}

/// Reads of one queue that finish later. Each comes with a tag of the caller's.
pub(crate) struct Ring<T> {
    ring: IoUring,
    reads: Vec<Option<Read<T>>>,
    free: Vec<usize>,
    unsubmitted: bool,
}

impl<T> Ring<T> {
    /// Makes a ring for `entries` reads at a time that makes `event` readable when one finishes.
    pub(crate) fn new(entries: u16, event: BorrowedFd<'_>) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_r_disabled()
            .build(u32::from(entries).max(1))?;
        let submitter = ring.submitter();
        submitter.register_eventfd(event.as_raw_fd())?;
        // A ring is no way around the system call filter: it can do nothing but this.
        submitter.register_restrictions(&mut [Restriction::sqe_op(opcode::Readv::CODE)])?;
        submitter.register_enable_rings()?;
        let count = usize::from(entries.max(1));
        Ok(Self {
            ring,
            reads: (0..count).map(|_| None).collect(),
            free: (0..count).collect(),
            unsubmitted: false,
        })
    }

    /// Queues a read that fills all of `segments` from `file` at `offset`; the file must stay open
    /// until the next [`Ring::submit`]. Returns the tag when there is no room.
    pub(crate) fn read(
        &mut self,
        file: BorrowedFd<'_>,
        segments: Segments,
        offset: u64,
        tag: T,
    ) -> Result<(), T> {
        let Some(slot) = self.free.pop() else {
            return Err(tag);
        };
        let spans = Spans(segments.spans().into());
        let count = u32::try_from(spans.0.len())
            .unwrap_or(u32::MAX)
            .min(libc::UIO_MAXIOV as u32);
        let entry = opcode::Readv::new(types::Fd(file.as_raw_fd()), spans.0.as_ptr(), count)
            .offset(offset)
            .build()
            .user_data(slot as u64);
        // SAFETY: the spans and the segments they point into are stored below in `reads` and stay
        // there, unmoved on the heap, until the completion is taken; `drop` waits for all of them.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            self.free.push(slot);
            return Err(tag);
        }
        if let Some(place) = self.reads.get_mut(slot) {
            *place = Some(Read {
                segments,
                spans,
                tag,
            });
        }
        self.unsubmitted = true;
        Ok(())
    }

    /// Hands everything queued to the kernel.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        if !std::mem::take(&mut self.unsubmitted) {
            return Ok(());
        }
        loop {
            match self.ring.submit() {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    self.unsubmitted = true;
                    return Err(e);
                }
            }
        }
    }

    /// Takes the finished reads: tag, the segments that were to be filled, and how many bytes were.
    pub(crate) fn finished(&mut self) -> Vec<(T, Segments, io::Result<usize>)> {
        let mut finished = Vec::new();
        for completion in self.ring.completion() {
            let Ok(slot) = usize::try_from(completion.user_data()) else {
                continue;
            };
            let Some(read) = self.reads.get_mut(slot).and_then(Option::take) else {
                continue;
            };
            self.free.push(slot);
            let result = usize::try_from(completion.result())
                .map_err(|_| io::Error::from_raw_os_error(completion.result().wrapping_neg()));
            drop(read.spans);
            finished.push((read.tag, read.segments, result));
        }
        finished
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        // The kernel must not fill memory that is gone.
        while self.reads.iter().any(Option::is_some) {
            if self.ring.submit_and_wait(1).is_err() {
                return std::mem::forget(std::mem::take(&mut self.reads));
            }
            drop(self.finished());
        }
    }
}
