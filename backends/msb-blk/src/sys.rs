//! The io_uring of a queue: the one place where the kernel gets addresses to use later.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, types};
use msb_vhost::Segments;

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the file into the segments.
    Read,
    /// From the segments into the file.
    Write,
}

/// The spans of one transfer, at an address that does not change until it is submitted.
struct Spans(Box<[libc::iovec]>);

// SAFETY: the addresses are never dereferenced here, only handed to the kernel; the memory behind
// them is kept by the `Segments` next to them, which are `Send` themselves.
unsafe impl Send for Spans {}

struct Transfer<T> {
    segments: Segments,
    spans: Spans,
    tag: T,
}

/// Transfers of one queue that finish later. Each comes with a tag of the caller's.
pub(crate) struct Ring<T> {
    ring: IoUring,
    transfers: Vec<Option<Transfer<T>>>,
    free: Vec<usize>,
    /// Transfers that the kernel has not been told of.
    queued: usize,
}

impl<T> Ring<T> {
    /// Makes a ring for `entries` transfers at a time that makes `event` readable when one
    /// finishes. It takes writes only if `writable`.
    pub(crate) fn new(entries: u16, event: BorrowedFd<'_>, writable: bool) -> io::Result<Self> {
        let entries = entries.max(1);
        // Completions wait for the thread's next call instead of interrupting it, where the kernel
        // can do that (5.19).
        let cooperative = IoUring::builder()
            .setup_r_disabled()
            .setup_coop_taskrun()
            .build(u32::from(entries));
        let ring = match cooperative {
            Ok(ring) => ring,
            Err(_) => IoUring::builder()
                .setup_r_disabled()
                .build(u32::from(entries))?,
        };
        let submitter = ring.submitter();
        submitter.register_eventfd(event.as_raw_fd())?;
        // A ring is no way around the system call filter: it can do nothing but this.
        let mut allowed = vec![Restriction::sqe_op(opcode::Readv::CODE)];
        if writable {
            allowed.push(Restriction::sqe_op(opcode::Writev::CODE));
        }
        submitter.register_restrictions(&mut allowed)?;
        submitter.register_enable_rings()?;
        let count = usize::from(entries);
        Ok(Self {
            ring,
            transfers: (0..count).map(|_| None).collect(),
            free: (0..count).collect(),
            queued: 0,
        })
    }

    /// Queues a transfer of all of `segments` from or to `file` at `offset`; the file must stay
    /// open until the next [`Ring::submit`]. Returns the tag when there is no room.
    pub(crate) fn start(
        &mut self,
        direction: Direction,
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
        let (file, first) = (types::Fd(file.as_raw_fd()), spans.0.as_ptr());
        let entry = match direction {
            Direction::Read => opcode::Readv::new(file, first, count)
                .offset(offset)
                .build(),
            Direction::Write => opcode::Writev::new(file, first, count)
                .offset(offset)
                .build(),
        };
        let entry = entry.user_data(slot as u64);
        // SAFETY: the spans and the segments they point into are stored below in `transfers` and
        // stay there, unmoved on the heap, until the completion is taken; `drop` waits for them.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            self.free.push(slot);
            return Err(tag);
        }
        if let Some(place) = self.transfers.get_mut(slot) {
            *place = Some(Transfer {
                segments,
                spans,
                tag,
            });
        }
        self.queued += 1;
        // The disk gets as much as it has left to do, and so never waits for the rest of a batch,
        // nor for one call after the other.
        let started = self.transfers.len().saturating_sub(self.free.len());
        if self.queued * 2 >= started {
            // What fails now is tried again, and reported, at the end of the batch.
            self.submit().ok();
        }
        Ok(())
    }

    /// Hands everything queued to the kernel.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        while self.queued > 0 {
            match self.ring.submit() {
                Ok(0) => return Err(io::ErrorKind::WouldBlock.into()),
                Ok(taken) => self.queued = self.queued.saturating_sub(taken),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Takes what has finished: tag, the segments that were to be moved, and how many bytes were.
    pub(crate) fn finished(&mut self) -> Vec<(T, Segments, io::Result<usize>)> {
        let mut finished = Vec::new();
        for completion in self.ring.completion() {
            let Ok(slot) = usize::try_from(completion.user_data()) else {
                continue;
            };
            let Some(transfer) = self.transfers.get_mut(slot).and_then(Option::take) else {
                continue;
            };
            self.free.push(slot);
            let result = usize::try_from(completion.result())
                .map_err(|_| io::Error::from_raw_os_error(completion.result().wrapping_neg()));
            drop(transfer.spans);
            finished.push((transfer.tag, transfer.segments, result));
        }
        finished
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        // The kernel must not use memory that is gone.
        while self.transfers.iter().any(Option::is_some) {
            if self.ring.submit_and_wait(1).is_err() {
                return std::mem::forget(std::mem::take(&mut self.transfers));
            }
            drop(self.finished());
        }
    }
}
