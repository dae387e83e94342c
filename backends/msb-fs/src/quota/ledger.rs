//! The account as numbers in a file, which all servers of a directory map.
//!
//! ```text
//! magic, device, inode of the directory, bytes, inodes, bytes and inodes without a name;
//! from number 512 on how many servers have an inode open, by its number
//! ```
//!
//! Whoever comes when nobody uses the account counts the files anew: what a killed server had
//! charged, and what the host has done meanwhile, is right from then on.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::sys::Numbers;
use crate::sys::{RangeLock, lock_range};

const MAGIC: u64 = u64::from_le_bytes(*b"msbquota");
const CELLS_AT: usize = 512;
const CELLS: usize = 1 << 20;
const LEN: usize = CELLS_AT + CELLS;

/// Bytes of the file that stand for its users, for the open inodes, and for groups of inodes; far
/// beyond its end.
const USERS: (i64, i64) = (1 << 40, 1);
const OPEN: (i64, i64) = ((1 << 40) + 1, 1);
/// How many groups of inodes are locked apart from each other.
pub(super) const GROUPS: usize = 64;

#[derive(Debug, Clone, Copy)]
pub(super) enum Field {
    Bytes = 3,
    Inodes = 4,
    UnnamedBytes = 5,
    UnnamedInodes = 6,
}

/// The numbers, and the file that they are in if others share them.
pub(super) struct Ledger {
    numbers: Numbers,
    file: Option<File>,
}

impl Ledger {
    /// Opens the account of the directory `identity`; the second value says whether the files must
    /// be counted first. Nobody else uses the account until [`Ledger::share`] is called.
    pub(super) fn open(path: Option<&Path>, identity: (u64, u64)) -> io::Result<(Self, bool)> {
        let Some(path) = path else {
            let numbers = Numbers::map(None, LEN)?;
            return Ok((
                Self {
                    numbers,
                    file: None,
                },
                true,
            ));
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
            .open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        let len = u64::try_from(LEN * 8).map_err(io::Error::other)?;
        match lock_range(&file, RangeLock::Exclusive, USERS, false) {
            Ok(()) => {
                if file.metadata()?.len() != len {
                    file.set_len(0)?;
                    file.set_len(len)?;
                }
                let ledger = Self::of(file)?;
                let [magic, device, inode] = ledger.head();
                if magic == MAGIC && (device, inode) != identity {
                    return Err(other_directory());
                }
                ledger.begin(len, identity)?;
                Ok((ledger, true))
            }
            Err(Errno::AGAIN) => {
                // Whoever counts the files at this moment lets us in afterwards.
                lock_range(&file, RangeLock::Shared, USERS, true)?;
                if file.metadata()?.len() != len {
                    return Err(io::Error::other("it is no account of a quota"));
                }
                let ledger = Self::of(file)?;
                let [magic, device, inode] = ledger.head();
                if magic != MAGIC || (device, inode) != identity {
                    return Err(other_directory());
                }
                Ok((ledger, false))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn of(file: File) -> io::Result<Self> {
        let numbers = Numbers::map(Some(&file), LEN)?;
        Ok(Self {
            numbers,
            file: Some(file),
        })
    }

    fn head(&self) -> [u64; 3] {
        [0, 1, 2].map(|place| self.number(place).load(Ordering::Acquire))
    }

    /// Writes an empty account over what is there.
    fn begin(&self, len: u64, identity: (u64, u64)) -> io::Result<()> {
        if let Some(file) = &self.file {
            file.set_len(0)?;
            file.set_len(len)?;
        }
        self.number(1).store(identity.0, Ordering::Relaxed);
        self.number(2).store(identity.1, Ordering::Relaxed);
        self.number(0).store(MAGIC, Ordering::Release);
        Ok(())
    }

    /// Lets other servers use the account, which is right now.
    pub(super) fn share(&self) -> io::Result<()> {
        match &self.file {
            Some(file) => Ok(lock_range(file, RangeLock::Shared, USERS, true)?),
            None => Ok(()),
        }
    }

    #[expect(
        clippy::indexing_slicing,
        reason = "constants and remainders below the length"
    )]
    fn number(&self, place: usize) -> &AtomicU64 {
        &self.numbers.all()[place]
    }

    pub(super) fn field(&self, field: Field) -> &AtomicU64 {
        self.number(field as usize)
    }

    /// How many servers have the inode open. Inodes with numbers far apart share a cell: the space
    /// of one that is gone may then stay charged until the files are counted again.
    pub(super) fn cell(&self, inode: u64) -> &AtomicU64 {
        let place = usize::try_from(inode % CELLS as u64).unwrap_or(0);
        self.number(CELLS_AT + place)
    }

    /// Keeps other servers from changing the inodes of a group, or all with `None`.
    pub(super) fn lock(&self, group: Option<usize>) -> Result<LedgerLock<'_>, Errno> {
        let range = match group.map(i64::try_from) {
            Some(Ok(group)) => (group, 1),
            _ => (0, 1 << 20),
        };
        self.lock_bytes(range)
    }

    /// Keeps other servers from opening and closing inodes.
    pub(super) fn lock_open(&self) -> Result<LedgerLock<'_>, Errno> {
        self.lock_bytes(OPEN)
    }

    fn lock_bytes(&self, range: (i64, i64)) -> Result<LedgerLock<'_>, Errno> {
        if let Some(file) = &self.file {
            lock_range(file, RangeLock::Exclusive, range, true)?;
        }
        Ok(LedgerLock {
            file: self.file.as_ref(),
            range,
        })
    }
}

/// A lock against other servers. The locks of one process do not exclude each other.
pub(super) struct LedgerLock<'a> {
    file: Option<&'a File>,
    range: (i64, i64),
}

impl Drop for LedgerLock<'_> {
    fn drop(&mut self) {
        if let Some(file) = self.file {
            lock_range(file, RangeLock::None, self.range, false).ok();
        }
    }
}

fn other_directory() -> io::Error {
    io::Error::other("it accounts for another directory; each needs a file of its own")
}
