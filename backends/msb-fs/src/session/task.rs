//! Requests that may wait for the disk, carried out beside the queue.

use msb_vhost::Segments;
use rustix::io::Errno;

use super::answer::Answer;
use crate::tree::{Caller, Tree};
use crate::wire::abi::{CopyFileRangeIn, FallocateIn, ReadIn, WriteOut};

/// One such request.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Task {
    /// A READ of which `done` bytes are in place.
    Read {
        id: u64,
        args: ReadIn,
        done: usize,
    },
    Fsync {
        id: u64,
        fh: u64,
        data_only: bool,
    },
    Fsyncdir {
        id: u64,
        fh: u64,
        data_only: bool,
    },
    Syncfs,
    Copy(u64, CopyFileRangeIn, Caller),
    Fallocate(u64, FallocateIn, Caller),
}

impl Task {
    /// Carries it out. What it reads goes to the front of `writable`.
    pub(crate) fn perform(self, tree: &Tree, writable: &mut Segments) -> Result<Answer, Errno> {
        match self {
            Self::Read { id, args, done } => {
                let size = (args.size as usize)
                    .saturating_sub(done)
                    .min(writable.len());
                let from = u64::try_from(done)
                    .ok()
                    .and_then(|done| args.offset.checked_add(done));
                let from = from.ok_or(Errno::INVAL)?;
                match tree.read(id, args.fh, (from, size), writable) {
                    Ok(more) => return Ok(Answer::Placed(done + more)),
                    Err(_) if done > 0 => return Ok(Answer::Placed(done)),
                    Err(error) => return Err(error),
                }
            }
            Self::Fsync { id, fh, data_only } => tree.fsync(id, fh, data_only)?,
            Self::Fsyncdir { id, fh, data_only } => tree.fsyncdir(id, fh, data_only)?,
            Self::Syncfs => tree.syncfs()?,
            Self::Copy(id, args, caller) => {
                let size = tree.copy(id, &args, caller)?;
                return Ok(Answer::of(&WriteOut { size, padding: 0 }));
            }
            Self::Fallocate(id, args, caller) => tree.fallocate(id, &args, caller)?,
        }
        Ok(Answer::empty())
    }
}
