//! Which requests are being worked on, in memory that outlives this process.
//!
//! The front end keeps the memory; the next process finds in it what the last one had not finished
//! and does it again, in the same order (vhost-user.rst, "Inflight I/O tracking", split virtqueue).
//! Whatever it holds is checked before use, for it may come from a process that was broken.
//!
//! ```text
//!   0          8       10       12               14       16
//!   | features |version|desc_num|last_batch_head|used_idx| entries: desc_num x 16 bytes
//!                                                          | inflight u8, 5 pad, next u16, counter u64
//! ```

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use crate::sys::Area;

const VERSION: u16 = 1;
const HEADER: usize = 16;
/// Places in the header.
const LAST: usize = 12;
const USED: usize = 14;
const ENTRY: usize = 16;
/// Places in an entry.
const NEXT: usize = 6;
const COUNTER: usize = 8;
/// Queues begin at multiples of this.
const ALIGN: usize = 64;

/// The part of the memory that belongs to one queue.
#[derive(Debug)]
pub(crate) struct Inflight {
    area: Area,
    size: u16,
    counter: u64,
    again: VecDeque<u16>,
}

/// Bytes that one queue of `size` entries takes.
pub(crate) fn stride(size: u16) -> usize {
    (HEADER + ENTRY * usize::from(size)).next_multiple_of(ALIGN)
}

impl Inflight {
    pub(crate) fn new(area: Area, size: u16) -> Self {
        Self {
            area,
            size,
            counter: 0,
            again: VecDeque::new(),
        }
    }

    /// Marks a request as begun.
    pub(crate) fn begin(&mut self, head: u16) {
        self.counter = self.counter.wrapping_add(1);
        let (area, at) = (self.area.view(), entry(head));
        area.release_wide(at + COUNTER, self.counter);
        area.put(at, 1_u8);
    }

    /// Adds a request to those that the next change of the used index ends: a list from the last
    /// one backwards.
    pub(crate) fn finish(&mut self, head: u16) {
        let area = self.area.view();
        let last: u16 = area.copy(LAST);
        area.put(entry(head) + NEXT, last);
        area.release(LAST, head);
    }

    /// Marks the last `count` of them as ended, after the used index was stored.
    pub(crate) fn finished(&mut self, count: u16, used: u16) {
        self.clear_last(count);
        self.area.view().release(USED, used);
    }

    fn clear_last(&self, count: u16) {
        let area = self.area.view();
        let mut head: u16 = area.copy(LAST);
        for _ in 0..count.min(self.size) {
            if head >= self.size {
                break;
            }
            area.put(entry(head), 0_u8);
            head = area.copy(entry(head) + NEXT);
        }
        // What follows must not be seen before.
        fence(Ordering::Release);
    }

    /// Reads what an earlier process left; returns where the available ring goes on. `used` is the
    /// used index in guest memory.
    pub(crate) fn recover(&mut self, used: u16, size: u16) -> u16 {
        self.again.clear();
        self.size = size;
        let area = self.area.view();
        if area.copy::<u16>(8) != VERSION {
            area.put(8, VERSION);
            area.put(10, size);
            area.release(USED, used);
            return used;
        }
        // Between the store of the used index and that of its copy the process had ended.
        let ended = used.wrapping_sub(area.copy::<u16>(USED));
        if ended != 0 {
            self.clear_last(ended);
            area.release(USED, used);
        }
        let mut open: Vec<(u64, u16)> = (0..size)
            .filter(|head| area.copy::<u8>(entry(*head)) == 1)
            .map(|head| (area.copy(entry(head) + COUNTER), head))
            .collect();
        open.sort_unstable();
        self.counter = open.last().map_or(0, |(counter, _)| *counter);
        let count = u16::try_from(open.len()).unwrap_or(size);
        self.again = open.into_iter().map(|(_, head)| head).collect();
        used.wrapping_add(count)
    }

    /// The next request that must be done again.
    pub(crate) fn resubmit(&mut self) -> Option<u16> {
        self.again.pop_front()
    }
}

fn entry(head: u16) -> usize {
    HEADER + ENTRY * usize::from(head)
}
