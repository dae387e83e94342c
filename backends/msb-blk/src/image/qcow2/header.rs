//! The qcow2 header and its extensions: bytes to a checked description, without I/O.
//!
//! All numbers are big-endian. Version 2 ends at byte 72; version 3 adds feature bits.
//!
//! ```text
//!  0 magic  4 version  8 backing offset  16 backing length  20 cluster bits  24 size
//! 32 crypt 36 L1 entries 40 L1 offset 48 refcount table offset 56 its clusters
//! 60 snapshots 64 their offset | 72 incompatible 80 compatible 88 autoclear 96 order 100 length
//! ```

/// Bytes of the image read before parsing: header, extensions and backing name lie within.
pub const MAX_HEADER: usize = 2 << 20;

const MAGIC: u32 = 0x5146_49fb;
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFTABLE_BYTES: u64 = 8 << 20;
const MAX_SNAPSHOTS: u32 = 65536;
const MAX_OFFSET: u64 = 1 << 56;

const DIRTY: u64 = 1;
pub(super) const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
/// Autoclear bit: the external data file reads as a raw image by itself.
pub(super) const RAW_DATA_FILE: u64 = 1 << 1;

/// Why an image is refused. The message names the offending part.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not this format at all.
    #[error("not a qcow2 image (give its real format with --format)")]
    Magic,
    /// Neither version 2 nor 3.
    #[error("qcow2 version {0} is not supported (convert it with `qemu-img convert`)")]
    Version(u32),
    /// The file ends within the header.
    #[error("the qcow2 header is cut off")]
    Truncated,
    /// A field has a value that no sound image has.
    #[error("{0} in the qcow2 header is out of range")]
    Field(&'static str),
    /// Encryption is not supported.
    #[error("the image is encrypted ({0}); decrypt it with `qemu-img convert` first")]
    Encrypted(&'static str),
    /// Incompatible features nobody here knows.
    #[error("the image needs unknown features: {0}")]
    Unknown(String),
}

/// How compressed clusters are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// A checked qcow2 header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size is two to this power, 9 to 21.
    pub cluster_bits: u32,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Number of L1 entries.
    pub l1_entries: u32,
    /// Host offset of the L1 table.
    pub l1_offset: u64,
    /// Host offset of the refcount table.
    pub reftable_offset: u64,
    /// Its size in clusters.
    pub reftable_clusters: u32,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Host offset of the snapshot table.
    pub snapshots_offset: u64,
    /// Refcounts are two to this power bits wide, 0 to 6.
    pub refcount_order: u32,
    /// Refcounts may be wrong.
    pub dirty: bool,
    /// Metadata is known to be damaged.
    pub corrupt: bool,
    /// L2 entries are 16 bytes, with a bitmap of 32 subclusters.
    pub extended_l2: bool,
    /// How clusters are packed.
    pub compression: Compression,
    /// Incompatible feature bits as stored.
    pub incompatible: u64,
    /// Autoclear bits as stored.
    pub autoclear: u64,
    /// Name of the backing file as stored.
    pub backing: Option<Vec<u8>>,
    /// Format of the backing file as stored.
    pub backing_format: Option<Vec<u8>>,
    /// Data lies in another file.
    pub external_data: bool,
    /// Name of the data file as stored.
    pub data_file: Option<Vec<u8>>,
}

impl Header {
    /// Parses the beginning of an image, [`MAX_HEADER`] bytes of it or all there is.
    ///
    /// # Errors
    ///
    /// [`HeaderError`] for anything that cannot be served safely.
    pub fn parse(bytes: &[u8]) -> Result<Self, HeaderError> {
        if be32(bytes, 0) != Ok(MAGIC) {
            return Err(HeaderError::Magic);
        }
        let version = be32(bytes, 4)?;
        if !(2..=3).contains(&version) {
            return Err(HeaderError::Version(version));
        }
        let v3 = version == 3;
        let incompatible = if v3 { be64(bytes, 72)? } else { 0 };
        let header_len = if v3 { be32(bytes, 100)? } else { 72 };
        let compression = match (incompatible & COMPRESSION != 0, header_len > 104) {
            (true, true) => match bytes.get(104) {
                Some(1) => Compression::Zstd,
                _ => return Err(HeaderError::Field("compression type")),
            },
            (true, false) => return Err(HeaderError::Field("compression type")),
            (false, true) if bytes.get(104) != Some(&0) => {
                return Err(HeaderError::Field("compression type"));
            }
            (false, _) => Compression::Zlib,
        };
        let mut header = Self {
            version,
            cluster_bits: be32(bytes, 20)?,
            size: be64(bytes, 24)?,
            l1_entries: be32(bytes, 36)?,
            l1_offset: be64(bytes, 40)?,
            reftable_offset: be64(bytes, 48)?,
            reftable_clusters: be32(bytes, 56)?,
            snapshots: be32(bytes, 60)?,
            snapshots_offset: be64(bytes, 64)?,
            refcount_order: if v3 { be32(bytes, 96)? } else { 4 },
            dirty: incompatible & DIRTY != 0,
            corrupt: incompatible & CORRUPT != 0,
            extended_l2: incompatible & EXTENDED_L2 != 0,
            compression,
            incompatible,
            autoclear: if v3 { be64(bytes, 88)? } else { 0 },
            backing: None,
            backing_format: None,
            external_data: incompatible & DATA_FILE != 0,
            data_file: None,
        };
        header.check(header_len)?;
        match be32(bytes, 32)? {
            0 => {}
            1 => return Err(HeaderError::Encrypted("AES")),
            2 => return Err(HeaderError::Encrypted("LUKS")),
            _ => return Err(HeaderError::Field("encryption method")),
        }
        header.read_extensions(bytes, header_len)?;
        Ok(header)
    }

    /// Cluster size in bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of one L2 entry.
    pub fn l2_entry_len(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// L2 entries per table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.l2_entry_len()
    }

    fn check(&self, header_len: u32) -> Result<(), HeaderError> {
        if !(9..=21).contains(&self.cluster_bits) {
            return Err(HeaderError::Field("cluster size"));
        }
        let cluster = self.cluster_size();
        let aligned = |offset: u64| offset.is_multiple_of(cluster) && offset < MAX_OFFSET;
        if self.version == 3 && (header_len < 104 || u64::from(header_len) > cluster) {
            return Err(HeaderError::Field("header length"));
        }
        if self.extended_l2 && self.cluster_bits < 14 {
            return Err(HeaderError::Field(
                "cluster size of an image with extended L2 entries",
            ));
        }
        if self.refcount_order > 6 {
            return Err(HeaderError::Field("refcount width"));
        }
        let l1_bytes = u64::from(self.l1_entries) * 8;
        if l1_bytes > MAX_L1_BYTES {
            return Err(HeaderError::Field("size of the L1 table"));
        }
        if !aligned(self.l1_offset) || (self.l1_entries > 0 && self.l1_offset == 0) {
            return Err(HeaderError::Field("offset of the L1 table"));
        }
        let reach =
            u128::from(self.l1_entries) * u128::from(self.l2_entries()) * u128::from(cluster);
        if self.size > MAX_OFFSET || u128::from(self.size) > reach {
            return Err(HeaderError::Field("disk size"));
        }
        let reftable_bytes = u64::from(self.reftable_clusters) * cluster;
        if reftable_bytes == 0 || reftable_bytes > MAX_REFTABLE_BYTES {
            return Err(HeaderError::Field("size of the refcount table"));
        }
        if !aligned(self.reftable_offset) || self.reftable_offset == 0 {
            return Err(HeaderError::Field("offset of the refcount table"));
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(HeaderError::Field("number of snapshots"));
        }
        if self.snapshots > 0 && (!aligned(self.snapshots_offset) || self.snapshots_offset == 0) {
            return Err(HeaderError::Field("offset of the snapshot table"));
        }
        Ok(())
    }

    fn read_extensions(&mut self, bytes: &[u8], header_len: u32) -> Result<(), HeaderError> {
        let backing_offset = be64(bytes, 8)?;
        let backing_len = be32(bytes, 16)?;
        let cluster = self.cluster_size();
        let mut end = cluster.min(bytes.len() as u64);
        if backing_offset != 0 {
            let last = backing_offset.checked_add(u64::from(backing_len));
            if backing_len > 1023 || last.is_none_or(|last| last > cluster) {
                return Err(HeaderError::Field("name of the backing file"));
            }
            end = end.min(backing_offset);
            if backing_len > 0 {
                let name = slice(bytes, backing_offset, u64::from(backing_len))?;
                self.backing = Some(name.to_vec());
            }
        }
        let mut names = Vec::new();
        let mut at = u64::from(header_len);
        while at + 8 <= end {
            let start = usize::try_from(at).map_err(|_| HeaderError::Truncated)?;
            let (kind, len) = (be32(bytes, start)?, be32(bytes, start + 4)?);
            if kind == 0 {
                break;
            }
            let len = u64::from(len);
            if len > end - at - 8 {
                return Err(HeaderError::Field("length of a header extension"));
            }
            let body = slice(bytes, at + 8, len)?;
            match kind {
                0xe279_2aca => self.backing_format = Some(body.to_vec()),
                0x4441_5441 => self.data_file = Some(body.to_vec()),
                0x6803_f857 => names = body.to_vec(),
                0x0537_be77 => return Err(HeaderError::Encrypted("LUKS")),
                _ => {}
            }
            at = at.saturating_add(8 + len.next_multiple_of(8));
        }
        let unknown = self.incompatible & !KNOWN;
        if unknown != 0 {
            return Err(HeaderError::Unknown(feature_names(unknown, &names)));
        }
        Ok(())
    }
}

/// Names of the incompatible bits set in `bits`, from the image's own table of 48-byte rows.
fn feature_names(bits: u64, table: &[u8]) -> String {
    let mut found = Vec::new();
    for bit in (0..64u8).filter(|bit| bits & (1 << bit) != 0) {
        let row = table
            .chunks_exact(48)
            .find(|row| row.starts_with(&[0, bit]));
        let name = row.and_then(|row| row.get(2..)).map(|name| {
            let printable = |b: &&u8| b.is_ascii_graphic() || **b == b' ';
            name.iter()
                .take_while(printable)
                .map(|&b| char::from(b))
                .collect::<String>()
        });
        found.push(match name {
            Some(name) if !name.is_empty() => format!("{name} (bit {bit})"),
            _ => format!("bit {bit}"),
        });
    }
    found.join(", ")
}

fn slice(bytes: &[u8], offset: u64, len: u64) -> Result<&[u8], HeaderError> {
    let start = usize::try_from(offset).map_err(|_| HeaderError::Truncated)?;
    let len = usize::try_from(len).map_err(|_| HeaderError::Truncated)?;
    let end = start.checked_add(len).ok_or(HeaderError::Truncated)?;
    bytes.get(start..end).ok_or(HeaderError::Truncated)
}

pub(super) fn be32(bytes: &[u8], at: usize) -> Result<u32, HeaderError> {
    let field = bytes
        .get(at..at.saturating_add(4))
        .and_then(|b| b.try_into().ok());
    field.map(u32::from_be_bytes).ok_or(HeaderError::Truncated)
}

pub(super) fn be64(bytes: &[u8], at: usize) -> Result<u64, HeaderError> {
    let field = bytes
        .get(at..at.saturating_add(8))
        .and_then(|b| b.try_into().ok());
    field.map(u64::from_be_bytes).ok_or(HeaderError::Truncated)
}
