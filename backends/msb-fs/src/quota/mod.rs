//! A limit of the space that the files of a directory take, one for all servers of it.
//!
//! Space is what the host has allocated, so holes are free. Before anything grows, what it may grow
//! by at most is taken out of the budget; afterwards the difference to what it has grown by is
//! settled. Inodes are counted beside the bytes, for empty files take space as well. The space of a
//! file without a name comes back when the last server closes it.

mod ledger;
#[expect(
    unsafe_code,
    reason = "memory shared by processes, and locks of open descriptions"
)]
pub(crate) mod sys;
mod walk;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, SeekFrom};
use rustix::io::Errno;

use self::ledger::{Field, GROUPS, Ledger, LedgerLock};
use crate::sys::{Stat, stat};

/// Unit of allocation, and of what is reserved.
pub(crate) const BLOCK: u64 = 4096;
/// The files are counted again at most this often, and for a small part of the time.
const PATIENCE: Duration = Duration::from_secs(5);

/// What files take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Space {
    /// Bytes that the host has allocated.
    pub bytes: u64,
    /// Number of inodes.
    pub inodes: u64,
}

/// What an inode takes. Some file systems allocate nothing for directories that they can tell.
fn space_of(stat: &Stat) -> u64 {
    let allocated = stat.st_blocks.saturating_mul(512);
    match stat.kind() {
        FileType::Directory => allocated.max(stat.st_size),
        _ => allocated,
    }
}

/// How much a change may add.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Room {
    /// So many bytes and inodes.
    Fixed(u64, u64),
    /// What the first file lacks between these positions.
    Between(u64, u64),
}

/// Changes of space that do not show in the files that were named.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    bytes: i64,
    inodes: i64,
}

impl Tally {
    /// A new inode.
    pub(crate) fn made(&mut self, file: impl AsFd) -> Result<(), Errno> {
        self.made_as(&stat(file)?);
        Ok(())
    }

    /// A new inode with these attributes.
    pub(crate) fn made_as(&mut self, stat: &Stat) {
        self.bytes += signed(space_of(stat));
        self.inodes += 1;
    }
}

/// The account of one directory, as one server sees it.
pub struct Account {
    ledger: Ledger,
    limit: Space,
    root: OwnedFd,
    groups: [Mutex<()>; GROUPS],
    open: Mutex<()>,
    counted: Mutex<(Instant, Duration)>,
}

impl Account {
    /// Opens or makes the account of `root` in the file at `path`, or for this server alone.
    ///
    /// # Errors
    ///
    /// When the file cannot be used, or the files of the directory cannot be counted.
    pub fn open(path: Option<&Path>, limit: u64, root: OwnedFd) -> io::Result<Self> {
        let found = stat(&root)?;
        let (ledger, uncounted) = Ledger::open(path, (found.st_dev, found.st_ino))?;
        let begun = Instant::now();
        let account = Self {
            ledger,
            limit: Space {
                bytes: limit,
                inodes: (limit / BLOCK).max(16),
            },
            root,
            groups: [const { Mutex::new(()) }; GROUPS],
            open: Mutex::new(()),
            counted: Mutex::new((begun, Duration::ZERO)),
        };
        if uncounted {
            account.count()?;
        }
        account.ledger.share()?;
        Ok(account)
    }

    /// The same account with another view of the directory.
    pub(crate) fn seen_through(mut self, root: OwnedFd) -> Self {
        self.root = root;
        self
    }

    fn count(&self) -> Result<(), Errno> {
        let begun = Instant::now();
        let found = walk::count(&self.root)?;
        let unnamed = self.load(Field::UnnamedBytes);
        self.store(Field::Bytes, found.bytes.saturating_add(unnamed));
        let unnamed = self.load(Field::UnnamedInodes);
        self.store(Field::Inodes, found.inodes.saturating_add(unnamed));
        *lock(&self.counted) = (Instant::now(), begun.elapsed());
        Ok(())
    }

    /// Counts the files again while nobody changes them, unless that was done a moment ago.
    fn recount(&self) -> bool {
        let (last, took) = *lock(&self.counted);
        if last.elapsed() < PATIENCE.max(took * 20) {
            return false;
        }
        let _here: Vec<_> = self.groups.iter().map(lock).collect();
        let Ok(_there) = self.ledger.lock(None) else {
            return false;
        };
        self.count().is_ok()
    }

    /// The limit, and what of it is used.
    pub(crate) fn state(&self) -> (Space, Space) {
        let used = Space {
            bytes: self.load(Field::Bytes),
            inodes: self.load(Field::Inodes),
        };
        (self.limit, used)
    }

    /// How many bytes may still be added.
    pub(crate) fn left(&self) -> u64 {
        self.limit.bytes.saturating_sub(self.load(Field::Bytes))
    }

    /// Carries out `change`, which may alter the files `touched`, when there is `room` for it.
    pub(crate) fn change<T>(
        &self,
        touched: &[BorrowedFd<'_>],
        room: Room,
        change: impl FnOnce(&mut Tally) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let mut groups = BTreeSet::new();
        for file in touched {
            groups.insert(usize::try_from(stat(file)?.st_ino % GROUPS as u64).unwrap_or(0));
        }
        let mut tries = 0..2;
        let (_locks, before, taken) = loop {
            let locks = self.lock_groups(&groups)?;
            let before: Vec<Stat> = touched.iter().map(stat).collect::<Result<_, _>>()?;
            let wanted = wanted(room, touched, &before)?;
            match self.reserve(wanted) {
                Ok(()) => break (locks, before, wanted),
                Err(error) => {
                    drop(locks);
                    tries.next();
                    if tries.is_empty() || !self.recount() {
                        return Err(error);
                    }
                }
            }
        };
        let mut tally = Tally::default();
        let result = change(&mut tally);
        let mut seen = BTreeSet::new();
        for (file, before) in touched.iter().zip(&before) {
            let Ok(after) = stat(file) else { continue };
            if same(&after, before) || !seen.insert((after.st_dev, after.st_ino)) {
                continue;
            }
            let (old, new) = (signed(space_of(before)), signed(space_of(&after)));
            tally.bytes += new - old;
            match (before.st_nlink, after.st_nlink) {
                (0, 0) => self.add(Field::UnnamedBytes, new - old),
                (0, _) => {
                    self.add(Field::UnnamedBytes, -old);
                    self.add(Field::UnnamedInodes, -1);
                }
                _ => {}
            }
        }
        self.add(Field::Bytes, tally.bytes - signed(taken.bytes));
        self.add(Field::Inodes, tally.inodes - signed(taken.inodes));
        result
    }

    fn lock_groups(&self, groups: &BTreeSet<usize>) -> Result<Locks<'_>, Errno> {
        let mut locks = Locks::default();
        // In order, so that nobody waits in a circle.
        for group in groups {
            locks.0.extend(self.groups.get(*group).map(lock));
            locks.1.push(self.ledger.lock(Some(*group))?);
        }
        Ok(locks)
    }

    /// Takes `wanted` out of the budget.
    fn reserve(&self, wanted: Space) -> Result<(), Errno> {
        self.reserve_field(Field::Bytes, wanted.bytes, self.limit.bytes)?;
        let inodes = self.reserve_field(Field::Inodes, wanted.inodes, self.limit.inodes);
        if inodes.is_err() {
            self.add(Field::Bytes, -signed(wanted.bytes));
        }
        inodes
    }

    fn reserve_field(&self, field: Field, wanted: u64, limit: u64) -> Result<(), Errno> {
        if wanted == 0 {
            return Ok(());
        }
        let fits = |used: u64| used.checked_add(wanted).filter(|sum| *sum <= limit);
        let (set, fetch) = (Ordering::AcqRel, Ordering::Acquire);
        let result = self.ledger.field(field).fetch_update(set, fetch, fits);
        result.map(drop).map_err(|_| Errno::NOSPC)
    }

    /// Takes note that `victim` has lost a name, `gone` if it has lost all. Its space is free at
    /// once when no server has it open.
    pub(crate) fn unlinked(
        &self,
        victim: &impl AsFd,
        gone: bool,
        tally: &mut Tally,
    ) -> Result<(), Errno> {
        let _here = lock(&self.open);
        let _there = self.ledger.lock_open()?;
        let found = stat(victim)?;
        if found.st_nlink > 0 && !gone {
            return Ok(());
        }
        let space = signed(space_of(&found));
        if self.ledger.cell(found.st_ino).load(Ordering::Acquire) == 0 {
            tally.bytes -= space;
            tally.inodes -= 1;
        } else {
            self.add(Field::UnnamedBytes, space);
            self.add(Field::UnnamedInodes, 1);
        }
        Ok(())
    }

    /// Says to all servers that this one has `file` open, until the value is handed to
    /// [`Presence::leave`].
    pub(crate) fn enter(self: &Arc<Self>, file: &impl AsFd) -> Option<Presence> {
        let _here = lock(&self.open);
        let _there = self.ledger.lock_open().ok()?;
        let found = stat(file).ok()?;
        let others = self
            .ledger
            .cell(found.st_ino)
            .fetch_add(1, Ordering::AcqRel);
        if others == 0 && found.st_nlink == 0 {
            // It lost its name when nobody seemed to have it open, or never had one.
            self.charge(&found, 1);
        }
        Some(Presence {
            account: Arc::clone(self),
            inode: found.st_ino,
        })
    }

    /// Adds or takes back the space of a file without a name.
    fn charge(&self, found: &Stat, sign: i64) {
        let space = signed(space_of(found));
        for (field, value) in [
            (Field::Bytes, space),
            (Field::Inodes, 1),
            (Field::UnnamedBytes, space),
            (Field::UnnamedInodes, 1),
        ] {
            self.add(field, sign * value);
        }
    }

    fn load(&self, field: Field) -> u64 {
        self.ledger.field(field).load(Ordering::Acquire)
    }

    fn store(&self, field: Field, value: u64) {
        self.ledger.field(field).store(value, Ordering::Release);
    }

    fn add(&self, field: Field, value: i64) {
        let number: &AtomicU64 = self.ledger.field(field);
        let sum = |old: u64| Some(old.saturating_add_signed(value));
        number
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, sum)
            .ok();
    }
}

/// An inode that this server has open.
pub(crate) struct Presence {
    account: Arc<Account>,
    inode: u64,
}

impl Presence {
    /// Says that the server closes `file` now.
    pub(crate) fn leave(self, file: &impl AsFd) {
        let account = &self.account;
        let _here = lock(&account.open);
        let _there = account.ledger.lock_open();
        let cell = account.ledger.cell(self.inode);
        let last = cell.fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| {
            old.checked_sub(1)
        });
        if last != Ok(1) {
            return;
        }
        if let Ok(found) = stat(file)
            && found.st_nlink == 0
        {
            account.charge(&found, -1);
        }
    }
}

#[derive(Default)]
struct Locks<'a>(Vec<MutexGuard<'a, ()>>, Vec<LedgerLock<'a>>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn same(one: &Stat, other: &Stat) -> bool {
    (one.st_blocks, one.st_size, one.st_nlink) == (other.st_blocks, other.st_size, other.st_nlink)
}

/// What `room` comes to.
fn wanted(room: Room, touched: &[BorrowedFd<'_>], before: &[Stat]) -> Result<Space, Errno> {
    let (bytes, inodes) = match (room, touched.first(), before.first()) {
        (Room::Fixed(bytes, inodes), ..) => (bytes, inodes),
        (Room::Between(from, to), Some(file), Some(stat)) => {
            let (from, to) = (from - from % BLOCK, to.next_multiple_of(BLOCK));
            (lacking(*file, stat, from, to)?, 0)
        }
        _ => (0, 0),
    };
    Ok(Space { bytes, inodes })
}

/// How many bytes between two block boundaries have no space yet.
fn lacking(file: BorrowedFd<'_>, stat: &Stat, from: u64, to: u64) -> Result<u64, Errno> {
    let size = stat.st_size.next_multiple_of(BLOCK);
    let dense = stat.st_blocks.saturating_mul(512) >= size;
    if dense || from >= size {
        return Ok(to.saturating_sub(from.max(size)));
    }
    let mut lacks = to.saturating_sub(size.max(from));
    let end = to.min(size);
    let mut at = from;
    while at < end {
        let hole = match rustix::fs::seek(file, SeekFrom::Hole(at)) {
            Ok(hole) => hole.min(end),
            Err(_) => return Ok(to - from),
        };
        if hole >= end {
            break;
        }
        let data = match rustix::fs::seek(file, SeekFrom::Data(hole)) {
            Ok(data) => data.min(end),
            Err(_) => end,
        };
        lacks = lacks.saturating_add(data.saturating_sub(hole));
        at = data;
    }
    // The ends of holes need not lie at block boundaries.
    Ok(lacks.next_multiple_of(BLOCK))
}
