//! A split virtqueue, seen from the device (virtio 1.3 section 2.7).
//!
//! Every descriptor is read once. A chain that cannot be right (a loop, an address outside guest
//! memory, a readable part after a writable one) is handed back to the driver without reaching the
//! device. An available index that jumps by more than the queue's size breaks the ring for good.
//! Own code and not virtio-queue's, whose iterator ends a bad chain as if it were a short one and
//! does not say that the available index is invalid.

use std::sync::atomic::{Ordering, fence};

use super::Inflight;
use crate::sys::{Area, Memory, Spans, View};

/// Most descriptors one chain may have; what Linux drivers build stays far below.
const MAX_CHAIN: u32 = 1024;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const DESCRIPTOR: usize = 16;

/// Flag in the used ring: the driver need not kick.
const NO_NOTIFY: u16 = 1;
/// Flag in the available ring: the driver wants no interrupts.
const NO_INTERRUPT: u16 = 1;

/// One descriptor, as it lies in memory.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// Addresses of the three parts in the front end's address space.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Addresses {
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

#[derive(Debug)]
struct Parts {
    descriptors: Area,
    available: Area,
    used: Area,
}

/// The state of one virtqueue.
#[derive(Debug)]
pub(crate) struct Ring {
    pub(crate) size: u16,
    pub(crate) addresses: Option<Addresses>,
    /// The next entry of the available ring.
    pub(crate) next_available: u16,
    pub(crate) event_idx: bool,
    pub(crate) inflight: Option<Inflight>,
    parts: Option<Parts>,
    next_used: u16,
    /// The used index as the driver sees it; chains from here on are not shown to it yet.
    shown: u16,
    /// The used index at the last interrupt.
    signalled: Option<u16>,
    broken: bool,
}

/// What the available ring holds next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Nothing.
    Empty,
    /// A request, whose spans were filled in.
    Chain { head: u16 },
    /// A chain that cannot be right.
    Malformed { head: u16 },
    /// The ring itself cannot be right; reported once.
    Broken,
}

impl Ring {
    pub(crate) fn new(size: u16) -> Self {
        Self {
            size,
            addresses: None,
            next_available: 0,
            event_idx: false,
            inflight: None,
            parts: None,
            next_used: 0,
            shown: 0,
            signalled: None,
            broken: false,
        }
    }

    /// Finds the three parts in `memory`; false when they do not lie there, aligned.
    pub(crate) fn place(&mut self, memory: &Memory) -> bool {
        let size = usize::from(self.size);
        self.parts = self.addresses.and_then(|at| {
            Some(Parts {
                descriptors: memory.ring_part(at.descriptors, size * DESCRIPTOR, 16)?,
                available: memory.ring_part(at.available, 6 + 2 * size, 2)?,
                used: memory.ring_part(at.used, 6 + 8 * size, 4)?,
            })
        });
        self.parts.is_some()
    }

    /// Begins where the driver's rings stand: after a reset of the guest the used index in memory
    /// is the truth.
    pub(crate) fn start(&mut self) {
        self.broken = false;
        self.signalled = None;
        if let Some(parts) = &self.parts {
            self.next_used = parts.used.view().acquire(2);
            self.shown = self.next_used;
        }
        if let Some(inflight) = &mut self.inflight {
            self.next_available = inflight.recover(self.next_used, self.size);
        }
    }

    /// Has the CPU fetch the tables of up to `most` chains that wait. All of them were written by
    /// another one: fetched together they cost little more than the first.
    pub(crate) fn foresee(&self, memory: &Memory, most: u16) {
        let Some(parts) = self.parts.as_ref().filter(|_| !self.broken) else {
            return;
        };
        let (available, table) = (parts.available.view(), parts.descriptors.view());
        let waiting = available.acquire(2).wrapping_sub(self.next_available);
        for ahead in 0..waiting.min(most) {
            let slot = usize::from(self.next_available.wrapping_add(ahead) & (self.size - 1));
            let head = available.copy::<u16>(4 + 2 * slot) & (self.size - 1);
            // A mere hint: when its turn comes the descriptor is read anew, and checked.
            let found: Descriptor = table.copy(usize::from(head) * DESCRIPTOR);
            memory.prefetch(found.address);
        }
    }

    /// Takes the next chain into `readable` and `writable`, which are empty, when `open` others
    /// have not been given back.
    pub(crate) fn next(
        &mut self,
        memory: &Memory,
        open: u32,
        readable: &mut Spans,
        writable: &mut Spans,
    ) -> Next {
        let Some(parts) = self.parts.as_ref().filter(|_| !self.broken) else {
            return Next::Empty;
        };
        let head = match self.inflight.as_mut().and_then(Inflight::resubmit) {
            Some(head) => head,
            None => {
                let available = parts.available.view();
                let announced = available.acquire(2);
                let waiting = announced.wrapping_sub(self.next_available);
                if waiting == 0 {
                    return Next::Empty;
                }
                // Each open request holds one descriptor at least.
                if waiting > self.size || open >= u32::from(self.size) {
                    self.broken = true;
                    return Next::Broken;
                }
                let slot = usize::from(self.next_available & (self.size - 1));
                let head = available.copy::<u16>(4 + 2 * slot);
                if head >= self.size {
                    self.broken = true;
                    return Next::Broken;
                }
                self.next_available = self.next_available.wrapping_add(1);
                if let Some(inflight) = &mut self.inflight {
                    inflight.begin(head);
                }
                head
            }
        };
        let table = parts.descriptors.view();
        if walk(table, self.size, head, memory, readable, writable).is_some() {
            Next::Chain { head }
        } else {
            readable.clear();
            writable.clear();
            Next::Malformed { head }
        }
    }

    /// Puts a chain into the used ring, where the driver finds it after [`Ring::show`].
    pub(crate) fn give_back(&mut self, head: u16, written: u32) {
        let Some(parts) = &self.parts else {
            return;
        };
        let used = parts.used.view();
        let slot = usize::from(self.next_used & (self.size - 1));
        used.put(4 + 8 * slot, u32::from(head));
        used.put(8 + 8 * slot, written);
        self.next_used = self.next_used.wrapping_add(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.finish(head);
        }
    }

    /// Shows the driver what was given back: one store of the index for all of it.
    pub(crate) fn show(&mut self) {
        if self.shown == self.next_used {
            return;
        }
        if let Some(parts) = &self.parts {
            parts.used.view().release(2, self.next_used);
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.finished(self.next_used.wrapping_sub(self.shown), self.next_used);
        }
        self.shown = self.next_used;
    }

    /// The end of what the driver has made available.
    pub(crate) fn end(&self) -> u16 {
        let parts = self.parts.as_ref().filter(|_| !self.broken);
        parts.map_or(self.next_available, |parts| {
            parts.available.view().acquire(2)
        })
    }

    /// Where the driver will announce the next chain, for who waits for it without a lock.
    pub(crate) fn watch(&self) -> Option<Watch> {
        let parts = self.parts.as_ref().filter(|_| !self.broken)?;
        Some(Watch {
            available: parts.available.clone(),
            next: self.next_available,
        })
    }

    /// Whether the driver wants an interrupt for what was given back since the last one.
    pub(crate) fn wants_interrupt(&mut self) -> bool {
        let Some(parts) = &self.parts else {
            return false;
        };
        let available = parts.available.view();
        // The used index must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        let now = self.shown;
        let before = self.signalled.replace(now);
        if !self.event_idx {
            return available.copy::<u16>(0) & NO_INTERRUPT == 0;
        }
        let wish = available.copy::<u16>(4 + 2 * usize::from(self.size));
        // True when the index passed the wish since the last interrupt (virtio 1.3 section 2.7.7.2).
        before
            .is_none_or(|before| now.wrapping_sub(wish).wrapping_sub(1) < now.wrapping_sub(before))
    }

    /// Tells the driver not to kick while the ring is being emptied.
    pub(crate) fn mute(&self) {
        if let Some(parts) = self.parts.as_ref().filter(|_| !self.event_idx) {
            parts.used.view().put(0, NO_NOTIFY);
        }
    }

    /// Asks the driver to kick when `bunch` more chains have come, or with the next one where it
    /// cannot be asked for more; true when so many have arrived meanwhile.
    pub(crate) fn listen(&self, bunch: u16) -> bool {
        let Some(parts) = self.parts.as_ref().filter(|_| !self.broken) else {
            return false;
        };
        let mut before = 0;
        if self.event_idx {
            // Half a ring at most: a driver that finds it full would wait without having kicked.
            before = bunch.min(self.size / 2).saturating_sub(1);
            let at = 4 + 8 * usize::from(self.size);
            let wish = self.next_available.wrapping_add(before);
            parts.used.view().put(at, wish);
        } else {
            parts.used.view().put(0, 0_u16);
        }
        // The wish must be visible before the index is read again.
        fence(Ordering::SeqCst);
        let available: u16 = parts.available.view().acquire(2);
        available.wrapping_sub(self.next_available) > before
    }
}

/// Looks for new chains while the ring itself may change hands.
pub(crate) struct Watch {
    available: Area,
    next: u16,
}

impl Watch {
    /// Whether the driver has announced something since the ring was found empty.
    pub(crate) fn has_news(&self) -> bool {
        self.available.view().acquire(2) != self.next
    }
}

/// Follows one chain; nothing when it cannot be right.
fn walk<'a>(
    mut table: View<'a>,
    size: u16,
    head: u16,
    memory: &'a Memory,
    readable: &mut Spans,
    writable: &mut Spans,
) -> Option<()> {
    let mut entries = u32::from(size);
    let (mut index, mut indirect, mut total) = (head, false, 0_u64);
    for _ in 0..MAX_CHAIN {
        if u32::from(index) >= entries {
            return None;
        }
        let found: Descriptor = table.copy(usize::from(index) * DESCRIPTOR);
        if found.flags & INDIRECT != 0 {
            let len = usize::try_from(found.len).ok()?;
            let whole = len != 0 && len.is_multiple_of(DESCRIPTOR);
            if indirect || !whole || found.flags & NEXT != 0 {
                return None;
            }
            entries = u32::try_from(len / DESCRIPTOR).ok()?;
            table = memory.table(found.address, len)?;
            (index, indirect) = (0, true);
            continue;
        }
        total += u64::from(found.len);
        if total > u64::from(u32::MAX) {
            return None;
        }
        let spans = if found.flags & WRITE != 0 {
            &mut *writable
        } else if writable.is_empty() {
            &mut *readable
        } else {
            return None;
        };
        if !memory.append(found.address, u64::from(found.len), spans) {
            return None;
        }
        if found.flags & NEXT == 0 {
            return Some(());
        }
        index = found.next;
    }
    None
}
