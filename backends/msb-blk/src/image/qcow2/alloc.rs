//! Hands out and takes back host clusters.
//!
//! Invariant of the reserve: its clusters have a durable refcount of one, read as zeroes durably,
//! and nothing refers to them. So using one needs no ordering against anything, and a crash only
//! leaks what was in reserve. Clusters given back become free after the next sync, when nothing on
//! the disk can refer to them any more.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::header::Header;
use super::refcount::Refcounts;
use super::table::SpreadMap;
use crate::file::{Durability, Emptying, HostFile};
use crate::image::ImageError;

/// The first reserve, in bytes; it doubles each time it runs out.
const FIRST_RESERVE: u64 = 1 << 20;
const LARGEST_RESERVE: u64 = 64 << 20;
/// Clusters that have to be filled one after the other before the host is asked for blocks ahead,
/// and the most that it is asked for at a time, in bytes.
const STREAK: u64 = 16;
const LARGEST_AHEAD: u64 = 4 << 20;

/// Neighbouring host clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// Number of the first cluster.
    pub(super) first: u64,
    /// How many.
    pub(super) count: u64,
}

/// Which host clusters hold metadata, and where the file ends. A word of 64 clusters takes memory
/// only when one of them does, because a hostile table can name clusters far apart.
#[derive(Default)]
pub(super) struct Metadata {
    words: SpreadMap<u64>,
    /// End of the file in clusters.
    end: u64,
}

impl Metadata {
    pub(super) fn add(&mut self, cluster: u64) {
        *self.words.entry(cluster / 64).or_default() |= 1 << (cluster % 64);
    }

    /// Marks clusters that nothing else may be in, and that the file must hold.
    pub(super) fn claim(&mut self, run: Run) -> Result<(), ImageError> {
        if self.holds(run) && self.contains_any(run) {
            return Err(ImageError::Corrupt("two tables lie in one cluster"));
        }
        self.share(run)
    }

    /// Marks clusters that something of the same kind may be in as well.
    pub(super) fn share(&mut self, run: Run) -> Result<(), ImageError> {
        if !self.holds(run) {
            return Err(ImageError::Corrupt(
                "a table lies beyond the end of the file",
            ));
        }
        (run.first..run.first + run.count).for_each(|cluster| self.add(cluster));
        Ok(())
    }

    pub(super) fn remove(&mut self, cluster: u64) {
        if let Some(word) = self.words.get_mut(&(cluster / 64)) {
            *word &= !(1 << (cluster % 64));
        }
    }

    pub(super) fn contains(&self, cluster: u64) -> bool {
        let word = self.words.get(&(cluster / 64));
        word.is_some_and(|word| word & (1 << (cluster % 64)) != 0)
    }

    pub(super) fn contains_any(&self, run: Run) -> bool {
        let end = run.first.saturating_add(run.count);
        (run.first / 64..end.div_ceil(64)).any(|key| {
            self.words.get(&key).is_some_and(|word| {
                let low = run.first.saturating_sub(key * 64);
                let high = (end - key * 64).min(64);
                word >> low << low << (64 - high) != 0
            })
        })
    }

    /// Whether a run lies in the file; its last cluster need not be whole.
    pub(super) fn holds(&self, run: Run) -> bool {
        run.first
            .checked_add(run.count)
            .is_some_and(|last| last <= self.end)
    }
}

/// The host clusters of one image.
pub(super) struct Space {
    file: Arc<dyn HostFile>,
    refcounts: Refcounts,
    metadata: Arc<RwLock<Metadata>>,
    cluster_bits: u32,
    /// End of the file in clusters.
    end: u64,
    /// No cluster below this is free.
    hint: u64,
    reserve: VecDeque<Run>,
    reserve_target: u64,
    returned: Vec<Run>,
    /// Clusters that were taken to be filled, since one was taken for less.
    streak: u64,
    /// The clusters for which the host has handed out blocks ahead.
    ahead: Run,
}

impl Space {
    /// Reads the refcount table and marks it as metadata, with the header. An image that is only
    /// read needs neither.
    pub(super) fn load(
        file: Arc<dyn HostFile>,
        header: &Header,
        metadata: &Arc<RwLock<Metadata>>,
        read_only: bool,
    ) -> Result<Self, ImageError> {
        let bits = header.cluster_bits;
        let clusters = if read_only {
            0
        } else {
            header.reftable_clusters
        };
        let end = file.size()?.div_ceil(1 << bits);
        let mut marks = metadata.write().unwrap_or_else(PoisonError::into_inner);
        marks.end = end;
        marks.add(0);
        if !read_only {
            marks.claim(Run {
                first: header.reftable_offset >> bits,
                count: u64::from(clusters),
            })?;
        }
        let refcounts = Refcounts::load(Arc::clone(&file), header, clusters)?;
        for offset in refcounts.block_offsets() {
            if !offset.is_multiple_of(1 << bits) {
                return Err(ImageError::Corrupt("a refcount block is not aligned"));
            }
            marks.claim(Run {
                first: offset >> bits,
                count: 1,
            })?;
        }
        drop(marks);
        Ok(Self {
            file,
            refcounts,
            metadata: Arc::clone(metadata),
            cluster_bits: bits,
            end,
            hint: 0,
            reserve: VecDeque::new(),
            reserve_target: (FIRST_RESERVE >> bits).max(4),
            returned: Vec::new(),
            streak: 0,
            ahead: Run { first: 0, count: 0 },
        })
    }

    /// Takes 1 to `most` clusters out of the reserve.
    pub(super) fn take(&mut self, most: u64) -> Result<Run, ImageError> {
        if self.reserve.is_empty() {
            self.refill()?;
        }
        let front = self
            .reserve
            .front_mut()
            .ok_or(io::Error::from(io::ErrorKind::StorageFull))?;
        let run = Run {
            first: front.first,
            count: front.count.min(most),
        };
        front.first += run.count;
        front.count -= run.count;
        if front.count == 0 {
            self.reserve.pop_front();
        }
        Ok(run)
    }

    /// The same for guest data; `filled` tells whether it fills the clusters.
    ///
    /// Blocks that the host hands out in one piece make writes cheaper. They are asked for only
    /// while clusters are being filled, and no more than were filled just before: a cluster that
    /// holds little takes little of the host's disk.
    pub(super) fn take_for_data(&mut self, most: u64, filled: bool) -> Result<Run, ImageError> {
        let run = self.take(most)?;
        if !filled {
            self.streak = 0;
            return Ok(run);
        }
        self.streak += run.count;
        let is_there = self.ahead.first <= run.first
            && run.first + run.count <= self.ahead.first + self.ahead.count;
        if self.streak >= STREAK && !is_there {
            let left = match self.reserve.front() {
                Some(next) if next.first == run.first + run.count => next.count,
                _ => 0,
            };
            let most = self.streak.min(LARGEST_AHEAD >> self.cluster_bits);
            let count = run.count + left.min(most);
            self.ahead = Run { count, ..run };
            let bits = self.cluster_bits;
            self.file.hand_out(run.first << bits, count << bits);
        }
        Ok(run)
    }

    /// Takes clusters back to which the tables no longer refer.
    pub(super) fn give_back(&mut self, run: Run) {
        if let Some(last) = self.returned.last_mut()
            && last.first + last.count == run.first
        {
            last.count += run.count;
            return;
        }
        self.returned.push(run);
    }

    /// Whether a cluster is counted more than once.
    pub(super) fn is_shared(&mut self, cluster: u64) -> Result<bool, ImageError> {
        Ok(self.refcounts.get(cluster)? > 1)
    }

    /// What was given back so far; the caller syncs, then hands it to [`Space::free`].
    pub(super) fn returned(&mut self) -> Vec<Run> {
        std::mem::take(&mut self.returned)
    }

    /// Keeps runs for later whose references may still be on the disk.
    pub(super) fn keep_returned(&mut self, runs: Vec<Run>) {
        self.returned.extend(runs);
    }

    /// Lowers the refcounts of clusters to which nothing on the disk refers any more, and gives the
    /// space of those that reach zero back to the host.
    pub(super) fn free(&mut self, runs: &[Run]) -> Result<(), ImageError> {
        for run in runs {
            let mut hole = Run {
                first: run.first,
                count: 0,
            };
            for cluster in run.first..run.first + run.count {
                let count = self.refcounts.get(cluster)?;
                if count == 0 || (count == 1 && self.marks().contains(cluster)) {
                    return Err(ImageError::Corrupt(
                        "a cluster was freed that was not in use",
                    ));
                }
                self.refcounts
                    .set(cluster, 1, count - 1, Durability::Later)?;
                if count > 1 {
                    continue;
                }
                self.hint = self.hint.min(cluster);
                if hole.first + hole.count == cluster {
                    hole.count += 1;
                } else {
                    self.punch(hole);
                    hole = Run {
                        first: cluster,
                        count: 1,
                    };
                }
            }
            self.punch(hole);
        }
        Ok(())
    }

    /// Frees what is in reserve and cuts the file off after its last used cluster.
    pub(super) fn close(&mut self) -> Result<(), ImageError> {
        let runs: Vec<Run> = self.reserve.drain(..).collect();
        self.free(&runs)?;
        self.file.sync()?;
        let used = runs.iter().fold(self.end, |end, run| {
            if run.first + run.count == end {
                run.first
            } else {
                end
            }
        });
        if used < self.end {
            self.file.set_size(used << self.cluster_bits)?;
            self.ends_at(used);
        }
        Ok(())
    }

    fn marks(&self) -> RwLockReadGuard<'_, Metadata> {
        self.metadata.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn ends_at(&mut self, end: u64) {
        self.end = end;
        self.marks_mut().end = end;
    }

    fn marks_mut(&self) -> RwLockWriteGuard<'_, Metadata> {
        self.metadata
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn punch(&self, run: Run) {
        if run.count > 0 {
            let (offset, len) = (
                run.first << self.cluster_bits,
                run.count << self.cluster_bits,
            );
            // Only space is lost when the host cannot do this: reuse makes zeroes by itself.
            if let Err(error) = self.file.empty(offset, len, Emptying::Discard) {
                tracing::debug!(%error, offset, len, "could not give space back");
            }
        }
    }

    fn refill(&mut self) -> Result<(), ImageError> {
        let run = self.find_free(self.reserve_target)?;
        if self.marks().contains_any(run) {
            return Err(ImageError::Corrupt(
                "a metadata cluster has a refcount of zero",
            ));
        }
        let bits = self.cluster_bits;
        let reused = run.count.min(self.end.saturating_sub(run.first));
        if reused > 0 {
            self.file
                .empty(run.first << bits, reused << bits, Emptying::Unmap)?;
            self.file.sync()?;
        }
        let last = run.first + run.count;
        if last > self.end {
            self.file.set_size(last << bits)?;
            self.ends_at(last);
        }
        self.refcounts
            .set(run.first, run.count, 1, Durability::Now)?;
        self.hint = last;
        self.reserve.push_back(run);
        self.reserve_target = (self.reserve_target * 2).min((LARGEST_RESERVE >> bits).max(4));
        Ok(())
    }

    /// The first run of free clusters at or after the hint, at most `most` long and within one
    /// refcount block, which is made when there is none.
    fn find_free(&mut self, most: u64) -> Result<Run, ImageError> {
        let limit = (1u64 << 56) >> self.cluster_bits;
        let mut cluster = self.hint;
        while cluster < limit {
            if !self.refcounts.has_block(cluster) {
                self.add_block(cluster)?;
            }
            if self.refcounts.get(cluster)? != 0 {
                cluster += 1;
                continue;
            }
            let block_end = (cluster / self.refcounts.per_block() + 1) * self.refcounts.per_block();
            let mut run = Run {
                first: cluster,
                count: 1,
            };
            while run.count < most
                && run.first + run.count < block_end
                && self.refcounts.get(run.first + run.count)? == 0
            {
                run.count += 1;
            }
            self.hint = cluster;
            return Ok(run);
        }
        Err(io::Error::from(io::ErrorKind::StorageFull).into())
    }

    fn add_block(&mut self, cluster: u64) -> Result<(), ImageError> {
        let per_block = self.refcounts.per_block();
        if self.marks().contains(cluster / per_block * per_block) {
            return Err(ImageError::Corrupt(
                "a metadata cluster has a refcount of zero",
            ));
        }
        let change = self.refcounts.add_block(cluster, &mut self.end);
        self.ends_at(self.end);
        let change = change?;
        for offset in change.added {
            self.marks_mut().add(offset >> self.cluster_bits);
        }
        if let Some((offset, count)) = change.dropped {
            let run = Run {
                first: offset >> self.cluster_bits,
                count,
            };
            (run.first..run.first + run.count).for_each(|c| self.marks_mut().remove(c));
            self.give_back(run);
        }
        Ok(())
    }
}
