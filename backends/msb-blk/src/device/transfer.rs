//! Reads and writes of guest data: at once where that does not wait, else through the io_uring.
//!
//! A read of cached data costs one system call and no hand-over. What would wait goes to the ring
//! of its queue, so that it holds up nobody behind it: reads that miss the page cache, everything
//! past the page cache, and writes while the host makes writers wait.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use msb_vhost::{Request, Segments};
use rustix::event::{EventfdFlags, eventfd};

use super::emptying::Emptied;
use super::{BlkDevice, status_of};
use crate::file::Wait;
use crate::image::{ImageError, Inside, Place};
use crate::request::Status;
use crate::sys::{Direction, Ring};

/// A write to the page cache that takes longer than this was made to wait.
const SLOW_WRITE: Duration = Duration::from_millis(2);
/// Writes that go to the ring after such a one, before the next is tried at once.
const DETOUR: u32 = 64;

/// Writes as large as this wait for their neighbours in the same turn, and this many bytes of them
/// are written together at most: the driver goes on with what is done.
const JOINED_FROM: usize = 16 << 10;
const JOINED_MOST: u64 = 512 << 10;

/// A request that was taken apart.
pub(super) struct Pending {
    /// Of its writable part only the status byte is left.
    pub(super) request: Request,
}

impl Pending {
    /// `None` when there is no room even for the status byte.
    pub(super) fn new(mut request: Request) -> Option<(Self, Segments)> {
        let room = request.writable.len().checked_sub(1)?;
        let data = request.writable.split_to(room);
        Some((Self { request }, data))
    }

    /// Answers; `room` bytes of data came before the status byte.
    pub(super) fn finish(mut self, room: usize, status: Status) {
        let written = u32::try_from(room).unwrap_or(u32::MAX).saturating_add(1);
        if self.request.writable.write_all(&[status as u8]).is_ok() {
            self.request.complete(written);
        }
    }
}

/// A read or write, as far as it has come.
pub(super) struct Transfer {
    pending: Pending,
    /// What is left to be moved.
    data: Segments,
    room: usize,
    /// Where on the disk that belongs.
    offset: u64,
    direction: Direction,
    /// Keeps the place that is being written to from being given to others.
    inside: Option<Inside>,
}

impl Transfer {
    /// Fills `data`, the writable part of a request, from `offset` of the disk.
    pub(super) fn read(pending: Pending, data: Segments, offset: u64) -> Self {
        Self {
            pending,
            room: data.len(),
            data,
            offset,
            direction: Direction::Read,
            inside: None,
        }
    }

    /// Writes what is left of the readable part to `offset` of the disk.
    pub(super) fn write(mut pending: Pending, room: usize, offset: u64) -> Self {
        let readable = &mut pending.request.readable;
        let data = readable.split_to(readable.len());
        Self {
            pending,
            data,
            room,
            offset,
            direction: Direction::Write,
            inside: None,
        }
    }

    fn finish(self, result: Result<(), ImageError>) {
        self.pending.finish(self.room, status_of(result));
    }
}

/// What each queue has for itself.
pub(super) struct Lane {
    event: OwnedFd,
    ring: Option<Mutex<Ring<Transfer>>>,
    /// Whether somebody waits for `event`; until then everything is carried out at once.
    is_watched: AtomicBool,
    /// Writes that go to the ring because the host makes writers wait.
    detour: AtomicU32,
    emptied: Mutex<Vec<Emptied>>,
    /// Writes to neighbouring places, which are carried out before the turn ends.
    neighbours: Mutex<Vec<Transfer>>,
}

impl Lane {
    pub(super) fn new(queue_size: u16, writable: bool) -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let ring = Ring::new(queue_size, event.as_fd(), writable)
            .inspect_err(|error| tracing::warn!(%error, "no io_uring: requests wait in line"))
            .ok()
            .map(Mutex::new);
        Ok(Self {
            event,
            ring,
            is_watched: AtomicBool::new(false),
            detour: AtomicU32::new(0),
            emptied: Mutex::default(),
            neighbours: Mutex::default(),
        })
    }

    /// What becomes readable when something has finished.
    pub(super) fn watch(&self) -> BorrowedFd<'_> {
        self.is_watched.store(true, Ordering::Relaxed);
        self.event.as_fd()
    }

    /// Hands what was queued to the kernel.
    pub(super) fn submit(&self) {
        if let Some(ring) = &self.ring
            && let Err(error) = lock(ring).submit()
        {
            tracing::warn!(%error, "io_uring takes no requests now");
            // Whoever waits for the event comes back here.
            rustix::io::write(&self.event, &1_u64.to_ne_bytes()).ok();
        }
    }

    /// What waits for the end of the batch to be emptied.
    pub(super) fn emptied(&self) -> MutexGuard<'_, Vec<Emptied>> {
        lock(&self.emptied)
    }

    fn ring(&self) -> Option<MutexGuard<'_, Ring<Transfer>>> {
        let watched = self.is_watched.load(Ordering::Relaxed);
        self.ring.as_ref().filter(|_| watched).map(lock)
    }
}

impl BlkDevice {
    /// Reads without waiting as far as that goes, the next piece through the ring.
    pub(super) fn read(&self, queue: u16, mut read: Transfer) {
        let result = self.read_now(&mut read, Wait::Never);
        if !matches!(&result, Err(error) if error.would_block()) {
            return read.finish(result);
        }
        if let Some(mut read) = self.read_later(queue, read) {
            let result = self.read_now(&mut read, Wait::Allowed);
            read.finish(result);
        }
    }

    fn read_now(&self, read: &mut Transfer, wait: Wait) -> Result<(), ImageError> {
        let before = read.data.len() as u64;
        let result = self.image.read(&mut read.data, read.offset, before, wait);
        read.offset += before - read.data.len() as u64;
        result
    }

    /// Queues the next piece of a read on the ring; gives it back if that cannot be done.
    fn read_later(&self, queue: u16, read: Transfer) -> Option<Transfer> {
        let Some(mut ring) = self.lane(queue).and_then(Lane::ring) else {
            return Some(read);
        };
        let Ok(extent) = self.image.locate(read.offset, read.data.len() as u64) else {
            return Some(read);
        };
        let Place::File(file, at) = extent.place else {
            return Some(read);
        };
        let Some(file) = file.descriptor() else {
            return Some(read);
        };
        let len = usize::try_from(extent.len).unwrap_or(usize::MAX);
        let piece = read.data.clone().split_to(len);
        ring.start(Direction::Read, file, piece, at, read).err()
    }

    /// Writes at once where that does not wait, else through the ring.
    pub(super) fn write(&self, queue: u16, write: Transfer) {
        let write = if self.writes_wait(queue) {
            let Some(write) = self.write_later(queue, write) else {
                return;
            };
            write
        } else {
            write
        };
        self.write_now(queue, write);
    }

    fn write_now(&self, queue: u16, mut write: Transfer) {
        let start = Instant::now();
        let len = write.data.len() as u64;
        let result = self.image.write(&mut write.data, write.offset, len);
        if start.elapsed() > SLOW_WRITE
            && let Some(lane) = self.lane(queue)
        {
            lane.detour.store(DETOUR, Ordering::Relaxed);
        }
        self.written(write, result);
    }

    /// Writes a request of the driver before the turn ends, together with what belongs before and
    /// behind it: to the host one long write costs less than several short ones.
    pub(super) fn write_in_turn(&self, queue: u16, write: Transfer) {
        let Some(lane) = self.lane(queue).filter(|_| write.data.len() >= JOINED_FROM) else {
            return self.write(queue, write);
        };
        let mut waiting = lock(&lane.neighbours);
        if let (Some(first), Some(last)) = (waiting.first(), waiting.last()) {
            let end = write.offset + write.data.len() as u64;
            let len = end.checked_sub(first.offset);
            let is_next = last.offset + last.data.len() as u64 == write.offset;
            if !is_next || len.is_none_or(|len| len > JOINED_MOST) {
                drop(waiting);
                self.write_neighbours(queue);
                waiting = lock(&lane.neighbours);
            }
        }
        waiting.push(write);
    }

    /// Carries out the writes that waited for their neighbours.
    pub(super) fn write_neighbours(&self, queue: u16) {
        let Some(lane) = self.lane(queue) else { return };
        let writes = std::mem::take(&mut *lock(&lane.neighbours));
        let apart = writes.len() < 2
            || self.image.avoids_cache()
            || self.committer.is_flushing()
            || lane.detour.load(Ordering::Relaxed) > 0;
        if apart {
            return writes
                .into_iter()
                .for_each(|write| self.write(queue, write));
        }
        let offset = writes.first().map_or(0, |first| first.offset);
        let mut data = Segments::joined(writes.iter().map(|write| write.data.clone()));
        let len = data.len() as u64;
        let start = Instant::now();
        let result = self.image.write(&mut data, offset, len);
        if start.elapsed() > SLOW_WRITE {
            lane.detour.store(DETOUR, Ordering::Relaxed);
        }
        for write in writes {
            match &result {
                Ok(()) => self.written(write, Ok(())),
                // Which of them fails shows when each is done by itself.
                Err(_) => self.write_now(queue, write),
            }
        }
    }

    fn written(&self, write: Transfer, result: Result<(), ImageError>) {
        if result.is_ok() && !self.is_writeback() {
            self.flush(write.pending, write.room);
        } else {
            write.finish(result);
        }
    }

    /// Whether a write had better not be carried out at once.
    fn writes_wait(&self, queue: u16) -> bool {
        // A flush makes writers wait for pages that are under way to the disk.
        if self.image.avoids_cache() || self.committer.is_flushing() {
            return true;
        }
        // Only the thread of the queue changes it.
        self.lane(queue).is_some_and(|lane| {
            let left = lane.detour.load(Ordering::Relaxed);
            lane.detour.store(left.saturating_sub(1), Ordering::Relaxed);
            left > 0
        })
    }

    /// Queues the next piece of a write on the ring; gives it back if that cannot be done, as when
    /// the mapping of the image has to change.
    fn write_later(&self, queue: u16, mut write: Transfer) -> Option<Transfer> {
        let Some(mut ring) = self.lane(queue).and_then(Lane::ring) else {
            return Some(write);
        };
        let left = write.data.len() as u64;
        let Ok(Some(place)) = self.image.in_place(write.offset, left) else {
            return Some(write);
        };
        let Some(file) = place.file.descriptor().filter(|_| place.len > 0) else {
            return Some(write);
        };
        let len = usize::try_from(place.len).unwrap_or(usize::MAX);
        let piece = write.data.clone().split_to(len);
        write.inside = place.inside;
        let back = ring.start(Direction::Write, file, piece, place.offset, write);
        back.err().map(|write| Transfer {
            inside: None,
            ..write
        })
    }

    /// Goes on with what has finished in the ring.
    pub(super) fn go_on(&self, queue: u16) {
        let Some(ring) = self.lane(queue).and_then(|lane| lane.ring.as_ref()) else {
            return;
        };
        let finished = lock(ring).finished();
        for (mut transfer, piece, result) in finished {
            transfer.inside = None;
            match result {
                Ok(moved) => self.go_on_with(queue, transfer, piece.len(), moved),
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {
                    self.transfer(queue, transfer);
                }
                // Memory that is not aligned as O_DIRECT wants it; the file knows another way.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => self.now(queue, transfer),
                Err(e) => transfer.finish(Err(e.into())),
            }
        }
    }

    fn now(&self, queue: u16, mut transfer: Transfer) {
        match transfer.direction {
            Direction::Read => {
                let result = self.read_now(&mut transfer, Wait::Allowed);
                transfer.finish(result);
            }
            Direction::Write => self.write_now(queue, transfer),
        }
    }

    /// Goes on after `moved` bytes of a piece of `len` bytes.
    fn go_on_with(&self, queue: u16, mut transfer: Transfer, len: usize, moved: usize) {
        let at_end = moved == 0 && len > 0;
        if at_end && transfer.direction == Direction::Write {
            return transfer.finish(Err(io::Error::from(io::ErrorKind::WriteZero).into()));
        }
        // At the end of the file less than the piece is there to be read; the rest is zero.
        let step = if at_end { len } else { moved };
        let mut part = transfer.data.split_to(step);
        if at_end {
            part.fill(0, step);
        }
        transfer.offset += step as u64;
        if transfer.data.is_empty() && transfer.direction == Direction::Write {
            return self.written(transfer, Ok(()));
        }
        self.transfer(queue, transfer);
    }

    fn transfer(&self, queue: u16, transfer: Transfer) {
        match transfer.direction {
            Direction::Read => self.read(queue, transfer),
            Direction::Write => self.write(queue, transfer),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
