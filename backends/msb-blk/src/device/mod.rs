//! The virtio-blk device (virtio 1.3 §5.2): requests in, image operations out.

mod emptying;
mod transfer;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use msb_vhost::{ConfigError, Device, FrontEnd, QueueLimits, Request};

use self::transfer::{Lane, Pending, Transfer};
use crate::commit::{Committer, Job};
use crate::control::{Command, Control};
use crate::image::{Image, ImageError};
use crate::request::{
    ID_LEN, Limits, MAX_RANGE_SECTORS, MAX_RANGES, Operation, SECTOR, Status, parse,
};

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

/// A request on the commit thread, with the room for data before its status byte.
type Waiting = (Pending, usize);

/// A virtio-blk device over an image.
pub struct BlkDevice {
    image: Arc<Image>,
    config: DeviceConfig,
    limits: Limits,
    writeback: AtomicBool,
    /// Whether the driver flushes; if not, every write is made durable by itself.
    driver_flushes: AtomicBool,
    lanes: Vec<Lane>,
    control: Option<Control>,
    front_end: Mutex<Option<FrontEnd>>,
    committer: Committer<Waiting>,
}

impl BlkDevice {
    /// Makes the device; no thread starts before the first request that needs one.
    ///
    /// # Errors
    ///
    /// When the host has no descriptors left.
    pub fn new(image: Arc<Image>, config: DeviceConfig) -> io::Result<Self> {
        let lanes = (0..config.queues)
            .map(|_| Lane::new(config.queue_size, !config.read_only))
            .collect::<io::Result<_>>()?;
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
            lanes,
            control: None,
            front_end: Mutex::new(None),
            committer,
        })
    }

    /// Takes commands from `control` from now on.
    #[must_use]
    pub fn with_control(mut self, control: Option<Control>) -> Self {
        self.control = control;
        self
    }

    /// Makes the disk longer and tells the guest.
    fn grow(&self, size: Option<u64>) -> Result<u64, ImageError> {
        self.image.grow(size)?;
        let front_end = self
            .front_end
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(front_end) = front_end.as_ref()
            && let Err(error) = front_end.config_changed()
        {
            tracing::warn!(%error, "the front end does not hear of the new size");
        }
        Ok(self.image.size())
    }

    /// What requests are checked against now.
    fn limits_now(&self) -> Limits {
        Limits {
            size: self.image.size(),
            ..self.limits
        }
    }

    /// Makes everything durable that was written so far, then answers.
    fn flush(&self, pending: Pending, room: usize) {
        self.commit(Job::Flush((pending, room)));
    }

    fn commit(&self, job: Job<Waiting>) {
        if let Err(Job::Flush((pending, room)) | Job::Run(_, _, (pending, room))) =
            self.committer.submit(job)
        {
            pending.finish(room, Status::IoError);
        }
    }

    fn lane(&self, queue: u16) -> Option<&Lane> {
        self.lanes.get(usize::from(queue))
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
        bytes.extend((self.image.size() / SECTOR).to_le_bytes());
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

    fn attach(&self, front_end: FrontEnd) {
        let mut attached = self
            .front_end
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *attached = Some(front_end);
    }

    fn control_fd(&self) -> Option<BorrowedFd<'_>> {
        self.control.as_ref().map(Control::as_fd)
    }

    fn control(&self) {
        if let Some(control) = &self.control {
            control.serve(|command| match command {
                Command::Resize(size) => self.grow(size).map_err(|error| error.to_string()),
            });
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
        match parse(&mut pending.request.readable, room, &self.limits_now()) {
            Ok(Operation::Read(range)) => {
                self.read(queue, Transfer::read(pending, data, range.offset));
            }
            Ok(Operation::Write(range)) => {
                self.write_in_turn(queue, Transfer::write(pending, room, range.offset));
            }
            Ok(Operation::Flush) if self.config.read_only => pending.finish(room, Status::Ok),
            Ok(Operation::Flush) => self.flush(pending, room),
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
            Ok(Operation::Discard(ranges)) => self.empty(queue, pending, &ranges, true, room),
            Ok(Operation::WriteZeroes(ranges)) => self.empty(queue, pending, &ranges, false, room),
            Err(status) => pending.finish(room, status),
        }
    }

    fn end_turn(&self, queue: u16) {
        self.write_neighbours(queue);
    }

    fn end_batch(&self, queue: u16) {
        self.write_neighbours(queue);
        self.empty_batch(queue);
        if let Some(lane) = self.lane(queue) {
            lane.submit();
        }
    }

    fn completion_fd(&self, queue: u16) -> Option<BorrowedFd<'_>> {
        self.lane(queue).map(Lane::watch)
    }

    fn reap(&self, queue: u16) {
        self.go_on(queue);
    }

    fn reset(&self) {
        self.writeback.store(true, Ordering::Relaxed);
        self.driver_flushes.store(true, Ordering::Relaxed);
    }
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
