//! Refcounts of host clusters: the refcount table and a small cache of its blocks.
//!
//! Changes are written through at once. Increments are made durable before the cluster is used,
//! decrements happen only after the last reference is durably gone; so whatever part of the writes
//! a crash leaves behind, a cluster in use never has a refcount of zero.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use super::header::Header;
use super::table::read_words;
use crate::file::{Durability, HostFile};
use crate::image::ImageError;

/// Refcount blocks kept in memory at most, in bytes.
const CACHE_BYTES: u64 = 4 << 20;
const MAX_TABLE_BYTES: u64 = 8 << 20;

/// Refcounts of one image.
pub(super) struct Refcounts {
    file: Arc<dyn HostFile>,
    table: Vec<u64>,
    table_offset: u64,
    cluster_bits: u32,
    order: u32,
    blocks: HashMap<u64, Vec<u8>>,
}

/// Metadata that came into being or ended while refcounts were changed.
#[derive(Default)]
pub(super) struct MetadataChange {
    /// Host offsets of new metadata clusters.
    pub(super) added: Vec<u64>,
    /// Host offset and number of clusters that hold no metadata any more.
    pub(super) dropped: Option<(u64, u64)>,
}

impl Refcounts {
    /// Reads the first `clusters` of the refcount table.
    pub(super) fn load(
        file: Arc<dyn HostFile>,
        header: &Header,
        clusters: u32,
    ) -> io::Result<Self> {
        let entries = u64::from(clusters) << (header.cluster_bits - 3);
        let table = read_words(file.as_ref(), header.reftable_offset, entries)?;
        Ok(Self {
            file,
            table,
            table_offset: header.reftable_offset,
            cluster_bits: header.cluster_bits,
            order: header.refcount_order,
            blocks: HashMap::new(),
        })
    }

    /// Host offsets of the refcount blocks.
    pub(super) fn block_offsets(&self) -> impl Iterator<Item = u64> {
        self.table.iter().copied().filter(|&offset| offset != 0)
    }

    /// Refcounts per block.
    pub(super) fn per_block(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.order)
    }

    /// Whether the block for a cluster exists.
    pub(super) fn has_block(&self, cluster: u64) -> bool {
        self.block_offset(cluster / self.per_block()) != 0
    }

    /// The refcount of a host cluster.
    pub(super) fn get(&mut self, cluster: u64) -> Result<u64, ImageError> {
        let (block, index) = (cluster / self.per_block(), cluster % self.per_block());
        if self.block_offset(block) == 0 {
            return Ok(0);
        }
        let order = self.order;
        Ok(get_count(self.block(block)?, index, order))
    }

    /// Sets the refcounts of `count` clusters from `first`, all in one block that exists.
    pub(super) fn set(
        &mut self,
        first: u64,
        count: u64,
        value: u64,
        durability: Durability,
    ) -> Result<(), ImageError> {
        let per_block = self.per_block();
        let (block, index) = (first / per_block, first % per_block);
        let offset = self.block_offset(block);
        if offset == 0 || count == 0 || index + count > per_block {
            return Err(ImageError::Corrupt("a refcount block is missing"));
        }
        let order = self.order;
        let from = usize::try_from((index << order) / 8).unwrap_or(0);
        let to = usize::try_from(((index + count) << order).div_ceil(8)).unwrap_or(0);
        let bytes = self.block(block)?;
        let before = bytes.get(from..to).unwrap_or_default().to_vec();
        for at in index..index + count {
            set_count(bytes, at, order, value);
        }
        let changed = bytes.get(from..to).unwrap_or_default().to_vec();
        if let Err(e) = self
            .file
            .write_at(&changed, offset + from as u64, durability)
        {
            // Memory keeps the old counts: a cluster counted on disk alone is merely lost.
            if let Some(bytes) = self.block(block)?.get_mut(from..to) {
                bytes.copy_from_slice(&before);
            }
            return Err(e.into());
        }
        Ok(())
    }

    /// Makes the block that counts `cluster`, which nobody uses, in the first clusters it counts,
    /// and moves the refcount table when it is too short. `end` is the end of the file in clusters
    /// and grows when the new block lies beyond it.
    pub(super) fn add_block(
        &mut self,
        cluster: u64,
        end: &mut u64,
    ) -> Result<MetadataChange, ImageError> {
        let block = cluster / self.per_block();
        if block >= self.table.len() as u64 {
            return self.move_table(block, end);
        }
        let first = block * self.per_block();
        let mut bytes = self.empty_block();
        set_count(&mut bytes, 0, self.order, 1);
        self.write_new(first, &bytes, end)?;
        let at = first << self.cluster_bits;
        let slot = self.table_offset + block * 8;
        self.file
            .write_at(&at.to_be_bytes(), slot, Durability::Now)?;
        if let Some(entry) = usize::try_from(block)
            .ok()
            .and_then(|i| self.table.get_mut(i))
        {
            *entry = at;
        }
        self.blocks.insert(block, bytes);
        Ok(MetadataChange {
            added: vec![at],
            dropped: None,
        })
    }

    /// Writes a longer refcount table, with the blocks that count it, into the first clusters that
    /// the old one could not count, then points the header to it.
    fn move_table(&mut self, block: u64, end: &mut u64) -> Result<MetadataChange, ImageError> {
        let per_block = self.per_block();
        let per_table_cluster = 1u64 << (self.cluster_bits - 3);
        let cluster_size = 1u64 << self.cluster_bits;
        let first_block = (self.table.len() as u64).max(block);
        let first = first_block * per_block;
        let mut blocks = 1;
        let (table_clusters, blocks) = loop {
            let entries = (first_block + blocks) * 5 / 4 + 1;
            let table_clusters = entries.div_ceil(per_table_cluster);
            let needed = (blocks + table_clusters).div_ceil(per_block);
            if needed <= blocks {
                break (table_clusters, blocks);
            }
            blocks = needed;
        };
        if table_clusters * cluster_size > MAX_TABLE_BYTES {
            return Err(io::Error::from(io::ErrorKind::StorageFull).into());
        }
        let len = usize::try_from(table_clusters * per_table_cluster)
            .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let mut table = self.table.clone();
        table.resize(len, 0);
        let mut change = MetadataChange::default();
        for nth in 0..blocks {
            let mut bytes = self.empty_block();
            let counted = (blocks + table_clusters)
                .saturating_sub(nth * per_block)
                .min(per_block);
            for index in 0..counted {
                set_count(&mut bytes, index, self.order, 1);
            }
            self.write_new(first + nth, &bytes, end)?;
            let at = (first + nth) << self.cluster_bits;
            if let Some(entry) = usize::try_from(first_block + nth)
                .ok()
                .and_then(|i| table.get_mut(i))
            {
                *entry = at;
            }
            change.added.push(at);
        }
        let bytes: Vec<u8> = table.iter().flat_map(|word| word.to_be_bytes()).collect();
        self.write_new(first + blocks, &bytes, end)?;
        let offset = (first + blocks) << self.cluster_bits;
        change
            .added
            .extend((0..table_clusters).map(|nth| offset + (nth << self.cluster_bits)));
        let mut field = [0; 12];
        field[..8].copy_from_slice(&offset.to_be_bytes());
        field[8..].copy_from_slice(&u32::try_from(table_clusters).unwrap_or(0).to_be_bytes());
        self.file.write_at(&field, 48, Durability::Now)?;
        let old = (self.table.len() as u64).div_ceil(per_table_cluster);
        change.dropped = Some((self.table_offset, old));
        self.table = table;
        self.table_offset = offset;
        Ok(change)
    }

    /// Writes whole clusters nobody refers to yet.
    fn write_new(&self, cluster: u64, bytes: &[u8], end: &mut u64) -> io::Result<()> {
        let last = cluster + (bytes.len() as u64 >> self.cluster_bits).max(1);
        if last > *end {
            self.file.set_size(last << self.cluster_bits)?;
            *end = last;
        }
        self.file
            .write_at(bytes, cluster << self.cluster_bits, Durability::Now)
    }

    fn empty_block(&self) -> Vec<u8> {
        vec![0; 1 << self.cluster_bits]
    }

    fn block_offset(&self, block: u64) -> u64 {
        let offset = usize::try_from(block)
            .ok()
            .and_then(|i| self.table.get(i))
            .copied();
        offset.unwrap_or(0) & !((1 << self.cluster_bits) - 1)
    }

    fn block(&mut self, block: u64) -> Result<&mut Vec<u8>, ImageError> {
        let offset = self.block_offset(block);
        if (self.blocks.len() as u64) << self.cluster_bits > CACHE_BYTES
            && !self.blocks.contains_key(&block)
        {
            self.blocks.clear();
        }
        match self.blocks.entry(block) {
            std::collections::hash_map::Entry::Occupied(found) => Ok(found.into_mut()),
            std::collections::hash_map::Entry::Vacant(vacant) => {
                let mut bytes = vec![0; 1 << self.cluster_bits];
                self.file.read_at(&mut bytes, offset)?;
                Ok(vacant.insert(bytes))
            }
        }
    }
}

/// Refcount number `index` of a block whose counts are `1 << order` bits wide.
fn get_count(block: &[u8], index: u64, order: u32) -> u64 {
    let index = usize::try_from(index).unwrap_or(usize::MAX);
    if order < 3 {
        let per_byte = 8 >> order;
        let byte = block.get(index / per_byte).copied().unwrap_or(0);
        let mask = (1u16 << (1 << order)) - 1;
        return u64::from(u16::from(byte) >> ((index % per_byte) << order) & mask);
    }
    let width = 1usize << (order - 3);
    let start = index.saturating_mul(width);
    let bytes = block
        .get(start..start.saturating_add(width))
        .unwrap_or_default();
    bytes
        .iter()
        .fold(0, |count, &byte| count << 8 | u64::from(byte))
}

fn set_count(block: &mut [u8], index: u64, order: u32, value: u64) {
    let index = usize::try_from(index).unwrap_or(usize::MAX);
    if order < 3 {
        let per_byte = 8 >> order;
        let shift = (index % per_byte) << order;
        let mask = ((1u16 << (1 << order)) - 1) << shift;
        if let Some(byte) = block.get_mut(index / per_byte) {
            let set = (value << shift).to_le_bytes()[0] & mask.to_le_bytes()[0];
            *byte = *byte & !mask.to_le_bytes()[0] | set;
        }
        return;
    }
    let width = 1usize << (order - 3);
    let start = index.saturating_mul(width);
    if let Some(bytes) = block.get_mut(start..start.saturating_add(width)) {
        bytes.copy_from_slice(value.to_be_bytes().get(8 - width..).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_keep_their_neighbours() {
        for order in 0..=6 {
            let mut block = vec![0; 512];
            let most = if order == 6 {
                u64::MAX
            } else {
                (1 << (1 << order)) - 1
            };
            set_count(&mut block, 5, order, most);
            assert_eq!(get_count(&block, 5, order), most, "order {order}");
            assert_eq!(get_count(&block, 4, order), 0, "order {order}");
            assert_eq!(get_count(&block, 6, order), 0, "order {order}");
            set_count(&mut block, 5, order, 1);
            assert_eq!(get_count(&block, 5, order), 1, "order {order}");
        }
    }
}
