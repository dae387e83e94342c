//! VMDK: a disk made of extents, each flat, sparse or zero, over an optional parent.

mod descriptor;
mod header;
mod open;
mod sparse;

pub use descriptor::{Descriptor, ExtentKind, ExtentLine, MAX_DESCRIPTOR, VmdkError};
pub use header::{SparseHeader, is_at_end, is_sparse};
pub(super) use open::is_own_extent;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use msb_vhost::Segments;

use self::sparse::{Grain, Sparse};
use super::{Extent, Image, ImageError, Place, len_of};
use crate::file::{Durability, Emptying, HostFile};

/// The content of one extent, opened.
pub enum Source {
    /// Plain bytes from an offset of a file on.
    Flat(Arc<dyn HostFile>, u64),
    /// A sparse file with its checked header.
    Sparse(Arc<dyn HostFile>, SparseHeader),
    /// Zeroes.
    Zero,
}

enum Body {
    Flat(Arc<dyn HostFile>, u64),
    Sparse(Box<Sparse>),
    Zero,
}

struct Part {
    start: u64,
    end: u64,
    writable: bool,
    body: Body,
}

/// Where the descriptor text is, to change the content id at the first write.
pub struct DescriptorPlace {
    /// The file it is in.
    pub file: Arc<dyn HostFile>,
    /// Offset of its content id's eight digits.
    pub cid: u64,
}

/// An open VMDK.
pub struct Vmdk {
    parts: Vec<Part>,
    parent: Option<Arc<Image>>,
    read_only: bool,
    descriptor: Option<DescriptorPlace>,
    cid_changed: AtomicBool,
    /// Content id as the descriptor had it when the image was opened.
    cid: Option<u32>,
}

impl Vmdk {
    /// Puts opened extents together; each comes with its line of the descriptor.
    ///
    /// # Errors
    ///
    /// [`ImageError`] when grain directories cannot be read.
    pub fn open(
        extents: Vec<(ExtentLine, Source)>,
        parent: Option<Arc<Image>>,
        descriptor: Option<DescriptorPlace>,
        cid: Option<u32>,
        read_only: bool,
    ) -> Result<Self, ImageError> {
        let mut parts = Vec::with_capacity(extents.len());
        let mut start = 0;
        for (line, source) in extents {
            let end = start + line.sectors * 512;
            let body = match source {
                Source::Flat(file, offset) => Body::Flat(file, offset),
                Source::Sparse(file, header) => Body::Sparse(Box::new(Sparse::open(
                    file,
                    header,
                    read_only || !line.writable,
                )?)),
                Source::Zero => Body::Zero,
            };
            parts.push(Part {
                start,
                end,
                writable: line.writable,
                body,
            });
            start = end;
        }
        Ok(Self {
            parts,
            parent,
            read_only,
            descriptor,
            cid_changed: AtomicBool::new(false),
            cid,
        })
    }

    pub(super) fn size(&self) -> u64 {
        self.parts.last().map_or(0, |part| part.end)
    }

    pub(super) fn granularity(&self) -> u64 {
        let grain = |part: &Part| match &part.body {
            Body::Sparse(sparse) => sparse.grain_bytes(),
            Body::Flat(..) | Body::Zero => 4096,
        };
        self.parts.iter().map(grain).max().unwrap_or(4096)
    }

    pub(super) fn can_discard(&self) -> bool {
        self.parts.iter().all(|part| !part.is_packed())
    }

    /// Whether some extent can only be read.
    pub fn is_packed(&self) -> bool {
        self.parts.iter().any(Part::is_packed)
    }

    fn part(&self, offset: u64) -> Result<&Part, ImageError> {
        let index = self.parts.partition_point(|part| part.end <= offset);
        self.parts
            .get(index)
            .ok_or(ImageError::OutOfRange { offset, len: 0 })
    }

    pub(super) fn locate(&self, offset: u64, len: u64) -> Result<Extent<'_>, ImageError> {
        let part = self.part(offset)?;
        let within = offset - part.start;
        let len = len.min(part.end - offset);
        match &part.body {
            Body::Flat(file, from) => Ok(Extent {
                place: Place::File(file.as_ref(), from + within),
                len,
            }),
            Body::Zero => Ok(Extent {
                place: Place::Zero,
                len,
            }),
            Body::Sparse(sparse) => {
                let (grain, len) = sparse.locate(within, len)?;
                let place = match grain {
                    Grain::Data(at) => Place::File(sparse.file(), at),
                    Grain::Packed(_) => Place::Packed,
                    Grain::Zero => Place::Zero,
                    Grain::Unallocated => return self.locate_below(offset, len),
                };
                Ok(Extent { place, len })
            }
        }
    }

    fn locate_below(&self, offset: u64, len: u64) -> Result<Extent<'_>, ImageError> {
        let left = |parent: &Arc<Image>| parent.size().saturating_sub(offset).min(len);
        match self.parent.as_ref().map(|parent| (parent, left(parent))) {
            Some((parent, left)) if left > 0 => parent.locate(offset, left),
            _ => Ok(Extent {
                place: Place::Zero,
                len,
            }),
        }
    }

    pub(super) fn unpack(&self, buf: &mut [u8], offset: u64) -> Result<(), ImageError> {
        let part = self.part(offset)?;
        let Body::Sparse(sparse) = &part.body else {
            return Err(ImageError::Unsupported);
        };
        let within = offset - part.start;
        match (sparse.locate(within, buf.len() as u64)?.0, &self.parent) {
            (Grain::Packed(at), _) => {
                let grain = sparse.unpack(at)?;
                let from = len_of(within % sparse.grain_bytes());
                let bytes = grain.get(from..from.saturating_add(buf.len()));
                buf.copy_from_slice(bytes.ok_or(ImageError::Corrupt("a grain is too short"))?);
                Ok(())
            }
            (Grain::Unallocated, Some(parent)) => parent.unpack(buf, offset),
            // It was written since it was located.
            (Grain::Data(at), _) => Ok(sparse.file().read_at(buf, at)?),
            _ => {
                buf.fill(0);
                Ok(())
            }
        }
    }

    pub(super) fn write(
        &self,
        from: &mut Segments,
        mut offset: u64,
        len: u64,
    ) -> Result<(), ImageError> {
        let end = offset + len;
        self.before_write()?;
        while offset < end {
            let part = self.writable_part(offset)?;
            let len = (end - offset).min(part.end - offset);
            let within = offset - part.start;
            offset += match &part.body {
                Body::Zero => return Err(ImageError::ReadOnly),
                Body::Flat(file, start) => {
                    file.write_from(from, len_of(len), start + within, Durability::Later)?;
                    len
                }
                Body::Sparse(sparse) => self.write_sparse(sparse, from, offset, within, len)?,
            };
        }
        Ok(())
    }

    fn writable_part(&self, offset: u64) -> Result<&Part, ImageError> {
        let part = self.part(offset)?;
        if self.read_only || !part.writable || part.is_packed() {
            return Err(ImageError::ReadOnly);
        }
        Ok(part)
    }

    /// Writes at most to the end of one grain or one stretch of grains; returns how much.
    fn write_sparse(
        &self,
        sparse: &Sparse,
        from: &mut Segments,
        offset: u64,
        within: u64,
        len: u64,
    ) -> Result<u64, ImageError> {
        if let (Grain::Data(at), found) = sparse.locate(within, len)? {
            sparse.write_data(from, at, found)?;
            return Ok(found);
        }
        let _grain = sparse.lock(within)?;
        let grain_bytes = sparse.grain_bytes();
        let start = within % grain_bytes;
        let len = len.min(grain_bytes - start);
        let (grain, _) = sparse.locate(within, 1)?;
        if matches!(grain, Grain::Data(_)) {
            return Ok(0);
        }
        let base = offset - start;
        if grain == Grain::Zero || self.parent_is_zero(base, grain_bytes)? {
            sparse.write_fresh(from, within, len)?;
            return Ok(len);
        }
        let mut bytes = vec![0; len_of(grain_bytes)];
        if let Some(parent) = &self.parent {
            parent.read_at(&mut bytes, base)?;
        }
        let new = bytes
            .get_mut(len_of(start)..len_of(start + len))
            .ok_or(ImageError::Unsupported)?;
        from.read_exact(new)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        sparse.write_over(&bytes, within - start)?;
        Ok(len)
    }

    fn parent_is_zero(&self, offset: u64, len: u64) -> Result<bool, ImageError> {
        self.parent
            .as_ref()
            .map_or(Ok(true), |parent| parent.is_zero(offset, len))
    }

    pub(super) fn empty(&self, mut offset: u64, len: u64, how: Emptying) -> Result<(), ImageError> {
        let end = offset + len;
        self.before_write()?;
        while offset < end {
            let part = self.writable_part(offset)?;
            let len = (end - offset).min(part.end - offset);
            let within = offset - part.start;
            offset += match &part.body {
                Body::Zero => return Err(ImageError::ReadOnly),
                Body::Flat(file, start) => {
                    file.empty(start + within, len, how)?;
                    len
                }
                Body::Sparse(sparse) => self.empty_sparse(sparse, offset, within, len, how)?,
            };
        }
        Ok(())
    }

    fn empty_sparse(
        &self,
        sparse: &Sparse,
        offset: u64,
        within: u64,
        len: u64,
        how: Emptying,
    ) -> Result<u64, ImageError> {
        let grain_bytes = sparse.grain_bytes();
        let start = within % grain_bytes;
        let len = len.min(grain_bytes - start);
        let guard = sparse.lock(within)?;
        match sparse.locate(within, len)?.0 {
            Grain::Data(at) => sparse.empty_data(at, len, how)?,
            Grain::Zero => {}
            Grain::Packed(_) => return Err(ImageError::ReadOnly),
            Grain::Unallocated => {
                let done = how == Emptying::Discard
                    || self.parent_is_zero(offset, len)?
                    || (len == grain_bytes && sparse.mark_zero(within)?);
                drop(guard);
                if !done {
                    let mut zeroes = Segments::from_vec(vec![0; len_of(len)]);
                    let mut written = 0;
                    while written < len {
                        let (at, left) = (offset + written, len - written);
                        written +=
                            self.write_sparse(sparse, &mut zeroes, at, within + written, left)?;
                    }
                }
            }
        }
        Ok(len)
    }

    /// Changes the content id before the first write, so that children notice.
    fn before_write(&self) -> Result<(), ImageError> {
        if self.read_only || self.cid_changed.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        if let Some(place) = &self.descriptor {
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            let mixed = now.as_nanos().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
            let cid = u32::try_from(mixed & 0x7fff_ffff).unwrap_or(1).max(1);
            place.file.write_at(
                format!("{cid:08x}").as_bytes(),
                place.cid,
                Durability::Later,
            )?;
        }
        Ok(())
    }

    pub(super) fn flush(&self) -> Result<(), ImageError> {
        self.for_each_file(|part| match &part.body {
            Body::Flat(file, _) => Ok(file.sync()?),
            Body::Sparse(sparse) => sparse.flush(),
            Body::Zero => Ok(()),
        })?;
        match &self.descriptor {
            Some(place) if !self.read_only => Ok(place.file.sync()?),
            _ => Ok(()),
        }
    }

    pub(super) fn close(&self) -> Result<(), ImageError> {
        self.flush()?;
        self.for_each_file(|part| match &part.body {
            Body::Sparse(sparse) => sparse.close(),
            Body::Flat(..) | Body::Zero => Ok(()),
        })
    }

    fn for_each_file(
        &self,
        act: impl Fn(&Part) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        if self.read_only {
            return Ok(());
        }
        self.parts
            .iter()
            .filter(|part| part.writable && !part.is_packed())
            .try_for_each(act)
    }
}

impl Part {
    fn is_packed(&self) -> bool {
        matches!(&self.body, Body::Sparse(sparse) if sparse.is_packed())
    }
}
