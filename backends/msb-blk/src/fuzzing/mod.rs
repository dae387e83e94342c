//! Entry points for fuzzing: hostile bytes as a request or an image, over a file in memory.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use msb_vhost::Segments;

use crate::file::{Durability, Emptying, HostFile, Wait};
use crate::image::Image;
use crate::image::qcow2::{Header, Qcow2};
use crate::image::vmdk::{Descriptor, ExtentKind, ExtentLine, Source, SparseHeader, Vmdk};
use crate::request::{Limits, parse};

/// Largest file an image may grow to.
const MAX_FILE: u64 = 64 << 20;

/// A file in memory; beyond 64 MiB it is full.
#[derive(Default)]
pub struct MemoryFile(Mutex<Vec<u8>>);

impl MemoryFile {
    /// A file with these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Mutex::new(bytes))
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

impl HostFile for MemoryFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.bytes().len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.bytes();
        let rest = bytes.get(index(offset)..).unwrap_or_default();
        buf.fill(0);
        buf.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, _: Durability) -> io::Result<()> {
        let end = offset.saturating_add(buf.len() as u64);
        if end > self.size()? {
            self.set_size(end)?;
        }
        if let Some(to) = self.bytes().get_mut(index(offset)..index(end)) {
            to.copy_from_slice(buf);
        }
        Ok(())
    }

    fn read_into(&self, to: &mut Segments, len: usize, offset: u64, _: Wait) -> io::Result<()> {
        let mut bytes = vec![0; len];
        self.read_at(&mut bytes, offset)?;
        to.write_all(&bytes).map_err(io::Error::other)
    }

    fn write_from(
        &self,
        from: &mut Segments,
        len: usize,
        offset: u64,
        durability: Durability,
    ) -> io::Result<()> {
        let mut bytes = vec![0; len];
        from.read_exact(&mut bytes).map_err(io::Error::other)?;
        self.write_at(&bytes, offset, durability)
    }

    fn empty(&self, offset: u64, len: u64, _: Emptying) -> io::Result<()> {
        let mut bytes = self.bytes();
        let end = index(offset.saturating_add(len)).min(bytes.len());
        if let Some(range) = bytes.get_mut(index(offset)..end) {
            range.fill(0);
        }
        Ok(())
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        if size > MAX_FILE {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes().resize(index(size), 0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Parses `data` as the readable part of a request.
pub fn request(data: &[u8]) {
    let limits = Limits {
        size: 1 << 30,
        read_only: data.len().is_multiple_of(3),
        discard: data.len().is_multiple_of(2),
    };
    let _ = parse(
        &mut Segments::from_vec(data.to_vec()),
        data.len() % 5000,
        &limits,
    );
}

/// Opens `data` as a qcow2 image and uses it.
pub fn qcow2(data: &[u8]) {
    let Ok(header) = Header::parse(data) else {
        return;
    };
    let read_only = header.corrupt || header.dirty;
    let file = Arc::new(MemoryFile::new(data.to_vec()));
    let data_file = header
        .external_data
        .then(|| Arc::new(MemoryFile::default()) as _);
    if let Ok(image) = Qcow2::open(header, file, data_file, None, read_only) {
        exercise(&Image::Qcow2(Box::new(image)), data);
    }
}

/// Opens `data` as a VMDK descriptor, then as a sparse extent, and uses it.
pub fn vmdk(data: &[u8]) {
    let _ = Descriptor::parse(data);
    let Ok(header) = SparseHeader::parse(data) else {
        return;
    };
    let kind = ExtentKind::Sparse {
        name: String::new(),
    };
    let line = ExtentLine {
        writable: true,
        sectors: header.capacity,
        kind,
    };
    let source = Source::Sparse(Arc::new(MemoryFile::new(data.to_vec())), header);
    if let Ok(image) = Vmdk::open(vec![(line, source)], None, None, None, false) {
        exercise(&Image::Vmdk(Box::new(image)), data);
    }
}

/// Reads, writes and empties where the last bytes of `data` say.
fn exercise(image: &Image, data: &[u8]) {
    let sectors = image.size() / 512;
    if sectors == 0 {
        return;
    }
    let mut buf = vec![0; 8192];
    for place in data.rchunks_exact(4).take(16) {
        let place = place.try_into().map_or(0, u32::from_le_bytes);
        let at = u64::from(place >> 4) % sectors * 512;
        let len = (u64::from(place >> 8 & 15) + 1) * 512;
        let len = len.min(image.size() - at);
        let _ = match place & 7 {
            0..=2 => {
                let part = buf.get_mut(..index(len)).unwrap_or_default();
                image.read_at(part, at)
            }
            3..=4 => image.write(&mut Segments::from_vec(vec![7; index(len)]), at, len),
            5 => image.empty(at, (len * 64).min(image.size() - at), Emptying::Discard),
            6 => image.empty(at, (len * 64).min(image.size() - at), Emptying::Zero),
            _ => image.flush(),
        };
    }
    let _ = image.close();
}
