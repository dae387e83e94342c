//! FORGETs that the guest has sent and that nobody has read yet.
//!
//! A file that the guest has removed is there until its FORGET is carried out: it takes space and a
//! descriptor, and on NFS it has a name in the directory. A guest sends the FORGET before it says to
//! its program that the file is gone, so whoever then misses something of these is right.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use msb_vhost::Backlog;
use rustix::io::Errno;

/// What is known of them.
#[derive(Debug, Default)]
pub(crate) struct Forgets {
    /// The queue in which they lie, once there is one.
    backlog: OnceLock<Backlog>,
    done: AtomicU64,
}

impl Forgets {
    /// Takes the queue; the first counts.
    pub(crate) fn attach(&self, backlog: Backlog) {
        self.backlog.set(backlog).ok();
    }

    /// One more has been carried out.
    pub(crate) fn note(&self) {
        self.done.fetch_add(1, Ordering::Release);
    }

    /// How many have been.
    pub(crate) fn done(&self) -> u64 {
        self.done.load(Ordering::Acquire)
    }

    /// Has all carried out that have been sent.
    pub(crate) fn catch_up(&self) {
        if let Some(backlog) = self.backlog.get() {
            backlog.catch_up();
        }
    }

    /// The same, and whether there are more now than `before`.
    pub(crate) fn gained(&self, before: u64) -> bool {
        self.catch_up();
        self.done() != before
    }

    /// Tries once more what fails for want of something that removed files may still have.
    pub(crate) fn insist<T>(
        &self,
        mut attempt: impl FnMut() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let before = self.done();
        match attempt() {
            Err(Errno::NOSPC | Errno::DQUOT | Errno::NOTEMPTY | Errno::MFILE | Errno::NFILE)
                if self.gained(before) =>
            {
                attempt()
            }
            result => result,
        }
    }
}
