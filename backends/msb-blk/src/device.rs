//! The virtio-blk device (virtio 1.3 §5.2): requests in, image operations out.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use msb_vhost::{ConfigError, Device, QueueLimits, Request, Segments};
use rustix::event::{EventfdFlags, eventfd};

use crate::commit::{Committer, Job};
use crate::file::{Emptying, Wait};
use crate::image::{Image, ImageError, Place};
use crate::request::{
    ID_LEN, Limits, MAX_RANGE_SECTORS, MAX_RANGES, Operation, Range, SECTOR, Status, parse,
};
use crate::sys::Ring;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Offset of the writeback byte in the configuration space.
const WRITEBACK: u32 = 32;
/// Discards and zeroes beyond this many bytes go to the commit thread.
const MAX_INLINE_EMPTY: u64 = 16 << 20;

/// What the device shows to the driver.
#[derive(Debug, Clone)]
pub struct DeviceConfig {
    /// Serial number, at most 20 bytes.
    pub serial: String,
    /// Number of virtqueues.
    pub queues: u16,
    /// Largest size of a virtqueue, a power of two.
    pub queue_size: u16,
    /// Refuse everything that changes the disk.
    pub read_only: bool,
}

/// A request that was taken apart.
struct Pending {
    /// Of its writable part only the status byte is left.
    request: Request,
}

impl Pending {
    /// `None` when there is no room even for the status byte.
    fn new(mut request: Request) -> Option<(Self, Segments)> {
        let room = request.writable.len().checked_sub(1)?;
        let data = request.writable.split_to(room);
        Some((Self { request }, data))
    }

    /// Answers; `room` bytes of data came before the status byte.
    fn finish(mut self, room: usize, status: Status) {
        let written = u32::try_from(room).unwrap_or(u32::MAX).saturating_add(1);
        if self.request.writable.write_all(&[status as u8]).is_ok() {
            self.request.complete(written);
        }
    }
}

/// A request on the commit thread, with the room for data before its status byte.
type Waiting = (Pending, usize);

/// A read that goes on when the ring has filled its next piece.
struct OpenRead {
    pending: Pending,
    data: Segments,
    room: usize,
    offset: u64,
}

struct Queue {
    event: OwnedFd,
    ring: Option<Mutex<Ring<OpenRead>>>,
    /// Whether somebody waits for `event`; until then reads are carried out at once.
    is_watched: AtomicBool,
}

/// A virtio-blk device over an image.
pub struct BlkDevice {
    image: Arc<Image>,
    config: DeviceConfig,
    limits: Limits,
    writeback: AtomicBool,
    /// Whether the driver flushes; if not, every write is made durable by itself.
    driver_flushes: AtomicBool,
    queues: Vec<Queue>,
    committer: Committer<Waiting>,
}

impl BlkDevice {
    /// Makes the device; no thread starts before the first request that needs one.
    ///
    /// # Errors
    ///
    /// When the host has no descriptors left.
    pub fn new(image: Arc<Image>, config: DeviceConfig) -> io::Result<Self> {
        let mut queues = Vec::new();
        for _ in 0..config.queues {
            let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            let ring = Ring::new(config.queue_size, event.as_fd())
                .inspect_err(|error| tracing::warn!(%error, "no io_uring: reads wait in line"))
                .ok()
                .map(Mutex::new);
            queues.push(Queue {
                event,
                ring,
                is_watched: AtomicBool::new(false),
            });
        }
        let committer = Committer::new(Arc::clone(&image), |(pending, room): Waiting, is_ok| {
            pending.finish(room, if is_ok { Status::Ok } else { Status::IoError });
        });
        let limits = Limits {
            size: image.size(),
            read_only: config.read_only,
            discard: image.can_discard() && !config.read_only,
        };
        Ok(Self {
            image,
            config,
            limits,
            writeback: AtomicBool::new(true),
            driver_flushes: AtomicBool::new(true),
            queues,
            committer,
        })
    }

    /// Reads without waiting as far as that goes, the next piece through the ring.
    fn read(&self, queue: u16, mut read: OpenRead) {
        let before = read.data.len() as u64;
        let result = self
            .image
            .read(&mut read.data, read.offset, before, Wait::Never);
        read.offset += before - read.data.len() as u64;
        let result = match result {
            Err(e) if e.would_block() => {
                let Some(back) = self.read_later(queue, read) else {
                    return;
                };
                read = back;
                let left = read.data.len() as u64;
                self.image
                    .read(&mut read.data, read.offset, left, Wait::Allowed)
            }
            result => result,
        };
        read.pending.finish(read.room, status_of(result));
    }

    /// Queues the next piece of a read on the ring; gives it back if that cannot be done.
    fn read_later(&self, queue: u16, read: OpenRead) -> Option<OpenRead> {
        let watched = self
            .queue(queue)
            .filter(|queue| queue.is_watched.load(Ordering::Relaxed));
        let Some(ring) = watched.and_then(|queue| queue.ring.as_ref()) else {
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
        lock(ring).read(file, piece, at, read).err()
    }

    fn write(&self, mut pending: Pending, range: Range, room: usize) {
        let data = &mut pending.request.readable;
        let result = self.image.write(data, range.offset, range.len);
        if result.is_ok() && !self.is_writeback() {
            self.commit(Job::Flush((pending, room)));
        } else {
            pending.finish(room, status_of(result));
        }
    }

    /// Empties small ranges at once and leaves large ones to the commit thread.
    fn empty(&self, pending: Pending, ranges: Vec<Range>, discard: bool, room: usize) {
        let total: u64 = ranges.iter().map(|range| range.len).sum();
        if total <= MAX_INLINE_EMPTY && self.is_writeback() {
            return pending.finish(room, status_of(empty_all(&self.image, &ranges, discard)));
        }
        let run = move |image: &Image| empty_all(image, &ranges, discard);
        self.commit(Job::Run(
            Box::new(run),
            !self.is_writeback(),
            (pending, room),
        ));
    }

    fn commit(&self, job: Job<Waiting>) {
        if let Err(Job::Flush((pending, room)) | Job::Run(_, _, (pending, room))) =
            self.committer.submit(job)
        {
            pending.finish(room, Status::IoError);
        }
    }

    fn queue(&self, queue: u16) -> Option<&Queue> {
        self.queues.get(usize::from(queue))
    }

    fn is_writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed) && self.driver_flushes.load(Ordering::Relaxed)
    }
}

impl Device for BlkDevice {
    fn features(&self) -> u64 {
        let mut bits = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_MQ;
        if self.config.read_only {
            bits |= F_RO;
        } else {
            bits |= F_CONFIG_WCE | F_WRITE_ZEROES;
        }
        if self.limits.discard {
            bits |= F_DISCARD;
        }
        bits
    }

    fn limits(&self) -> QueueLimits {
        QueueLimits {
            queues: self.config.queues,
            size: self.config.queue_size,
        }
    }

    fn config(&self) -> Vec<u8> {
        let granularity = self.image.granularity();
        let sectors = u32::try_from(granularity / SECTOR).unwrap_or(8).max(1);
        let mut bytes = Vec::with_capacity(60);
        bytes.extend((self.limits.size / SECTOR).to_le_bytes());
        bytes.extend(0u32.to_le_bytes()); // size_max: no limit
        bytes.extend(u32::from(self.config.queue_size.saturating_sub(2).max(1)).to_le_bytes());
        bytes.extend([0; 4]); // geometry
        bytes.extend(512u32.to_le_bytes()); // blk_size
        bytes.extend([3, 0]); // physical block of 4096 bytes, aligned
        bytes.extend(1u16.to_le_bytes()); // min_io_size
        bytes.extend(sectors.to_le_bytes()); // opt_io_size
        bytes.extend([u8::from(self.writeback.load(Ordering::Relaxed)), 0]);
        bytes.extend(self.config.queues.to_le_bytes());
        for _ in 0..2 {
            // Discards, then write-zeroes.
            bytes.extend(MAX_RANGE_SECTORS.to_le_bytes());
            bytes.extend(u32::try_from(MAX_RANGES).unwrap_or(1).to_le_bytes());
            if bytes.len() == 44 {
                bytes.extend(sectors.to_le_bytes()); // discard_sector_alignment
            }
        }
        bytes.extend([1, 0, 0, 0]); // write_zeroes_may_unmap
        bytes
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), ConfigError> {
        match data {
            [value @ 0..=1] if offset == WRITEBACK && !self.config.read_only => {
                self.writeback.store(*value == 1, Ordering::Relaxed);
                Ok(())
            }
            _ => Err(ConfigError {
                offset,
                len: data.len(),
            }),
        }
    }

    fn accept_features(&self, features: u64) {
        self.driver_flushes
            .store(features & F_FLUSH != 0, Ordering::Relaxed);
    }

    fn handle(&self, queue: u16, request: Request) {
        let Some((mut pending, mut data)) = Pending::new(request) else {
            return;
        };
        let room = data.len();
        match parse(&mut pending.request.readable, room, &self.limits) {
            Ok(Operation::Read(range)) => {
                self.read(
                    queue,
                    OpenRead {
                        pending,
                        data,
                        room,
                        offset: range.offset,
                    },
                );
            }
            Ok(Operation::Write(range)) => {
                self.write(pending, range, room);
            }
            Ok(Operation::Flush) if self.config.read_only => pending.finish(room, Status::Ok),
            Ok(Operation::Flush) => self.commit(Job::Flush((pending, room))),
            Ok(Operation::GetId) => {
                let mut id = [0; ID_LEN];
                for (to, from) in id.iter_mut().zip(self.config.serial.bytes()) {
                    *to = from;
                }
                let answer = id.get(..ID_LEN.min(room)).unwrap_or_default();
                let written = data.write_all(answer);
                pending.finish(
                    room,
                    if written.is_ok() {
                        Status::Ok
                    } else {
                        Status::IoError
                    },
                );
            }
            Ok(Operation::Discard(ranges)) => self.empty(pending, ranges, true, room),
            Ok(Operation::WriteZeroes(ranges)) => self.empty(pending, ranges, false, room),
            Err(status) => pending.finish(room, status),
        }
    }

    fn end_batch(&self, queue: u16) {
        if let Some(ring) = self.queue(queue).and_then(|queue| queue.ring.as_ref())
            && let Err(error) = lock(ring).submit()
        {
            tracing::error!(%error, "io_uring takes no reads");
        }
    }

    fn completion_fd(&self, queue: u16) -> Option<BorrowedFd<'_>> {
        let queue = self.queue(queue)?;
        queue.is_watched.store(true, Ordering::Relaxed);
        Some(queue.event.as_fd())
    }

    fn reap(&self, queue: u16) {
        let Some(state) = self.queue(queue) else {
            return;
        };
        let _ = rustix::io::read(&state.event, &mut [0; 8]);
        let Some(ring) = &state.ring else { return };
        let reads = lock(ring).finished();
        for (mut read, piece, result) in reads {
            match result {
                Ok(filled) => {
                    // At the end of the file less than the piece is there; the rest is zero.
                    let whole = if filled == 0 { piece.len() } else { filled };
                    let mut part = read.data.split_to(whole);
                    if filled == 0 {
                        part.fill(0, whole);
                    }
                    read.offset += whole as u64;
                    self.read(queue, read);
                }
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {
                    self.read(queue, read);
                }
                Err(e) => read.pending.finish(read.room, status_of(Err(e.into()))),
            }
        }
        self.end_batch(queue);
    }

    fn reset(&self) {
        self.writeback.store(true, Ordering::Relaxed);
        self.driver_flushes.store(true, Ordering::Relaxed);
    }
}

fn empty_all(image: &Image, ranges: &[Range], discard: bool) -> Result<(), ImageError> {
    ranges.iter().try_for_each(|range| {
        let how = match (discard, range.unmap) {
            (true, _) => Emptying::Discard,
            (false, true) => Emptying::Unmap,
            (false, false) => Emptying::Zero,
        };
        image.empty(range.offset, range.len, how)
    })
}

/// The one place where an image error becomes a virtio status.
fn status_of(result: Result<(), ImageError>) -> Status {
    match result {
        Ok(()) => Status::Ok,
        Err(ImageError::Unsupported) => Status::Unsupported,
        Err(error) => {
            tracing::debug!(%error, "request failed");
            Status::IoError
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
