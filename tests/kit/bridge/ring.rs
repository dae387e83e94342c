//! The two ends of a split ring, each for one thread: what is made available, and what is used.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::frontend::{Driver, FrontEnd};

/// The available ring.
pub(super) struct Producer {
    front: Arc<FrontEnd>,
    queue: usize,
    next: u16,
    event_idx: bool,
}

/// The used ring.
pub(super) struct Consumer {
    front: Arc<FrontEnd>,
    queue: usize,
    next: u16,
    event_idx: bool,
}

impl Producer {
    pub(super) fn new(front: &Arc<FrontEnd>, queue: usize, event_idx: bool) -> Self {
        Self {
            front: Arc::clone(front),
            queue,
            next: 0,
            event_idx,
        }
    }

    /// Hands the chain that begins at `head` to the device, and wakes it if it sleeps.
    pub(super) fn publish(&mut self, head: u16) -> rustix::io::Result<()> {
        let driver = driver(&self.front, self.queue);
        let memory = &self.front.memory;
        let slot = u64::from(self.next % driver.size);
        let available = driver.available();
        memory
            .index(available + 4 + 2 * slot)
            .store(head, Ordering::Relaxed);
        let old = self.next;
        self.next = old.wrapping_add(1);
        memory
            .index(available + 2)
            .store(self.next, Ordering::Release);
        if self.front.wants_kick(self.queue, old, self.event_idx) {
            rustix::io::write(&driver.kick, &1_u64.to_ne_bytes())?;
        }
        Ok(())
    }
}

impl Consumer {
    pub(super) fn new(front: &Arc<FrontEnd>, queue: usize, event_idx: bool) -> Self {
        Self {
            front: Arc::clone(front),
            queue,
            next: 0,
            event_idx,
        }
    }

    /// The next chain that the device is done with: its head, and how much was written.
    pub(super) fn take(&mut self) -> Option<(u16, u32)> {
        let driver = driver(&self.front, self.queue);
        let memory = &self.front.memory;
        let used = driver.used();
        if memory.index(used + 2).load(Ordering::Acquire) == self.next {
            return None;
        }
        let at = used + 4 + 8 * u64::from(self.next % driver.size);
        self.next = self.next.wrapping_add(1);
        let half = |at| memory.index(at).load(Ordering::Relaxed);
        Some((
            half(at),
            u32::from(half(at + 4)) | u32::from(half(at + 6)) << 16,
        ))
    }

    /// Asks for an interrupt when the next chain is done; true when one is done already.
    pub(super) fn arm(&mut self) -> bool {
        let driver = driver(&self.front, self.queue);
        let memory = &self.front.memory;
        if self.event_idx {
            let wish = driver.available() + 4 + 2 * u64::from(driver.size);
            memory.index(wish).store(self.next, Ordering::Relaxed);
        }
        // The wish must be visible before the last look.
        fence(Ordering::SeqCst);
        memory.index(driver.used() + 2).load(Ordering::Acquire) != self.next
    }
}

fn driver(front: &FrontEnd, queue: usize) -> &Driver {
    &front.queues[queue]
}
