//! The L1 table and a cache of L2 table slices; readers of a cached slice share one read lock.
//!
//! Invariant: an entry changes on the file first and in the cache second, both under a lock of its
//! shard, while a slice is loaded under the write lock. So a loaded slice never misses a change, and
//! whoever sees an entry in memory finds it in the file as well. An entry of two words changes in
//! the cache under the write lock, so that nobody sees half of it.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::entry::{Entry, OFFSET};
use crate::file::{Durability, HostFile};
use crate::image::ImageError;

/// Bytes of an L2 table kept together: 32 MiB of disk with clusters of 64 KiB.
const SLICE_BYTES: u64 = 4096;
/// Bytes of a table in memory while it is read.
const WORDS_AT_A_TIME: u64 = 256 << 10;
const SHARDS: u64 = 16;
/// Most slices per shard: 128 MiB in all, the tables of 1 TiB with clusters of 64 KiB.
const SLICES_PER_SHARD: usize = 2048;

/// Entries up to which the L1 table can grow while the image is open: 4 TiB with clusters of 64 KiB.
const LARGEST_GROWTH: usize = 8192;

/// Slice numbers are dense, so one multiplication spreads them well enough.
#[derive(Default)]
pub(super) struct SpreadHasher(u64);

impl Hasher for SpreadHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0 ^ value)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29);
    }
}

pub(super) type SpreadMap<V> = HashMap<u64, V, BuildHasherDefault<SpreadHasher>>;

struct Slice {
    words: Box<[AtomicU64]>,
    used: AtomicBool,
}

/// The active mapping of an image.
pub(super) struct Tables {
    file: Arc<dyn HostFile>,
    /// With room for what the clusters of the table can hold.
    l1: Vec<AtomicU64>,
    l1_len: AtomicU64,
    l1_offset: u64,
    l2_entries: u64,
    entry_len: u64,
    slice_entries: u64,
    shards: Vec<RwLock<SpreadMap<Slice>>>,
}

impl Tables {
    /// Reads the L1 table; `l2_entries` of `entry_len` bytes each make an L2 table.
    pub(super) fn load(
        file: Arc<dyn HostFile>,
        l1_offset: u64,
        l1_entries: u32,
        l2_entries: u64,
        entry_len: u64,
    ) -> io::Result<Self> {
        let l1 = read_words(file.as_ref(), l1_offset, u64::from(l1_entries))?;
        let slice_entries = (SLICE_BYTES / entry_len).min(l2_entries);
        let room = LARGEST_GROWTH.saturating_sub(l1.len());
        Ok(Self {
            file,
            l1_len: AtomicU64::new(l1.len() as u64),
            l1: l1
                .into_iter()
                .chain(std::iter::repeat_n(0, room))
                .map(AtomicU64::new)
                .collect(),
            l1_offset,
            l2_entries,
            entry_len,
            slice_entries,
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
        })
    }

    /// Number of L1 entries.
    pub(super) fn l1_len(&self) -> u64 {
        self.l1_len.load(Ordering::Acquire)
    }

    /// The L1 entry with this index; 0 beyond the table.
    pub(super) fn l1(&self, index: u64) -> u64 {
        let entry = usize::try_from(index)
            .ok()
            .and_then(|index| self.l1.get(index));
        entry.map_or(0, |entry| entry.load(Ordering::Acquire))
    }

    /// Makes the table at least `entries` long, within the clusters it has.
    pub(super) fn lengthen(&self, entries: u64, cluster_size: u64) -> Result<(), ImageError> {
        let before = self.l1_len();
        if entries <= before {
            return Ok(());
        }
        let end = self.l1_offset + entries * 8;
        let room = (self.l1_offset + before.max(1) * 8).next_multiple_of(cluster_size);
        let (true, Ok(count)) = (
            end <= room && entries <= self.l1.len() as u64,
            u32::try_from(entries),
        ) else {
            return Err(ImageError::TooLarge);
        };
        let new = vec![0; usize::try_from((entries - before) * 8).unwrap_or(0)];
        let place = self.l1_offset + before * 8;
        self.file.write_at(&new, place, Durability::Now)?;
        self.file
            .write_at(&count.to_be_bytes(), 36, Durability::Now)?;
        self.l1_len.store(entries, Ordering::Release);
        Ok(())
    }

    /// Changes an L1 entry in the file and in memory.
    pub(super) fn set_l1(&self, index: u64, value: u64, durability: Durability) -> io::Result<()> {
        let entry = usize::try_from(index)
            .ok()
            .and_then(|index| self.l1.get(index));
        let entry = entry.ok_or(io::ErrorKind::InvalidInput)?;
        self.file
            .write_at(&value.to_be_bytes(), self.l1_offset + index * 8, durability)?;
        entry.store(value, Ordering::Release);
        Ok(())
    }

    /// The L2 entry of a guest cluster; all zero when it has no L2 table.
    pub(super) fn entry(&self, cluster: u64) -> Result<Entry, ImageError> {
        let table = self.l1(cluster / self.l2_entries) & OFFSET;
        if table == 0 {
            return Ok(Entry::default());
        }
        let (key, at) = (cluster / self.slice_entries, cluster % self.slice_entries);
        let shard = self.with_slice(table, key)?;
        let slice = shard
            .get(&key)
            .ok_or(ImageError::Corrupt("an L2 slice is missing"))?;
        slice.used.store(true, Ordering::Relaxed);
        Ok(slice.get(at, self.entry_len == 16))
    }

    /// Changes the L2 entry of a guest cluster, whose L2 table must exist and belong to this image
    /// alone.
    pub(super) fn set_entry(&self, cluster: u64, entry: Entry) -> Result<(), ImageError> {
        let table = self.l1(cluster / self.l2_entries) & OFFSET;
        if table == 0 {
            return Err(ImageError::Corrupt("an L2 table is missing"));
        }
        let (key, at) = (cluster / self.slice_entries, cluster % self.slice_entries);
        let shard = self.with_slice(table, key)?;
        let slice = shard
            .get(&key)
            .ok_or(ImageError::Corrupt("an L2 slice is missing"))?;
        let place = table + cluster % self.l2_entries * self.entry_len;
        if self.entry_len == 16 {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&entry.word.to_be_bytes());
            bytes[8..].copy_from_slice(&entry.bitmap.to_be_bytes());
            self.file.write_at(&bytes, place, Durability::Later)?;
            drop(shard);
            // Had the slice gone meanwhile, its next reader would load what was just written.
            let shard = self
                .shard(key)?
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            if let Some(slice) = shard.get(&key) {
                slice.set(at, entry, true);
            }
            return Ok(());
        }
        self.file
            .write_at(&entry.word.to_be_bytes(), place, Durability::Later)?;
        slice.set(at, entry, false);
        Ok(())
    }

    fn shard(&self, key: u64) -> Result<&RwLock<SpreadMap<Slice>>, ImageError> {
        let shard = usize::try_from(key % SHARDS)
            .ok()
            .and_then(|index| self.shards.get(index));
        shard.ok_or(ImageError::Corrupt("no such shard"))
    }

    /// The shard of slice `key`, locked for reading and with that slice in it.
    fn with_slice(
        &self,
        table: u64,
        key: u64,
    ) -> Result<RwLockReadGuard<'_, SpreadMap<Slice>>, ImageError> {
        let shard = self.shard(key)?;
        loop {
            let guard = shard.read().unwrap_or_else(PoisonError::into_inner);
            if guard.contains_key(&key) {
                return Ok(guard);
            }
            drop(guard);
            let mut guard = shard.write().unwrap_or_else(PoisonError::into_inner);
            if !guard.contains_key(&key) {
                if guard.len() >= SLICES_PER_SHARD {
                    evict(&mut guard);
                }
                let first = key * self.slice_entries % self.l2_entries;
                let words = self.slice_entries * self.entry_len / 8;
                let place = table + first * self.entry_len;
                let words = read_words(self.file.as_ref(), place, words)?;
                let words = words.into_iter().map(AtomicU64::new).collect();
                guard.insert(
                    key,
                    Slice {
                        words,
                        used: AtomicBool::new(true),
                    },
                );
            }
        }
    }
}

impl Slice {
    fn get(&self, at: u64, extended: bool) -> Entry {
        let word = |index: u64| {
            let word = usize::try_from(index)
                .ok()
                .and_then(|index| self.words.get(index));
            word.map_or(0, |word| word.load(Ordering::Acquire))
        };
        if extended {
            let bitmap = word(at * 2 + 1);
            Entry {
                word: word(at * 2),
                bitmap,
            }
        } else {
            Entry {
                word: word(at),
                bitmap: 0,
            }
        }
    }

    fn set(&self, at: u64, entry: Entry, extended: bool) {
        let store = |index: u64, value| {
            if let Some(word) = usize::try_from(index)
                .ok()
                .and_then(|index| self.words.get(index))
            {
                word.store(value, Ordering::Release);
            }
        };
        if extended {
            store(at * 2, entry.word);
            store(at * 2 + 1, entry.bitmap);
        } else {
            store(at, entry.word);
        }
    }
}

/// Second chance: drops the first slice that was not used since it was last looked at.
fn evict(shard: &mut RwLockWriteGuard<'_, SpreadMap<Slice>>) {
    let unused = shard
        .iter()
        .find(|(_, slice)| !slice.used.swap(false, Ordering::Relaxed));
    let victim = unused.or_else(|| shard.iter().next()).map(|(&key, _)| key);
    if let Some(key) = victim {
        shard.remove(&key);
    }
}

/// Reads `count` big-endian words at `offset`.
pub(super) fn read_words(file: &dyn HostFile, offset: u64, count: u64) -> io::Result<Vec<u64>> {
    let len = usize::try_from(count).map_err(|_| io::ErrorKind::OutOfMemory)?;
    let mut words = Vec::with_capacity(len);
    for_each_word(file, offset, count, |word| words.push(word))?;
    Ok(words)
}

/// Reads `count` big-endian words at `offset` and keeps none of them.
pub(super) fn for_each_word(
    file: &dyn HostFile,
    mut offset: u64,
    count: u64,
    mut act: impl FnMut(u64),
) -> io::Result<()> {
    let mut left = count * 8;
    let mut bytes = vec![0; usize::try_from(left.min(WORDS_AT_A_TIME)).unwrap_or(0)];
    while left > 0 {
        let step = left.min(WORDS_AT_A_TIME);
        let piece = bytes
            .get_mut(..usize::try_from(step).unwrap_or(0))
            .unwrap_or_default();
        file.read_at(piece, offset)?;
        for word in piece.chunks_exact(8) {
            act(word.try_into().map_or(0, u64::from_be_bytes));
        }
        offset = offset.saturating_add(step);
        left -= step;
    }
    Ok(())
}
