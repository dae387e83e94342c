//! What a table entry means: L1 and L2 words decoded and encoded, without I/O.

/// Set in L1 and L2 entries whose target is referenced once and may be written in place.
pub(super) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
pub(super) const ZERO: u64 = 1;
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Subclusters per cluster of an image with extended L2 entries.
pub(super) const SUBCLUSTERS: u64 = 32;

/// An L2 entry as stored: the word and, with extended L2 entries, the bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Entry {
    pub(super) word: u64,
    pub(super) bitmap: u64,
}

/// What is known about a cluster, or about one subcluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mapping {
    /// The backing image decides.
    Unallocated,
    /// Zeroes.
    Zero,
    /// Data at the cluster's host offset.
    Data,
    /// Compressed data; see [`packed`].
    Packed,
}

impl Entry {
    /// Host offset of the cluster, 0 for none. Meaningless when packed.
    pub(super) fn host(self) -> u64 {
        if self.is_packed() {
            0
        } else {
            self.word & OFFSET
        }
    }

    pub(super) fn is_packed(self) -> bool {
        self.word & COMPRESSED != 0
    }

    pub(super) fn is_copied(self) -> bool {
        self.word & COPIED != 0
    }

    /// What an entry without subclusters means. `plain_zero` says whether the version has the zero
    /// bit; `has_data_file` that offset 0 is a valid place.
    pub(super) fn mapping(self, plain_zero: bool, has_data_file: bool) -> Mapping {
        if self.is_packed() {
            Mapping::Packed
        } else if plain_zero && self.word & ZERO != 0 {
            Mapping::Zero
        } else if self.host() != 0 || (has_data_file && self.is_copied()) {
            Mapping::Data
        } else {
            Mapping::Unallocated
        }
    }

    /// What subcluster `index` is, 0 to 31. `None` for a combination that no sound image has.
    pub(super) fn subcluster(self, index: u64, has_data_file: bool) -> Option<Mapping> {
        if self.is_packed() {
            return (self.bitmap == 0).then_some(Mapping::Packed);
        }
        let placed = self.host() != 0 || (has_data_file && self.is_copied());
        let allocated = self.bitmap >> index & 1 != 0;
        let zero = self.bitmap >> (index + SUBCLUSTERS) & 1 != 0;
        match (allocated, zero) {
            (true, true) => None,
            (true, false) => placed.then_some(Mapping::Data),
            (false, true) => Some(Mapping::Zero),
            (false, false) => Some(Mapping::Unallocated),
        }
    }
}

/// Where a packed cluster's bytes are: host offset and the most they can occupy.
pub(super) fn packed(word: u64, cluster_bits: u32) -> (u64, u64) {
    let shift = 62 - (cluster_bits - 8);
    let offset = word & ((1 << shift) - 1);
    let sectors = (word & (COMPRESSED - 1)) >> shift;
    (offset, (sectors + 1) * 512 - (offset & 511))
}

/// Mask of `count` subclusters from `first`, in the low half.
pub(super) fn subcluster_mask(first: u64, count: u64) -> u64 {
    let ones = if count >= SUBCLUSTERS {
        u64::from(u32::MAX)
    } else {
        (1 << count) - 1
    };
    ones << first & u64::from(u32::MAX)
}
