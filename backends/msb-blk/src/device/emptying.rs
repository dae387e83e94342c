//! Discards and zeroes: the small ones of a batch together, large ones off the data path.
//!
//! A driver that trims a disk sends many neighbouring pieces at a time. To the host one long hole
//! costs hardly more than a short one.

use super::transfer::Pending;
use super::{BlkDevice, status_of};
use crate::commit::Job;
use crate::file::Emptying;
use crate::image::{Image, ImageError};
use crate::request::Range;

/// Discards and zeroes beyond this many bytes go to the commit thread.
const MAX_INLINE: u64 = 16 << 20;

/// A request that waits for the end of its batch.
pub(super) struct Emptied {
    pending: Pending,
    room: usize,
    pieces: Vec<Piece>,
}

/// A range and what is to be done with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Piece {
    how: Emptying,
    offset: u64,
    len: u64,
}

impl BlkDevice {
    /// Empties ranges: small ones at the end of the batch, large ones on the commit thread.
    pub(super) fn empty(
        &self,
        queue: u16,
        pending: Pending,
        ranges: &[Range],
        discard: bool,
        room: usize,
    ) {
        let pieces: Vec<Piece> = ranges
            .iter()
            .map(|range| Piece::of(range, discard))
            .collect();
        let total: u64 = pieces.iter().map(|piece| piece.len).sum();
        let lane = self
            .lane(queue)
            .filter(|_| total <= MAX_INLINE && self.is_writeback());
        let Some(lane) = lane else {
            let run = move |image: &Image| empty_all(image, &pieces);
            return self.commit(Job::Run(
                Box::new(run),
                !self.is_writeback(),
                (pending, room),
            ));
        };
        lane.emptied().push(Emptied {
            pending,
            room,
            pieces,
        });
    }

    /// Carries out what the batch has left to be emptied.
    pub(super) fn empty_batch(&self, queue: u16) {
        let Some(lane) = self.lane(queue) else { return };
        let batch = std::mem::take(&mut *lane.emptied());
        let pieces = batch
            .iter()
            .flat_map(|emptied| emptied.pieces.iter().copied());
        let together = empty_all(&self.image, &joined(pieces.collect()));
        for emptied in batch {
            let result = match &together {
                Ok(()) => Ok(()),
                // Which of them failed shows when each is done by itself.
                Err(_) => empty_all(&self.image, &emptied.pieces),
            };
            emptied.pending.finish(emptied.room, status_of(result));
        }
    }
}

impl Piece {
    fn of(range: &Range, discard: bool) -> Self {
        let how = match (discard, range.unmap) {
            (true, _) => Emptying::Discard,
            (false, true) => Emptying::Unmap,
            (false, false) => Emptying::Zero,
        };
        Self {
            how,
            offset: range.offset,
            len: range.len,
        }
    }
}

fn empty_all(image: &Image, pieces: &[Piece]) -> Result<(), ImageError> {
    pieces
        .iter()
        .try_for_each(|piece| image.empty(piece.offset, piece.len, piece.how))
}

/// The same bytes in as few pieces as possible.
fn joined(mut pieces: Vec<Piece>) -> Vec<Piece> {
    pieces.sort_unstable();
    let mut joined: Vec<Piece> = Vec::with_capacity(pieces.len());
    for piece in pieces {
        match joined.last_mut() {
            Some(last) if last.how == piece.how && piece.offset <= last.offset + last.len => {
                let end = (last.offset + last.len).max(piece.offset + piece.len);
                last.len = end - last.offset;
            }
            _ => joined.push(piece),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_become_one() {
        let piece = |how, offset, len| Piece { how, offset, len };
        let (discard, zero) = (Emptying::Discard, Emptying::Zero);
        let given = vec![
            piece(discard, 8, 4),
            piece(zero, 4, 4),
            piece(discard, 0, 4),
            piece(discard, 4, 4),
            piece(discard, 20, 4),
            piece(discard, 5, 2),
        ];
        assert_eq!(
            joined(given),
            [
                piece(discard, 0, 12),
                piece(discard, 20, 4),
                piece(zero, 4, 4)
            ]
        );
        assert!(joined(Vec::new()).is_empty());
    }
}
