//! Virtual disks: a flat range of bytes over whatever the image format does.
//!
//! ```text
//! device ─▶ Image ─▶ locate(offset, len) ─▶ Extent { file, place } | zeroes | packed bytes
//!             │ raw │ qcow2 │ vmdk │ backing images below, read-only
//! ```
//!
//! Invariant of every format: whatever `write`, `empty` and `flush` leave half done when the
//! process or the host dies, the image opens again with everything that was flushed.

mod beside;
mod gate;
mod lock;
mod open;
mod raw;
mod sys;

pub mod qcow2;
pub mod vmdk;

pub use beside::{References, is_plain_name};
pub use gate::Inside;
pub use open::{Format, OpenError, OpenOptions, open};
pub use raw::Raw;

use std::io;

use msb_vhost::Segments;

use crate::file::{Emptying, HostFile, Wait};
use qcow2::Qcow2;
use vmdk::Vmdk;

/// Why an operation on an open image failed. To the guest all of them are an I/O error.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The host refused; ENOSPC and EDQUOT among them.
    #[error("host input/output failed")]
    Host(#[from] io::Error),
    /// The image contradicts itself.
    #[error("image is corrupt: {0}")]
    Corrupt(&'static str),
    /// The bytes of this place are lost; the rest of the image can be relied on.
    #[error("data is damaged: {0}")]
    Damaged(&'static str),
    /// The image cannot be written.
    #[error("image is read-only")]
    ReadOnly,
    /// The request leaves the disk.
    #[error("range {offset}+{len} lies outside the disk")]
    OutOfRange {
        /// First byte of the range.
        offset: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The format cannot express it.
    #[error("the image format cannot do this")]
    Unsupported,
    /// Its tables have no room for so large a disk.
    #[error("the image has no room for the tables of so large a disk")]
    TooLarge,
    /// A disk in use does not become smaller.
    #[error("a disk in use cannot become smaller")]
    Shrink,
}

impl ImageError {
    /// Whether the operation only failed because it was told not to wait.
    pub fn would_block(&self) -> bool {
        matches!(self, Self::Host(e) if e.kind() == io::ErrorKind::WouldBlock)
    }
}

/// Where the bytes of a piece of the disk are.
pub enum Place<'a> {
    /// In a host file, at this offset.
    File(&'a dyn HostFile, u64),
    /// Nowhere: they are zero.
    Zero,
    /// In compressed form; [`Image::unpack`] gives them.
    Packed,
}

/// A piece of the disk whose bytes lie together.
pub struct Extent<'a> {
    /// Where.
    pub place: Place<'a>,
    /// Length in bytes, at least 1.
    pub len: u64,
}

/// Where a write may go without a change of the mapping.
pub struct InPlace<'a> {
    /// The file.
    pub file: &'a dyn HostFile,
    /// Offset in it.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
    /// To be kept until the bytes are written.
    pub inside: Option<Inside>,
}

/// An open image of any format.
pub enum Image {
    /// The file is the disk.
    Raw(Raw),
    /// QEMU's copy-on-write format.
    Qcow2(Box<Qcow2>),
    /// VMware's formats.
    Vmdk(Box<Vmdk>),
}

impl Image {
    /// Size of the virtual disk in bytes, a multiple of 512.
    pub fn size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.size(),
            Self::Qcow2(qcow2) => qcow2.size(),
            Self::Vmdk(vmdk) => vmdk.size(),
        }
    }

    /// Smallest piece that can be given back or made zero without writing, in bytes.
    pub fn granularity(&self) -> u64 {
        match self {
            Self::Raw(_) => 4096,
            Self::Qcow2(qcow2) => qcow2.cluster_size(),
            Self::Vmdk(vmdk) => vmdk.granularity(),
        }
    }

    /// Whether [`Image::empty`] can do anything but write zeroes.
    pub fn can_discard(&self) -> bool {
        match self {
            Self::Raw(_) | Self::Qcow2(_) => true,
            Self::Vmdk(vmdk) => vmdk.can_discard(),
        }
    }

    /// Finds the longest piece that starts at `offset`, at most `len` bytes.
    ///
    /// # Errors
    ///
    /// [`ImageError`] when the metadata cannot be read or is corrupt.
    pub fn locate(&self, offset: u64, len: u64) -> Result<Extent<'_>, ImageError> {
        check_range(offset, len, self.size())?;
        match self {
            Self::Raw(raw) => Ok(raw.locate(offset, len)),
            Self::Qcow2(qcow2) => qcow2.locate(offset, len),
            Self::Vmdk(vmdk) => vmdk.locate(offset, len),
        }
    }

    /// Fills `buf` with the compressed bytes at `offset`, which [`Image::locate`] has called
    /// packed and at least as long.
    ///
    /// # Errors
    ///
    /// [`ImageError`] when they cannot be read or do not inflate.
    pub fn unpack(&self, buf: &mut [u8], offset: u64) -> Result<(), ImageError> {
        match self {
            Self::Raw(_) => Err(ImageError::Unsupported),
            Self::Qcow2(qcow2) => qcow2.unpack(buf, offset),
            Self::Vmdk(vmdk) => vmdk.unpack(buf, offset),
        }
    }

    /// Moves `len` bytes of the disk at `offset` into the front of `to` and consumes what was
    /// filled.
    ///
    /// # Errors
    ///
    /// [`ImageError`]; with [`Wait::Never`] one that [`ImageError::would_block`], and then what
    /// was read so far stays consumed.
    pub fn read(
        &self,
        to: &mut Segments,
        mut offset: u64,
        mut len: u64,
        wait: Wait,
    ) -> Result<(), ImageError> {
        while len > 0 {
            let extent = self.locate(offset, len)?;
            let step = len_of(extent.len);
            match extent.place {
                Place::File(file, at) => file.read_into(to, step, at, wait)?,
                Place::Zero => {
                    to.fill(0, step);
                }
                Place::Packed => {
                    let mut bytes = vec![0; step];
                    self.unpack(&mut bytes, offset)?;
                    to.write_all(&bytes)
                        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
                }
            }
            offset += extent.len;
            len = len.saturating_sub(extent.len);
        }
        Ok(())
    }

    /// Fills `buf` from the disk at `offset`; bytes beyond its end are zero.
    ///
    /// # Errors
    ///
    /// [`ImageError`].
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), ImageError> {
        let locate = |offset, len| self.locate(offset, len);
        let unpack = |buf: &mut [u8], offset| self.unpack(buf, offset);
        read_through(self.size(), locate, unpack, buf, offset)
    }

    /// Whether `len` bytes at `offset` are known to be zero without reading data.
    ///
    /// # Errors
    ///
    /// [`ImageError`] when the metadata cannot be read.
    pub fn is_zero(&self, mut offset: u64, len: u64) -> Result<bool, ImageError> {
        let end = offset.saturating_add(len).min(self.size());
        while offset < end {
            let extent = self.locate(offset, end - offset)?;
            if !matches!(extent.place, Place::Zero) {
                return Ok(false);
            }
            offset += extent.len;
        }
        Ok(true)
    }

    /// Writes the first `len` bytes of `from` to the disk at `offset` and consumes them. They
    /// survive the death of the process at once, that of the host after [`Image::flush`].
    ///
    /// # Errors
    ///
    /// [`ImageError`]; part of the range may have been written.
    pub fn write(&self, from: &mut Segments, offset: u64, len: u64) -> Result<(), ImageError> {
        check_range(offset, len, self.size())?;
        match self {
            Self::Raw(raw) => raw.write(from, offset, len),
            Self::Qcow2(qcow2) => qcow2.write(from, offset, len),
            Self::Vmdk(vmdk) => vmdk.write(from, offset, len),
        }
    }

    /// Where the first bytes of a write of `len` bytes at `offset` go, for who writes them himself:
    /// `None` when only [`Image::write`] can, because the mapping has to change.
    ///
    /// # Errors
    ///
    /// [`ImageError`].
    pub fn in_place(&self, offset: u64, len: u64) -> Result<Option<InPlace<'_>>, ImageError> {
        check_range(offset, len, self.size())?;
        match self {
            Self::Raw(raw) => raw.in_place(offset, len).map(Some),
            Self::Qcow2(qcow2) => qcow2.in_place_for_later(offset, len),
            Self::Vmdk(_) => Ok(None),
        }
    }

    /// Whether guest data goes past the page cache, so that every transfer waits for the disk.
    pub fn avoids_cache(&self) -> bool {
        match self {
            Self::Raw(raw) => raw.avoids_cache(),
            Self::Qcow2(qcow2) => qcow2.avoids_cache(),
            Self::Vmdk(_) => false,
        }
    }

    /// Discards a range or makes it zero.
    ///
    /// # Errors
    ///
    /// [`ImageError`]; part of the range may have been emptied.
    pub fn empty(&self, offset: u64, len: u64, how: Emptying) -> Result<(), ImageError> {
        check_range(offset, len, self.size())?;
        match self {
            Self::Raw(raw) => raw.empty(offset, len, how),
            Self::Qcow2(qcow2) => qcow2.empty(offset, len, how),
            Self::Vmdk(vmdk) => vmdk.empty(offset, len, how),
        }
    }

    /// Makes the disk `size` bytes long, while it is in use; without a size a raw disk becomes as
    /// long as its file. The new part reads as zeroes.
    ///
    /// # Errors
    ///
    /// [`ImageError`]; the disk keeps its size then.
    pub fn grow(&self, size: Option<u64>) -> Result<(), ImageError> {
        match self {
            Self::Raw(raw) => raw.grow(size),
            Self::Qcow2(qcow2) => qcow2.grow(size.ok_or(ImageError::Unsupported)?),
            Self::Vmdk(_) => Err(ImageError::Unsupported),
        }
    }

    /// Puts everything written so far on stable storage.
    ///
    /// # Errors
    ///
    /// [`ImageError`] when the host reports one.
    pub fn flush(&self) -> Result<(), ImageError> {
        match self {
            Self::Raw(raw) => raw.flush(),
            Self::Qcow2(qcow2) => qcow2.flush(),
            Self::Vmdk(vmdk) => vmdk.flush(),
        }
    }

    /// Flushes and gives back what was kept in reserve; the last call before the process ends.
    ///
    /// # Errors
    ///
    /// [`ImageError`]; the image is consistent all the same.
    pub fn close(&self) -> Result<(), ImageError> {
        match self {
            Self::Raw(raw) => raw.flush(),
            Self::Qcow2(qcow2) => qcow2.close(),
            Self::Vmdk(vmdk) => vmdk.close(),
        }
    }
}

/// Fills `buf` with the bytes at `offset` of a disk of `size` bytes, beyond which they are zero.
fn read_through<'a>(
    size: u64,
    locate: impl Fn(u64, u64) -> Result<Extent<'a>, ImageError>,
    unpack: impl Fn(&mut [u8], u64) -> Result<(), ImageError>,
    mut buf: &mut [u8],
    mut offset: u64,
) -> Result<(), ImageError> {
    while !buf.is_empty() {
        let left = size.saturating_sub(offset).min(buf.len() as u64);
        if left == 0 {
            buf.fill(0);
            break;
        }
        let extent = locate(offset, left)?;
        let (front, rest) = buf.split_at_mut(len_of(extent.len));
        match extent.place {
            Place::File(file, at) => file.read_at(front, at)?,
            Place::Zero => front.fill(0),
            Place::Packed => unpack(front, offset)?,
        }
        buf = rest;
        offset += extent.len;
    }
    Ok(())
}

/// A length of at most one request as usize; requests are shorter than 4 GiB.
fn len_of(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

fn check_range(offset: u64, len: u64, size: u64) -> Result<(), ImageError> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(ImageError::OutOfRange { offset, len }),
    }
}
