//! Lets a recycler wait until every write that may still use an old mapping has ended.

use std::cell::Cell;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

const SLOTS: usize = 8;
/// How often a recycler looks again by itself, should it have missed the last one to leave.
const RECHECK: Duration = Duration::from_millis(1);

/// A cache line of its own, so that queues do not share one.
#[repr(align(128))]
#[derive(Default)]
struct Slot([AtomicUsize; 2]);

/// Writers are inside from looking a mapping up until the data is written; [`Gate::drain`] returns
/// when all who were inside at the call have left. Those who come meanwhile are counted apart.
#[derive(Default)]
pub(super) struct Gate {
    /// Its lowest bit tells with which of the two counts who enters now is counted.
    turn: AtomicUsize,
    slots: [Slot; SLOTS],
    is_draining: AtomicBool,
    drain: Mutex<()>,
    left: Condvar,
}

/// Somebody inside a gate.
pub(super) struct Guard<G: Deref<Target = Gate>> {
    gate: G,
    slot: usize,
    turn: usize,
}

/// A write inside that may end on another thread.
pub struct Inside {
    _guard: Guard<Arc<Gate>>,
}

impl Gate {
    /// Enters for the time of one call.
    pub(super) fn enter(&self) -> Guard<&Gate> {
        let (slot, turn) = self.count_in();
        Guard {
            gate: self,
            slot,
            turn,
        }
    }

    /// Enters for as long as the answer is kept.
    pub(super) fn enter_for_later(self: &Arc<Self>) -> Inside {
        let (slot, turn) = self.count_in();
        Inside {
            _guard: Guard {
                gate: Arc::clone(self),
                slot,
                turn,
            },
        }
    }

    fn count_in(&self) -> (usize, usize) {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static SLOT: Cell<usize> = Cell::new(NEXT.fetch_add(1, Ordering::Relaxed) % SLOTS);
        }
        let slot = SLOT.get();
        loop {
            let turn = self.turn.load(Ordering::SeqCst);
            self.count(slot, turn).fetch_add(1, Ordering::SeqCst);
            if self.turn.load(Ordering::SeqCst) == turn {
                return (slot, turn);
            }
            // Whoever drains may have looked at this count before: enter again, with the others.
            self.leave(slot, turn);
        }
    }

    fn count(&self, slot: usize, turn: usize) -> &AtomicUsize {
        let Some(count) = self.slots.get(slot).and_then(|slot| slot.0.get(turn & 1)) else {
            unreachable!("a slot number is below the number of slots")
        };
        count
    }

    fn leave(&self, slot: usize, turn: usize) {
        self.count(slot, turn).fetch_sub(1, Ordering::SeqCst);
        if self.is_draining.load(Ordering::SeqCst) {
            self.left.notify_all();
        }
    }

    /// Waits for everybody inside to leave.
    pub(super) fn drain(&self) {
        let mut drain = self.drain.lock().unwrap_or_else(PoisonError::into_inner);
        self.is_draining.store(true, Ordering::SeqCst);
        let before = self.turn.fetch_add(1, Ordering::SeqCst);
        while (0..SLOTS).any(|slot| self.count(slot, before).load(Ordering::SeqCst) > 0) {
            let waited = self.left.wait_timeout(drain, RECHECK);
            drain = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        self.is_draining.store(false, Ordering::SeqCst);
    }
}

impl<G: Deref<Target = Gate>> Drop for Guard<G> {
    fn drop(&mut self) {
        self.gate.leave(self.slot, self.turn);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_waits_for_those_inside_and_no_others() {
        let gate = Arc::new(Gate::default());
        gate.drain();
        let early = gate.enter_for_later();
        let drained = Arc::new(AtomicBool::new(false));
        let (there, done) = (Arc::clone(&gate), Arc::clone(&drained));
        let recycler = std::thread::spawn(move || {
            there.drain();
            done.store(true, Ordering::SeqCst);
        });
        while !gate.is_draining.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        // The turn may be about to change: whoever enters then is waited for, and leaves.
        for _ in 0..1000 {
            drop(gate.enter());
        }
        let late = loop {
            let late = gate.enter_for_later();
            if late._guard.turn != early._guard.turn {
                break late;
            }
        };
        assert!(!drained.load(Ordering::SeqCst));
        drop(early);
        assert!(recycler.join().is_ok());
        drop(late);
        gate.drain();
    }
}
