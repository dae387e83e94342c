//! A sparse VMDK extent: grains found through a directory of grain tables.
//!
//! Like in qcow2, new grains come from a reserve at the end of the file whose size is durable and
//! whose bytes are zero, so that an entry may reach the disk before its data. A crash leaves at
//! most a longer file behind.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use flate2::{Decompress, FlushDecompress};
use msb_vhost::Segments;

use super::header::SparseHeader;
use crate::file::{Durability, Emptying, HostFile};
use crate::image::{ImageError, len_of};

const FIRST_RESERVE: u64 = 1 << 20;
const LARGEST_RESERVE: u64 = 64 << 20;
/// Grain tables kept at most, 2 KiB each.
const MAX_TABLES: usize = 32768;
const GROUP_LOCKS: u64 = 64;

/// What lies at a byte of an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Grain {
    /// The parent decides.
    Unallocated,
    /// Zeroes.
    Zero,
    /// Data at this host offset.
    Data(u64),
    /// Deflated data at this host offset.
    Packed(u64),
}

struct Space {
    /// Where the next reserve begins, in bytes.
    end: u64,
    reserve: u64,
    reserve_end: u64,
    target: u64,
}

/// Grain tables by number.
type Tables = HashMap<u64, Box<[AtomicU32]>>;

/// One sparse extent.
pub(super) struct Sparse {
    file: Arc<dyn HostFile>,
    header: SparseHeader,
    directory: Vec<AtomicU32>,
    redundant: Vec<AtomicU32>,
    tables: RwLock<Tables>,
    /// Sectors of grain tables that lie among the grains, with their length.
    late_tables: RwLock<Vec<(u64, u64)>>,
    space: Mutex<Space>,
    groups: Vec<Mutex<()>>,
}

impl Sparse {
    /// Reads the grain directories, and refuses to write where they contradict each other.
    pub(super) fn open(
        file: Arc<dyn HostFile>,
        header: SparseHeader,
        read_only: bool,
    ) -> Result<Self, ImageError> {
        let directory = read_entries(file.as_ref(), header.directory * 512, header.tables())?;
        let redundant = match header.redundant {
            Some(sector) => read_entries(file.as_ref(), sector * 512, header.tables())?,
            None => Vec::new(),
        };
        let table_sectors = (header.table_entries * 4).div_ceil(512);
        let mut late_tables = Vec::new();
        for entry in directory.iter().chain(&redundant) {
            let sector = u64::from(entry.load(Ordering::Relaxed));
            if sector != 0 && sector + table_sectors > header.overhead {
                late_tables.push((sector, table_sectors));
            }
        }
        let size = file.size()?;
        if !read_only {
            let tables = directory.iter().chain(&redundant);
            check_metadata(
                &header,
                size,
                tables.map(|entry| entry.load(Ordering::Relaxed)),
            )?;
        }
        let end = size
            .max(header.overhead * 512)
            .next_multiple_of(header.grain_bytes());
        let groups = (0..GROUP_LOCKS).map(|_| Mutex::new(())).collect();
        let space = Space {
            end,
            reserve: end,
            reserve_end: end,
            target: FIRST_RESERVE,
        };
        Ok(Self {
            file,
            header,
            directory,
            redundant,
            tables: RwLock::default(),
            late_tables: RwLock::new(late_tables),
            space: Mutex::new(space),
            groups,
        })
    }

    /// Size of a grain in bytes.
    pub(super) fn grain_bytes(&self) -> u64 {
        self.header.grain_bytes()
    }

    /// Whether new grains can be made.
    pub(super) fn is_packed(&self) -> bool {
        self.header.compressed
    }

    /// The file grains lie in.
    pub(super) fn file(&self) -> &dyn HostFile {
        self.file.as_ref()
    }

    /// What lies at `offset` and how far that goes, at most `len`.
    pub(super) fn locate(&self, offset: u64, len: u64) -> Result<(Grain, u64), ImageError> {
        let first = self.grain_at(offset)?;
        let grain_bytes = self.grain_bytes();
        let mut found = (grain_bytes - offset % grain_bytes).min(len);
        while found < len {
            let follows = match (first, self.grain_at(offset + found)?) {
                (Grain::Data(at), Grain::Data(next)) => next == at + found,
                (Grain::Packed(_), _) => false,
                (first, next) => first == next,
            };
            if !follows {
                break;
            }
            found += grain_bytes.min(len - found);
        }
        Ok((first, found))
    }

    fn grain_at(&self, offset: u64) -> Result<Grain, ImageError> {
        let entry = u64::from(self.entry(offset / self.grain_bytes())?);
        let within = offset % self.grain_bytes();
        Ok(match entry {
            0 => Grain::Unallocated,
            1 if self.header.zero_grains => Grain::Zero,
            sector if self.header.compressed => Grain::Packed(sector * 512),
            sector => Grain::Data(sector * 512 + within),
        })
    }

    fn entry(&self, grain: u64) -> Result<u32, ImageError> {
        let (table, index) = (
            grain / self.header.table_entries,
            grain % self.header.table_entries,
        );
        if sector_of(&self.directory, table) == 0 {
            return Ok(0);
        }
        let tables = self.with_table(table)?;
        let entry = tables.get(&table).zip(usize::try_from(index).ok());
        let entry = entry.and_then(|(entries, index)| entries.get(index));
        Ok(entry.map_or(0, |entry| entry.load(Ordering::Acquire)))
    }

    fn set_entry(&self, grain: u64, sector: u32) -> Result<(), ImageError> {
        let (table, index) = (
            grain / self.header.table_entries,
            grain % self.header.table_entries,
        );
        let tables = self.with_table(table)?;
        for directory in [&self.redundant, &self.directory] {
            let place = sector_of(directory, table);
            if place != 0 {
                let at = place * 512 + index * 4;
                self.file
                    .write_at(&sector.to_le_bytes(), at, Durability::Later)?;
            }
        }
        let entry = tables.get(&table).zip(usize::try_from(index).ok());
        if let Some(entry) = entry.and_then(|(entries, index)| entries.get(index)) {
            entry.store(sector, Ordering::Release);
        }
        Ok(())
    }

    fn with_table(&self, table: u64) -> Result<RwLockReadGuard<'_, Tables>, ImageError> {
        loop {
            let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
            if tables.contains_key(&table) {
                return Ok(tables);
            }
            drop(tables);
            let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
            if tables.len() >= MAX_TABLES {
                tables.clear();
            }
            let sector = sector_of(&self.directory, table);
            if sector == 0 {
                return Err(ImageError::Corrupt("a grain table is missing"));
            }
            let entries =
                read_entries(self.file.as_ref(), sector * 512, self.header.table_entries)?;
            tables.insert(table, entries.into());
        }
    }

    /// Inflates the grain at host offset `at` into a buffer of the grain size.
    pub(super) fn unpack(&self, at: u64) -> Result<Vec<u8>, ImageError> {
        let grain_bytes = len_of(self.grain_bytes());
        let most = grain_bytes * 2 + 512;
        let (start, len) = if self.header.markers {
            let mut marker = [0; 12];
            self.file.read_at(&mut marker, at)?;
            let [.., a, b, c, d] = marker;
            (
                at + 12,
                usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX),
            )
        } else {
            (at, most)
        };
        if len == 0 || len > most {
            return Err(ImageError::Corrupt(
                "a packed grain has an impossible length",
            ));
        }
        let mut packed = vec![0; len];
        self.file.read_at(&mut packed, start)?;
        let mut grain = vec![0; grain_bytes];
        let mut deflate = Decompress::new(true);
        let status = deflate.decompress(&packed, &mut grain, FlushDecompress::Finish);
        // The last grain of a disk may be short; the rest of it is beyond the end.
        if status.is_err() || deflate.total_out() == 0 {
            return Err(ImageError::Corrupt("a packed grain does not inflate"));
        }
        Ok(grain)
    }

    /// Locks the mapping of the grain at `offset` against other writers.
    pub(super) fn lock(&self, offset: u64) -> Result<MutexGuard<'_, ()>, ImageError> {
        let group = offset / self.grain_bytes() % GROUP_LOCKS;
        let lock = usize::try_from(group)
            .ok()
            .and_then(|group| self.groups.get(group));
        let lock = lock.ok_or(ImageError::Corrupt("no such group"))?;
        Ok(lock.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Writes in place, refusing to touch metadata.
    pub(super) fn write_data(
        &self,
        from: &mut Segments,
        at: u64,
        len: u64,
    ) -> Result<(), ImageError> {
        self.check_data(at, len)?;
        Ok(self
            .file
            .write_from(from, len_of(len), at, Durability::Later)?)
    }

    /// Empties grains in place.
    pub(super) fn empty_data(&self, at: u64, len: u64, how: Emptying) -> Result<(), ImageError> {
        self.check_data(at, len)?;
        Ok(self.file.empty(at, len, how)?)
    }

    /// Makes the grain at `offset`, which was zero, and writes part of it.
    pub(super) fn write_fresh(
        &self,
        from: &mut Segments,
        offset: u64,
        len: u64,
    ) -> Result<(), ImageError> {
        self.ensure_table(offset)?;
        let at = self.take(self.grain_bytes())?;
        let within = offset % self.grain_bytes();
        self.file
            .write_from(from, len_of(len), at + within, Durability::Later)?;
        self.set_entry(offset / self.grain_bytes(), sector(at)?)
    }

    /// Makes the grain at `offset` with new contents that replace others: durable first.
    pub(super) fn write_over(&self, bytes: &[u8], offset: u64) -> Result<(), ImageError> {
        self.ensure_table(offset)?;
        let at = self.take(self.grain_bytes())?;
        self.file.write_at(bytes, at, Durability::Now)?;
        self.set_entry(offset / self.grain_bytes(), sector(at)?)
    }

    /// Makes the unallocated grain at `offset` read as zero; `false` if the format cannot.
    pub(super) fn mark_zero(&self, offset: u64) -> Result<bool, ImageError> {
        if !self.header.zero_grains {
            return Ok(false);
        }
        self.ensure_table(offset)?;
        self.set_entry(offset / self.grain_bytes(), 1)?;
        Ok(true)
    }

    /// Puts everything written so far on stable storage.
    pub(super) fn flush(&self) -> Result<(), ImageError> {
        Ok(self.file.sync()?)
    }

    /// Cuts off what was in reserve.
    pub(super) fn close(&self) -> Result<(), ImageError> {
        self.flush()?;
        let mut space = self.lock_space();
        if space.reserve < space.reserve_end && space.reserve_end == space.end {
            self.file.set_size(space.reserve)?;
            space.end = space.reserve;
            space.reserve_end = space.reserve;
        }
        Ok(())
    }

    fn check_data(&self, at: u64, len: u64) -> Result<(), ImageError> {
        let (first, last) = (at / 512, (at + len).div_ceil(512));
        let late = self
            .late_tables
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let hits = late
            .iter()
            .any(|&(sector, len)| first < sector + len && sector < last);
        let end = self.lock_space().end;
        if first < self.header.overhead || hits || at + len > end {
            return Err(ImageError::Corrupt(
                "a grain overlaps metadata or leaves the file",
            ));
        }
        Ok(())
    }

    /// Makes the grain table for `offset` if there is none.
    fn ensure_table(&self, offset: u64) -> Result<(), ImageError> {
        let table = offset / self.grain_bytes() / self.header.table_entries;
        if sector_of(&self.directory, table) != 0 {
            return Ok(());
        }
        let mut late = self
            .late_tables
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if sector_of(&self.directory, table) != 0 {
            return Ok(());
        }
        let len = (self.header.table_entries * 4).next_multiple_of(self.grain_bytes());
        let places = [
            (self.header.redundant.unwrap_or(0), &self.redundant),
            (self.header.directory, &self.directory),
        ];
        for (directory, entries) in places {
            let entry = usize::try_from(table)
                .ok()
                .and_then(|table| entries.get(table));
            let Some(entry) = entry.filter(|_| directory != 0) else {
                continue;
            };
            let at = self.take(len)?;
            let new = sector(at)?;
            self.file.write_at(
                &new.to_le_bytes(),
                directory * 512 + table * 4,
                Durability::Later,
            )?;
            late.push((u64::from(new), len / 512));
            entry.store(new, Ordering::Release);
        }
        Ok(())
    }

    /// Takes `len` zero bytes, a multiple of the grain size, out of the reserve.
    fn take(&self, len: u64) -> Result<u64, ImageError> {
        let mut space = self.lock_space();
        if space.reserve + len > space.reserve_end {
            let more = space.target.next_multiple_of(self.grain_bytes()).max(len);
            let end = space.end + more;
            sector(end)?;
            self.file.set_size(end)?;
            self.file.sync()?;
            if space.reserve_end != space.end {
                space.reserve = space.end;
            }
            space.end = end;
            space.reserve_end = end;
            space.target = (space.target * 2).min(LARGEST_RESERVE);
        }
        let at = space.reserve;
        space.reserve += len;
        Ok(at)
    }

    fn lock_space(&self) -> MutexGuard<'_, Space> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fails unless header, descriptor, directories and grain tables lie in the file, each for itself.
fn check_metadata(
    header: &SparseHeader,
    size: u64,
    tables: impl Iterator<Item = u32>,
) -> Result<(), ImageError> {
    let directory_len = (header.tables() * 4).div_ceil(512);
    let table_len = (header.table_entries * 4).div_ceil(512);
    let descriptor_len = if header.descriptor == 0 {
        0
    } else {
        header.descriptor_len
    };
    let mut places = vec![
        (0, 1),
        (header.descriptor, descriptor_len),
        (header.directory, directory_len),
    ];
    places.extend(header.redundant.map(|redundant| (redundant, directory_len)));
    for sector in tables.filter(|&sector| sector != 0) {
        // Of more tables than the file has sectors some must overlap.
        if places.len() as u64 > size / 512 {
            break;
        }
        places.push((u64::from(sector), table_len));
    }
    places.sort_unstable();
    let mut taken = 0;
    for (first, len) in places {
        if len == 0 {
            continue;
        }
        if first < taken {
            return Err(ImageError::Corrupt("two tables of an extent overlap"));
        }
        taken = first + len;
    }
    if taken * 512 > size.next_multiple_of(512) {
        return Err(ImageError::Corrupt(
            "a table lies beyond the end of the extent",
        ));
    }
    Ok(())
}

/// The directory entry of a grain table, 0 for none.
fn sector_of(directory: &[AtomicU32], table: u64) -> u64 {
    let entry = usize::try_from(table)
        .ok()
        .and_then(|table| directory.get(table));
    entry.map_or(0, |entry| u64::from(entry.load(Ordering::Acquire)))
}

/// A byte offset as the sector number an entry can hold; beyond 2 TiB there is no room.
fn sector(offset: u64) -> Result<u32, ImageError> {
    u32::try_from(offset / 512).map_err(|_| io::Error::from(io::ErrorKind::StorageFull).into())
}

fn read_entries(file: &dyn HostFile, offset: u64, count: u64) -> io::Result<Vec<AtomicU32>> {
    let len = usize::try_from(count * 4).map_err(|_| io::ErrorKind::OutOfMemory)?;
    let mut bytes = vec![0; len];
    file.read_at(&mut bytes, offset)?;
    let words = bytes.chunks_exact(4);
    Ok(words
        .map(|w| AtomicU32::new(w.try_into().map_or(0, u32::from_le_bytes)))
        .collect())
}
