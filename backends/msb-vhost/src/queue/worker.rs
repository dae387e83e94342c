//! The thread of one queue: takes chains in batches, hands them to the device, and gives them back.
//!
//! What the device completes on this thread is kept aside and given back with one lock, one store
//! of the used index and one decision about the interrupt for all of it.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use super::poll::Polling;
use super::ring::{Next, Watch};
use super::{DONE, Lease, Queue, State};
use crate::Device;
use crate::request::{Completion, Request, Segments};
use crate::sys::{Spans, prefetch, prefetch_to_write};

/// Requests taken, and given back, with one lock.
const BATCH: usize = 16;
/// Requests as large as this together are not kept aside: the driver could go on meanwhile.
const BATCH_BYTES: u64 = 256 << 10;
/// How long a completion may wait for others of its batch to share an interrupt with them.
const SHARE: Duration = Duration::from_micros(20);
/// Bytes that a CPU fetches at a time.
const LINE: usize = 64;
/// Completions between two looks at the clock.
const CLOCK: usize = 4;
/// Requests after which the device submits what it has queued, and other events are looked at.
const ROUND: usize = 8 * BATCH;
/// For how many requests the driver of a patient queue is asked to kick, and how long what is less
/// lies there.
const BUNCH: u16 = 32;
const LULL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 2_000_000,
};
/// How often the available index is read between two looks at the clock.
const LOOKS: u32 = 16;

/// A request that the device has completed and that was not given back yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Finished {
    pub(super) head: u16,
    pub(super) epoch: u32,
    pub(super) written: u32,
}

/// What the worker of this thread keeps aside.
struct Aside {
    /// Address of its queue, as a number: it only serves to tell queues apart.
    queue: usize,
    finished: Vec<Finished>,
    bytes: u64,
    /// From when on the first of them may have waited.
    since: Option<Instant>,
}

impl Aside {
    /// Whether what is kept should go to the driver now.
    fn is_due(&self) -> bool {
        self.finished.len() >= BATCH
            || self.bytes >= BATCH_BYTES
            || self.finished.len().is_multiple_of(CLOCK)
                && self.since.is_some_and(|since| since.elapsed() >= SHARE)
    }
}

thread_local! {
    static ASIDE: RefCell<Aside> = const {
        RefCell::new(Aside { queue: 0, finished: Vec::new(), bytes: 0, since: None })
    };
}

/// Keeps a completion for later if it is made on the thread of its queue; whether it was.
pub(super) fn keep_aside(queue: &Arc<Queue>, finished: Finished, bytes: u64) -> bool {
    let kept = ASIDE.try_with(|aside| {
        let mut aside = aside.borrow_mut();
        if aside.queue != Arc::as_ptr(queue).addr() {
            return None;
        }
        aside.finished.push(finished);
        aside.bytes += bytes;
        Some(aside.is_due())
    });
    match kept {
        Ok(Some(full)) => {
            if full {
                settle(&mut queue.lock());
                note_begin();
            }
            true
        }
        // After the thread's own end nothing is kept for it.
        Ok(None) | Err(_) => false,
    }
}

/// Gives back what was kept aside.
fn settle(state: &mut State) {
    ASIDE.with_borrow_mut(|aside| {
        aside.bytes = 0;
        for finished in aside.finished.drain(..) {
            state.give_back(finished);
        }
    });
    state.ring.show();
    state.announce();
}

/// What is completed from now on has waited for nothing yet.
fn note_begin() {
    ASIDE.with_borrow_mut(|aside| aside.since = Some(Instant::now()));
}

/// Has the CPU fetch what the device looks at first: headers and short bodies.
fn foresee(spans: &Spans, fetch: fn(*const u8)) {
    for span in spans.iter().take(2) {
        for at in [0, LINE].into_iter().filter(|at| *at < span.iov_len) {
            fetch(span.iov_base.cast::<u8>().wrapping_add(at));
        }
    }
}

/// Why a worker stops emptying its ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pause {
    /// There is nothing left, and the driver will kick.
    Empty,
    /// There may be more.
    Round,
    /// There may soon be a few, for which the driver does not kick.
    Lull,
    /// The queue is to end.
    End,
}

/// What only the thread of the queue uses.
pub(super) struct Worker<'a, D> {
    queue: &'a Arc<Queue>,
    number: u16,
    device: &'a D,
    patient: bool,
    polling: Polling,
    events: Vec<epoll::Event>,
    lease: Option<Arc<Lease>>,
    batch: Vec<Request>,
}

impl<'a, D: Device> Worker<'a, D> {
    pub(super) fn new(
        queue: &'a Arc<Queue>,
        number: u16,
        device: &'a D,
        poll_limit: Duration,
    ) -> Self {
        ASIDE.with_borrow_mut(|aside| aside.queue = Arc::as_ptr(queue).addr());
        let patient = device.is_patient(number);
        let poll_limit = if patient { Duration::ZERO } else { poll_limit };
        Self {
            queue,
            number,
            device,
            patient,
            polling: Polling::new(poll_limit),
            events: Vec::with_capacity(3),
            lease: None,
            batch: Vec::with_capacity(BATCH),
        }
    }

    /// Serves until the queue ends.
    pub(super) fn run(&mut self) -> io::Result<()> {
        if let Some(done) = self.device.completion_fd(self.number) {
            self.queue.listen_to(done, DONE)?;
        }
        let mut pause = Pause::Empty;
        while pause != Pause::End {
            if self.wait(pause)? {
                self.queue.lock().busy = true;
                self.device.reap(self.number);
            }
            pause = self.drain();
        }
        Ok(())
    }

    /// Waits for an event, or only takes those that have come; whether the device has finished
    /// something. Events come with edges, so no descriptor needs to be read to tell of the next.
    fn wait(&mut self, pause: Pause) -> io::Result<bool> {
        let now = Timespec::default();
        let limit = match pause {
            Pause::Empty | Pause::End => None,
            Pause::Round => Some(&now),
            Pause::Lull => Some(&LULL),
        };
        let start = (limit.is_none() && self.polling.is_on()).then(Instant::now);
        self.events.clear();
        while let Err(error) = epoll::wait(
            &self.queue.epoll,
            rustix::buffer::spare_capacity(&mut self.events),
            limit,
        ) {
            if error != Errno::INTR {
                return Err(error.into());
            }
        }
        if let Some(start) = start {
            self.polling.slept(start.elapsed());
        }
        Ok(self.events.iter().any(|event| event.data.u64() == DONE))
    }

    /// Gives the device every chain that waits.
    fn drain(&mut self) -> Pause {
        let (mut taken, mut looked) = (0, false);
        let pause = loop {
            let mut state = self.queue.lock();
            settle(&mut state);
            if state.ending {
                break Pause::End;
            }
            if !state.runs() {
                self.lease = None;
                break Pause::Empty;
            }
            if taken >= ROUND {
                break Pause::Round;
            }
            self.take(&mut state);
            if self.batch.is_empty() {
                let bunch = if self.patient && taken > 0 { BUNCH } else { 1 };
                let watch = state.ring.watch().filter(|_| state.open == 0 && !looked);
                if let Some(watch) = watch {
                    drop(state);
                    self.look(&watch);
                    looked = true;
                } else if !state.ring.listen(bunch) {
                    break if bunch > 1 { Pause::Lull } else { Pause::Empty };
                }
                continue;
            }
            drop(state);
            (taken, looked) = (taken + self.batch.len(), false);
            for request in self.batch.drain(..) {
                self.device.handle(self.number, request);
            }
            self.device.end_turn(self.number);
        };
        // Also without a request: `reap` may have left something to submit.
        self.device.end_batch(self.number);
        let mut state = self.queue.lock();
        settle(&mut state);
        state.busy = false;
        self.queue.note_idle(&state);
        pause
    }

    /// Takes up to a batch of chains.
    fn take(&mut self, state: &mut State) {
        state.busy = true;
        state.ring.mute();
        let lease = match self.lease.take() {
            Some(lease) if lease.is_of(state) => lease,
            _ => Arc::new(Lease {
                queue: Arc::clone(self.queue),
                memory: Arc::clone(&state.memory),
                epoch: state.epoch,
            }),
        };
        state.ring.foresee(&lease.memory, BATCH as u16);
        while self.batch.len() < BATCH {
            let (mut readable, mut writable) = (Spans::new(), Spans::new());
            let (memory, open) = (&lease.memory, state.open);
            match state.ring.next(memory, open, &mut readable, &mut writable) {
                Next::Chain { head } => {
                    state.open += 1;
                    foresee(&readable, prefetch);
                    foresee(&writable, prefetch_to_write);
                    let readable = Segments::of_lease(readable, &lease);
                    let writable = Segments::of_lease(writable, &lease);
                    let bytes = readable.len() as u64 + writable.len() as u64;
                    let completion = Completion::ring(Arc::clone(&lease), head, bytes);
                    self.batch
                        .push(Request::with_completion(readable, writable, completion));
                }
                Next::Malformed { head } => {
                    tracing::debug!(queue = self.number, head, "malformed chain");
                    state.ring.give_back(head, 0);
                    state.unannounced = true;
                }
                Next::Broken => {
                    tracing::warn!(queue = self.number, "the driver broke its ring");
                    if let Some(err) = &state.err {
                        err.signal();
                    }
                    break;
                }
                Next::Empty => break,
            }
        }
        self.lease = Some(lease);
        if !self.batch.is_empty() {
            note_begin();
        }
    }

    /// Looks for new chains for a while, before the driver is asked to kick.
    fn look(&mut self, watch: &Watch) {
        let window = self.polling.window();
        if window.is_zero() {
            return;
        }
        self.polling.look(crate::sys::pushed_off);
        let start = Instant::now();
        loop {
            let found = (0..LOOKS).any(|_| {
                let found = watch.has_news();
                std::hint::spin_loop();
                found
            });
            let took = start.elapsed();
            if found || took >= window {
                return self.polling.looked(found, took);
            }
        }
    }
}
