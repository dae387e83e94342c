//! A file in memory that remembers how it came about, and that can be told to fail.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

use msb_blk::file::{Durability, Emptying, HostFile, Wait};
use msb_vhost::Segments;

use super::Random;

#[derive(Clone)]
pub enum Change {
    Write {
        offset: usize,
        bytes: Vec<u8>,
        now: bool,
    },
    Size(usize),
    Sync,
}

/// A file in memory that remembers how it came about.
/// Which changes fail.
#[derive(Default)]
pub enum Failures {
    #[default]
    None,
    /// One in so many, chosen by the generator.
    OneIn(u64, Random),
    /// Those with these numbers, counted from 0, with this error.
    At(std::ops::Range<usize>, i32),
}

#[derive(Default)]
pub struct Recorder {
    pub bytes: Mutex<Vec<u8>>,
    pub log: Mutex<Vec<Change>>,
    pub failures: Mutex<Failures>,
    /// Changes that were asked for, failed ones too.
    pub asked: Mutex<usize>,
}

impl Recorder {
    pub fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            ..Self::default()
        })
    }

    pub fn len(&self) -> usize {
        self.log.lock().unwrap().len()
    }

    pub fn fail(&self, failures: Failures) {
        *self.failures.lock().unwrap() = failures;
    }

    pub fn may_fail(&self) -> bool {
        !matches!(*self.failures.lock().unwrap(), Failures::None)
    }

    /// The error of this change, and how many of its sectors arrive all the same.
    fn failure(&self, sectors: u64) -> Option<(i32, u64)> {
        let mut asked = self.asked.lock().unwrap();
        let number = *asked;
        *asked += 1;
        match &mut *self.failures.lock().unwrap() {
            Failures::None => None,
            Failures::OneIn(one_in, random) => (random.below(*one_in) == 0).then(|| {
                let errors = [libc::ENOSPC, libc::EIO, libc::EDQUOT];
                (errors[random.below(3) as usize], random.below(sectors + 1))
            }),
            Failures::At(range, errno) => range
                .contains(&number)
                .then_some((*errno, number as u64 % (sectors + 1))),
        }
    }

    fn apply(&self, change: Change) -> io::Result<()> {
        let sectors = match &change {
            Change::Write { bytes, .. } => bytes.len() as u64 / 512,
            Change::Size(_) | Change::Sync => 0,
        };
        if let Some((errno, arrived)) = self.failure(sectors) {
            // A write that fails may still have changed part of the range.
            if let Change::Write { offset, bytes, .. } = &change {
                let part = Change::Write {
                    offset: *offset,
                    bytes: bytes[..arrived as usize * 512].to_vec(),
                    now: false,
                };
                apply(&mut self.bytes.lock().unwrap(), &part, 0, usize::MAX);
                self.log.lock().unwrap().push(part);
            }
            return Err(io::Error::from_raw_os_error(errno));
        }
        apply(&mut self.bytes.lock().unwrap(), &change, 0, usize::MAX);
        self.log.lock().unwrap().push(change);
        Ok(())
    }
}

/// Applies the part of a change that lies between two offsets.
pub fn apply(file: &mut Vec<u8>, change: &Change, from: usize, to: usize) {
    match change {
        Change::Write { offset, bytes, .. } => {
            let start = (*offset).max(from);
            let end = (offset + bytes.len()).min(to);
            if start < end {
                if file.len() < end {
                    file.resize(end, 0);
                }
                file[start..end].copy_from_slice(&bytes[start - offset..end - offset]);
            }
        }
        Change::Size(size) => file.resize(*size, 0),
        Change::Sync => {}
    }
}

impl HostFile for Recorder {
    fn size(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().unwrap().len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.bytes.lock().unwrap();
        let start = (offset as usize).min(bytes.len());
        let len = buf.len().min(bytes.len() - start);
        buf.fill(0);
        buf[..len].copy_from_slice(&bytes[start..start + len]);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, durability: Durability) -> io::Result<()> {
        let now = durability == Durability::Now;
        self.apply(Change::Write {
            offset: offset as usize,
            bytes: buf.to_vec(),
            now,
        })
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
        let end = self
            .bytes
            .lock()
            .unwrap()
            .len()
            .min((offset + len) as usize);
        let bytes = vec![0; end.saturating_sub(offset as usize)];
        self.apply(Change::Write {
            offset: offset as usize,
            bytes,
            now: false,
        })
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.apply(Change::Size(size as usize))
    }

    fn sync(&self) -> io::Result<()> {
        self.apply(Change::Sync)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
