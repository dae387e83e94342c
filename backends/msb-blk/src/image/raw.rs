//! A raw image: the file or block device is the disk.

use std::sync::Arc;

use msb_vhost::Segments;

use super::{Extent, ImageError, InPlace, Place, len_of};
use crate::file::{Durability, Emptying, HostFile};

/// A raw disk.
pub struct Raw {
    file: Arc<dyn HostFile>,
    size: u64,
    read_only: bool,
}

impl Raw {
    /// Takes a file whose size was `size` bytes; a last sector that is not whole is filled up with
    /// zeroes.
    pub fn new(file: Arc<dyn HostFile>, size: u64, read_only: bool) -> Self {
        Self {
            file,
            size: size.saturating_add(511) & !511,
            read_only,
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.size
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
