//! Lets a recycler wait until every write that may still use an old mapping has ended.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

const SLOTS: usize = 8;

/// A cache line of its own, so that queues do not share one.
#[repr(align(128))]
#[derive(Default)]
struct Slot(RwLock<()>);

/// Writers hold a guard from looking a mapping up until the data is written; [`Gate::drain`]
/// returns when all guards that existed at the call are gone.
#[derive(Default)]
pub(super) struct Gate {
    slots: [Slot; SLOTS],
}

impl Gate {
    /// Enters for the time of one write.
    pub(super) fn enter(&self) -> RwLockReadGuard<'_, ()> {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static SLOT: Cell<usize> = Cell::new(NEXT.fetch_add(1, Ordering::Relaxed) % SLOTS);
        }
        let Some(slot) = self.slots.get(SLOT.get()).or(self.slots.first()) else {
            unreachable!("a slot number is below the number of slots")
        };
        slot.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for everybody inside to leave.
    pub(super) fn drain(&self) {
        for slot in &self.slots {
            drop(slot.0.write().unwrap_or_else(PoisonError::into_inner));
        }
    }
}
