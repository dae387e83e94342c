//! Locks of the guest's programs that are locks of the host as well.
//!
//! Each owner in the guest has an open description of its own of the file, which holds the owner's
//! locks on the host: those of fcntl(2) as locks of open file descriptions, which exclude those of
//! the host's processes, and those of flock(2). They end with it, and so with the server.
//!
//! Whoever waits is asked for again and again by one thread. A call that waits could be interrupted
//! by a signal alone, and would take a thread of each waiter.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use super::table::{Key, Node};
use super::{Result, Tree};
use crate::sys::{self, RangeLock};
use crate::wire::abi::{FileLock, LK_FLOCK, LkIn, LkOut};

/// Owners of locks, each with a descriptor.
const OWNERS: usize = 4096;
/// Requests that wait for a lock.
const WAITERS: usize = 1024;
/// Interrupts that have come before what they interrupt.
const EARLY: usize = 64;
/// How long a lock that somebody else holds is left alone, at first and at last.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

/// What is called with the lock, or when it cannot be had.
pub type Done = Box<dyn FnOnce(Result<()>) + Send>;

/// Whose locks on which file; a program's, or of one of its open files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Owner {
    file: Key,
    number: u64,
    flock: bool,
}

/// A lock that is asked for.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    kind: RangeLock,
    /// First byte and length, where zero is up to the end; of flock(2) there is no range.
    range: Option<(i64, i64)>,
}

impl Wanted {
    fn of(args: &LkIn) -> Result<Self> {
        let kind = match args.lock.kind.cast_signed() {
            libc::F_RDLCK => RangeLock::Shared,
            libc::F_WRLCK => RangeLock::Exclusive,
            libc::F_UNLCK => RangeLock::None,
            _ => return Err(Errno::INVAL),
        };
        if args.lk_flags & LK_FLOCK != 0 {
            return Ok(Self { kind, range: None });
        }
        let start = i64::try_from(args.lock.start).map_err(|_| Errno::INVAL)?;
        let len = match i64::try_from(args.lock.end) {
            Ok(end) if end < start => return Err(Errno::INVAL),
            Ok(i64::MAX) | Err(_) => 0,
            Ok(end) => (end - start).saturating_add(1),
        };
        let range = Some((start, len));
        Ok(Self { kind, range })
    }

    /// Whether this takes all locks of its owner away.
    fn ends(&self) -> bool {
        self.kind == RangeLock::None && matches!(self.range, None | Some((0, 0)))
    }

    /// Asks the host; EAGAIN when somebody else has it.
    fn set(&self, file: &OwnedFd) -> Result<()> {
        match self.range {
            Some(range) => sys::lock_range(file, self.kind, range, false),
            None => rustix::fs::flock(
                file,
                match self.kind {
                    RangeLock::Shared => FlockOperation::NonBlockingLockShared,
                    RangeLock::Exclusive => FlockOperation::NonBlockingLockExclusive,
                    RangeLock::None => FlockOperation::NonBlockingUnlock,
                },
            ),
        }
    }
}

struct Waiter {
    unique: u64,
    owner: Owner,
    file: Arc<OwnedFd>,
    wanted: Wanted,
    done: Done,
}

#[derive(Default)]
struct State {
    files: HashMap<Owner, Arc<OwnedFd>>,
    waiting: Vec<Waiter>,
    early: VecDeque<u64>,
    watched: bool,
}

/// All locks of a guest, and who waits for one.
#[derive(Default)]
pub(super) struct Locks {
    state: Mutex<State>,
    changed: Condvar,
}

impl Locks {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a lock or gives it back.
    fn set(&self, owner: Owner, file: &Arc<OwnedFd>, wanted: Wanted) -> Result<()> {
        wanted.set(file)?;
        if wanted.ends() {
            // A request of the same owner that waits holds the description as well.
            self.state().files.remove(&owner);
        }
        if wanted.kind != RangeLock::Exclusive {
            self.changed.notify_one();
        }
        Ok(())
    }

    /// Has `waiter` called when it has its lock.
    fn wait(self: &Arc<Self>, waiter: Waiter) {
        let mut state = self.state();
        if let Some(at) = state.early.iter().position(|one| *one == waiter.unique) {
            state.early.remove(at);
            drop(state);
            return (waiter.done)(Err(Errno::INTR));
        }
        if state.waiting.len() >= WAITERS {
            drop(state);
            return (waiter.done)(Err(Errno::NOLCK));
        }
        if !state.watched {
            let locks = Arc::clone(self);
            let thread = std::thread::Builder::new().name("msb-fs-locks".to_owned());
            if thread.spawn(move || locks.watch()).is_err() {
                drop(state);
                return (waiter.done)(Err(Errno::NOLCK));
            }
            state.watched = true;
        }
        state.waiting.push(waiter);
        drop(state);
        self.changed.notify_one();
    }

    /// Asks for what is waited for, in the order of the requests, until nobody waits.
    fn watch(&self) {
        let mut pause = PAUSES.0;
        let mut state = self.state();
        loop {
            let mut ended = Vec::new();
            let mut left = Vec::with_capacity(state.waiting.len());
            for waiter in std::mem::take(&mut state.waiting) {
                match waiter.wanted.set(&waiter.file) {
                    Err(Errno::AGAIN) => left.push(waiter),
                    result => {
                        // The owner may have closed another of its files meanwhile.
                        if result.is_ok() {
                            state.files.entry(waiter.owner).or_insert(waiter.file);
                        }
                        ended.push((waiter.done, result));
                    }
                }
            }
            state.waiting = left;
            if !ended.is_empty() {
                drop(state);
                for (done, result) in ended {
                    done(result);
                }
                state = self.state();
            } else if state.waiting.is_empty() {
                state.watched = false;
                return;
            } else {
                let (again, timeout) = self
                    .changed
                    .wait_timeout(state, pause)
                    .unwrap_or_else(PoisonError::into_inner);
                state = again;
                pause = if timeout.timed_out() {
                    (pause * 2).min(PAUSES.1)
                } else {
                    PAUSES.0
                };
            }
        }
    }

    fn interrupt(&self, unique: u64) {
        let mut state = self.state();
        let at = state.waiting.iter().position(|one| one.unique == unique);
        if let Some(at) = at {
            let waiter = state.waiting.remove(at);
            drop(state);
            return (waiter.done)(Err(Errno::INTR));
        }
        if state.early.len() == EARLY {
            state.early.pop_front();
        }
        state.early.push_back(unique);
    }

    /// Gives all locks back, and ends all waiting.
    pub(super) fn clear(&self) {
        let mut state = self.state();
        let files = std::mem::take(&mut state.files);
        let waiting = std::mem::take(&mut state.waiting);
        state.early.clear();
        drop(state);
        drop(files);
        for waiter in waiting {
            (waiter.done)(Err(Errno::INTR));
        }
    }
}

impl Tree {
    /// Whether a lock could be had, and if not, which one is in its way. Locks of flock(2) are not
    /// asked about.
    pub fn test_lock(&self, id: u64, args: &LkIn) -> Result<LkOut> {
        let wanted = Wanted::of(args)?;
        let range = wanted.range.ok_or(Errno::INVAL)?;
        let node = self.locked_node(id, args.fh)?;
        let owner = owner(&node, args.owner, false);
        let known = self.locks.state().files.get(&owner).map(Arc::clone);
        let file = match known {
            Some(file) => file,
            None => Arc::new(self.open_for_locks(&node)?),
        };
        let free = FileLock {
            kind: libc::F_UNLCK.cast_unsigned(),
            ..args.lock
        };
        let found = match wanted.kind {
            RangeLock::None => None,
            kind => sys::lock_in_the_way(&file, kind, range)?,
        };
        let lock = found.map_or(free, |(kind, (start, len))| {
            let last = match len {
                0 => i64::MAX,
                len => start.saturating_add(len - 1),
            };
            let kind = match kind {
                RangeLock::Shared => libc::F_RDLCK,
                _ => libc::F_WRLCK,
            };
            FileLock {
                start: start.cast_unsigned(),
                end: last.cast_unsigned(),
                kind: kind.cast_unsigned(),
                // The host's processes are nobody in the guest.
                pid: 0,
            }
        });
        Ok(LkOut { lock })
    }

    /// Takes a lock or gives it back; EAGAIN when somebody else has it.
    pub fn lock(&self, id: u64, args: &LkIn) -> Result<()> {
        let (owner, wanted, file) = self.prepare(id, args)?;
        match file {
            Some(file) => self.locks.set(owner, &file, wanted),
            // Who has no lock cannot give one back.
            None => Ok(()),
        }
    }

    /// The same, but waits for who has it; `done` may be called by another thread.
    pub fn lock_when_free(&self, id: u64, args: &LkIn, unique: u64, done: Done) {
        let (owner, wanted, file) = match self.prepare(id, args) {
            Ok((owner, wanted, Some(file))) => (owner, wanted, file),
            Ok((_, _, None)) => return done(Ok(())),
            Err(error) => return done(Err(error)),
        };
        match self.locks.set(owner, &file, wanted) {
            Err(Errno::AGAIN) => self.locks.wait(Waiter {
                unique,
                owner,
                file,
                wanted,
                done,
            }),
            result => done(result),
        }
    }

    /// Has a request that waits for a lock end without it.
    pub fn interrupt(&self, unique: u64) {
        if self.rules.locks {
            self.locks.interrupt(unique);
        }
    }

    /// Gives back what a program, or one of its open files, holds of a file.
    pub fn unlock(&self, id: u64, fh: u64, number: u64, flock: bool) {
        if !self.rules.locks {
            return;
        }
        let Ok(node) = self.locked_node(id, fh) else {
            return;
        };
        let owner = owner(&node, number, flock);
        let file = self.locks.state().files.remove(&owner);
        if let Some(file) = file {
            let wanted = Wanted {
                kind: RangeLock::None,
                range: (!flock).then_some((0, 0)),
            };
            wanted.set(&file).ok();
            self.locks.changed.notify_one();
        }
    }

    /// What a request is about, and the description that its owner's locks are of; none when the
    /// owner has none and only gives back.
    fn prepare(&self, id: u64, args: &LkIn) -> Result<(Owner, Wanted, Option<Arc<OwnedFd>>)> {
        let wanted = Wanted::of(args)?;
        let node = self.locked_node(id, args.fh)?;
        let owner = owner(&node, args.owner, wanted.range.is_none());
        let known = self.locks.state().files.get(&owner).map(Arc::clone);
        if known.is_some() || wanted.kind == RangeLock::None {
            return Ok((owner, wanted, known));
        }
        let file = Arc::new(self.open_for_locks(&node)?);
        let mut state = self.locks.state();
        if state.files.len() >= OWNERS {
            return Err(Errno::NOLCK);
        }
        // Another thread of the same program may have been faster.
        let file = state.files.entry(owner).or_insert(file);
        Ok((owner, wanted, Some(Arc::clone(file))))
    }

    fn locked_node(&self, id: u64, fh: u64) -> Result<Arc<Node>> {
        match fh {
            0 => self.node(id),
            fh => Ok(Arc::clone(&self.handles.file(fh, id)?.node)),
        }
    }

    /// A description that can hold both kinds of lock, where the file can be written at all.
    fn open_for_locks(&self, node: &Node) -> Result<OwnedFd> {
        let result = if self.rules.readonly {
            Err(Errno::ROFS)
        } else {
            self.reopen(node, OFlags::RDWR)
        };
        match result {
            Err(Errno::ROFS | Errno::ACCESS | Errno::PERM | Errno::TXTBSY) => {
                self.reopen(node, OFlags::RDONLY)
            }
            result => result,
        }
        .map_err(|error| match error {
            Errno::MFILE | Errno::NFILE => Errno::NOLCK,
            error => error,
        })
    }
}

fn owner(node: &Node, number: u64, flock: bool) -> Owner {
    Owner {
        file: node.key,
        number,
        flock,
    }
}
