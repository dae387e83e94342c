//! Virtio-blk requests: bytes of the driver to a checked operation (virtio 1.3 §5.2.6). Pure.

use msb_vhost::Segments;

/// Bytes of a sector, the unit of every address.
pub const SECTOR: u64 = 512;
/// Bytes of a device id.
pub const ID_LEN: usize = 20;
/// Most ranges in one discard or write-zeroes request.
pub const MAX_RANGES: usize = 32;
/// Most sectors of one range: 2 GiB.
pub const MAX_RANGE_SECTORS: u32 = 1 << 22;

const HEADER_LEN: usize = 16;
const RANGE_LEN: usize = 16;
const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;
const FLAG_UNMAP: u32 = 1;

/// How a request ended; the value is the status byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It was carried out.
    Ok = 0,
    /// It failed or is not allowed.
    IoError = 1,
    /// The device does not know it.
    Unsupported = 2,
}

/// Part of the disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Its first byte.
    pub offset: u64,
    /// Its length.
    pub len: u64,
    /// The space may be given back (write-zeroes only).
    pub unmap: bool,
}

/// What the driver wants. All ranges lie within the disk and consist of whole sectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Fill the writable part.
    Read(Range),
    /// Take the rest of the readable part.
    Write(Range),
    /// Everything that was completed must survive a crash.
    Flush,
    /// Give the serial number.
    GetId,
    /// The content of these ranges is not needed any more.
    Discard(Vec<Range>),
    /// These ranges read as zero from now on.
    WriteZeroes(Vec<Range>),
}

/// What requests are checked against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Refuse everything that changes the disk.
    pub read_only: bool,
    /// Whether discards are offered.
    pub discard: bool,
}

/// Reads the header, consumes it, and checks the operation. What is left of `readable` is the data
/// of a write. `room` is the length of the writable part without the status byte.
///
/// # Errors
///
/// The [`Status`] to answer with.
pub fn parse(readable: &mut Segments, room: usize, limits: &Limits) -> Result<Operation, Status> {
    let mut header = [0; HEADER_LEN];
    readable
        .read_exact(&mut header)
        .map_err(|_| Status::IoError)?;
    let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
    let kind = u32::from_le_bytes([k0, k1, k2, k3]);
    let sector = u64::from_le_bytes(sector);
    let changes = matches!(kind, TYPE_OUT | TYPE_DISCARD | TYPE_WRITE_ZEROES);
    if changes && limits.read_only {
        return Err(Status::IoError);
    }
    match kind {
        TYPE_IN => data_range(sector, room as u64, limits).map(Operation::Read),
        TYPE_OUT => data_range(sector, readable.len() as u64, limits).map(Operation::Write),
        TYPE_FLUSH => Ok(Operation::Flush),
        TYPE_GET_ID => Ok(Operation::GetId),
        TYPE_DISCARD if limits.discard => ranges(readable, limits, 0).map(Operation::Discard),
        TYPE_WRITE_ZEROES => ranges(readable, limits, FLAG_UNMAP).map(Operation::WriteZeroes),
        _ => Err(Status::Unsupported),
    }
}

fn data_range(sector: u64, len: u64, limits: &Limits) -> Result<Range, Status> {
    let offset = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
    let end = offset.checked_add(len).ok_or(Status::IoError)?;
    if !len.is_multiple_of(SECTOR) || end > limits.size {
        return Err(Status::IoError);
    }
    Ok(Range {
        offset,
        len,
        unmap: false,
    })
}

fn ranges(readable: &mut Segments, limits: &Limits, allowed: u32) -> Result<Vec<Range>, Status> {
    let len = readable.len();
    if len == 0 || !len.is_multiple_of(RANGE_LEN) || len / RANGE_LEN > MAX_RANGES {
        return Err(Status::IoError);
    }
    let mut found = Vec::with_capacity(len / RANGE_LEN);
    let mut bytes = [0; RANGE_LEN];
    while !readable.is_empty() {
        readable
            .read_exact(&mut bytes)
            .map_err(|_| Status::IoError)?;
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes(flags);
        if flags & !allowed != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > MAX_RANGE_SECTORS {
            return Err(Status::IoError);
        }
        let range = data_range(sector, u64::from(sectors) * SECTOR, limits)?;
        found.push(Range {
            unmap: flags & FLAG_UNMAP != 0,
            ..range
        });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        size: 1 << 20,
        read_only: false,
        discard: true,
    };

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        bytes
    }

    fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    }

    fn check(readable: impl Into<Vec<u8>>, room: usize, expected: impl Into<Answer>) {
        let mut segments = Segments::from_vec(readable.into());
        assert_eq!(parse(&mut segments, room, &LIMITS), expected.into());
    }

    type Answer = Result<Operation, Status>;

    fn bytes(offset: u64, len: u64) -> Range {
        Range {
            offset,
            len,
            unmap: false,
        }
    }

    #[test]
    fn headers() {
        check(vec![], 0, Err(Status::IoError));
        check(vec![0; 15], 512, Err(Status::IoError));
        check(header(0, 1), 512, Ok(Operation::Read(bytes(512, 512))));
        check(header(0, 0), 0, Ok(Operation::Read(bytes(0, 0))));
        check(header(0, 0), 511, Err(Status::IoError));
        check(
            header(0, 2047),
            512,
            Ok(Operation::Read(bytes((1 << 20) - 512, 512))),
        );
        check(header(0, 2048), 512, Err(Status::IoError));
        check(header(0, u64::MAX), 512, Err(Status::IoError));
        check(header(0, 1 << 55), 512, Err(Status::IoError));
        check(header(4, 0), 0, Ok(Operation::Flush));
        check(header(8, 0), 20, Ok(Operation::GetId));
        check(header(2, 0), 512, Err(Status::Unsupported));
        check(header(u32::MAX, 0), 512, Err(Status::Unsupported));
    }

    #[test]
    fn writes_take_what_is_left() {
        check(
            [header(1, 2), vec![7; 1024]].concat(),
            0,
            Ok(Operation::Write(bytes(1024, 1024))),
        );
        check(
            [header(1, 2), vec![7; 1000]].concat(),
            0,
            Err(Status::IoError),
        );
        check(
            [header(1, 2047), vec![7; 1024]].concat(),
            0,
            Err(Status::IoError),
        );
    }

    #[test]
    fn discards_and_zeroes() {
        let one = vec![bytes(4096, 8192)];
        check(
            [header(11, 0), range(8, 16, 0)].concat(),
            0,
            Ok(Operation::Discard(one.clone())),
        );
        check(
            [header(13, 0), range(8, 16, 0)].concat(),
            0,
            Ok(Operation::WriteZeroes(one)),
        );
        let unmap = vec![Range {
            offset: 0,
            len: 512,
            unmap: true,
        }];
        check(
            [header(13, 0), range(0, 1, 1)].concat(),
            0,
            Ok(Operation::WriteZeroes(unmap)),
        );
        check(
            [header(11, 0), range(0, 1, 1)].concat(),
            0,
            Err(Status::Unsupported),
        );
        check(
            [header(13, 0), range(0, 1, 2)].concat(),
            0,
            Err(Status::Unsupported),
        );
        check(
            [header(13, 0), range(2048, 1, 0)].concat(),
            0,
            Err(Status::IoError),
        );
        check(
            [header(13, 0), range(u64::MAX, u32::MAX, 0)].concat(),
            0,
            Err(Status::IoError),
        );
        check(header(11, 0), 0, Err(Status::IoError));
        check(
            [header(11, 0), vec![0; 17]].concat(),
            0,
            Err(Status::IoError),
        );
        check(
            [header(11, 0), range(0, 1, 0).repeat(33)].concat(),
            0,
            Err(Status::IoError),
        );
    }

    #[test]
    fn a_read_only_disk_takes_nothing() {
        let limits = Limits {
            read_only: true,
            ..LIMITS
        };
        for kind in [1, 11, 13] {
            let mut segments = Segments::from_vec([header(kind, 0), range(0, 1, 0)].concat());
            assert_eq!(parse(&mut segments, 0, &limits), Err(Status::IoError));
        }
        let mut segments = Segments::from_vec(header(4, 0));
        assert_eq!(parse(&mut segments, 0, &limits), Ok(Operation::Flush));
    }
}
