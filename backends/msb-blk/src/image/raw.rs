//! A raw image: the file or block device is the disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use msb_vhost::Segments;

use super::{Extent, ImageError, InPlace, Place, len_of};
use crate::file::{Durability, Emptying, HostFile};

/// A raw disk.
pub struct Raw {
    file: Arc<dyn HostFile>,
    size: AtomicU64,
    read_only: bool,
}

impl Raw {
    /// Takes a file whose size was `size` bytes; a last sector that is not whole is filled up with
    /// zeroes.
    pub fn new(file: Arc<dyn HostFile>, size: u64, read_only: bool) -> Self {
        Self {
            file,
            size: AtomicU64::new(whole_sectors(size)),
            read_only,
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub(super) fn locate(&self, offset: u64, len: u64) -> Extent<'_> {
        Extent {
            place: Place::File(self.file.as_ref(), offset),
            len,
        }
    }

    pub(super) fn write(
        &self,
        from: &mut Segments,
        offset: u64,
        len: u64,
    ) -> Result<(), ImageError> {
        self.writable()?;
        Ok(self
            .file
            .write_from(from, len_of(len), offset, Durability::Later)?)
    }

    /// Makes the disk `size` bytes long, or as long as its file has become.
    pub(super) fn grow(&self, size: Option<u64>) -> Result<(), ImageError> {
        let present = self.file.size()?;
        let size = size.unwrap_or(present);
        if size < self.size() {
            return Err(ImageError::Shrink);
        }
        if size > present {
            self.writable()?;
            self.file.set_size(size)?;
        }
        self.size.store(whole_sectors(size), Ordering::Release);
        Ok(())
    }

    pub(super) fn in_place(&self, offset: u64, len: u64) -> Result<InPlace<'_>, ImageError> {
        self.writable()?;
        Ok(InPlace {
            file: self.file.as_ref(),
            offset,
            len,
            inside: None,
        })
    }

    pub(super) fn avoids_cache(&self) -> bool {
        self.file.avoids_cache()
    }

    pub(super) fn empty(&self, offset: u64, len: u64, how: Emptying) -> Result<(), ImageError> {
        self.writable()?;
        Ok(self.file.empty(offset, len, how)?)
    }

    pub(super) fn flush(&self) -> Result<(), ImageError> {
        if self.read_only {
            return Ok(());
        }
        Ok(self.file.sync()?)
    }

    fn writable(&self) -> Result<(), ImageError> {
        if self.read_only {
            Err(ImageError::ReadOnly)
        } else {
            Ok(())
        }
    }
}

fn whole_sectors(size: u64) -> u64 {
    size.saturating_add(511) & !511
}
