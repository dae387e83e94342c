//! A file in memory that can be told to fail.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use msb_vhost::Segments;

use super::index;
use crate::file::{Durability, Emptying, HostFile, Wait};

/// Largest file an image may grow to.
const MAX_FILE: u64 = 64 << 20;

/// A file in memory; beyond 64 MiB it is full.
#[derive(Default)]
pub struct MemoryFile {
    bytes: Mutex<Vec<u8>>,
    /// How many changes succeed before one fails, counted from 1; 0 for no failure.
    countdown: AtomicU32,
}

impl MemoryFile {
    /// A file with these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes: Mutex::new(bytes),
            countdown: AtomicU32::new(0),
        }
    }

    /// Lets the `nth` change from now on fail, counted from 1, and none with 0.
    pub fn fail_at(&self, nth: u32) {
        self.countdown.store(nth, Ordering::Relaxed);
    }

    /// A copy of everything in it.
    pub fn content(&self) -> Vec<u8> {
        self.bytes().clone()
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self) -> io::Result<()> {
        let count = |left: u32| left.checked_sub(1);
        match self
            .countdown
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, count)
        {
            Ok(1) => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        }
    }
}

impl HostFile for MemoryFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.bytes().len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.bytes();
        let rest = bytes.get(index(offset)..).unwrap_or_default();
        let len = rest.len().min(buf.len());
        let (front, end) = buf.split_at_mut(len);
        front.copy_from_slice(rest.get(..len).unwrap_or_default());
        end.fill(0);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, _: Durability) -> io::Result<()> {
        self.change()?;
        let end = offset.saturating_add(buf.len() as u64);
        if end > MAX_FILE {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let mut bytes = self.bytes();
        if end > bytes.len() as u64 {
            bytes.resize(index(end), 0);
        }
        if let Some(to) = bytes.get_mut(index(offset)..index(end)) {
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
        self.change()?;
        let mut bytes = self.bytes();
        let end = index(offset.saturating_add(len)).min(bytes.len());
        if let Some(range) = bytes.get_mut(index(offset)..end) {
            range.fill(0);
        }
        Ok(())
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.change()?;
        if size > MAX_FILE {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes().resize(index(size), 0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.change()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
