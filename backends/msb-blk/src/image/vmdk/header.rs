//! The binary header of a sparse VMDK extent: bytes to a checked description, without I/O.
//!
//! All numbers are little-endian; offsets and sizes are in sectors of 512 bytes.
//!
//! ```text
//!  0 "KDMV"  4 version  8 flags  12 capacity  20 grain  28 descriptor offset  36 its size
//! 44 entries per grain table  48 redundant directory  56 directory  64 overhead
//! 72 unclean  73 line-end test  77 compression
//! ```

use super::descriptor::VmdkError;

const REDUNDANT: u32 = 1 << 1;
const ZERO_GRAINS: u32 = 1 << 2;
const COMPRESSED: u32 = 1 << 16;
const MARKERS: u32 = 1 << 17;
const AT_END: u64 = u64::MAX;
const MAX_TABLE_ENTRIES: u32 = 512;
/// Largest grain directory, in entries: 64 TiB with grains of 64 KiB.
const MAX_DIRECTORY: u64 = 2 << 20;

/// A checked sparse header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SparseHeader {
    /// Size of the extent in sectors.
    pub capacity: u64,
    /// Size of a grain in sectors, a power of two.
    pub grain: u64,
    /// Where the embedded descriptor is, in sectors; 0 for none.
    pub descriptor: u64,
    /// Its size in sectors.
    pub descriptor_len: u64,
    /// Entries per grain table.
    pub table_entries: u64,
    /// The second grain directory, in sectors, if it is kept.
    pub redundant: Option<u64>,
    /// The grain directory, in sectors.
    pub directory: u64,
    /// Where grains may begin, in sectors.
    pub overhead: u64,
    /// Table entry 1 means a grain of zeroes.
    pub zero_grains: bool,
    /// Grains are deflated.
    pub compressed: bool,
    /// Grains are preceded by their address and length.
    pub markers: bool,
}

/// Whether the header only refers to the footer at the end of the file.
pub fn is_at_end(bytes: &[u8]) -> bool {
    le64(bytes, 56) == Some(AT_END)
}

/// Whether this is the beginning of a sparse extent, not of a text descriptor.
pub fn is_sparse(bytes: &[u8]) -> bool {
    bytes.starts_with(b"KDMV")
}

impl SparseHeader {
    /// Parses the 512 bytes of a header or footer.
    ///
    /// # Errors
    ///
    /// [`VmdkError`] for anything that cannot be served safely.
    pub fn parse(bytes: &[u8]) -> Result<Self, VmdkError> {
        if !is_sparse(bytes) {
            return Err(VmdkError::Magic);
        }
        let short = VmdkError::Field("length");
        let u32_at = |at: usize| {
            let field = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
            field.map(u32::from_le_bytes).ok_or(short.clone())
        };
        let u64_at = |at| le64(bytes, at).ok_or(short.clone());
        if !(1..=3).contains(&u32_at(4)?) {
            return Err(VmdkError::Field("version"));
        }
        let flags = u32_at(8)?;
        let compression = bytes.get(77..79).ok_or(short.clone())?;
        let compressed = flags & COMPRESSED != 0 && compression == [1, 0];
        if flags & COMPRESSED != 0 && !compressed && compression != [0, 0] {
            return Err(VmdkError::Field("compression"));
        }
        let header = Self {
            capacity: u64_at(12)?,
            grain: u64_at(20)?,
            descriptor: u64_at(28)?,
            descriptor_len: u64_at(36)?,
            table_entries: u64::from(u32_at(44)?),
            redundant: (flags & REDUNDANT != 0)
                .then_some(u64_at(48)?)
                .filter(|&rgd| rgd != 0),
            directory: u64_at(56)?,
            overhead: u64_at(64)?,
            zero_grains: flags & ZERO_GRAINS != 0,
            compressed,
            markers: flags & MARKERS != 0,
        };
        header.check()?;
        Ok(header)
    }

    /// Grain size in bytes.
    pub fn grain_bytes(&self) -> u64 {
        self.grain * 512
    }

    /// Number of grain tables.
    pub fn tables(&self) -> u64 {
        self.capacity.div_ceil(self.grain * self.table_entries)
    }

    fn check(&self) -> Result<(), VmdkError> {
        if !self.grain.is_power_of_two() || !(8..=4096).contains(&self.grain) {
            return Err(VmdkError::Field("grain size"));
        }
        if self.table_entries == 0 || self.table_entries > u64::from(MAX_TABLE_ENTRIES) {
            return Err(VmdkError::Field("size of a grain table"));
        }
        if self.capacity == 0 || self.capacity > 1 << 39 || self.tables() > MAX_DIRECTORY {
            return Err(VmdkError::Field("capacity"));
        }
        let far = |sector: u64| sector == 0 || sector > u64::from(u32::MAX);
        if far(self.directory) || self.redundant.is_some_and(far) {
            return Err(VmdkError::Field("offset of the grain directory"));
        }
        if self.overhead > u64::from(u32::MAX) {
            return Err(VmdkError::Field("overhead"));
        }
        if self.descriptor > u64::from(u32::MAX) || self.descriptor_len > 2048 {
            return Err(VmdkError::Field("place of the descriptor"));
        }
        Ok(())
    }
}

fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes
        .get(at..at + 8)?
        .try_into()
        .ok()
        .map(u64::from_le_bytes)
}
