//! Empty images made from a few bytes, and a judge of their structure that shares no code with them.

#![allow(
    clippy::indexing_slicing,
    reason = "both ends are ours; a judge that panics has found something"
)]

use std::collections::HashMap;

const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// An empty qcow2 image: header, refcount table, one refcount block and the L1 table.
pub(super) struct Qcow2Shape {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) order: u32,
    pub(super) extended: bool,
    pub(super) sectors: u64,
}

impl Qcow2Shape {
    pub(super) fn new(seed: [u8; 4]) -> Self {
        let [kind, width, low, high] = seed;
        let extended = kind & 3 == 3;
        let version = if kind & 3 == 0 { 2 } else { 3 };
        Self {
            version,
            cluster_bits: if extended {
                14
            } else {
                9 + u32::from(kind >> 2) % 5
            },
            order: if version == 2 {
                4
            } else {
                u32::from(width) % 7
            },
            extended,
            sectors: 1 + u64::from(u16::from_le_bytes([low, high])) % 1500,
        }
    }

    pub(super) fn build(&self) -> Vec<u8> {
        let cluster = 1usize << self.cluster_bits;
        let mut image = vec![0; 4 * cluster];
        let entry_len = if self.extended { 16 } else { 8 };
        let reach = (cluster as u64 / entry_len) << self.cluster_bits;
        let l1_entries = (self.sectors * 512).div_ceil(reach).max(1);
        let mut put32 = |at: usize, value: u32| {
            image[at..at + 4].copy_from_slice(&value.to_be_bytes());
        };
        put32(0, 0x5146_49fb);
        put32(4, self.version);
        put32(20, self.cluster_bits);
        put32(36, u32::try_from(l1_entries).unwrap_or(1));
        put32(56, 1);
        if self.version == 3 {
            put32(76, if self.extended { 16 } else { 0 });
            put32(96, self.order);
            put32(100, 104);
        }
        let mut put64 = |at: usize, value: usize| {
            image[at..at + 8].copy_from_slice(&(value as u64).to_be_bytes());
        };
        put64(40, 3 * cluster);
        put64(48, cluster);
        put64(cluster, 2 * cluster);
        image[24..32].copy_from_slice(&(self.sectors * 512).to_be_bytes());
        for number in 0..4 {
            let bit = number << self.order;
            let at = 2 * cluster + bit / 8;
            if self.order < 3 {
                image[at] |= 1 << (bit % 8);
            } else {
                image[at + (1 << (self.order - 3)) - 1] = 1;
            }
        }
        image
    }
}

fn be64(bytes: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap_or(usize::MAX - 8);
    let word = bytes.get(at..at + 8).and_then(|word| word.try_into().ok());
    word.map_or(0, u64::from_be_bytes)
}

/// Panics unless every cluster in use has one owner and is counted; without leaks if `exact`.
/// Knows images without snapshots and packed clusters.
pub(super) fn judge_qcow2(image: &[u8], exact: bool) {
    let bits = be64(image, 16) & 0xffff_ffff;
    let cluster = 1u64 << bits;
    let version = be64(image, 0) & 0xffff_ffff;
    let word = |at| be64(image, at);
    let order = if version == 2 { 4 } else { word(96) >> 32 };
    let extended = version == 3 && word(72) & 16 != 0;
    let mut owners: HashMap<u64, &str> = HashMap::new();
    let mut own = |offset: u64, clusters: u64, what: &'static str| {
        assert!(
            offset.is_multiple_of(cluster),
            "{what} at {offset:#x} is not aligned"
        );
        for number in offset / cluster..offset / cluster + clusters {
            let before = owners.insert(number, what);
            assert!(
                before.is_none(),
                "cluster {number} is {what} and {before:?}"
            );
        }
    };
    let (table, clusters) = (word(48), word(56) >> 32);
    let (l1_offset, l1_entries) = (word(40), word(36) >> 32);
    own(0, 1, "header");
    own(table, clusters, "refcount table");
    own(l1_offset, (l1_entries * 8).div_ceil(cluster), "L1 table");
    let mut counts = HashMap::new();
    let per_block = (cluster * 8) >> order;
    for block in 0..clusters * cluster / 8 {
        let offset = word(table + block * 8);
        if offset == 0 {
            continue;
        }
        own(offset, 1, "refcount block");
        for nth in 0..per_block {
            let bit = nth << order;
            let at = usize::try_from(offset + bit / 8).unwrap_or(0);
            let count = if order < 3 {
                u64::from(image[at] >> (bit % 8)) & ((1 << (1 << order)) - 1)
            } else {
                let field = &image[at..at + (1 << (order - 3))];
                field.iter().fold(0, |n, &b| n << 8 | u64::from(b))
            };
            if count > 0 {
                counts.insert(block * per_block + nth, count);
            }
        }
    }
    let entry_len = if extended { 16 } else { 8 };
    for index in 0..l1_entries {
        let l2 = word(l1_offset + index * 8);
        if l2 & OFFSET == 0 {
            continue;
        }
        assert!(l2 & COPIED != 0, "an L2 table is not marked as copied");
        own(l2 & OFFSET, 1, "L2 table");
        for nth in 0..cluster / entry_len {
            let entry = word((l2 & OFFSET) + nth * entry_len);
            if entry & OFFSET != 0 {
                assert!(entry & COPIED != 0, "a cluster is not marked as copied");
                own(entry & OFFSET, 1, "data");
            }
        }
    }
    for (number, what) in &owners {
        let count = counts.get(number);
        assert!(
            count == Some(&1),
            "{what} in cluster {number} has refcount {count:?}"
        );
    }
    let leaks = counts
        .keys()
        .filter(|number| !owners.contains_key(number))
        .count();
    assert!(!exact || leaks == 0, "{leaks} clusters leaked");
}

/// An empty sparse VMDK extent.
pub(super) struct VmdkShape {
    pub(super) grain: u32,
    pub(super) entries: u32,
    pub(super) redundant: bool,
    pub(super) zero_grains: bool,
    /// Grain tables come only when they are needed.
    pub(super) late: bool,
    pub(super) sectors: u32,
}

impl VmdkShape {
    pub(super) fn new(seed: [u8; 4]) -> Self {
        let [kind, size, low, high] = seed;
        Self {
            grain: 8 << (size % 5),
            entries: if kind & 1 == 0 { 512 } else { 16 },
            redundant: kind & 2 != 0,
            zero_grains: kind & 4 != 0,
            late: kind & 8 != 0,
            sectors: 1 + u32::from(u16::from_le_bytes([low, high])) % 3000,
        }
    }

    pub(super) fn build(&self) -> Vec<u8> {
        let tables = self.sectors.div_ceil(self.grain * self.entries);
        let directory_len = (tables * 4).div_ceil(512);
        let table_len = (self.entries * 4).div_ceil(512);
        let copies = if self.redundant { 2 } else { 1 };
        let mut end = 1 + copies * directory_len;
        let directories: Vec<u32> = (0..copies).map(|nth| 1 + nth * directory_len).collect();
        let mut entries = Vec::new();
        for directory in &directories {
            for nth in 0..tables {
                if !self.late {
                    entries.push((directory * 512 + nth * 4, end));
                    end += table_len;
                }
            }
        }
        let overhead = end.next_multiple_of(self.grain);
        let mut image = vec![0; overhead as usize * 512];
        let mut put = |at: u32, value: u32| {
            image[at as usize..at as usize + 4].copy_from_slice(&value.to_le_bytes());
        };
        put(0, u32::from_le_bytes(*b"KDMV"));
        put(4, 1);
        let zero_grains = if self.zero_grains { 4 } else { 0 };
        put(8, 1 | (copies - 1) << 1 | zero_grains);
        put(12, self.sectors);
        put(20, self.grain);
        put(44, self.entries);
        if self.redundant {
            put(48, directories[0]);
        }
        put(56, directories[directories.len() - 1]);
        put(64, overhead);
        entries.iter().for_each(|&(at, value)| put(at, value));
        image
    }
}

/// Panics unless every grain lies in the file, outside the metadata, and has one owner.
pub(super) fn judge_vmdk(image: &[u8]) {
    let word = |at: u64| {
        let at = usize::try_from(at).unwrap_or(usize::MAX - 4);
        let word = image.get(at..at + 4).and_then(|word| word.try_into().ok());
        word.map_or(0, u32::from_le_bytes)
    };
    let (capacity, grain, entries) = (word(12), word(20), word(44));
    let (redundant, directory, overhead) = (word(48), word(56), word(64));
    let mut owners: HashMap<u32, &str> = HashMap::new();
    let mut own = |first: u32, sectors: u32, what: &'static str| {
        let inside = (u64::from(first) + u64::from(sectors)) * 512 <= image.len() as u64;
        assert!(inside, "{what} at sector {first} leaves the file");
        for sector in first..first + sectors {
            let before = owners.insert(sector, what);
            assert!(before.is_none(), "sector {sector} is {what} and {before:?}");
        }
    };
    let table_len = (entries * 4).div_ceil(512);
    for place in [redundant, directory].into_iter().filter(|&at| at != 0) {
        for nth in 0..capacity.div_ceil(grain * entries) {
            let table = word(u64::from(place) * 512 + u64::from(nth) * 4);
            if table == 0 {
                continue;
            }
            own(table, table_len, "grain table");
            for index in 0..entries {
                let at = word(u64::from(table) * 512 + u64::from(index) * 4);
                if at > 1 && place == directory {
                    assert!(at >= overhead, "a grain at sector {at} is in the metadata");
                    own(at, grain, "grain");
                }
            }
        }
    }
}
