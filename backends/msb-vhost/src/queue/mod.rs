//! One virtqueue with its worker thread.
//!
//! The control thread changes the ring under its lock; the worker takes the lock to fetch a chain
//! and to hand one back, never while the device works on a request.

mod inflight;
mod ring;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::FileType;
use rustix::io::Errno;

pub(crate) use self::inflight::{Inflight, stride};
pub(crate) use self::ring::{Addresses, Descriptor};
use self::ring::{Next, Ring};
use crate::Device;
use crate::request::{Completion, Request, Segments};
use crate::sys::Memory;

/// Finished requests that may wait for one common interrupt while more are being worked on.
const BATCH: u32 = 16;

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
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    /// Requests that the device has and has not completed.
    open: u32,
    /// Counts the stops: a request of an earlier time must not touch the ring of a later one.
    epoch: u32,
    /// The worker is emptying the ring and will look after the interrupt.
    draining: bool,
    unannounced: u32,
    /// Somebody waits for the last open request; to notify costs a system call.
    awaited: bool,
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
        epoll::add(
            &events,
            &wake,
            epoll::EventData::new_u64(WAKE),
            epoll::EventFlags::IN,
        )?;
        Ok(Self {
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
                draining: false,
                unannounced: 0,
                awaited: false,
            }),
            idle: Condvar::new(),
            epoll: events,
            wake,
        })
    }

    /// Serves the queue until [`Queue::end`]. Runs on the queue's own thread.
    pub(crate) fn work<D: Device>(self: &Arc<Self>, number: u16, device: &D) -> io::Result<()> {
        if let Some(done) = device.completion_fd(number) {
            let data = epoll::EventData::new_u64(DONE);
            epoll::add(&self.epoll, done, data, epoll::EventFlags::IN)?;
        }
        let mut events = Vec::with_capacity(3);
        loop {
            events.clear();
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                None,
            ) {
                Err(Errno::INTR) => continue,
                result => result?,
            };
            let mut done = false;
            for event in &events {
                match event.data.u64() {
                    WAKE => self.clear_wake(),
                    KICK => self.clear_kick(),
                    _ => done = true,
                }
            }
            if self.lock().ending {
                return Ok(());
            }
            if done {
                self.lock().draining = true;
                device.reap(number);
                self.announce();
            }
            self.drain(number, device);
        }
    }

    /// Gives the device every chain that waits.
    fn drain<D: Device>(self: &Arc<Self>, number: u16, device: &D) {
        let mut any = false;
        loop {
            let mut state = self.lock();
            if !state.runs() {
                break;
            }
            if !any {
                state.ring.mute();
            }
            state.draining = true;
            let State {
                ring, memory, open, ..
            } = &mut *state;
            match ring.next(memory, *open) {
                Next::Chain {
                    head,
                    readable,
                    writable,
                } => {
                    state.open += 1;
                    let epoch = state.epoch;
                    let memory = Arc::clone(&state.memory);
                    drop(state);
                    any = true;
                    let completion = Completion::ring(Arc::clone(self), head, epoch);
                    let readable = Segments::of_memory(readable, Arc::clone(&memory));
                    let writable = Segments::of_memory(writable, memory);
                    device.handle(
                        number,
                        Request::with_completion(readable, writable, completion),
                    );
                }
                Next::Malformed { head } => {
                    tracing::debug!(queue = number, head, "malformed chain");
                    state.ring.give_back(head, 0);
                    state.unannounced += 1;
                }
                Next::Broken => {
                    tracing::warn!(queue = number, "the driver broke its ring");
                    if let Some(err) = &state.err {
                        signal(err);
                    }
                    break;
                }
                Next::Empty => {
                    if state.ring.listen() {
                        state.ring.mute();
                    } else {
                        break;
                    }
                }
            }
        }
        if any {
            device.end_batch(number);
        }
        self.announce();
    }

    /// Ends a request that the device has completed.
    pub(crate) fn complete(&self, head: u16, epoch: u32, written: u32) {
        let mut state = self.lock();
        if state.epoch != epoch {
            return;
        }
        state.open = state.open.saturating_sub(1);
        if state.open == 0 && state.awaited {
            self.idle.notify_all();
        }
        state.ring.give_back(head, written);
        state.unannounced += 1;
        if !state.draining || state.unannounced >= BATCH {
            state.announce();
        }
    }

    /// Sends the interrupt for what was completed while the worker was busy.
    fn announce(&self) {
        let mut state = self.lock();
        state.draining = false;
        if state.unannounced > 0 {
            state.announce();
        }
    }

    pub(crate) fn set_memory(&self, memory: &Arc<Memory>) {
        let mut state = self.lock();
        state.memory = Arc::clone(memory);
        let State { ring, memory, .. } = &mut *state;
        if ring.addresses.is_some() && !ring.place(memory) && state.started {
            tracing::warn!("a running ring has lost its memory");
        }
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
        accept_event(kick.as_ref())?;
        let mut state = self.lock();
        self.drop_kick(&mut state);
        if let Some(kick) = &kick {
            let data = epoll::EventData::new_u64(KICK);
            epoll::add(&self.epoll, kick, data, epoll::EventFlags::IN)
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
        accept_event(call.as_ref())?;
        let mut state = self.lock();
        state.call = call;
        // An interrupt that had nowhere to go is not lost.
        if let Some(call) = state.call.as_ref().filter(|_| state.started) {
            signal(call);
        }
        Ok(())
    }

    pub(crate) fn set_err(&self, err: Option<OwnedFd>) -> Result<(), QueueError> {
        accept_event(err.as_ref())?;
        self.lock().err = err;
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

    /// Waits until no request is open; gives up after `patience`.
    fn wait_idle<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        patience: Duration,
    ) -> MutexGuard<'a, State> {
        state.awaited = true;
        let deadline = Instant::now() + patience;
        while state.open > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::error!(open = state.open, "requests do not end; leaving them");
                break;
            }
            state = self
                .idle
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        state.awaited = false;
        state
    }

    /// Stops the ring, waits for its open requests, and returns where it stands.
    pub(crate) fn stop(&self, patience: Duration) -> u16 {
        let mut state = self.lock();
        state.started = false;
        self.drop_kick(&mut state);
        let mut state = self.wait_idle(state, patience);
        if state.unannounced > 0 {
            state.announce();
        }
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
        signal(&self.wake);
    }

    fn clear_wake(&self) {
        rustix::io::read(&self.wake, &mut [0_u8; 8]).ok();
    }

    fn clear_kick(&self) {
        if let Some(kick) = &self.lock().kick {
            // Readable, as epoll says, and only this thread reads it.
            rustix::io::read(kick, &mut [0_u8; 8]).ok();
        }
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

    fn announce(&mut self) {
        self.unannounced = 0;
        if self.ring.wants_interrupt()
            && let Some(call) = &self.call
        {
            signal(call);
        }
    }
}

fn signal(event: &OwnedFd) {
    // Fails only when the counter is full, and then whoever reads it is awake already.
    rustix::io::write(event, &1_u64.to_ne_bytes()).ok();
}

/// Takes a descriptor if it is an eventfd, and makes sure that it never blocks: it is read and
/// written under the lock of the queue.
fn accept_event(fd: Option<&OwnedFd>) -> Result<(), QueueError> {
    let Some(fd) = fd else {
        return Ok(());
    };
    let plain = rustix::fs::fstat(fd)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Unknown);
    // Of all files without a type only an eventfd takes eight zero bytes, and they change nothing.
    let counts = plain && rustix::io::write(fd, &[0; 8]) == Ok(8);
    let flags = rustix::fs::fcntl_getfl(fd).map_err(|_| QueueError::NoEventfd)?;
    let set = rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK);
    if counts && set.is_ok() {
        Ok(())
    } else {
        Err(QueueError::NoEventfd)
    }
}
