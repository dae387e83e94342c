//! qcow2: maps guest clusters to host clusters through two levels of tables.
//!
//! Order of writes, the whole of crash safety:
//! 1. A cluster comes from the reserve ([`alloc`]): counted durably, zero, referred to by nobody.
//! 2. Data is written there. If what the guest read there before was not zero, the write is durable
//!    before step 3, so that a crash leaves either the old or the new bytes.
//! 3. The L2 entry is written; from now on the page cache holds everything, and the death of the
//!    process alone loses nothing.
//! 4. A flush is one fdatasync. Clusters given back before it become free after it.

mod alloc;
mod compressed;
mod entry;
mod grow;
mod header;
mod refcount;
mod snapshot;
mod table;
mod write;

pub use header::{Compression, Header, HeaderError, MAX_HEADER};

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use self::alloc::{Metadata, Run, Space};
use self::entry::{COPIED, Entry, Mapping, OFFSET, SUBCLUSTERS, packed};
use self::snapshot::Table;
use self::table::Tables;
use super::gate::Gate;
use super::{Extent, Image, ImageError, InPlace, Place};
use crate::file::{Durability, HostFile};

/// Clusters that share an allocation lock, and the number of locks.
const GROUP: u64 = 16;
const GROUP_LOCKS: u64 = 64;
/// Inflated clusters kept, for readers that come in smaller steps.
const INFLATED: usize = 8;

/// An open qcow2 image.
pub struct Qcow2 {
    header: Header,
    /// Size of the disk; that in `header` is the one it was opened with.
    size: AtomicU64,
    file: Arc<dyn HostFile>,
    /// Where guest data lies: the image itself or its external data file.
    data: Arc<dyn HostFile>,
    backing: Option<Arc<Image>>,
    read_only: bool,
    tables: Tables,
    metadata: Arc<RwLock<Metadata>>,
    space: Mutex<Space>,
    /// Serialises changes of the L1 table.
    l1_lock: Mutex<()>,
    /// Serialises changes of the mapping of a group of clusters.
    groups: Vec<Mutex<()>>,
    gate: Arc<Gate>,
    inflated: Mutex<VecDeque<(u64, Arc<Vec<u8>>)>>,
    corrupt: AtomicBool,
}

impl Qcow2 {
    /// Opens an image whose header was parsed and whose references were opened.
    ///
    /// # Errors
    ///
    /// [`ImageError`] when its tables cannot be read or contradict each other.
    pub fn open(
        header: Header,
        file: Arc<dyn HostFile>,
        data: Option<Arc<dyn HostFile>>,
        backing: Option<Arc<Image>>,
        read_only: bool,
    ) -> Result<Self, ImageError> {
        let metadata = Arc::new(RwLock::new(Metadata::default()));
        let tables = Tables::load(
            Arc::clone(&file),
            header.l1_offset,
            header.l1_entries,
            header.l2_entries(),
            header.l2_entry_len(),
        )?;
        let space = Space::load(Arc::clone(&file), &header, &metadata, read_only)?;
        let image = Self {
            data: data.unwrap_or_else(|| Arc::clone(&file)),
            file,
            backing,
            read_only,
            tables,
            metadata,
            space: Mutex::new(space),
            l1_lock: Mutex::new(()),
            groups: (0..GROUP_LOCKS).map(|_| Mutex::new(())).collect(),
            gate: Arc::default(),
            inflated: Mutex::default(),
            corrupt: AtomicBool::new(header.corrupt),
            size: AtomicU64::new(header.size),
            header,
        };
        image.mark_tables()?;
        if !read_only {
            image.take_over()?;
        }
        Ok(image)
    }

    /// Marks the L1 and L2 tables, of the active state and of the snapshots, as metadata.
    fn mark_tables(&self) -> Result<(), ImageError> {
        let bits = self.header.cluster_bits;
        let aligned = |entry: u64| (entry & OFFSET).is_multiple_of(1 << bits);
        if (0..self.tables.l1_len()).any(|index| !aligned(self.tables.l1(index))) {
            return Err(ImageError::Corrupt("an L2 table is not aligned"));
        }
        if self.read_only {
            return Ok(());
        }
        let mut marks = self
            .metadata
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let run = |offset: u64, len: u64| Run {
            first: offset >> bits,
            count: offset.saturating_add(len).div_ceil(1 << bits) - (offset >> bits),
        };
        marks.claim(run(
            self.header.l1_offset,
            u64::from(self.header.l1_entries) * 8,
        ))?;
        for index in 0..self.tables.l1_len() {
            let table = self.tables.l1(index) & OFFSET;
            if table != 0 {
                marks.claim(run(table, 1))?;
            }
        }
        snapshot::tables(
            self.file.as_ref(),
            &self.header,
            |table, offset, len| match table {
                Table::Own => marks.claim(run(offset, len)),
                Table::MayBeShared => marks.share(run(offset, len)),
            },
        )
    }

    /// Clears what only a program that knows it may keep: the autoclear bits.
    fn take_over(&self) -> Result<(), ImageError> {
        let kept = self.header.autoclear & header::RAW_DATA_FILE;
        if kept != self.header.autoclear {
            self.file
                .write_at(&kept.to_be_bytes(), 88, Durability::Now)?;
        }
        Ok(())
    }

    /// Size of the disk, rounded up to whole sectors.
    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire).saturating_add(511) & !511
    }

    pub(super) fn cluster_size(&self) -> u64 {
        self.header.cluster_size()
    }

    pub(super) fn locate(&self, offset: u64, len: u64) -> Result<Extent<'_>, ImageError> {
        self.note_corruption(self.locate_inside(offset, len))
    }

    fn locate_inside(&self, offset: u64, len: u64) -> Result<Extent<'_>, ImageError> {
        let (mapping, host, mut found) = self.lookup(offset, len)?;
        match mapping {
            Mapping::Data => {
                while found < len {
                    let (mapping, next, more) = self.lookup(offset + found, len - found)?;
                    if mapping != Mapping::Data || next != host + found {
                        break;
                    }
                    found += more;
                }
                Ok(Extent {
                    place: Place::File(self.data.as_ref(), host),
                    len: found,
                })
            }
            Mapping::Packed => Ok(Extent {
                place: Place::Packed,
                len: found,
            }),
            Mapping::Zero => Ok(Extent {
                place: Place::Zero,
                len: found,
            }),
            Mapping::Unallocated => self.locate_below(offset, found),
        }
    }

    fn locate_below(&self, offset: u64, len: u64) -> Result<Extent<'_>, ImageError> {
        let Some(backing) = &self.backing else {
            return Ok(Extent {
                place: Place::Zero,
                len,
            });
        };
        let left = backing.size().saturating_sub(offset).min(len);
        if left == 0 {
            return Ok(Extent {
                place: Place::Zero,
                len,
            });
        }
        backing.locate(offset, left)
    }

    /// What lies at `offset`, where on the host, and how far that goes within its cluster or, when
    /// subclusters differ, its subcluster.
    fn lookup(&self, offset: u64, len: u64) -> Result<(Mapping, u64, u64), ImageError> {
        let entry = self.tables.entry(offset >> self.header.cluster_bits)?;
        self.lookup_in(entry, offset, len)
    }

    /// The same, with the entry of the cluster at `offset`.
    fn lookup_in(
        &self,
        entry: Entry,
        offset: u64,
        len: u64,
    ) -> Result<(Mapping, u64, u64), ImageError> {
        let cluster_size = self.cluster_size();
        let within = offset & (cluster_size - 1);
        let (mapping, unit) = self
            .mapping_at(entry, within)
            .ok_or(ImageError::Corrupt("an L2 bitmap is invalid"))?;
        let host = entry.host();
        if mapping == Mapping::Data && host & (cluster_size - 1) != 0 {
            return Err(ImageError::Corrupt("a data cluster is not aligned"));
        }
        let left = unit - within % unit;
        Ok((mapping, host + within, left.min(len)))
    }

    /// What an entry means at a byte of its cluster, and the size of the unit that holds for.
    fn mapping_at(&self, entry: Entry, within: u64) -> Option<(Mapping, u64)> {
        let cluster_size = self.cluster_size();
        if self.header.extended_l2 {
            let unit = cluster_size / SUBCLUSTERS;
            let mapping = entry.subcluster(within / unit, self.header.external_data)?;
            let unit = if mapping == Mapping::Packed {
                cluster_size
            } else {
                unit
            };
            return Some((mapping, unit));
        }
        Some((
            entry.mapping(self.header.version == 3, self.header.external_data),
            cluster_size,
        ))
    }

    pub(super) fn avoids_cache(&self) -> bool {
        self.data.avoids_cache()
    }

    pub(super) fn unpack(&self, buf: &mut [u8], offset: u64) -> Result<(), ImageError> {
        let cluster = offset >> self.header.cluster_bits;
        let entry = self.tables.entry(cluster)?;
        if !entry.is_packed() {
            // Either the backing image has it, or it was written since it was located.
            let (mapping, host, _) = self.lookup(offset, buf.len() as u64)?;
            return match (mapping, &self.backing) {
                (Mapping::Unallocated, Some(backing)) => backing.unpack(buf, offset),
                (Mapping::Data, _) => Ok(self.data.read_at(buf, host)?),
                _ => {
                    buf.fill(0);
                    Ok(())
                }
            };
        }
        let bytes = match self.inflated(entry.word) {
            // It moved meanwhile, and its old place may be in use for something else.
            _ if self.tables.entry(cluster)? != entry => return self.unpack(buf, offset),
            bytes => bytes?,
        };
        let start = usize::try_from(offset & (self.cluster_size() - 1)).unwrap_or(0);
        let part = bytes.get(start..start.saturating_add(buf.len()));
        buf.copy_from_slice(part.ok_or(ImageError::Corrupt("a packed cluster is too short"))?);
        Ok(())
    }

    fn inflated(&self, word: u64) -> Result<Arc<Vec<u8>>, ImageError> {
        let cache = || self.inflated.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, bytes)) = cache().iter().find(|(kept, _)| *kept == word) {
            return Ok(Arc::clone(bytes));
        }
        let (at, len) = packed(word, self.header.cluster_bits);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        self.data.read_at(&mut bytes, at)?;
        let size = usize::try_from(self.cluster_size()).unwrap_or(0);
        let bytes = Arc::new(compressed::inflate(&bytes, size, self.header.compression)?);
        let mut cache = cache();
        if cache.len() >= INFLATED {
            cache.pop_front();
        }
        cache.push_back((word, Arc::clone(&bytes)));
        Ok(bytes)
    }

    pub(super) fn flush(&self) -> Result<(), ImageError> {
        if self.read_only {
            return Ok(());
        }
        let returned = self.lock_space().returned();
        if let Err(error) = self.sync() {
            self.lock_space().keep_returned(returned);
            return Err(error);
        }
        if !returned.is_empty() && !self.is_corrupt() {
            self.gate.drain();
            self.inflated
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clear();
            self.note_corruption(self.lock_space().free(&returned))?;
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), ImageError> {
        if self.header.external_data {
            self.data.sync()?;
        }
        Ok(self.file.sync()?)
    }

    pub(super) fn close(&self) -> Result<(), ImageError> {
        if self.read_only {
            return Ok(());
        }
        self.flush()?;
        if self.is_corrupt() {
            return Ok(());
        }
        self.lock_space().close()
    }

    fn is_corrupt(&self) -> bool {
        self.corrupt.load(Ordering::Relaxed)
    }

    fn lock_space(&self) -> MutexGuard<'_, Space> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_group(&self, cluster: u64) -> Result<MutexGuard<'_, ()>, ImageError> {
        let index = usize::try_from(cluster / GROUP % GROUP_LOCKS).unwrap_or(0);
        let lock = self
            .groups
            .get(index)
            .ok_or(ImageError::Corrupt("no such group"))?;
        Ok(lock.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Hands on a result; one that shows corruption is recorded in the image, and it takes no more
    /// writes.
    fn note_corruption<T>(&self, result: Result<T, ImageError>) -> Result<T, ImageError> {
        if let Err(ImageError::Corrupt(reason)) = &result
            && !self.corrupt.swap(true, Ordering::Relaxed)
        {
            tracing::error!(reason, "the image is corrupt and takes no more writes");
            if self.header.version == 3 && !self.read_only {
                let bits = self.header.incompatible | header::CORRUPT;
                self.file
                    .write_at(&bits.to_be_bytes(), 72, Durability::Now)?;
            }
        }
        result
    }
}
