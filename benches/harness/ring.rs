//! The driver's side of one virtqueue: what a guest kernel does for each request, and no more.

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use anyhow::{Result, bail};
use msb_testkit::frontend::{Driver, EVENT_IDX};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;

use super::device::{INDIRECT_DESC, Shape};

/// Most pieces of one request: 256 pages of data and the headers around them.
pub const MAX_PARTS: usize = 260;
const TABLE_BYTES: usize = 16 * MAX_PARTS;
/// Longest time that a server may keep a request, in seconds.
const PATIENCE: Timespec = Timespec {
    tv_sec: 20,
    tv_nsec: 0,
};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A piece of a request: guest address, length, and whether the device writes it.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    at: u64,
    len: u32,
    device_writes: bool,
}

impl Part {
    /// The device reads it.
    pub fn out(at: u64, len: u32) -> Self {
        Self {
            at,
            len,
            device_writes: false,
        }
    }

    /// The device writes it.
    pub fn back(at: u64, len: u32) -> Self {
        Self {
            at,
            len,
            device_writes: true,
        }
    }
}

/// Guest memory as the driver sees it.
#[derive(Clone, Copy)]
pub struct Window {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a `Ring` and its `Window` live no longer than the front end that owns the mapping (see
// `Device`), and all accesses are copies or atomics.
unsafe impl Send for Window {}

impl Window {
    pub(super) fn new(base: NonNull<u8>, len: usize) -> Self {
        Self { base, len }
    }

    /// Copies bytes to a guest address.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        let to = self.pointer(at, bytes.len());
        // SAFETY: `pointer` checked the range; `bytes` is not part of guest memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// Copies bytes from a guest address.
    pub fn read(&self, at: u64, bytes: &mut [u8]) {
        let from = self.pointer(at, bytes.len());
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
    }

    /// The bytes at a guest address, as an array.
    pub fn array<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.read(at, &mut bytes);
        bytes
    }

    fn index(&self, at: u64) -> &AtomicU16 {
        #[expect(clippy::cast_ptr_alignment, reason = "parts of a ring are aligned")]
        let pointer = self.pointer(at, 2).cast::<u16>();
        // SAFETY: in the mapping, and even because the parts of a ring begin at multiples of 16.
        unsafe { AtomicU16::from_ptr(pointer) }
    }

    fn pointer(&self, at: u64, len: usize) -> *mut u8 {
        let at = usize::try_from(at).expect("a guest address");
        assert!(at + len <= self.len, "outside of guest memory");
        // SAFETY: checked on the line above.
        unsafe { self.base.as_ptr().add(at) }
    }
}

/// One queue.
pub struct Ring {
    /// Guest memory.
    pub window: Window,
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    tables: u64,
    next: u16,
    published: u16,
    seen: u16,
    event_idx: bool,
    spin: bool,
    /// Without indirect tables: how many entries of the queue each slot has.
    pieces: Option<u16>,
    kick: OwnedFd,
    call: OwnedFd,
}

impl Ring {
    /// Takes over a queue that was just set up; `tables` is where its indirect tables go.
    pub(super) fn new(
        window: Window,
        queue: &Driver,
        features: u64,
        tables: u64,
        shape: Shape,
    ) -> Result<Self> {
        Ok(Self {
            window,
            size: queue.size,
            descriptors: queue.descriptors(),
            available: queue.available(),
            used: queue.used(),
            tables,
            next: 0,
            published: 0,
            seen: 0,
            event_idx: features & EVENT_IDX != 0,
            spin: shape.spin,
            pieces: match features & INDIRECT_DESC {
                0 => Some((shape.size / shape.depth).max(1)),
                _ => None,
            },
            kick: queue.kick().try_clone_to_owned()?,
            call: queue.call().try_clone_to_owned()?,
        })
    }

    /// Bytes of guest memory that the tables of a queue with `size` entries take.
    pub fn table_space(size: u16) -> u64 {
        u64::from(size) * TABLE_BYTES as u64
    }

    /// Puts the request of a slot into the queue.
    pub fn push(&mut self, slot: u16, chain: &[Part]) {
        assert!(chain.len() <= MAX_PARTS && slot < self.size);
        let head = slot * self.pieces.unwrap_or(1);
        let (table, first) = match self.pieces {
            None => (self.tables + u64::from(slot) * TABLE_BYTES as u64, 0),
            Some(most) => {
                assert!(chain.len() <= usize::from(most));
                (self.descriptors, head)
            }
        };
        let last = chain.len() - 1;
        for (place, part) in (first..).zip(chain) {
            let mut flags = if part.device_writes { WRITE } else { 0 };
            if usize::from(place - first) != last {
                flags |= NEXT;
            }
            let to = table + 16 * u64::from(place);
            self.descriptor(to, part.at, part.len, flags, place + 1);
        }
        if self.pieces.is_none() {
            let len = 16 * u32::try_from(chain.len()).expect("a short chain");
            let entry = self.descriptors + 16 * u64::from(head);
            self.descriptor(entry, table, len, INDIRECT, 0);
        }
        let place = self.available + 4 + 2 * u64::from(self.next % self.size);
        self.window.write(place, &head.to_le_bytes());
        self.next = self.next.wrapping_add(1);
    }

    fn descriptor(&self, to: u64, at: u64, len: u32, flags: u16, next: u16) {
        let word = u128::from(at)
            | u128::from(len) << 64
            | u128::from(flags) << 96
            | u128::from(next) << 112;
        self.window.write(to, &word.to_le_bytes());
    }

    /// Shows the device what was pushed, and wakes it if it wants that.
    ///
    /// # Errors
    ///
    /// When the eventfd cannot be written.
    pub fn publish(&mut self) -> Result<()> {
        if self.published == self.next {
            return Ok(());
        }
        self.window
            .index(self.available + 2)
            .store(self.next, Ordering::Release);
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.used + 4 + 8 * u64::from(self.size);
            let event = self.window.index(event).load(Ordering::Acquire);
            passed(event, self.next, self.published)
        } else {
            self.window.index(self.used).load(Ordering::Acquire) & 1 == 0
        };
        self.published = self.next;
        if wanted {
            rustix::io::write(&self.kick, &1_u64.to_ne_bytes())?;
        }
        Ok(())
    }

    /// The next finished request: its slot and how many bytes the device wrote.
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        let index = self.window.index(self.used + 2).load(Ordering::Acquire);
        if index == self.seen {
            return None;
        }
        let place = self.used + 4 + 8 * u64::from(self.seen % self.size);
        let entry = u64::from_le_bytes(self.window.array(place));
        self.seen = self.seen.wrapping_add(1);
        Some((
            entry as u16 / self.pieces.unwrap_or(1),
            (entry >> 32) as u32,
        ))
    }

    /// Waits until a request has finished, by its interrupt unless spinning was asked for.
    ///
    /// # Errors
    ///
    /// When none finishes in time.
    pub fn wait(&mut self) -> Result<()> {
        let index = self.window.index(self.used + 2);
        if self.spin {
            // A driver that polls leaves its wish behind and is not interrupted.
            while index.load(Ordering::Acquire) == self.seen {
                std::hint::spin_loop();
            }
            return Ok(());
        }
        if self.event_idx {
            let wish = self.available + 4 + 2 * u64::from(self.size);
            self.window.index(wish).store(self.seen, Ordering::Release);
        }
        fence(Ordering::SeqCst);
        while index.load(Ordering::Acquire) == self.seen {
            let call = self.call.as_fd();
            let ready =
                retry_on_intr(|| poll(&mut [PollFd::new(&call, PollFlags::IN)], Some(&PATIENCE)))?;
            if ready == 0 {
                bail!(
                    "the server did not answer a request in {} s",
                    PATIENCE.tv_sec
                );
            }
            rustix::io::read(call, &mut [0_u8; 8])?;
        }
        Ok(())
    }
}

/// virtio 1.3, 2.7.10: whether `event` lies among the entries between `old` and `new`.
fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::passed;

    #[test]
    fn an_event_is_passed_once_also_where_the_index_wraps() {
        assert!(passed(4, 5, 4));
        assert!(!passed(5, 5, 4));
        assert!(!passed(3, 5, 4));
        assert!(passed(65535, 2, 65534));
        assert!(!passed(2, 2, 65534));
    }
}
