//! Makes the disk longer while it is in use.
//!
//! The L1 table grows within the clusters it has: its new entries are zero durably before the header
//! counts them, and they are counted durably before the header gives the new size.

use super::*;

impl Qcow2 {
    pub(in crate::image) fn grow(&self, size: u64) -> Result<(), ImageError> {
        self.writable()?;
        if size < self.size() {
            return Err(ImageError::Shrink);
        }
        // Version 2 has no place for the size of the disk in a snapshot.
        if !size.is_multiple_of(512) || (self.header.version == 2 && self.header.snapshots > 0) {
            return Err(ImageError::Unsupported);
        }
        let _l1 = self.l1_lock.lock().unwrap_or_else(PoisonError::into_inner);
        let per_table = self.header.l2_entries() << self.header.cluster_bits;
        self.tables
            .lengthen(size.div_ceil(per_table), self.cluster_size())?;
        if self.header.external_data && self.data.size()? < size {
            self.data.set_size(size)?;
        }
        self.file
            .write_at(&size.to_be_bytes(), 24, Durability::Now)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}
