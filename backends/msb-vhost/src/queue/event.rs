//! The eventfds through which a queue and its front end wake each other.

use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags};

use super::QueueError;

/// An eventfd that this side writes. It is left as it is: its flags belong to the front end too.
#[derive(Debug)]
pub(super) struct Event {
    fd: OwnedFd,
    blocks: bool,
}

impl Event {
    pub(super) fn new(fd: OwnedFd) -> Result<Self, QueueError> {
        check(&fd)?;
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(|_| QueueError::NoEventfd)?;
        let blocks = !flags.contains(OFlags::NONBLOCK);
        Ok(Self { fd, blocks })
    }

    /// Adds one to the counter. When it is full, whoever reads it is awake already.
    pub(super) fn signal(&self) {
        if self.blocks {
            let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
            if poll(&mut fds, Some(&Timespec::default())) != Ok(1) {
                return;
            }
        }
        rustix::io::write(&self.fd, &1_u64.to_ne_bytes()).ok();
    }
}

/// Whether a descriptor is an eventfd.
pub(super) fn check(fd: &OwnedFd) -> Result<(), QueueError> {
    let plain = rustix::fs::fstat(fd)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Unknown);
    // Of all files without a type only an eventfd takes eight zero bytes, and they change nothing.
    if plain && rustix::io::write(fd, &[0; 8]) == Ok(8) {
        Ok(())
    } else {
        Err(QueueError::NoEventfd)
    }
}
