//! Internal snapshots: found only so that nothing ever writes over them.

use super::entry::OFFSET;
use super::header::{Header, be32, be64};
use super::table::for_each_word;
use crate::file::HostFile;
use crate::image::ImageError;

const MAX_TABLE_BYTES: u64 = 64 << 20;
const MAX_L1_BYTES: u64 = 32 << 20;
/// All L1 tables of snapshots together; beyond it the image is refused for writing.
const MAX_ALL_L1_BYTES: u64 = 256 << 20;

/// Whose a table is.
pub(super) enum Table {
    /// One snapshot's alone.
    Own,
    /// An L2 table, which the active state and other snapshots may have too.
    MayBeShared,
}

/// Calls `mark` with offset and length of the snapshot table and of every table a snapshot has; it
/// refuses those that the file cannot hold.
pub(super) fn tables(
    file: &dyn HostFile,
    header: &Header,
    mut mark: impl FnMut(Table, u64, u64) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let mut at = header.snapshots_offset;
    let mut all_l1 = 0;
    for _ in 0..header.snapshots {
        let mut fixed = [0; 40];
        file.read_at(&mut fixed, at)?;
        let cut_off = |_| ImageError::Corrupt("a snapshot is cut off");
        let l1_offset = be64(&fixed, 0).map_err(cut_off)?;
        let l1_bytes = u64::from(be32(&fixed, 8).map_err(cut_off)?) * 8;
        let id_and_name = be32(&fixed, 12).map_err(cut_off)?;
        let extra = u64::from(be32(&fixed, 36).map_err(cut_off)?);
        let names = u64::from(id_and_name >> 16) + u64::from(id_and_name & 0xffff);
        at += (40 + extra + names).next_multiple_of(8);
        if at - header.snapshots_offset > MAX_TABLE_BYTES {
            return Err(ImageError::Corrupt("the snapshot table is too large"));
        }
        all_l1 += l1_bytes;
        let aligned = l1_offset.is_multiple_of(header.cluster_size()) && l1_offset < 1 << 56;
        if l1_bytes > MAX_L1_BYTES || all_l1 > MAX_ALL_L1_BYTES || !aligned {
            return Err(ImageError::Corrupt("a snapshot has an impossible L1 table"));
        }
        mark(Table::Own, l1_offset, l1_bytes)?;
        let mut marked = Ok(());
        for_each_word(file, l1_offset, l1_bytes / 8, |word| {
            if word & OFFSET != 0 && marked.is_ok() {
                marked = mark(Table::MayBeShared, word & OFFSET, 1);
            }
        })?;
        marked?;
    }
    if header.snapshots > 0 {
        mark(
            Table::Own,
            header.snapshots_offset,
            at - header.snapshots_offset,
        )?;
    }
    Ok(())
}
