//! One virtqueue with its worker thread.
//!
//! The control thread changes the ring under its lock; the worker takes the lock to fetch a batch
//! of chains and to hand one back, never while the device works on a request.

mod event;
mod inflight;
mod poll;
mod ring;
mod worker;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, epoll, eventfd};

use self::event::Event;
pub(crate) use self::inflight::{Inflight, stride};
use self::ring::Ring;
pub(crate) use self::ring::{Addresses, Descriptor};
use self::worker::{Finished, Worker, keep_aside};
use crate::Device;
use crate::sys::Memory;

/// How long a queue that is being stopped waits for its open requests, unless the end is near.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

const WAKE: u64 = 0;
const KICK: u64 = 1;
const DONE: u64 = 2;

/// A virtqueue, shared by its worker, the control thread and the requests that are open.
pub(crate) struct Queue {
    state: Mutex<State>,
    idle: Condvar,
    epoll: OwnedFd,
    wake: OwnedFd,
}

struct State {
    ring: Ring,
    memory: Arc<Memory>,
    enabled: bool,
    started: bool,
    ending: bool,
    kick: Option<OwnedFd>,
    call: Option<Event>,
    err: Option<Event>,
    /// Requests that the device has and has not completed.
    open: u32,
    /// Counts the stops: a request of an earlier time must not touch the ring of a later one.
    epoch: u32,
    /// The worker is in the device, or will be before it takes the lock again.
    busy: bool,
    /// Something was given back for which no interrupt was considered.
    unannounced: bool,
    /// How many wait for the last open request; to notify costs a system call.
    awaited: u32,
}

/// What an open request holds: its queue, the memory its spans lie in, and the time it belongs to.
pub(crate) struct Lease {
    queue: Arc<Queue>,
    memory: Arc<Memory>,
    epoch: u32,
}

impl Lease {
    fn is_of(&self, state: &State) -> bool {
        self.epoch == state.epoch && Arc::ptr_eq(&self.memory, &state.memory)
    }

    /// Ends request `head`, which is `bytes` long; `written` of them are the answer.
    pub(crate) fn complete(&self, head: u16, written: u32, bytes: u64) {
        let finished = Finished {
            head,
            epoch: self.epoch,
            written,
        };
        if keep_aside(&self.queue, finished, bytes) {
            return;
        }
        let mut state = self.queue.lock();
        state.give_back(finished);
        state.ring.show();
        state.announce();
        self.queue.note_idle(&state);
    }
}

/// A change that the front end asked for and that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QueueError {
    #[error("queue size must be a power of two and at most {0}")]
    Size(u16),
    #[error("the ring does not lie in guest memory, or is not aligned")]
    Place,
    #[error("the ring is in use")]
    Busy,
    #[error("the descriptor is no eventfd")]
    NoEventfd,
}

impl Queue {
    pub(crate) fn new(size: u16) -> io::Result<Self> {
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let queue = Self {
            state: Mutex::new(State {
                ring: Ring::new(size),
                memory: Arc::default(),
                enabled: false,
                started: false,
                ending: false,
                kick: None,
                call: None,
                err: None,
                open: 0,
                epoch: 0,
                busy: false,
                unannounced: false,
                awaited: 0,
            }),
            idle: Condvar::new(),
            epoll: events,
            wake,
        };
        queue.listen_to(queue.wake.as_fd(), WAKE)?;
        Ok(queue)
    }

    /// Serves the queue until [`Queue::end`]. Runs on the queue's own thread, which looks for
    /// requests for at most `poll_limit` before it sleeps.
    pub(crate) fn work<D: Device>(
        self: &Arc<Self>,
        number: u16,
        device: &D,
        poll_limit: Duration,
    ) -> io::Result<()> {
        Worker::new(self, number, device, poll_limit).run()
    }

    pub(crate) fn set_memory(&self, memory: &Arc<Memory>) {
        let mut state = self.lock();
        state.memory = Arc::clone(memory);
        let State { ring, memory, .. } = &mut *state;
        if ring.addresses.is_some() && !ring.place(memory) && state.started {
            tracing::warn!("a running ring has lost its memory");
        }
        drop(state);
        // The worker lets go of the memory that was before.
        self.wake();
    }

    pub(crate) fn set_event_idx(&self, on: bool) {
        self.lock().ring.event_idx = on;
    }

    pub(crate) fn set_size(&self, size: u32, limit: u16) -> Result<(), QueueError> {
        let size = u16::try_from(size)
            .ok()
            .filter(|size| size.is_power_of_two() && *size <= limit)
            .ok_or(QueueError::Size(limit))?;
        self.settle();
        let mut state = self.lock();
        if state.started && size != state.ring.size {
            return Err(QueueError::Busy);
        }
        state.ring.size = size;
        Ok(())
    }

    pub(crate) fn set_addresses(&self, at: Addresses) -> Result<(), QueueError> {
        self.settle();
        let mut state = self.lock();
        if state.started {
            return Err(QueueError::Busy);
        }
        let State { ring, memory, .. } = &mut *state;
        let before = ring.addresses.replace(at);
        if ring.place(memory) {
            return Ok(());
        }
        ring.addresses = before;
        ring.place(memory);
        Err(QueueError::Place)
    }

    pub(crate) fn set_base(&self, base: u32) -> Result<(), QueueError> {
        self.settle();
        let mut state = self.lock();
        if state.started {
            return Err(QueueError::Busy);
        }
        // The upper half belongs to packed rings.
        state.ring.next_available = (base & 0xffff) as u16;
        Ok(())
    }

    /// Stops a ring that was disabled before it is set up anew: all that libkrun says when its
    /// guest resets the driver is that the ring is disabled.
    fn settle(&self) {
        let state = self.lock();
        if state.started && !state.enabled {
            drop(state);
            self.stop(PATIENCE);
        }
    }

    /// Takes the descriptor through which the driver kicks, and starts the ring.
    pub(crate) fn set_kick(&self, kick: Option<OwnedFd>) -> Result<(), QueueError> {
        if let Some(kick) = &kick {
            event::check(kick)?;
        }
        let mut state = self.lock();
        self.drop_kick(&mut state);
        if let Some(kick) = &kick {
            self.listen_to(kick.as_fd(), KICK)
                .map_err(|_| QueueError::NoEventfd)?;
        }
        state.kick = kick;
        if !state.started {
            let State { ring, memory, .. } = &mut *state;
            if !ring.place(memory) {
                return Err(QueueError::Place);
            }
            ring.start();
            state.started = true;
        }
        drop(state);
        self.wake();
        Ok(())
    }

    pub(crate) fn set_call(&self, call: Option<OwnedFd>) -> Result<(), QueueError> {
        let call = call.map(Event::new).transpose()?;
        let mut state = self.lock();
        state.call = call;
        // An interrupt that had nowhere to go is not lost.
        if let Some(call) = state.call.as_ref().filter(|_| state.started) {
            call.signal();
        }
        Ok(())
    }

    pub(crate) fn set_err(&self, err: Option<OwnedFd>) -> Result<(), QueueError> {
        self.lock().err = err.map(Event::new).transpose()?;
        Ok(())
    }

    pub(crate) fn set_inflight(&self, inflight: Option<Inflight>) {
        self.lock().ring.inflight = inflight;
    }

    /// Enables or disables the ring. A kick that came while it was disabled is not lost; once it
    /// is disabled no request is open, for the driver may use its memory for something else.
    pub(crate) fn enable(&self, on: bool, patience: Duration) {
        let mut state = self.lock();
        state.enabled = on;
        if on {
            drop(state);
            self.wake();
        } else {
            drop(self.wait_idle(state, patience));
        }
    }

    /// Waits until no request is open and the worker has left the device; gives up after
    /// `patience`.
    fn wait_idle<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        patience: Duration,
    ) -> MutexGuard<'a, State> {
        let (state, is_idle) = self.wait_until(state, patience, State::is_idle);
        if !is_idle {
            tracing::error!(open = state.open, "requests do not end; leaving them");
        }
        state
    }

    /// Waits until something is so that can only become so when the queue has become idle; says
    /// whether it is.
    fn wait_until<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        patience: Duration,
        is_so: impl Fn(&State) -> bool,
    ) -> (MutexGuard<'a, State>, bool) {
        state.awaited += 1;
        let deadline = Instant::now() + patience;
        let mut done = is_so(&state);
        while !done {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self
                .idle
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            done = is_so(&state);
        }
        state.awaited -= 1;
        (state, done)
    }

    /// Has everything carried out that the driver has made available before this call, and waits
    /// for that; false when there was nothing, or it was given up.
    pub(crate) fn catch_up(&self, patience: Duration) -> bool {
        let state = self.lock();
        let end = state.ring.end();
        let is_done = |state: &State| {
            let ahead = state.ring.next_available.wrapping_sub(end);
            let taken = ahead <= u16::MAX / 2 || !state.runs();
            taken && state.is_idle()
        };
        if !state.runs() || is_done(&state) {
            return false;
        }
        self.wake();
        self.wait_until(state, patience, is_done).1
    }

    /// Stops the ring, waits for its open requests, and returns where it stands.
    pub(crate) fn stop(&self, patience: Duration) -> u16 {
        let mut state = self.lock();
        state.started = false;
        self.drop_kick(&mut state);
        let mut state = self.wait_idle(state, patience);
        // What is still open has nowhere to go any more, and is not counted among later ones.
        state.epoch = state.epoch.wrapping_add(1);
        state.open = 0;
        state.call = None;
        state.err = None;
        state.ring.next_available
    }

    /// Forgets the ring, for the next front end.
    pub(crate) fn reset(&self, patience: Duration) {
        self.stop(patience);
        let mut state = self.lock();
        let size = state.ring.size;
        state.ring = Ring::new(size);
        state.enabled = false;
        state.memory = Arc::default();
    }

    /// Ends the worker.
    pub(crate) fn end(&self) {
        self.lock().ending = true;
        self.wake();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic of a worker ends the process; nobody goes on with what it left.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Fails only when the counter is full, and then the worker is awake already.
        rustix::io::write(&self.wake, &1_u64.to_ne_bytes()).ok();
    }

    /// Tells whoever waits for it that nothing is open any more.
    fn note_idle(&self, state: &State) {
        if state.awaited > 0 && state.is_idle() {
            self.idle.notify_all();
        }
    }

    /// Wakes the worker at each signal of `event`. An edge comes with every write to an eventfd,
    /// so it is never read: not a call for each wake-up, and nothing that could block.
    fn listen_to(&self, event: BorrowedFd<'_>, data: u64) -> io::Result<()> {
        let edges = epoll::EventFlags::IN | epoll::EventFlags::ET;
        let data = epoll::EventData::new_u64(data);
        Ok(epoll::add(&self.epoll, event, data, edges)?)
    }

    fn drop_kick(&self, state: &mut State) {
        if let Some(kick) = state.kick.take() {
            epoll::delete(&self.epoll, &kick).ok();
        }
    }
}

impl State {
    fn runs(&self) -> bool {
        self.enabled && self.started && !self.ending
    }

    /// Whether no request is open and the worker has left the device.
    fn is_idle(&self) -> bool {
        self.open == 0 && !self.busy
    }

    /// Puts a chain into the used ring; the driver sees it after `ring.show()`.
    fn give_back(&mut self, finished: Finished) {
        if finished.epoch == self.epoch {
            self.open = self.open.saturating_sub(1);
            self.ring.give_back(finished.head, finished.written);
            self.unannounced = true;
        }
    }

    /// Sends the interrupt for what was given back, if the driver wants one.
    fn announce(&mut self) {
        if std::mem::take(&mut self.unannounced)
            && self.ring.wants_interrupt()
            && let Some(call) = &self.call
        {
            call.signal();
        }
    }
}
