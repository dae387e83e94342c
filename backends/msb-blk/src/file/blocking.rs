//! A host file reached with plain system calls.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use msb_vhost::Segments;
use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use super::{Durability, Emptying, HostFile, Wait};

/// Zeroes written at a time where the host cannot empty a range by itself.
const ZERO_CHUNK: usize = 128 * 1024;
static ZEROES: [u8; ZERO_CHUNK] = [0; ZERO_CHUNK];

/// What stands between the guest and stable storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caching {
    /// The host's page cache; a flush of the guest reaches the disk.
    Writeback,
    /// No page cache for guest data (O_DIRECT).
    None,
    /// The host's page cache; flushes are ignored, so a crash of the host may lose everything.
    Unsafe,
}

/// A regular file or block device, open.
#[derive(Debug)]
pub struct BlockingFile {
    file: OwnedFd,
    /// The same file opened with O_DIRECT, for guest data only.
    direct: Option<OwnedFd>,
    is_device: bool,
    durable: bool,
    knows_nowait: AtomicBool,
    /// Whether the host hands out blocks ahead.
    hands_out: AtomicBool,
    /// The host once failed to write something back. It has forgotten what that was, so nothing may
    /// count as durable any more until the image is opened again.
    lost: AtomicBool,
}

impl BlockingFile {
    /// Takes over an open file. Anything but a regular file or a block device is refused.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for another type of file, or what fstat(2) reports.
    pub fn new(file: OwnedFd, caching: Caching) -> io::Result<Self> {
        let stat = rustix::fs::fstat(&file)?;
        let is_device = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            FileType::Directory => return Err(io::Error::from(Errno::ISDIR)),
            _ => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "neither a regular file nor a block device",
                ));
            }
        };
        Ok(Self {
            file,
            direct: None,
            is_device,
            durable: caching != Caching::Unsafe,
            knows_nowait: AtomicBool::new(true),
            hands_out: AtomicBool::new(!is_device),
            lost: AtomicBool::new(false),
        })
    }

    /// Sends guest data past the page cache from now on.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the host cannot do that for single sectors, or what open(2) reports.
    pub fn go_direct(&mut self, access: OFlags) -> io::Result<()> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let flags = access | OFlags::DIRECT | OFlags::CLOEXEC;
        let refused = || {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "no direct access to single sectors here; use --cache writeback",
            )
        };
        let direct = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| match e {
            Errno::INVAL => refused(),
            e => e.into(),
        })?;
        // The strictest request a guest can make: one sector, no better aligned than a sector.
        let mut bytes = vec![0; 2 * 4096];
        let start = bytes.as_ptr().align_offset(4096) + 512;
        let sector = bytes.get_mut(start..start + 512).unwrap_or_default();
        rustix::io::pread(&direct, sector, 512).map_err(|_| refused())?;
        self.direct = Some(direct);
        Ok(())
    }

    /// The descriptor of the file, for locks and checks.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The descriptor guest data goes through.
    fn data_fd(&self) -> BorrowedFd<'_> {
        self.direct.as_ref().unwrap_or(&self.file).as_fd()
    }

    /// Moves guest data past the page cache if that is wanted and its memory is aligned, else
    /// through it: the kernel keeps both ways coherent.
    fn by_data_fd(
        &self,
        mut transfer: impl FnMut(BorrowedFd<'_>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        match transfer(self.data_fd()) {
            Err(e) if self.direct.is_some() && e.raw_os_error() == Some(libc::EINVAL) => {
                transfer(self.file.as_fd())
            }
            result => result,
        }
    }

    fn flags(&self, durability: Durability) -> ReadWriteFlags {
        if durability == Durability::Now && self.durable {
            ReadWriteFlags::DSYNC
        } else {
            ReadWriteFlags::empty()
        }
    }

    /// Notes the failure of a durable write.
    fn lose(&self, durable: bool, error: &io::Error) {
        if durable && error.raw_os_error() == Some(libc::EIO) {
            self.lost.store(true, Ordering::Relaxed);
        }
    }

    fn write_zeroes(&self, mut offset: u64, len: u64) -> io::Result<()> {
        let end = offset.saturating_add(len);
        while offset < end {
            let step = usize::try_from(end - offset)
                .unwrap_or(ZERO_CHUNK)
                .min(ZERO_CHUNK);
            self.write_at(
                ZEROES.get(..step).unwrap_or_default(),
                offset,
                Durability::Later,
            )?;
            offset += step as u64;
        }
        Ok(())
    }
}

impl HostFile for BlockingFile {
    fn size(&self) -> io::Result<u64> {
        if self.is_device {
            return Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?);
        }
        Ok(u64::try_from(rustix::fs::fstat(&self.file)?.st_size).unwrap_or(0))
    }

    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match rustix::io::pread(&self.file, &mut *buf, offset) {
                Ok(0) => {
                    buf.fill(0);
                    return Ok(());
                }
                Ok(n) => {
                    offset += n as u64;
                    buf = buf.get_mut(n..).unwrap_or_default();
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn write_at(&self, mut buf: &[u8], mut offset: u64, durability: Durability) -> io::Result<()> {
        let flags = self.flags(durability);
        while !buf.is_empty() {
            let written = if flags.is_empty() {
                rustix::io::pwrite(&self.file, buf, offset)
            } else {
                rustix::io::pwritev2(&self.file, &[IoSlice::new(buf)], offset, flags)
            };
            match written {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    offset += n as u64;
                    buf = buf.get(n..).unwrap_or_default();
                }
                Err(Errno::INTR) => {}
                Err(e) => {
                    let error = e.into();
                    self.lose(!flags.is_empty(), &error);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn read_into(
        &self,
        to: &mut Segments,
        mut len: usize,
        mut offset: u64,
        wait: Wait,
    ) -> io::Result<()> {
        let mut flags = 0;
        if wait == Wait::Never {
            if self.direct.is_some() || !self.knows_nowait.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            flags = libc::RWF_NOWAIT;
        }
        while len > 0 {
            match self.by_data_fd(|fd| to.pread(fd, len, offset, flags)) {
                Ok(0) => {
                    to.fill(0, len);
                    return Ok(());
                }
                Ok(n) => {
                    offset += n as u64;
                    len = len.saturating_sub(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if flags != 0 && e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    self.knows_nowait.store(false, Ordering::Relaxed);
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn write_from(
        &self,
        from: &mut Segments,
        mut len: usize,
        mut offset: u64,
        durability: Durability,
    ) -> io::Result<()> {
        let flags = if self.flags(durability).is_empty() {
            0
        } else {
            libc::RWF_DSYNC
        };
        while len > 0 {
            match self.by_data_fd(|fd| from.pwrite(fd, len, offset, flags)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    offset += n as u64;
                    len = len.saturating_sub(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    self.lose(flags != 0, &e);
                    return Err(e);
                }
            }
        }
        Ok(())
    }

    fn empty(&self, offset: u64, len: u64, how: Emptying) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let flags = match how {
            Emptying::Discard | Emptying::Unmap => punch,
            Emptying::Zero => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        };
        loop {
            match rustix::fs::fallocate(&self.file, flags, offset, len) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NODEV | Errno::NOSYS | Errno::INVAL) => break,
                Err(e) => return Err(e.into()),
            }
        }
        match how {
            Emptying::Discard => Ok(()),
            Emptying::Unmap | Emptying::Zero => self.write_zeroes(offset, len),
        }
    }

    fn hand_out(&self, offset: u64, len: u64) {
        // Where this fails, as on a disk that is almost full, writes get their blocks one by one.
        if self.hands_out.load(Ordering::Relaxed)
            && rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, offset, len).is_err()
        {
            self.hands_out.store(false, Ordering::Relaxed);
        }
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        if self.is_device {
            if size > self.size()? {
                return Err(io::ErrorKind::StorageFull.into());
            }
            return Ok(());
        }
        Ok(rustix::fs::ftruncate(&self.file, size)?)
    }

    fn sync(&self) -> io::Result<()> {
        if !self.durable {
            return Ok(());
        }
        if self.lost.load(Ordering::Relaxed) {
            return Err(Errno::IO.into());
        }
        loop {
            match rustix::fs::fdatasync(&self.file) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(e) => {
                    self.lost.store(true, Ordering::Relaxed);
                    return Err(e.into());
                }
            }
        }
    }

    fn avoids_cache(&self) -> bool {
        self.direct.is_some()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.data_fd())
    }
}
