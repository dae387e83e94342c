//! Writes, discards and zeroes: everything that changes the mapping.

use std::io;
use std::sync::PoisonError;

use msb_vhost::Segments;

use super::entry::{ZERO, subcluster_mask};
use super::*;
use crate::file::Emptying;
use crate::image::{len_of, read_through};

/// A piece of one cluster: its number, and the bytes from `start` to `end` in it.
#[derive(Debug, Clone, Copy)]
struct Part {
    cluster: u64,
    start: u64,
    end: u64,
}

impl Qcow2 {
    pub(in crate::image) fn write(
        &self,
        from: &mut Segments,
        offset: u64,
        len: u64,
    ) -> Result<(), ImageError> {
        self.writable()?;
        let _inside = self.gate.enter();
        self.note_corruption(self.write_inside(from, offset, len))
    }

    fn write_inside(
        &self,
        from: &mut Segments,
        mut offset: u64,
        len: u64,
    ) -> Result<(), ImageError> {
        let end = offset + len;
        while offset < end {
            let (host, found) = self.in_place(offset, end - offset)?;
            if found > 0 {
                self.check_data(host, found)?;
                self.data
                    .write_from(from, len_of(found), host, Durability::Later)?;
                offset += found;
            } else {
                offset += self.write_elsewhere(from, offset, end - offset)?;
            }
        }
        Ok(())
    }

    pub(super) fn writable(&self) -> Result<(), ImageError> {
        if self.read_only {
            return Err(ImageError::ReadOnly);
        }
        if self.is_corrupt() {
            return Err(ImageError::Corrupt("the image takes no more writes"));
        }
        Ok(())
    }

    /// Host offset and length of what can be written in place from `offset` on; length 0 if the
    /// first cluster cannot.
    fn in_place(&self, offset: u64, len: u64) -> Result<(u64, u64), ImageError> {
        let mut host = 0;
        let mut found = 0;
        while found < len {
            let cluster = (offset + found) >> self.header.cluster_bits;
            let entry = self.tables.entry(cluster)?;
            if !entry.is_copied() {
                break;
            }
            let (mapping, next, more) = self.lookup_in(entry, offset + found, len - found)?;
            if mapping != Mapping::Data || (found > 0 && next != host + found) {
                break;
            }
            host = next - found;
            found += more;
        }
        Ok((host, found))
    }

    /// Where the first bytes of a write can go without a change of the mapping.
    pub(in crate::image) fn in_place_for_later(
        &self,
        offset: u64,
        len: u64,
    ) -> Result<Option<InPlace<'_>>, ImageError> {
        self.writable()?;
        let inside = self.gate.enter_for_later();
        let (host, found) = self.in_place(offset, len)?;
        if found == 0 {
            return Ok(None);
        }
        self.note_corruption(self.check_data(host, found))?;
        Ok(Some(InPlace {
            file: self.data.as_ref(),
            offset: host,
            len: found,
            inside: Some(inside),
        }))
    }

    /// Refuses to write guest data over metadata.
    fn check_data(&self, host: u64, len: u64) -> Result<(), ImageError> {
        if self.header.external_data {
            return Ok(());
        }
        let bits = self.header.cluster_bits;
        let first = host >> bits;
        let run = Run {
            first,
            count: (host + len).div_ceil(1 << bits) - first,
        };
        let marks = self.metadata.read().unwrap_or_else(PoisonError::into_inner);
        if marks.contains_any(run) {
            return Err(ImageError::Corrupt("a data cluster overlaps metadata"));
        }
        if !marks.holds(run) {
            return Err(ImageError::Corrupt(
                "a data cluster lies beyond the end of the file",
            ));
        }
        Ok(())
    }

    /// Writes to clusters that need a new place; returns how many bytes that were.
    fn write_elsewhere(
        &self,
        from: &mut Segments,
        offset: u64,
        len: u64,
    ) -> Result<u64, ImageError> {
        let bits = self.header.cluster_bits;
        let first = offset >> bits;
        let _group = self.lock_group(first)?;
        self.ensure_l2(first)?;
        let group_end = (first / GROUP + 1) * GROUP;
        let last = ((offset + len).div_ceil(1 << bits)).min(group_end);
        let mut fresh = 0;
        while first + fresh < last && self.is_fresh(first + fresh, offset, offset + len)? {
            fresh += 1;
        }
        if fresh > 0 {
            return self.write_fresh(from, offset, len, fresh);
        }
        if self.in_place(offset, 1)?.1 > 0 {
            return Ok(0);
        }
        let start = offset & ((1 << bits) - 1);
        let end = (start + len).min(1 << bits);
        self.write_over(
            from,
            Part {
                cluster: first,
                start,
                end,
            },
        )?;
        Ok(end - start)
    }

    /// Whether a cluster has no place yet and reads as zero wherever a write from `offset` to `end`
    /// will give it one.
    fn is_fresh(&self, cluster: u64, offset: u64, end: u64) -> Result<bool, ImageError> {
        let entry = self.tables.entry(cluster)?;
        if self.header.external_data || entry.is_packed() || entry.host() != 0 {
            return Ok(false);
        }
        let base = cluster << self.header.cluster_bits;
        let (mut from, mut to) = (base, base + self.cluster_size());
        if self.header.extended_l2 {
            let unit = self.cluster_size() / SUBCLUSTERS;
            from = from.max(offset) / unit * unit;
            to = to.min(end).div_ceil(unit) * unit;
        }
        let to = to.min(self.size());
        while from < to {
            let extent = self.locate(from, to - from)?;
            if !matches!(extent.place, Place::Zero) {
                return Ok(false);
            }
            from += extent.len;
        }
        Ok(true)
    }

    /// Writes to up to `clusters` clusters that were zero. No order matters: should the entry
    /// reach the disk without the data, it still reads as zero.
    fn write_fresh(
        &self,
        from: &mut Segments,
        offset: u64,
        len: u64,
        clusters: u64,
    ) -> Result<u64, ImageError> {
        let bits = self.header.cluster_bits;
        let first = offset >> bits;
        let start = offset & ((1 << bits) - 1);
        let filled = start == 0 && len >= clusters << bits;
        let run = self.lock_space().take_for_data(clusters, filled)?;
        let len = len.min((run.count << bits) - start);
        let written = self
            .data
            .write_from(
                from,
                len_of(len),
                (run.first << bits) + start,
                Durability::Later,
            )
            .map_err(ImageError::from)
            .and_then(|()| {
                for nth in 0..run.count {
                    let from = if nth == 0 { start } else { 0 };
                    let to = (start + len - (nth << bits)).min(1 << bits);
                    let part = Part {
                        cluster: first + nth,
                        start: from,
                        end: to,
                    };
                    let old = self.tables.entry(part.cluster)?;
                    let host = (run.first + nth) << bits;
                    self.tables
                        .set_entry(part.cluster, self.placed(old, host, part))?;
                }
                Ok(())
            });
        if let Err(error) = written {
            self.reclaim(run, first);
            return Err(error);
        }
        Ok(len)
    }

    /// Gives those clusters of a run back that did not come into use.
    fn reclaim(&self, run: Run, first: u64) {
        for nth in 0..run.count {
            let host = (run.first + nth) << self.header.cluster_bits;
            let in_use = self
                .tables
                .entry(first + nth)
                .is_ok_and(|entry| entry.host() == host);
            if !in_use {
                self.lock_space().give_back(Run {
                    first: run.first + nth,
                    count: 1,
                });
            }
        }
    }

    /// The entry of a cluster after `part` of it was written to the host cluster at `host`.
    fn placed(&self, old: Entry, host: u64, part: Part) -> Entry {
        let mut bitmap = 0;
        if self.header.extended_l2 {
            let unit = self.cluster_size() / SUBCLUSTERS;
            let first = part.start / unit;
            let mask = subcluster_mask(first, part.end.div_ceil(unit) - first);
            bitmap = (old.bitmap | mask) & !(mask << SUBCLUSTERS);
        }
        Entry {
            word: host | COPIED,
            bitmap,
        }
    }

    /// Writes to a cluster that has contents: a whole new copy is durable before the entry changes.
    fn write_over(&self, from: &mut Segments, part: Part) -> Result<(), ImageError> {
        let old = self.tables.entry(part.cluster)?;
        let base = part.cluster << self.header.cluster_bits;
        if old.host() & (self.cluster_size() - 1) != 0 {
            return Err(ImageError::Corrupt("a data cluster is not aligned"));
        }
        let in_its_place = self.header.external_data || (old.host() != 0 && old.is_copied());
        let mut cover = Part {
            start: 0,
            end: self.cluster_size(),
            ..part
        };
        if self.header.extended_l2 && (in_its_place || old.host() == 0) && !old.is_packed() {
            let unit = self.cluster_size() / SUBCLUSTERS;
            cover.start = part.start / unit * unit;
            cover.end = part.end.div_ceil(unit) * unit;
        }
        let mut bytes = vec![0; len_of(cover.end - cover.start)];
        if cover.start < part.start || part.end < cover.end {
            let locate = |offset, len| self.locate(offset, len);
            let unpack = |buf: &mut [u8], offset| self.unpack(buf, offset);
            read_through(self.size(), locate, unpack, &mut bytes, base + cover.start)?;
        }
        let within = len_of(part.start - cover.start)..len_of(part.end - cover.start);
        let new = bytes.get_mut(within).ok_or(ImageError::Unsupported)?;
        from.read_exact(new)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        if in_its_place {
            let host = if self.header.external_data {
                base
            } else {
                old.host()
            };
            self.check_data(host, self.cluster_size())?;
            self.data
                .write_at(&bytes, host + cover.start, Durability::Now)?;
            self.tables
                .set_entry(part.cluster, self.placed(old, host, cover))?;
            return self.release(old, host);
        }
        let run = self.lock_space().take(1)?;
        let host = run.first << self.header.cluster_bits;
        let written = self
            .data
            .write_at(&bytes, host + cover.start, Durability::Now)
            .map_err(ImageError::from)
            .and_then(|()| {
                self.tables
                    .set_entry(part.cluster, self.placed(old, host, cover))
            });
        if let Err(error) = written {
            self.reclaim(run, part.cluster);
            return Err(error);
        }
        self.release(old, host)
    }

    /// Gives back what an entry referred to before its cluster moved to `now`.
    fn release(&self, old: Entry, now: u64) -> Result<(), ImageError> {
        let bits = self.header.cluster_bits;
        if self.header.external_data {
            return Ok(());
        }
        if old.is_packed() {
            let (at, len) = packed(old.word, bits);
            let first = at >> bits;
            let count = ((at + len - 1) >> bits) - first + 1;
            self.lock_space().give_back(Run { first, count });
        } else if old.host() != 0 && old.host() != now {
            if old.host() & (self.cluster_size() - 1) != 0 {
                return Err(ImageError::Corrupt("a data cluster is not aligned"));
            }
            self.lock_space().give_back(Run {
                first: old.host() >> bits,
                count: 1,
            });
        }
        Ok(())
    }

    /// Makes sure that the L2 table for a cluster exists and belongs to the active state alone.
    fn ensure_l2(&self, cluster: u64) -> Result<(), ImageError> {
        let index = cluster / self.header.l2_entries();
        let ready = |entry: u64| entry & OFFSET != 0 && entry & COPIED != 0;
        if ready(self.tables.l1(index)) {
            return Ok(());
        }
        let _l1 = self.l1_lock.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.tables.l1(index);
        if ready(old) {
            return Ok(());
        }
        let bits = self.header.cluster_bits;
        let run = self.lock_space().take(1)?;
        let host = run.first << bits;
        let copied = if old & OFFSET == 0 {
            Ok(())
        } else {
            let mut table = vec![0; len_of(self.cluster_size())];
            self.file
                .read_at(&mut table, old & OFFSET)
                .and_then(|()| self.file.write_at(&table, host, Durability::Now))
        };
        let set = copied.and_then(|()| self.tables.set_l1(index, host | COPIED, Durability::Later));
        if let Err(error) = set {
            self.lock_space().give_back(run);
            return Err(error.into());
        }
        self.metadata
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .add(run.first);
        if old & OFFSET != 0 {
            let freed = (old & OFFSET) >> bits;
            let mut space = self.lock_space();
            // A table that is neither marked as ours nor counted twice may be a snapshot's: it stays.
            if space.is_shared(freed)? {
                space.give_back(Run {
                    first: freed,
                    count: 1,
                });
            }
        }
        Ok(())
    }

    pub(in crate::image) fn empty(
        &self,
        offset: u64,
        len: u64,
        how: Emptying,
    ) -> Result<(), ImageError> {
        self.writable()?;
        let _inside = self.gate.enter();
        self.note_corruption(self.empty_inside(offset, len, how))
    }

    fn empty_inside(&self, offset: u64, len: u64, how: Emptying) -> Result<(), ImageError> {
        let bits = self.header.cluster_bits;
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let start = at & ((1 << bits) - 1);
            let step = (self.cluster_size() - start).min(end - at);
            // The last cluster counts as whole when the disk ends within it.
            let whole = start == 0 && (step == self.cluster_size() || at + step == self.size());
            if !(whole && self.empty_cluster(at >> bits, how)?) && how != Emptying::Discard {
                self.write_zeroes(at, step)?;
            }
            at += step;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), ImageError> {
        let mut from = offset;
        while from < offset + len {
            let extent = self.locate(from, offset + len - from)?;
            if !matches!(extent.place, Place::Zero) {
                let mut zeroes = Segments::from_vec(vec![0; len_of(extent.len)]);
                self.write_inside(&mut zeroes, from, extent.len)?;
            }
            from += extent.len;
        }
        Ok(())
    }

    /// Empties a whole cluster through its entry alone; `false` if the format cannot express it.
    fn empty_cluster(&self, cluster: u64, how: Emptying) -> Result<bool, ImageError> {
        let version_2 = self.header.version == 2;
        if version_2 && self.backing.is_some() {
            return Ok(how == Emptying::Discard);
        }
        let _group = self.lock_group(cluster)?;
        let old = self.tables.entry(cluster)?;
        if old == Entry::default() && self.backing.is_none() {
            return Ok(true);
        }
        self.ensure_l2(cluster)?;
        if self.header.external_data {
            let base = cluster << self.header.cluster_bits;
            let len = self.cluster_size().min(self.size() - base);
            self.data.empty(base, len, Emptying::Unmap)?;
        }
        let all_zero = u64::from(u32::MAX) << SUBCLUSTERS;
        let keeps = how == Emptying::Zero && old.host() != 0 && old.is_copied() && !version_2;
        let place = if keeps { old.host() | COPIED } else { 0 };
        let new = match (self.header.extended_l2, keeps || self.backing.is_some()) {
            (_, false) => Entry::default(),
            (true, true) => Entry {
                word: place,
                bitmap: all_zero,
            },
            (false, true) => Entry {
                word: place | ZERO,
                bitmap: 0,
            },
        };
        if new != old {
            self.tables.set_entry(cluster, new)?;
            self.release(old, place & OFFSET)?;
        }
        Ok(true)
    }
}
