//! Hands out and takes back host clusters.
//!
//! Invariant of the reserve: its clusters have a durable refcount of one, read as zeroes durably,
//! and nothing refers to them. So using one needs no ordering against anything, and a crash only
//! leaks what was in reserve. Clusters given back become free after the next sync, when nothing on
//! the disk can refer to them any more.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::header::Header;
use super::refcount::Refcounts;
use crate::file::{Durability, Emptying, HostFile};
use crate::image::ImageError;

/// The first reserve, in bytes; it doubles each time it runs out.
const FIRST_RESERVE: u64 = 1 << 20;
const LARGEST_RESERVE: u64 = 64 << 20;

/// Neighbouring host clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// Number of the first cluster.
    pub(super) first: u64,
    /// How many.
    pub(super) count: u64,
}

/// Which host clusters hold metadata.
#[derive(Default)]
pub(super) struct Metadata {
    chunks: HashMap<u64, [u64; 64]>,
}

impl Metadata {
    fn place(cluster: u64) -> (u64, usize, u64) {
        let word = usize::try_from(cluster / 64 % 64).unwrap_or(0);
        (cluster / 4096, word, 1 << (cluster % 64))
    }

    pub(super) fn add(&mut self, cluster: u64) {
        let (chunk, word, bit) = Self::place(cluster);
        if let Some(word) = self.chunks.entry(chunk).or_insert([0; 64]).get_mut(word) {
            *word |= bit;
        }
    }

    pub(super) fn remove(&mut self, cluster: u64) {
        let (chunk, word, bit) = Self::place(cluster);
        if let Some(word) = self
            .chunks
            .get_mut(&chunk)
            .and_then(|chunk| chunk.get_mut(word))
        {
            *word &= !bit;
        }
    }

    pub(super) fn contains(&self, cluster: u64) -> bool {
        let (chunk, word, bit) = Self::place(cluster);
        let word = self.chunks.get(&chunk).and_then(|chunk| chunk.get(word));
        word.is_some_and(|word| word & bit != 0)
    }

    pub(super) fn contains_any(&self, run: Run) -> bool {
        (run.first..run.first.saturating_add(run.count)).any(|cluster| self.contains(cluster))
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
}

impl Space {
    /// Reads the refcount table and marks it as metadata, with the header.
    pub(super) fn load(
        file: Arc<dyn HostFile>,
        header: &Header,
        metadata: &Arc<RwLock<Metadata>>,
    ) -> Result<Self, ImageError> {
        let bits = header.cluster_bits;
        let refcounts = Refcounts::load(Arc::clone(&file), header)?;
        let mut marks = metadata.write().unwrap_or_else(PoisonError::into_inner);
        marks.add(0);
        let first = header.reftable_offset >> bits;
        (first..first + u64::from(header.reftable_clusters)).for_each(|c| marks.add(c));
        for offset in refcounts.block_offsets() {
            if !offset.is_multiple_of(1 << bits) {
                return Err(ImageError::Corrupt("a refcount block is not aligned"));
            }
            marks.add(offset >> bits);
        }
        drop(marks);
        let end = file.size()?.div_ceil(1 << bits);
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
            self.end = used;
        }
        Ok(())
    }

    fn marks(&self) -> RwLockReadGuard<'_, Metadata> {
        self.metadata.read().unwrap_or_else(PoisonError::into_inner)
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
            self.end = last;
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
        let change = self.refcounts.add_block(cluster, &mut self.end)?;
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
